"""The policy: the transformer in the sizes of the task, and how right it is."""

import numpy as np
import torch

from sorting import (
    END,
    GENERATED_TOKENS,
    HELD_OUT,
    MAX_COMPLETION,
    MAX_SEQUENCE,
    VOCABULARY,
    answer,
    encode,
)
from transformer import Shape, Transformer, complete


def new_policy() -> Transformer:
    """A policy that has learnt nothing yet; torch's seed decides where it begins. It has 102 347 parameters."""
    return Transformer(Shape(len(VOCABULARY), GENERATED_TOKENS, MAX_SEQUENCE))


def held_out_accuracy(policy: Transformer) -> float:
    """The share of the held-out prompts whose most likely completion is right to the last token."""
    right = 0
    for prompts in _by_length(HELD_OUT):
        completions = complete(policy, torch.from_numpy(prompts), END, MAX_COMPLETION)
        rows = zip(prompts, completions.tokens.numpy(), completions.lengths, strict=True)
        right += sum(np.array_equal(tokens[:length], answer(prompt)) for prompt, tokens, length in rows)
    return right / len(HELD_OUT)


def _by_length(texts: frozenset[str]) -> list[np.ndarray]:
    """Prompts of one length at a time, (B, P) int64: they need no padding."""
    lengths = sorted({len(text) for text in texts})
    return [np.stack([encode(text) for text in sorted(texts) if len(text) == length]) for length in lengths]
