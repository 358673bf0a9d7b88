"""How payloads and weights travel, as the replicas see it; `inline` and `by_reference` do it.

Every wait ends when the replica's stop flag is set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np

from dray.errors import DrayError
from dray.identifiers import PayloadId
from dray.jobs.queue import Delivery, RolloutEntry

Arrays = Mapping[str, np.ndarray]


class TrajectoryPublisher(Protocol):
    """The rollout replica's end of the way of trajectories."""

    def put(self, arrays: Arrays, *, work_item: int, weight_version: int) -> bool:
        """Hand on one trajectory, waiting while there is no room; False if stopped before it was handed on.

        Raises:
            PayloadError: `arrays` cannot be carried; where there are too many bytes, the message names the key.
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
        """The version that was published last, by whichever life of the policy; None if there is none."""
        ...


class WeightsSubscriber(Protocol):
    """The rollout replica's end of the way of weights."""

    def newer(self, timeout: float) -> tuple[int, Arrays] | None:
        """Version and arrays of the newest weights if they are others than the last time; else None."""
        ...


RolloutEnds = AbstractContextManager[tuple[TrajectoryPublisher, WeightsSubscriber]]
PolicyEnds = AbstractContextManager[tuple[TrajectoryReader, WeightsPublisher]]
