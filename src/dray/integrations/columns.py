"""Batches of TransferQueue as rows to put, and rows that were got as columns of a batch.

A batch is a TensorDict: each field is a column, dense, nested or a stack of values that are no tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from math import prod
from typing import Any

import numpy as np

from dray.errors import MissingDependencyError, StaleSlotError
from dray.integrations.store import Token
from dray.payload import Ragged
from dray.payload.ragged import map_arrays
from dray.payload.schema import Array
from dray.payload.torch_interop import is_tensor, to_numpy, to_torch
from dray.transport.receive_buffers import ReceiveBuffers

try:
    import torch
    from tensordict import NonTensorStack, TensorDict
except ImportError as error:
    raise MissingDependencyError("tensordict", "dray.integrations.transfer_queue", "tensordict") from error


def wrapped(value: Any) -> Any:
    """What is stored for a value that is no tensor, so that `value_of` returns it with its type."""
    if value is None or type(value) is str:
        return value
    if isinstance(value, bytes):
        return {"bytes": np.frombuffer(value, np.uint8)}
    return {"value": value}


def value_of(stored: Any) -> Any:
    """What was put: a tensor, or another value. Arrays must be in memory of their own."""
    if isinstance(stored, np.ndarray):
        return to_torch({"": stored})[""]
    if not isinstance(stored, Mapping):
        return stored
    return stored["bytes"].tobytes() if "bytes" in stored else stored["value"]


def columns_of(data: TensorDict) -> dict[str, Array] | None:
    """The columns of a TensorDict that has dense ones only: arrays that share its memory. None for another."""
    columns: dict[str, Array] = {}
    for name, column in data.items():
        if not isinstance(column, torch.Tensor) or column.is_nested:
            return None
        columns[str(name)] = to_numpy(column)
    return columns


def rows_of(data: TensorDict) -> list[dict[str, Any]]:
    """The rows of a TensorDict: arrays that share its memory, and other values."""
    names = list(map(str, data.keys()))
    return [
        dict(zip(names, row, strict=True)) for row in zip(*[_split(data[name]) for name in names], strict=True)
    ]


def _split(column: Any) -> Sequence[Any]:
    """The rows of a column."""
    if not is_tensor(column):
        return [value if is_tensor(value) else wrapped(value) for value in column]
    if not column.is_nested:
        array = to_numpy(column)
        return [array[row, ...] for row in range(len(array))]
    return [to_numpy(row) for row in column.unbind()]


def reads(
    samples: Sequence[Any], fields: Sequence[str], tokens: Sequence[str | None]
) -> Iterable[tuple[tuple[str, ...] | None, list[str], list[dict[str, int]]]]:
    """What to read together: the fields of payloads, their tokens, and the place of each field of each payload.

    Fields are None where all of a payload are wanted.
    """
    places: dict[tuple[Any, str], dict[str, int]] = {}
    for place, (sample, field, token) in enumerate(zip(samples, fields, tokens, strict=True)):
        if token is None:
            raise StaleSlotError(f"field {field!r} of sample {sample} is not in the storage")
        places.setdefault((sample, token), {})[field] = place
    groups: dict[tuple[str, ...] | None, tuple[list[str], list[dict[str, int]]]] = {}
    for (_, token), by_name in places.items():
        whole = Token.decode(token).fields == len(by_name)
        found = groups.setdefault(None if whole else tuple(by_name), ([], []))
        found[0].append(token)
        found[1].append(by_name)
    return [(names, *found) for names, found in groups.items()]


class Column:
    """One field of a batch. Rows are copied into one array, if they have the expected shapes.

    Args:
        shapes: the shapes of the rows according to the metadata; None for values that are no tensors.
        buffers: where its memory comes from: memory that was used before is several times as fast as new memory.
    """

    def __init__(self, shapes: Sequence[Sequence[int] | None], buffers: ReceiveBuffers) -> None:
        self._buffers = buffers
        self._shapes = [None if shape is None else tuple(shape) for shape in shapes]
        self._rows: list[Any] = [None] * len(shapes)
        self._array: Array | None = None
        self._offsets = [0]
        self._regular = all(self._shapes) and len({shape[1:] for shape in self._shapes if shape}) == 1

    def add(self, row: int, value: Any) -> None:
        """A row has been read; `value` is valid during this call."""
        if self._regular and isinstance(value, np.ndarray) and value.shape == self._shapes[row]:
            if self._array is None:
                self._offsets = [0, *accumulate(shape[0] for shape in self._shapes if shape)]
                shape = (self._offsets[-1], *value.shape[1:])
                memory = self._buffers.allocate(prod(shape) * value.dtype.itemsize)
                self._array = memory.view(value.dtype).reshape(shape)
            if self._array.dtype == value.dtype:
                part = self._array[self._offsets[row] : self._offsets[row + 1]]
                part[...] = value
                self._rows[row] = part
                return
        self._regular = False
        self._rows[row] = _kept(value)

    def merged(self) -> Any:
        """The column: a nested tensor, a dense one of numbers, or a stack of other values."""
        if self._regular and self._array is not None:
            values = to_torch({"": self._array})[""]
            lengths = np.diff(self._offsets)
            return torch.nested.nested_tensor_from_jagged(
                values, torch.tensor(self._offsets), min_seqlen=int(lengths.min()), max_seqlen=int(lengths.max())
            )
        rows = [value_of(row) for row in self._rows]
        if not all(map(is_tensor, rows)):
            return NonTensorStack(*rows)
        if all(row.dim() == 0 for row in rows):
            return torch.stack(rows)
        for layout in (torch.jagged, torch.strided):
            try:
                return torch.nested.as_nested_tensor(rows, layout=layout)
            except (RuntimeError, TypeError):
                continue  # rows that this layout cannot hold
        return NonTensorStack(*rows)


def _kept(value: Any) -> Any:
    """A value with arrays in memory of their own."""
    return map_arrays({"": value}, np.array, lambda rows: Ragged(rows.values.copy(), rows.offsets.copy()))[""]
