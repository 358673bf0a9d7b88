"""Acting: a group of completions for each prompt."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from policy import new_policy
from sorting import END, MAX_COMPLETION, reward, training_prompt
from transformer import complete

if TYPE_CHECKING:
    from dray.jobs import ReplicaContext, WorkItem


class SortingRollout:
    """Samples completions from a copy of the policy and rewards each of them."""

    def setup(self, context: "ReplicaContext") -> None:
        self.group_size = int(context.args["group_size"])
        torch.set_num_threads(1)  # the model is tiny, and the other replicas need the other cores
        self.policy = new_policy()

    def load_weights(self, weights: Mapping[str, np.ndarray], version: int) -> None:
        """Take over a copy of `weights`, the arrays of `GRPOTrainer.weights()`."""
        del version
        self.policy.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})

    def rollout(self, work_item: "WorkItem") -> dict[str, np.ndarray]:
        """Complete the training prompt of `work_item.seed` as often as the group is large.

        Returns, for a prompt of P tokens and a group of G completions, N tokens together:
            prompt     (P,) int64
            lengths    (G,) int64     tokens of each completion; their sum is N
            tokens     (N,) int64     the completions, one after the other
            log_probs  (N,) float32   log-probability of each of `tokens` when it was sampled
            rewards    (G,) float32
        """
        tokens = training_prompt(work_item.seed)
        completions = complete(
            self.policy,
            torch.from_numpy(tokens).repeat(self.group_size, 1),
            end=END,
            limit=MAX_COMPLETION,
            generator=torch.Generator().manual_seed(work_item.seed),
        )
        lengths = completions.lengths.numpy()
        there = np.arange(completions.tokens.shape[1]) < lengths[:, np.newaxis]
        rows = zip(completions.tokens.numpy(), there, strict=True)
        return {
            "prompt": tokens,
            "lengths": lengths,
            "tokens": completions.tokens.numpy()[there],
            "log_probs": completions.log_probs.numpy()[there],
            "rewards": np.array([reward(tokens, row[kept]) for row, kept in rows], np.float32),
        }
