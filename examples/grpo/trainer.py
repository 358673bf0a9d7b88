"""Learning: GRPO, with the rewards of completions as its only signal."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from batch import Batch, batch_of
from loss import grpo_loss
from policy import held_out_accuracy, new_policy

if TYPE_CHECKING:
    from dray.jobs import ReplicaContext, Trajectory


@dataclass(frozen=True)
class GRPOSettings:
    """The table `[policy.args]` of the job file."""

    learning_rate: float = 2e-3
    clip: float = 0.2
    entropy_bonus: float = 0.1  # with a tenth of it, some seeds converge early to completions that are half right
    max_gradient_norm: float = 1.0
    evaluate_every: int = 10  # steps


class GRPOTrainer:
    """Makes what was better than its group more likely, and measures the policy on prompts that are held out."""

    def setup(self, context: "ReplicaContext") -> None:
        self.settings = GRPOSettings(**context.args)
        torch.set_num_threads(1)  # the model is tiny, and the rollout replicas need the other cores
        torch.manual_seed(context.seed)
        self.policy = new_policy()
        self.optimiser = torch.optim.Adam(self.policy.parameters(), lr=self.settings.learning_rate)
        self.steps = 0

    def weights(self) -> dict[str, np.ndarray]:
        """Copies of the policy's parameters."""
        return {name: tensor.numpy().copy() for name, tensor in self.policy.state_dict().items()}

    def train_step(self, trajectories: "Sequence[Trajectory]") -> dict[str, float]:
        """Do one update on groups of completions and return its metrics.

        Every few steps there is an `accuracy` among them, and at the first step an `accuracy_before` it.
        """
        groups = [trajectory.arrays for trajectory in trajectories]
        rewards = np.concatenate([group["rewards"] for group in groups])
        lengths = np.concatenate([group["lengths"] for group in groups])
        metrics = {
            "mean_return": float(rewards.mean()),
            "right": float((rewards == 1).mean()),
            "completions": float(len(rewards)),
            "mean_length": float(lengths.mean()),
        }
        if self.steps == 0:
            metrics["accuracy_before"] = held_out_accuracy(self.policy)
        metrics |= self._update(batch_of(groups))
        self.steps += 1
        if self.steps % self.settings.evaluate_every == 0:
            metrics["accuracy"] = held_out_accuracy(self.policy)
        return metrics

    def save(self, folder: Path) -> None:
        """Write everything that the next step depends on into `folder`, which exists: all of it or nothing."""
        state = {
            "policy": self.policy.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "steps": self.steps,
        }
        partial = folder / "trainer.pt.partial"
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(folder / "trainer.pt")

    def load(self, folder: Path) -> None:
        """Resume from what `save` wrote. Only tensors and plain values are read: nothing is executed."""
        state = torch.load(folder / "trainer.pt", weights_only=True)
        self.policy.load_state_dict(state["policy"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.steps = state["steps"]

    def _update(self, batch: Batch) -> dict[str, float]:
        logits = self.policy(batch.sequences[:, :-1])
        loss = grpo_loss(logits, batch, self.settings.clip, self.settings.entropy_bonus)
        self.optimiser.zero_grad()
        loss.total.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.policy.parameters(), self.settings.max_gradient_norm)
        self.optimiser.step()
        return {
            "loss": loss.total.item(),
            "policy_loss": loss.policy.item(),
            "entropy": loss.entropy.item(),
            "divergence": loss.divergence.item(),
            "clipped": loss.clipped.item(),
            "gradient_norm": norm.item(),
        }
