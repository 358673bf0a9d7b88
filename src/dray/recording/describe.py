"""What is in payloads: names, dtypes, shapes and statistics of their fields, as a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import numpy as np

from dray.payload import Ragged

HEAD: Final = ("field", "dtype", "shape", "payloads", "bytes", "min", "mean", "max", "not finite")
_MAX_SHAPES: Final = 3


class Field:
    """One field of several payloads."""

    def __init__(self) -> None:
        self.dtypes: list[str] = []
        self.shapes: list[tuple[int, ...]] = []
        self.payloads = self.nbytes = self.finite = self.not_finite = 0
        self.total = 0.0
        self.minimum, self.maximum = np.inf, -np.inf

    def add(self, value: object) -> None:
        """Take in the value of one payload."""
        self.payloads += 1
        if value is None or isinstance(value, str):
            self._note("none" if value is None else "text", ())
            self.nbytes += len(value.encode()) if value else 0
            return
        ragged = isinstance(value, Ragged)
        array = np.asarray(value.values if isinstance(value, Ragged) else value)
        self._note(f"{'ragged ' if ragged else ''}{array.dtype}", array.shape)
        self.nbytes += array.nbytes
        if array.dtype.kind == "c":
            return
        numbers = array.astype(np.float64)
        finite = numbers[np.isfinite(numbers)]
        self.not_finite += numbers.size - finite.size
        if finite.size:
            self.finite += finite.size
            self.total += float(finite.sum())
            self.minimum = min(self.minimum, float(finite.min()))
            self.maximum = max(self.maximum, float(finite.max()))

    def _note(self, dtype: str, shape: tuple[int, ...]) -> None:
        if dtype not in self.dtypes:
            self.dtypes.append(dtype)
        if shape not in self.shapes:
            self.shapes.append(shape)

    def row(self, name: str) -> tuple[str, ...]:
        """Its line in the table, in the order of `HEAD`."""
        shapes = [str(shape) for shape in self.shapes[:_MAX_SHAPES]] + ["…"] * (len(self.shapes) > _MAX_SHAPES)
        known = self.finite > 0
        numbers = (self.minimum, self.total / max(1, self.finite), self.maximum)
        return (
            name,
            " ".join(self.dtypes),
            " ".join(shapes),
            f"{self.payloads}",
            f"{self.nbytes}",
            *(f"{number:.6g}" if known else "-" for number in numbers),
            f"{self.not_finite}" if self.not_finite else "-",
        )


def fields_of(payloads: Iterable[Mapping[str, Any]]) -> dict[str, Field]:
    """The fields of payloads by name; those of nested values are named by their path, such as ``turns.0.ids``."""
    fields: dict[str, Field] = {}
    for values in payloads:
        for name, value in _leaves(values, ""):
            fields.setdefault(name, Field()).add(value)
    return fields


def _leaves(values: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(values, Mapping):
        parts: Iterable[tuple[Any, Any]] = values.items()
    elif type(values) in (list, tuple):
        parts = enumerate(values)
    else:
        yield path, values
        return
    for key, value in parts:
        yield from _leaves(value, f"{path}.{key}" if path else str(key))


def table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Lines with aligned columns, `HEAD` first."""
    lines = [HEAD, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    aligned = ([f"{text:{width}}" for text, width in zip(line, widths, strict=True)] for line in lines)
    return ["  ".join(line).rstrip() for line in aligned]
