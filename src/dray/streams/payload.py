"""What a program gets of a stream: the `Payload` of a consumer, and its base, `NamedValues`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dray.identifiers import PayloadId
from dray.payload import Ragged, Values, torch_interop
from dray.payload.ragged import map_arrays
from dray.payload.schema import Array
from dray.protocol.streams import Given

if TYPE_CHECKING:
    from dray.ring.attachment import DirectLease
    from dray.streams.source import Source


class NamedValues(Mapping[str, Any]):
    """The values of a payload by name, in the order in which they were put: arrays, and nested values.

    On the producer's host the arrays are read-only views of its memory. That memory is not used again before the
    last of them is gone, so arrays that are kept stay valid, and keep a slot from being used. `copy` makes arrays
    that do not. From another host the arrays are in memory of this process. Text and numbers are always copies.

    Attributes:
        in_place: the arrays are views of the producer's memory.
    """

    __slots__ = ("_values", "in_place")

    def __init__(self, values: Values, in_place: bool) -> None:
        self._values = values
        self.in_place = in_place

    def copy(self) -> Values:
        """The values with arrays in memory of their own, writable."""
        return _mapped(self._values, np.array)

    def torch(self, *, copy: bool = True) -> dict[str, Any]:
        """The values with tensors on the host in the place of arrays, and jagged ones in that of `Ragged`.

        Args:
            copy: the tensors have memory of their own. Otherwise they share that of the arrays: torch does not
                know that it is read-only, and a tensor that is written to ends the process.

        Raises:
            MissingDependencyError: torch is not installed.
        """
        if copy:
            return torch_interop.to_torch(self._values if self.in_place else self.copy())
        return torch_interop.to_torch(_mapped(self._values, torch_interop.writable_alias))

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        fields = ", ".join(f"{name} {_shown(value)}" for name, value in self._values.items())
        return f"<{type(self).__name__} {self._title()}: {fields}>"

    def _title(self) -> str:
        return ""


def _mapped(values: Values, function: Callable[[Array], Array]) -> Values:
    mapped: Values = map_arrays(
        values, function, lambda rows: Ragged(function(rows.values), function(rows.offsets))
    )
    return mapped


def _shown(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    return repr(value) if isinstance(value, Ragged) else type(value).__name__


class Payload(NamedValues):
    """A payload of a stream. Its memory is used again when it is acknowledged and the last of its arrays is gone.

    Attributes:
        id: names the payload; it can be pickled, and acknowledged by another process of this user.
        deliveries: how often the payload was handed out to this group, this time included.
        ended: it was acknowledged or released.
    """

    __slots__ = ("_given", "_lease", "_source", "deliveries", "ended", "id")

    def __init__(self, source: Source, given: Given, values: Values, lease: DirectLease | None) -> None:
        super().__init__(values, lease is not None)
        self._source = source
        self._given = given
        self._lease = lease
        self.id = PayloadId(source.producer, given.sequence, given.slot, given.nbytes)
        self.deliveries = given.deliveries
        self.ended = False

    @property
    def redelivered(self) -> bool:
        """A consumer of this group may have had the payload before."""
        return self.deliveries > 1

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
            self._source.release(self._source, self._given)
            self.ended = True

    def _title(self) -> str:
        return str(self.id)


class Weights(NamedValues):
    """One version of the arrays of a publisher.

    Arrays that come from a publisher on another host with ``delta="sparse"`` are read-only: the next delta is
    applied to a copy of them.

    Attributes:
        version: its number.
        publisher: the publisher's id: after a restart, numbers may begin again.
        delta: only what has changed since the version before has travelled.
        received_bytes: how many bytes have travelled; 0 if the arrays are in place.
    """

    __slots__ = ("delta", "publisher", "received_bytes", "version")

    def __init__(
        self, values: Values, *, version: int, publisher: bytes, in_place: bool, delta: bool, received_bytes: int
    ) -> None:
        super().__init__(values, in_place)
        self.version = version
        self.publisher = publisher
        self.delta = delta
        self.received_bytes = received_bytes

    def _title(self) -> str:
        return f"version {self.version}"
