"""A worker that waits for its model as one waits for an inference engine, and a trainer that learns to add.

The policy guesses a + b: a normal distribution around w[0] * a + w[1] * b. A guess is better the closer it is.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dray.jobs import ReplicaContext, Rollout, Trajectory, WorkItem

GUESSES = 4
NOISE = 0.5


class Engine:
    """Stands for an inference engine: it answers after a while, and many requests may wait at once."""

    def __init__(self) -> None:
        self.weights = np.zeros(2)
        self.in_flight = 0

    async def guess(self, question: np.ndarray, rng: np.random.Generator) -> tuple[float, int]:
        """A guess, and how many requests were in flight."""
        self.in_flight += 1
        try:
            await asyncio.sleep(0.02)
            return float(question @ self.weights + NOISE * rng.standard_normal()), self.in_flight
        finally:
            self.in_flight -= 1


class SumWorker:
    """See `dray.jobs.RolloutWorker`. `rollout` is async: several run at once in the replica's event loop."""

    def setup(self, context: ReplicaContext) -> None:
        self.engine = Engine()

    def load_weights(self, weights: Mapping[str, np.ndarray], version: int) -> None:
        # Rollouts may be in flight: what they have begun with the old weights continues with the new ones.
        self.engine.weights = np.array(weights["w"])

    async def rollout(self, work_item: WorkItem) -> list[Rollout]:
        rng = np.random.default_rng(work_item.seed)
        row = work_item.row
        question = np.array([row["a"], row["b"]], dtype=np.float64)
        payloads = []
        for _ in range(GUESSES):
            guess, in_flight = await self.engine.guess(question, rng)
            arrays = {
                "question": question,
                "guess": np.array(guess),
                "rewards": np.array([-abs(guess - row["answer"])], dtype=np.float32),
            }
            payloads.append(Rollout(arrays, metadata={"in_flight": in_flight, "sum": f"{row['a']} + {row['b']}"}))
        return payloads


class SumTrainer:
    """See `dray.jobs.PolicyTrainer`: a policy gradient whose baseline is the mean reward of a work item."""

    def setup(self, context: ReplicaContext) -> None:
        self.w = np.zeros(2)
        self.sums: set[str] = set()
        self.max_in_flight = 0

    def train_step(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        rewards: dict[int, list[float]] = {}
        for each in trajectories:
            rewards.setdefault(each.work_item, []).append(float(each.arrays["rewards"][0]))
            self.sums.add(each.metadata["sum"])
            self.max_in_flight = max(self.max_in_flight, each.metadata["in_flight"])
        gradient = np.zeros(2)
        for each in trajectories:
            question, guess = each.arrays["question"], float(each.arrays["guess"])
            advantage = float(each.arrays["rewards"][0]) - np.mean(rewards[each.work_item])
            gradient += advantage * (guess - question @ self.w) / NOISE**2 * question
        self.w += 0.01 * gradient / len(trajectories)
        error = -float(np.mean([reward for found in rewards.values() for reward in found]))
        return {"error": error, "sums": len(self.sums), "in_flight": self.max_in_flight}

    def weights(self) -> dict[str, np.ndarray]:
        return {"w": self.w}

    def save(self, folder: Path) -> None:
        state: dict[str, Any] = {
            "w": self.w.tolist(),
            "sums": sorted(self.sums),
            "max_in_flight": self.max_in_flight,
        }
        (folder / "trainer.json").write_text(json.dumps(state))

    def load(self, folder: Path) -> None:
        state = json.loads((folder / "trainer.json").read_text())
        self.w, self.sums = np.array(state["w"]), set(state["sums"])
        self.max_in_flight = state["max_in_flight"]
