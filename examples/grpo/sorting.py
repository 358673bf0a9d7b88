"""The task: put the digits of a prompt in ascending order. Tokens, problems and the reward, with NumPy alone.

A problem is a few different digits in any order. The right completion has them in ascending order and then stops:

    prompt       7 2 9 4 =
    completion   2 4 7 9 .

Whether a completion is right can be checked by a program: no person judges it, and no answer is ever shown to the
policy, which learns from the reward alone.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int64]

VOCABULARY = "0123456789.="
END = VOCABULARY.index(".")  # ends every completion
GENERATED_TOKENS = END + 1  # the digits and END; the "=" that ends a prompt is only ever read

DIGITS = range(2, 6)  # how many digits a problem can have
MAX_COMPLETION = DIGITS[-1] + 1
MAX_SEQUENCE = DIGITS[-1] + 1 + MAX_COMPLETION


def encode(text: str) -> Tokens:
    """The tokens of `text`, one per character: shape (T,), int64."""
    return np.array([VOCABULARY.index(character) for character in text], np.int64)


def decode(tokens: Sequence[int] | Tokens) -> str:
    """The text of `tokens`."""
    return "".join(VOCABULARY[token] for token in tokens)


def answer(prompt: Tokens) -> Tokens:
    """The one right completion of `prompt`, such as "2479." for "7294="."""
    return np.append(np.sort(prompt[:-1]), END)


def reward(prompt: Tokens, completion: Tokens) -> float:
    """From 0 to 1: one half for being right as a whole, the other by the share of positions that are right.

    A token too many or too few is a position that is wrong. Without the second half, a policy that knows nothing
    would hardly ever be rewarded, and so never learn.
    """
    expected = answer(prompt)
    both = min(len(expected), len(completion))
    matches = int((expected[:both] == completion[:both]).sum())
    share = matches / max(len(expected), len(completion))
    return share / 2 + (0.5 if share == 1 else 0.0)


def training_prompt(seed: int) -> Tokens:
    """The prompt that follows from `seed`: shape (P,), int64, 3 <= P <= 6; never one that is held out."""
    random = np.random.default_rng(seed)
    while True:
        prompt = _draw(random)
        if decode(prompt) not in HELD_OUT:
            return prompt


def _draw(random: np.random.Generator) -> Tokens:
    digits = random.permutation(10)[: random.choice(DIGITS)]
    return np.append(digits, VOCABULARY.index("="))


def _held_out(count: int) -> frozenset[str]:
    random, prompts = np.random.default_rng(0), set[str]()
    while len(prompts) < count:
        prompts.add(decode(_draw(random)))
    return frozenset(prompts)


HELD_OUT = _held_out(200)
"""The prompts that measure the policy, as text: the same in every process and every run, and never trained on."""
