"""`Payload`: what a consumer gets of a stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dray.identifiers import PayloadId
from dray.payload import Arrays, torch_interop
from dray.payload.schema import Array
from dray.protocol.streams import Given

if TYPE_CHECKING:
    from dray.ring.attachment import DirectLease
    from dray.streams.source import Source


class Payload(Mapping[str, Array]):
    """The arrays of one payload by name, in the order in which they were put.

    On the producer's host the arrays are read-only views of its memory. That memory is used again when the payload
    is acknowledged and the last of its arrays is gone, so arrays that are kept stay valid, and keep a slot from
    being used. `copy` makes arrays that do not. From another host the arrays are in memory of this process.

    Attributes:
        id: names the payload; it can be pickled, and acknowledged by another process of this user.
        deliveries: how often the payload was handed out to this group, this time included.
        in_place: the arrays are views of the producer's memory.
    """

    __slots__ = ("_arrays", "_given", "_lease", "_source", "deliveries", "ended", "id", "in_place")

    def __init__(self, source: Source, given: Given, arrays: Arrays, lease: DirectLease | None) -> None:
        self._arrays = arrays
        self._source = source
        self._given = given
        self._lease = lease
        self.id = PayloadId(source.producer, given.sequence, given.slot, given.nbytes)
        self.deliveries = given.deliveries
        self.in_place = lease is not None
        self.ended = False

    @property
    def redelivered(self) -> bool:
        """A consumer of this group may have had the payload before."""
        return self.deliveries > 1

    def copy(self) -> Arrays:
        """The arrays in memory of their own, writable."""
        return {name: np.array(array) for name, array in self._arrays.items()}

    def torch(self, *, copy: bool = True) -> dict[str, Any]:
        """The arrays as tensors on the host.

        Args:
            copy: the tensors have memory of their own. Otherwise they share that of the arrays: torch does not
                know
                that it is read-only, and a tensor that is written to ends the process.

        Raises:
            MissingDependencyError: torch is not installed.
        """
        if copy:
            return torch_interop.to_torch(self.copy() if not self.in_place else self._arrays)
        return torch_interop.to_torch({name: torch_interop.writable_alias(a) for name, a in self._arrays.items()})

    def acknowledge(self) -> None:
        """The group has consumed the payload. Its arrays stay valid. Twice is fine."""
        self.end()

    def end(self, ring: bool = True) -> None:
        """As `acknowledge`; without `ring`, see `Source.acknowledge`."""
        if not self.ended:
            self._source.acknowledge(self._given, self._lease, ring)
            self.ended = True

    def release(self) -> None:
        """Give the payload back: a consumer of the group gets it again. Twice is fine."""
        if not self.ended:
            self._source.give_back(self._given, begun=True)
            self.ended = True

    def __getitem__(self, name: str) -> Array:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __repr__(self) -> str:
        fields = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in self._arrays.items())
        return f"<Payload {self.id}: {fields}>"
