"""Learns from episodes by policy gradient (REINFORCE), with NumPy alone.

Put your own model here. The policy replica creates one `Trainer` and calls `setup` once, `load` if the run is
resumed, and for each batch of `policy.batch_size` payloads `train_step`, then `weights`, which the workers get.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dray.jobs import ReplicaContext, Trajectory


class Trainer:
    """A linear policy: the probability of a push to the right depends on the sum of weighted states."""

    def setup(self, context: ReplicaContext) -> None:
        # context.args is the table [policy.args] of job.toml.
        self.learning_rate = float(context.args["learning_rate"])
        self.discount = float(context.args["discount"])
        self.policy = np.zeros(4)
        self.recent = np.zeros(0)  # mean returns of the last ten steps

    def train_step(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        episodes = [trajectory.arrays for trajectory in trajectories]
        states = np.concatenate([episode["states"] for episode in episodes])
        actions = np.concatenate([episode["actions"] for episode in episodes])
        returns = np.concatenate([self.to_go(episode["rewards"]) for episode in episodes])
        advantages = (returns - returns.mean()) / (returns.std() + 1e-8)
        probabilities = 1 / (1 + np.exp(-(states @ self.policy)))  # of a push to the right
        gradient = (advantages * (actions - probabilities)) @ states / len(states)
        self.policy += self.learning_rate * gradient
        mean_return = float(np.mean([episode["rewards"].sum() for episode in episodes]))
        self.recent = np.append(self.recent, mean_return)[-10:]
        # [stop] in job.toml ends the job when average_return is high enough.
        metrics = {"policy_norm": float(np.linalg.norm(self.policy))}
        return metrics | ({"average_return": float(self.recent.mean())} if len(self.recent) == 10 else {})

    def weights(self) -> dict[str, np.ndarray]:
        return {"policy": self.policy}

    def save(self, folder: Path) -> None:
        # dray keeps only complete checkpoints; `dray run --resume` continues from the newest.
        np.savez(folder / "trainer.npz", policy=self.policy, recent=self.recent)

    def load(self, folder: Path) -> None:
        with np.load(folder / "trainer.npz") as saved:
            self.policy, self.recent = saved["policy"], saved["recent"]

    def to_go(self, rewards: np.ndarray) -> np.ndarray:
        """For each step, the discounted sum of its reward and those that follow."""
        total, returns = 0.0, np.empty(len(rewards))
        for step in reversed(range(len(rewards))):
            returns[step] = total = float(rewards[step]) + self.discount * total
        return returns
