"""A small decoder-only transformer, and how to sample completions from it. It knows nothing of the task."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional


@dataclass(frozen=True)
class Shape:
    """The sizes of a `Transformer`."""

    known_tokens: int  # what it can read
    generated_tokens: int  # the first of these are what it can write
    longest_sequence: int  # of prompt and completion together
    width: int = 64
    heads: int = 4
    layers: int = 2


class Transformer(nn.Module):
    """Attention over everything before, as in GPT-2: layer norm first, learnt positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.known_tokens, shape.width)
        self.positions = nn.Embedding(shape.longest_sequence, shape.width)
        self.blocks = nn.Sequential(*(Block(shape.width, shape.heads) for _ in range(shape.layers)))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.generated_tokens)
        nn.init.normal_(self.positions.weight, std=0.3)
        # The first policy is nearly uniform: it tries everything.
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The logits of the token after each of `tokens`: (B, T) int64 in, (B, T, generated_tokens) out.

        A position sees only those before it, so padding behind a sequence does not change its logits.
        """
        hidden = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        logits: torch.Tensor = self.head(self.norm(self.blocks(hidden)))
        return logits


class Block(nn.Module):
    """Attention, then two dense layers, each added to what it was given."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.attended = nn.Linear(width, width)
        self.dense_norm = nn.LayerNorm(width)
        self.dense = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, T, width) in and out."""
        hidden = hidden + self._attention(self.attention_norm(hidden))
        output: torch.Tensor = hidden + self.dense(self.dense_norm(hidden))
        return output

    def _attention(self, hidden: torch.Tensor) -> torch.Tensor:
        split = self.queries_keys_values(hidden).unflatten(
            2, (3, self.heads, -1)
        )  # (B, T, 3, heads, width / heads)
        queries, keys, values = split.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        output: torch.Tensor = self.attended(mixed.transpose(1, 2).flatten(2))
        return output


class Completions(NamedTuple):
    """B completions of at most T tokens; what lies beyond a completion's length means nothing."""

    tokens: torch.Tensor  # (B, T) int64
    log_probs: torch.Tensor  # (B, T) float32, of each token when it was chosen
    lengths: torch.Tensor  # (B,) int64, from 1 to T, the end token included


@torch.inference_mode()
def complete(
    model: Transformer, prompts: torch.Tensor, end: int, limit: int, generator: torch.Generator | None = None
) -> Completions:
    """Continue each of `prompts`, (B, P) int64, up to the token `end` or for `limit` tokens.

    Each token is sampled with `generator`, or the most likely one without. The whole sequence goes through the
    model again for each new token; with longer ones, the keys and values of earlier tokens would be kept.
    """
    sequence = prompts
    log_probs: list[torch.Tensor] = []
    lengths = torch.zeros(len(prompts), dtype=torch.int64)
    running = torch.ones(len(prompts), dtype=torch.bool)
    while running.any() and len(log_probs) < limit:
        choices = functional.log_softmax(model(sequence)[:, -1], dim=1)
        if generator is None:
            chosen = choices.argmax(dim=1, keepdim=True)
        else:
            chosen = choices.exp().multinomial(1, generator=generator)
        sequence = torch.cat([sequence, chosen], dim=1)
        log_probs.append(choices.gather(1, chosen))
        lengths += running
        running &= chosen[:, 0] != end
    return Completions(sequence[:, prompts.shape[1] :], torch.cat(log_probs, dim=1), lengths)
