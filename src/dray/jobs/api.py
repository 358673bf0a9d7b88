"""What the user of the runtime supplies, `RolloutWorker` and `PolicyTrainer`, and what those are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

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
    """What a replica is told at `setup`.

    `args` is the job file's table `[rollout.args]` or `[policy.args]`; `seed` differs between replicas, but for
    those of one policy group; `name` is unique in the job, e.g. ``"rollout-0"``; `output` is the job's output
    folder; `group` says with whom a policy replica learns; `address` is that of this machine, at which the job's
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
    """A unit of work: `index` counts up over the job, `seed` (31 bits) follows from it and the job's seed."""

    index: int
    seed: int


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A payload as the trainer gets it: the worker's arrays, and the version of the weights that acted.

    The arrays are valid during `train_step`. Those of 64 KiB or more may lie in the memory of the process that
    made them, and are read-only then: copy what is kept or changed. ``policy.in_place = false`` copies all.
    """

    arrays: Mapping[str, np.ndarray]
    weight_version: int


class RolloutWorker(Protocol):
    """Generates trajectories. Named in the job file as ``rollout.worker``; made without arguments."""

    def setup(self, context: ReplicaContext) -> None:
        """Called once, before anything else."""
        ...

    def load_weights(self, weights: Mapping[str, np.ndarray], version: int) -> None:
        """Take over new weights; called before the first rollout, and never during one. Copy what is kept."""
        ...

    def rollout(self, work_item: WorkItem) -> Mapping[str, np.ndarray]:
        """Work on one work item; the arrays returned become one payload."""
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

        Copy what is kept.
        """
        ...

    def weights(self) -> Mapping[str, np.ndarray]:
        """What the rollout workers need to act."""
        ...

    def save(self, folder: Path) -> None:
        """Write everything that the next step depends on into `folder`, which exists and is empty."""
        ...

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote; called after `setup`."""
        ...
