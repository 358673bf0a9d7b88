"""What the user of the runtime supplies, `RolloutWorker` and `PolicyTrainer`, and what those are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class ReplicaContext:
    """What a replica is told at `setup`.

    `args` is the job file's table `[rollout.args]` or `[policy.args]`; `seed` differs between replicas; `name` is
    unique in the job, e.g. ``"rollout-0"``; `output` is the job's output folder.
    """

    args: Mapping[str, Any]
    seed: int
    index: int
    name: str
    output: Path


@dataclass(frozen=True, slots=True)
class Prompt:
    """A unit of work: `index` counts up over the job, `seed` (31 bits) follows from it and the job's seed."""

    index: int
    seed: int


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A payload as the trainer gets it: the worker's arrays, and the version of the weights that acted."""

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

    def rollout(self, prompt: Prompt) -> Mapping[str, np.ndarray]:
        """Work on one prompt; the arrays returned become one payload."""
        ...


class PolicyTrainer(Protocol):
    """Learns from trajectories. Named in the job file as ``policy.trainer``; made without arguments."""

    def setup(self, context: ReplicaContext) -> None:
        """Called once, before anything else."""
        ...

    def train_step(self, trajectories: Sequence[Trajectory]) -> Mapping[str, float]:
        """Do one step on ``policy.batch_size`` trajectories and return its metrics. Copy what is kept."""
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
