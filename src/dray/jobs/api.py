"""What the user of the runtime supplies, `RolloutWorker` and `PolicyTrainer`, and what those are given."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np


def _alone(text: str | None) -> str:
    if text is None:
        raise ValueError("the first rank of a group has to share something")
    return text


@dataclass(frozen=True, slots=True)
class PolicyGroup:
    """The place of a policy replica among those that learn together.

    Rank r trains on part r // `readers` of each batch; the `readers` ranks of one part get the same payloads in
    the same order. `share` is for use in `setup`, by all ranks: it returns the text of rank 0 to each of them, for
    instance the port of a rendezvous that rank 0 has opened; the other ranks give None.
    """

    rank: int = 0
    size: int = 1
    readers: int = 1
    share: Callable[[str | None], str] = _alone


@dataclass(frozen=True, slots=True)
class ReplicaContext:
    """What a replica gets at `setup`.

    `args` is the job file's table `[rollout.args]` or `[policy.args]`; `seed` differs between replicas, but for
    those of one policy group; `name` is unique in the job, e.g. ``"rollout-0"``; `output` is the job's output
    folder; `group` is its place among the policy replicas; `address` is that of this machine, at which the job's
    others reach it.
    """

    args: Mapping[str, Any]
    seed: int
    index: int
    name: str
    output: Path
    group: PolicyGroup = field(default=PolicyGroup())
    address: str = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class WorkItem:
    """A unit of work.

    `index` counts up over the job, `seed` (31 bits) follows from it and the job's seed. `row` is a row of the
    job's data set, ``[work] items`` of the job file: the same one for this index in every replica, in every
    attempt and after a resume. It is None without ``[work]``.
    """

    index: int
    seed: int
    row: Any = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Rollout:
    """One payload as a worker returns it: named arrays and nested values, with metadata beside them.

    `metadata` is a mapping that JSON can carry, of at most 16 KiB as JSON. It travels with the reference to the
    payload, not in it, and the trainer gets it as `Trajectory.metadata`. A worker without metadata returns the
    arrays alone.
    """

    arrays: Mapping[str, Any]
    metadata: Mapping[str, Any] = field(default_factory=dict)


RolloutResult = Mapping[str, Any] | Rollout
"""What stands for one payload in the value that `RolloutWorker.rollout` returns."""


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A payload as the trainer gets it.

    `arrays` are the worker's, `weight_version` is the version of the weights with which its rollout began,
    `work_item` is the index of its work item, and `metadata` is what the worker returned with it.

    The arrays are valid during `train_step`. Those of a payload of 64 KiB or more may lie in the memory of the
    process that made them, and are read-only then: copy what is kept or changed, as an array that is kept holds
    the slot of its payload. ``policy.in_place = false`` copies all.
    """

    arrays: Mapping[str, Any]
    weight_version: int
    work_item: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)


class RolloutWorker(Protocol):
    """Generates trajectories. Named in the job file as ``rollout.worker``; made without arguments.

    A worker whose `rollout` is an ``async def`` is asynchronous: ``rollout.concurrency`` work items are in flight
    in each replica at the same time, as tasks of one asyncio event loop in the main thread. Nothing else of dray
    runs in that loop, so a rollout that blocks it delays the other rollouts of the replica and nothing more.
    """

    def setup(self, context: ReplicaContext) -> None:
        """Called once, before anything else. For an asynchronous worker, the event loop does not run yet."""
        ...

    def load_weights(self, weights: Mapping[str, np.ndarray], version: int) -> Awaitable[None] | None:
        """Take over new weights; called before the first rollout. The arrays are valid during the call: copy them.

        It is never called during a rollout of a synchronous worker. An asynchronous worker gets new weights while
        rollouts are in flight, as an inference engine takes them: between two steps of the event loop if this is a
        plain method, and concurrently with the rollouts if it is an ``async def``. There is one call at a time.
        """
        ...

    def rollout(
        self, work_item: WorkItem
    ) -> RolloutResult | Sequence[RolloutResult] | Awaitable[RolloutResult | Sequence[RolloutResult]]:
        """Work on one work item and return its payload, or a list or tuple of its payloads, at least one.

        A payload is a mapping of names to arrays and nested values, such as text and ragged arrays, or a
        `Rollout`, which adds metadata. Every payload has the version of the weights that were loaded when the
        rollout began.

        An exception fails this attempt at the work item, not the replica. The work item is given out again, to
        another replica if one asks for work, up to ``rollout.max_attempts`` attempts in all; then it is given up
        and counted. After ``rollout.max_failures`` given-up work items in a row, the job fails with the last
        exception. A return value that cannot be carried ends the replica, as another attempt would return it
        again.

        A rollout that takes longer than ``rollout.timeout`` is a failed attempt, too. In an asynchronous worker
        its task is cancelled; a replica with a synchronous worker ends. When the replica is to end, a synchronous
        rollout is waited for, and asynchronous ones are cancelled.
        """
        ...


class PolicyTrainer(Protocol):
    """Learns from trajectories. Named in the job file as ``policy.trainer``; made without arguments.

    With several policy replicas each has one, and every method is called on all of them, in the same order; what
    they have to agree on is theirs to agree on. Metrics and weights are taken from rank 0.
    """

    def setup(self, context: ReplicaContext) -> None:
        """Called once, before anything else."""
        ...

    def train_step(self, trajectories: Sequence[Trajectory]) -> Mapping[str, float]:
        """Do one step on ``policy.batch_size`` trajectories, or this rank's part of them, and return its metrics.

        A trajectory is one payload: work items with several payloads have several trajectories, which may come in
        different steps. The arrays are valid during the call: copy what is kept.
        """
        ...

    def weights(self) -> Mapping[str, np.ndarray]:
        """What the rollout workers need to act."""
        ...

    def save(self, folder: Path) -> None:
        """Write everything that the next step depends on into `folder`, which exists and is empty."""
        ...

    def load(self, folder: Path) -> None:
        """Continue from what `save` wrote; called after `setup`."""
        ...
