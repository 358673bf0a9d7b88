"""The field names of reinforcement learning, and the length of a trajectory.

A trajectory is a mapping of arrays. Its *per-step* fields have one row for each step of the environment; the other
fields belong to the whole trajectory. ``episode_length`` is the number of steps; later rows are padding.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy.typing as npt

from dray.errors import SchemaError
from dray.payload.schema import as_array

REWARDS = "rewards"
EPISODE_LENGTH = "episode_length"

STEP_FIELDS = ("observations", "actions", REWARDS, "terminated", "truncated")
"""Names of fields that have one row for each step."""


def resolve_episode_length(arrays: Mapping[str, npt.ArrayLike], per_step: Collection[str] = ()) -> int:
    """Return the number of steps of a trajectory: its ``episode_length``, else the length of its per-step fields.

    Args:
        arrays: the trajectory. ``episode_length`` is one integer of any integer dtype. It is smaller than the
            length of the per-step fields if these are padded.
        per_step: names of further per-step fields, beside `STEP_FIELDS`.

    Raises:
        SchemaError: the per-step fields differ in length, ``episode_length`` does not fit them, or the trajectory
            has neither.
    """
    rows = _rows(arrays, per_step)
    if EPISODE_LENGTH not in arrays:
        if rows is None:
            raise SchemaError(f"there is neither {EPISODE_LENGTH!r} nor a per-step field, such as {REWARDS!r}")
        return rows
    stored = as_array(EPISODE_LENGTH, arrays[EPISODE_LENGTH])
    if stored.dtype.kind not in "iu" or stored.size != 1:
        raise SchemaError(
            f"field {EPISODE_LENGTH!r} has dtype {stored.dtype} and shape {stored.shape}, expected one integer"
        )
    length = int(stored.reshape(())[()])
    if length < 0 or (rows is not None and length > rows):
        raise SchemaError(f"field {EPISODE_LENGTH!r} is {length}, but the per-step fields have {rows} rows")
    return length


def trim(values: Mapping[str, Any], per_step: Collection[str] = ()) -> dict[str, Any]:
    """Return a trajectory whose per-step fields end with ``episode_length``: views, without the padding.

    Without ``episode_length``, all fields are returned as they are.

    Args:
        values: the trajectory.
        per_step: names of further per-step fields, beside `STEP_FIELDS`.

    Raises:
        SchemaError: ``episode_length`` does not fit the per-step fields.
    """
    if EPISODE_LENGTH not in values:
        return dict(values)
    length = resolve_episode_length(values, per_step)
    steps = {name for name in values if name in STEP_FIELDS or name in per_step}
    return {name: value[:length] if name in steps else value for name, value in values.items()}


def _rows(arrays: Mapping[str, npt.ArrayLike], per_step: Collection[str]) -> int | None:
    """The common number of rows of the per-step fields; ``None`` without such fields."""
    first: tuple[str, int] | None = None
    for name in arrays:
        if name not in STEP_FIELDS and name not in per_step:
            continue
        shape = as_array(name, arrays[name]).shape
        if not shape:
            raise SchemaError(f"field {name!r} has one row per step, but is a scalar")
        if first is None:
            first = name, shape[0]
        elif shape[0] != first[1]:
            raise SchemaError(f"field {name!r} has {shape[0]} rows, but {first[0]!r} has {first[1]}")
    return None if first is None else first[1]
