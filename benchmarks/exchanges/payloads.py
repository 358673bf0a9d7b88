"""What the payloads of the benchmarks hold."""

from __future__ import annotations

from typing import Any

import numpy as np

from dray.payload.codec import plan

FIELD = "payload"

MANY = 32
"""Fields of a payload of many."""

_MANY_HEADER_BYTES = 4096

_STEP_BYTES = 4 * 4 + 4 + 4 + 1 + 1  # of one time step: observation, action, reward, two flags


def one_array(nbytes: int) -> dict[str, np.ndarray[Any, Any]]:
    """One array whose packed image has exactly `nbytes` bytes (a multiple of 64, 1 KiB or more)."""
    source = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)
    overhead = plan({FIELD: source}).nbytes - nbytes
    arrays = {FIELD: source[: nbytes - overhead]}
    packed = plan(arrays).nbytes
    if packed != nbytes:
        raise ValueError(f"a payload of {nbytes} bytes cannot be made; it has {packed}")
    return arrays


def six_fields(nbytes: int) -> dict[str, np.ndarray[Any, Any]]:
    """Six fields of a trajectory whose packed image has at most `nbytes` bytes, and about as many."""
    header = plan(_trajectory(1)).nbytes - 2 * _STEP_BYTES
    steps = max(1, (nbytes - header) // _STEP_BYTES)
    while steps > 1 and plan(_trajectory(steps)).nbytes > nbytes:
        steps -= 1
    return _trajectory(steps)


def field_name(number: int) -> str:
    """The name of a field of `many_fields`."""
    return f"field{number:02}"


def many_fields(nbytes: int) -> dict[str, np.ndarray[Any, Any]]:
    """Equal fields whose packed image has `nbytes` bytes or a few less."""
    image = one_array(nbytes // MANY)[FIELD]
    each = (nbytes - _MANY_HEADER_BYTES) // MANY
    return {field_name(number): image[:each] for number in range(MANY)}


def _trajectory(steps: int) -> dict[str, np.ndarray[Any, Any]]:
    generator = np.random.default_rng(0)
    return {
        "observations": generator.random((steps, 4), np.float32),
        "actions": generator.integers(0, 2, steps, np.int32),
        "rewards": generator.random(steps, np.float32),
        "terminated": np.zeros(steps, np.bool_),
        "truncated": np.zeros(steps, np.bool_),
        "episode_length": np.asarray(steps, np.int64),
    }
