"""Payloads whose contents name the producer and a number, with a checksum over all of it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import xxhash

MAX_BYTES: Final = 1 << 20
_SHIFTS: Final = 4096
_MAGIC: Final = 0x5354_4F52_4D01
_ABOUT_WORDS: Final = 5
_BYTES: Final = np.frombuffer(random.Random(0).randbytes(MAX_BYTES + _SHIFTS), np.uint8)


class WrongPayload(Exception):
    """The arrays are not those that a producer has put."""


def draw_size(rng: random.Random) -> int:
    """A size from 0 bytes to 1 MiB; small ones are frequent."""
    kind = rng.random()
    if kind < 0.1:
        return 0
    if kind < 0.13:
        return MAX_BYTES
    return int(2 ** rng.uniform(0, 14 if kind < 0.8 else 20))


def make(key: int, number: int, size: int) -> dict[str, Any]:
    """The arrays of a producer's payload."""
    first = (key * 1_009 + number * 31) % _SHIFTS
    body = _BYTES[first : first + size]
    about = np.array([_MAGIC, key, number, size, _checksum(key, number, body)], np.uint64)
    return {"about": about, "body": body}


def identity(arrays: Mapping[str, Any]) -> tuple[int, int]:
    """The producer's key and the number, without a check of the body.

    Raises:
        WrongPayload: the arrays name none.
    """
    about = arrays.get("about")
    if about is None or about.dtype != np.uint64 or about.shape != (_ABOUT_WORDS,) or int(about[0]) != _MAGIC:
        raise WrongPayload(f"the payload names no producer: {about!r}")
    return int(about[1]), int(about[2])


def check(arrays: Mapping[str, Any]) -> None:
    """Check every byte.

    Raises:
        WrongPayload: something else was put.
    """
    key, number = identity(arrays)
    size, checksum = (int(word) for word in arrays["about"][3:])
    body = arrays["body"]
    if body.dtype != np.uint8 or body.shape != (size,):
        raise WrongPayload(
            f"payload {number} of producer {key} has a body {body.dtype}{list(body.shape)}, not {size}"
        )
    if _checksum(key, number, body) != checksum:
        raise WrongPayload(f"the bytes of payload {number} of producer {key} are not those that were put")


def _checksum(key: int, number: int, body: np.ndarray[Any, Any]) -> int:
    return xxhash.xxh3_64_intdigest(body.data, seed=key << 40 | number)
