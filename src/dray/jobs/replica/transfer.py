"""How payloads and weights travel, as the replicas see it; `ring_transfer` and `redis_transfer` do it.

Every wait ends when the replica's stop flag is set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dray.errors import DrayError
from dray.identifiers import PayloadId
from dray.jobs.queue import Delivery, RolloutEntry

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class RolloutPayload:
    """One payload of a finished rollout.

    Attributes:
        work_item: index of its work item.
        weight_version: of the weights with which the rollout began.
        part: which of the `parts` payloads of the work item it is, from 0.
        metadata: a JSON object; empty for none.
    """

    arrays: Mapping[str, Any]
    work_item: int
    weight_version: int
    part: int = 0
    parts: int = 1
    metadata: str = ""

    def entry(
        self,
        replica: str,
        producer: str,
        sequence: int,
        *,
        reference: str | None = None,
        image: bytes | None = None,
    ) -> RolloutEntry:
        """Its entry of the rollout stream, with a reference, the packed `image`, or both."""
        return RolloutEntry(
            producer=producer,
            sequence=sequence,
            weight_version=self.weight_version,
            replica=replica,
            work_item=self.work_item,
            part=self.part,
            parts=self.parts,
            metadata=self.metadata,
            reference=reference,
            payload=image,
        )


class TrajectoryPublisher(Protocol):
    """The rollout replica's end of the way of trajectories."""

    def put(self, payload: RolloutPayload) -> bool:
        """Hand it on, waiting while there is no room; False if stopped before. One call at a time.

        Raises:
            PayloadError: its arrays cannot be carried; where there are too many bytes, the message names the key.
        """
        ...

    def refresh(self) -> None:
        """Publish again what Redis has lost, if it was restarted empty."""
        ...

    def drain(self, timeout: float) -> int:
        """Wait until everything handed on was consumed; returns how many payloads were not."""
        ...


class TrajectoryReader(Protocol):
    """The policy replica's end of the way of trajectories."""

    def read(self, deliveries: Sequence[Delivery]) -> Iterator[tuple[Delivery, Arrays | DrayError]]:
        """The arrays of each delivery, or why they cannot be had; nothing is consumed yet."""
        ...

    def consume(self, entries: Sequence[RolloutEntry]) -> None:
        """Have payloads freed at their producers, for all their readers; does not wait for it."""
        ...

    def unfreed(self) -> list[PayloadId]:
        """What `consume` was given and no producer has confirmed."""
        ...

    def statistics(self) -> Mapping[str, float]:
        """``bytes`` and ``retries`` so far, and ``unfreed``: payloads that are done with and whose producers have
        not answered yet."""
        ...

    @property
    def transfer(self) -> str:
        """How payloads have come so far: ``"reference"``, read from their producers, or ``"inline"``, in the
        entries of the stream; both joined by ``+``; empty before the first."""
        ...

    @property
    def lane(self) -> str:
        """The lane that payloads were read over, e.g. ``"shm"``; several joined by ``+``; empty if over none."""
        ...


class WeightsPublisher(Protocol):
    """The policy replica's end of the way of weights."""

    def publish(self, weights: Arrays, version: int, epoch: int | None) -> None:
        """Make `weights`, of a policy group in its `epoch`, the newest.

        Raises:
            PayloadError: `weights` cannot be carried; where there are too many bytes, the message has the bound.
        """
        ...

    def restore(self) -> None:
        """Publish again what Redis has lost, if it was restarted empty."""
        ...

    def newest_version(self) -> int | None:
        """The version that was published last, in whichever epoch of the policy group; None if there is none."""
        ...


class WeightsSubscriber(Protocol):
    """The rollout replica's end of the way of weights."""

    def newer(self, timeout: float) -> tuple[int, Arrays] | None:
        """Version and arrays of the newest weights if they are others than the last time; else None."""
        ...


RolloutEnds = AbstractContextManager[tuple[TrajectoryPublisher, WeightsSubscriber]]
PolicyEnds = AbstractContextManager[tuple[TrajectoryReader, WeightsPublisher]]
