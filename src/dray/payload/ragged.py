"""`Ragged`: rows of different lengths in one array."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt

from dray.errors import PayloadFormatError

if TYPE_CHECKING:
    from dray.payload.schema import Array


class Ragged(Sequence[Any]):
    """Rows of different lengths, one after the other in one array. A sequence of its rows, which are views.

    Row ``i`` is ``values[offsets[i]:offsets[i + 1]]``.

    Args:
        values: the elements of all rows, shape ``(total, …)``.
        offsets: where each row begins, and where the last one ends: int64, shape ``(rows + 1,)``.

    Raises:
        PayloadFormatError: the offsets do not begin with 0, fall, or do not end with the length of `values`.
    """

    __slots__ = ("offsets", "values")

    def __init__(self, values: npt.ArrayLike, offsets: npt.ArrayLike) -> None:
        self.values: Array = np.asarray(values)
        given = np.asarray(offsets)
        if given.dtype.kind not in "iu":
            raise PayloadFormatError(f"offsets of a ragged array have dtype {given.dtype}; they must be integers")
        self.offsets: npt.NDArray[np.int64] = given.astype(np.int64, copy=False)
        if self.values.ndim == 0:
            raise PayloadFormatError("the values of a ragged array have no dimension; they need one at least")
        check_offsets(self.offsets, len(self.values))

    @classmethod
    def from_rows(cls, rows: Iterable[npt.ArrayLike], dtype: npt.DTypeLike | None = None) -> Ragged:
        """Return the ragged array of `rows`, which are copied into one array.

        Args:
            rows: arrays that are equal in all dimensions but the first.
            dtype: of the values; by default what NumPy makes of all rows, float64 where there is none.

        Raises:
            PayloadFormatError: a row is a scalar, or the rows do not go together.
        """
        arrays = [np.asarray(row) for row in rows]
        for number, array in enumerate(arrays):
            if array.ndim == 0:
                raise PayloadFormatError(f"row {number} of a ragged array is a scalar; rows are arrays")
        offsets = np.fromiter(accumulate(map(len, arrays), initial=0), np.int64, len(arrays) + 1)
        filled = [array for array in arrays if array.size] or arrays[:1]  # an empty list has NumPy's float64
        try:
            values = np.concatenate(filled, dtype=dtype, casting="same_kind") if filled else np.empty(0, dtype)
        except (TypeError, ValueError) as error:
            raise PayloadFormatError(f"the rows do not make one ragged array: {error}") from error
        return cls(values, offsets)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the values."""
        return self.values.dtype

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """The length of each row: int64, shape ``(rows,)``."""
        return np.diff(self.offsets)

    @property
    def nbytes(self) -> int:
        """Bytes of values and offsets."""
        return self.values.nbytes + self.offsets.nbytes

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> Array: ...
    @overload
    def __getitem__(self, index: slice) -> list[Array]: ...
    def __getitem__(self, index: int | slice) -> Array | list[Array]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        row = index + len(self) if index < 0 else index
        if not 0 <= row < len(self):
            raise IndexError(f"row {index} of a ragged array of {len(self)} rows")
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[Array]:
        bounds = self.offsets.tolist()
        return (self.values[start:end] for start, end in pairwise(bounds))

    def __repr__(self) -> str:
        return f"<Ragged {self.values.dtype}, {len(self)} rows, values {list(self.values.shape)}>"


def arrays_in(values: Any, path: str = "") -> Iterator[tuple[str, Array]]:
    """Each array among the values of a payload, that of a ragged one too, with the path of its value."""
    if isinstance(values, np.ndarray):
        yield path, values
    elif isinstance(values, Ragged):
        yield path, values.values
    elif isinstance(values, Mapping):
        for key, value in values.items():
            yield from arrays_in(value, f"{path}.{key}" if path else str(key))
    elif type(values) in (list, tuple):
        for index, value in enumerate(values):
            yield from arrays_in(value, f"{path}.{index}")


def check_offsets(offsets: npt.NDArray[np.int64], length: int) -> None:
    """Check the offsets of rows in an array of `length` elements.

    Raises:
        PayloadFormatError: they do not begin with 0, fall, or do not end with `length`.
    """
    if offsets.ndim != 1 or not len(offsets):
        raise PayloadFormatError(f"offsets have shape {offsets.shape}; one for each row and one more are needed")
    if offsets[0] != 0 or offsets[-1] != length or bool((offsets[1:] < offsets[:-1]).any()):
        raise PayloadFormatError(
            f"offsets must begin with 0, never fall and end with {length}, the values' length"
        )


def map_arrays(values: Any, array: Callable[[Array], Any], ragged: Callable[[Ragged], Any]) -> Any:
    """The values of a payload with `array` of each array, and `ragged` of each ragged one, in its place."""
    if isinstance(values, np.ndarray):
        return array(values)
    if isinstance(values, Ragged):
        return ragged(values)
    if isinstance(values, Mapping):
        return {key: map_arrays(value, array, ragged) for key, value in values.items()}
    if type(values) in (list, tuple):
        return type(values)(map_arrays(value, array, ragged) for value in values)
    return values
