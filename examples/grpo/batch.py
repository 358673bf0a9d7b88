"""From the payloads of a training step to tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Batch:
    """R completions with their prompts, N generated tokens together: row by row, the last two identify them.

    Only the model needs rows of equal length: they are padded behind to the T tokens of the longest.
    """

    sequences: torch.Tensor  # (R, T) int64
    generated: torch.Tensor  # (R, T) bool, true N times: neither in the prompt nor in the padding
    log_probs: torch.Tensor  # (N,) float32, of the policy that generated
    advantages: torch.Tensor  # (N,) float32, the same for all tokens of a completion


def batch_of(groups: Sequence[Mapping[str, np.ndarray]]) -> Batch:
    """Put `groups` into one batch; each is a payload of `SortingRollout.rollout`."""
    prompts = [group["prompt"] for group in groups for _ in group["lengths"]]
    lengths = [int(length) for group in groups for length in group["lengths"]]
    rows, longest = (
        len(lengths),
        max(len(prompt) + length for prompt, length in zip(prompts, lengths, strict=True)),
    )
    sequences, generated = np.zeros((rows, longest), np.int64), np.zeros((rows, longest), np.bool_)
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        sequences[row, : len(prompt)] = prompt
        generated[row, len(prompt) : len(prompt) + length] = True
    sequences[generated] = np.concatenate([group["tokens"] for group in groups])
    advantages = np.concatenate([group_advantages(group["rewards"]) for group in groups])
    return Batch(
        sequences=torch.from_numpy(sequences),
        generated=torch.from_numpy(generated),
        log_probs=torch.from_numpy(np.concatenate([group["log_probs"] for group in groups])),
        advantages=torch.from_numpy(np.repeat(advantages, lengths)),
    )


def group_advantages(rewards: np.ndarray) -> np.ndarray:
    """How much better each completion is than its group: (G,) float32 in and out.

    The mean is 0, and the spread 1 unless all are alike. This is what GRPO has in place of a critic.
    """
    advantages: np.ndarray = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    return advantages
