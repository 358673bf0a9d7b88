"""Trajectories: the field names of reinforcement learning, their length, padding and trimming.

A trajectory is a mapping of arrays. Its *per-step* fields have one row for each step of the environment; every
other field belongs to the trajectory as a whole. ``episode_length`` counts the steps that really happened: rows
beyond it are padding.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dray.errors import SchemaError
from dray.payload.schema import Array, as_array

OBSERVATIONS = "observations"
ACTIONS = "actions"
REWARDS = "rewards"
TERMINATED = "terminated"
TRUNCATED = "truncated"
EPISODE_LENGTH = "episode_length"

STEP_FIELDS = (OBSERVATIONS, ACTIONS, REWARDS, TERMINATED, TRUNCATED)
"""The known fields with one row per step."""

FIELD_NAMES = (*STEP_FIELDS, EPISODE_LENGTH)
"""Every field name this module knows."""


class PaddedBatch(NamedTuple):
    """Trajectories of various lengths as one batch of B rows and T steps."""

    arrays: dict[str, Array]
    """Per-step fields (B, T, …), zero beyond the end; other fields (B, …); ``episode_length`` (B,), int64."""
    mask: npt.NDArray[np.bool_]
    """Shape (B, T): true where a step really happened."""


def resolve_episode_length(arrays: Mapping[str, npt.ArrayLike], per_step: Collection[str] = ()) -> int:
    """Return the number of steps of a trajectory: its ``episode_length``, else the length of its per-step fields.

    Args:
        arrays: the trajectory. ``episode_length``, if there, is one integer of any integer dtype and may be
            smaller than the per-step fields are long, when those are padded.
        per_step: names of further per-step fields, beside `STEP_FIELDS`.

    Raises:
        SchemaError: the per-step fields differ in length, ``episode_length`` does not fit them, or there is
            neither.
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


def with_episode_length(arrays: Mapping[str, npt.ArrayLike], per_step: Collection[str] = ()) -> dict[str, Array]:
    """Return the trajectory with ``episode_length`` in it: as it was, or else the resolved one, a scalar int64.

    Raises:
        SchemaError: as for `resolve_episode_length`.
    """
    complete = {name: as_array(name, value) for name, value in arrays.items()}
    length = resolve_episode_length(complete, per_step)
    complete.setdefault(EPISODE_LENGTH, np.asarray(length, np.int64))
    return complete


def trim(arrays: Mapping[str, npt.ArrayLike], per_step: Collection[str] = ()) -> dict[str, Array]:
    """Return the trajectory without padding: per-step fields become views of their first ``episode_length`` rows.

    Raises:
        SchemaError: as for `resolve_episode_length`.
    """
    complete = with_episode_length(arrays, per_step)
    length = resolve_episode_length(complete, per_step)
    for name in _step_names(complete, per_step):
        complete[name] = complete[name][:length]
    return complete


def pad(arrays: Mapping[str, npt.ArrayLike], length: int, per_step: Collection[str] = ()) -> dict[str, Array]:
    """Return the trajectory with per-step fields of exactly `length` rows, zero from ``episode_length`` on.

    Raises:
        SchemaError: the episode is longer than `length`, or as for `resolve_episode_length`.
    """
    trimmed = trim(arrays, per_step)
    steps = resolve_episode_length(trimmed, per_step)
    if steps > length:
        raise SchemaError(f"the episode has {steps} steps, more than the {length} to pad to")
    for name in _step_names(trimmed, per_step):
        rows = trimmed[name]
        trimmed[name] = np.zeros((length, *rows.shape[1:]), rows.dtype)
        trimmed[name][:steps] = rows
    return trimmed


def stack(
    trajectories: Sequence[Mapping[str, npt.ArrayLike]],
    length: int | None = None,
    per_step: Collection[str] = (),
) -> PaddedBatch:
    """Collate trajectories of various lengths into one padded batch.

    Args:
        trajectories: B of them, at least one, with the same fields, dtypes and trailing shapes.
        length: T; the longest episode when ``None``.
        per_step: names of further per-step fields, beside `STEP_FIELDS`.

    Raises:
        SchemaError: the trajectories do not fit each other; the message names the field and the trajectory.
    """
    if not trajectories:
        raise SchemaError("there is no trajectory to stack")
    trimmed = [trim(trajectory, per_step) for trajectory in trajectories]
    steps = [resolve_episode_length(trajectory, per_step) for trajectory in trimmed]
    longest = max(steps)
    if length is None:
        length = longest
    elif longest > length:
        raise SchemaError(f"trajectory {steps.index(longest)} has {longest} steps, length is {length}")
    by_step = set(_step_names(trimmed[0], per_step))
    first = trimmed[0]
    for index, trajectory in enumerate(trimmed):
        _require_alike(index, first, trajectory, by_step)
    arrays: dict[str, Array] = {}
    for name, example in first.items():
        if name == EPISODE_LENGTH:
            arrays[name] = np.asarray(steps, np.int64)
        elif name in by_step:
            arrays[name] = np.zeros((len(trimmed), length, *example.shape[1:]), example.dtype)
            for row, count, trajectory in zip(arrays[name], steps, trimmed, strict=True):
                row[:count] = trajectory[name]
        else:
            arrays[name] = np.stack([trajectory[name] for trajectory in trimmed])
    mask: npt.NDArray[np.bool_] = np.arange(length) < np.asarray(steps)[:, np.newaxis]
    return PaddedBatch(arrays, mask)


def _step_names(arrays: Mapping[str, Any], per_step: Collection[str]) -> list[str]:
    return [name for name in arrays if name in STEP_FIELDS or name in per_step]


def _rows(arrays: Mapping[str, npt.ArrayLike], per_step: Collection[str]) -> int | None:
    """The common number of rows of the per-step fields; ``None`` when there are none."""
    first: tuple[str, int] | None = None
    for name in _step_names(arrays, per_step):
        shape = as_array(name, arrays[name]).shape
        if not shape:
            raise SchemaError(f"field {name!r} has one row per step, but is a scalar")
        if first is None:
            first = name, shape[0]
        elif shape[0] != first[1]:
            raise SchemaError(f"field {name!r} has {shape[0]} rows, but {first[0]!r} has {first[1]}")
    return None if first is None else first[1]


def _require_alike(
    index: int, first: Mapping[str, Array], other: Mapping[str, Array], by_step: Collection[str]
) -> None:
    if odd := sorted(first.keys() ^ other.keys()):
        raise SchemaError(f"field {odd[0]!r} is in only one of the trajectories 0 and {index}")
    for name, example in first.items():
        if name == EPISODE_LENGTH:
            continue
        array = other[name]
        skipped = 1 if name in by_step else 0
        if array.dtype != example.dtype or array.shape[skipped:] != example.shape[skipped:]:
            raise SchemaError(
                f"field {name!r} of trajectory {index} has dtype {array.dtype} and shape {array.shape}, "
                f"that of trajectory 0 {example.dtype} and {example.shape}"
            )
