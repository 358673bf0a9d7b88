"""The objective of GRPO (Shao et al. 2024, arXiv:2402.03300), averaged over tokens as in DAPO (arXiv:2503.14476).

There is no penalty for leaving a reference policy: the first policy knows nothing that would be worth keeping.
"""

from typing import NamedTuple

import torch

from batch import Batch


class Loss(NamedTuple):
    """The loss to minimise and, detached, what to watch: scalars, means over the generated tokens."""

    total: torch.Tensor
    policy: torch.Tensor
    entropy: torch.Tensor
    divergence: torch.Tensor  # estimates the KL divergence of the policy that generated from the policy now
    clipped: torch.Tensor  # the share of tokens with a ratio outside of the clip


def grpo_loss(logits: torch.Tensor, batch: Batch, clip: float, entropy_bonus: float) -> Loss:
    """The loss of `batch`, given the `logits` of the policy now after each token but the last: (R, T - 1, tokens).

    The completions may come from older policies. The ratio of new to old probability corrects for the difference,
    and clipping it bounds how far one batch can push the policy.
    """
    chosen = batch.sequences[batch.generated]
    choices = torch.log_softmax(logits[batch.generated[:, 1:]], dim=1)  # (N, tokens)
    log_ratio = choices.gather(1, chosen[:, None]).squeeze(1) - batch.log_probs
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - clip, 1 + clip)
    policy = -torch.minimum(ratio * batch.advantages, bounded * batch.advantages).mean()
    entropy = -(choices.exp() * choices).sum(dim=1).mean()
    return Loss(
        total=policy - entropy_bonus * entropy,
        policy=policy.detach(),
        entropy=entropy.detach(),
        divergence=(ratio - 1 - log_ratio).mean().detach(),
        clipped=(ratio != bounded).float().mean(),
    )
