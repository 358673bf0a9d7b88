"""Parts of a payload: some of its fields, and of plain arrays some of their rows.

A `Selection` names what is wanted, and has the text that a READ carries to a server. `part_of` finds it in an
image: for a consumer that has the image in its memory, the views of it; for one that does not, the image of the
part: a header of its own, and the bytes of the tensors, which lie in the whole image.

Nothing here trusts a selection: its text is bounded, its ranges are sorted and do not overlap. So a part never has
more bytes than the whole and a header.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from dray.errors import PayloadFormatError, SelectionError
from dray.payload import tree
from dray.payload.header import (
    MAX_CACHED_HEADER_BYTES,
    MAX_CACHED_HEADERS,
    Header,
    build_header,
    from_json,
    header_text,
    parse_text,
)
from dray.payload.schema import Array, Values
from dray.payload.tree import Field, Node, Tensors
from dray.text import printable_value

MAX_SELECTED: Final = 1024
"""Limit on the fields that a selection names, and on its ranges of rows, together."""

MAX_SELECTION_BYTES: Final = 64 << 10
"""Limit on the text of a selection."""

_MAX_CACHED_LARGE: Final = 8
"""Parts of payloads with large headers that are kept, such as the weights of a model for each rank of a group."""

_MAX_CACHED: Final = 64
_MAX_CACHED_BYTES: Final = 4096
_MAX_ROWS: Final = (1 << 63) - 1
_MAX_SHOWN: Final = 8

Fields: TypeAlias = Iterable[str]
"""Names of fields of the first level, or paths of keys with dots between them."""

RowRange: TypeAlias = slice | tuple[int, int | None]
"""Rows from a start to a stop, which is not included; None is the end of the array."""

Rows: TypeAlias = Mapping[str, RowRange | Sequence[RowRange]]
"""Ranges of rows, ascending and disjoint, by the names of plain arrays of the first level."""

_Range: TypeAlias = tuple[int, int | None]


@dataclass(frozen=True, slots=True)
class Selection:
    """What is wanted of a payload. Made by `of` or `decode`.

    Attributes:
        fields: the fields; None for all.
        rows: the ranges of rows of those arrays of which not all are wanted.
        text: the selection as JSON, for a READ.
    """

    fields: tuple[str, ...] | None
    rows: tuple[tuple[str, tuple[_Range, ...]], ...]
    text: bytes = field(compare=False, repr=False)

    @classmethod
    def of(cls, fields: Fields | None = None, rows: Rows | None = None) -> Selection | None:
        """The selection for the arguments of a read; None if both are None.

        Args:
            fields: the fields that are wanted; None for all.
            rows: which rows of them, as a slice, a pair (start, stop) or a sequence of these.

        Raises:
            SelectionError: they cannot be selected from any payload.
        """
        if fields is None and rows is None:
            return None
        if isinstance(fields, str):
            raise SelectionError(f"fields = {printable_value(fields)} is one name; give a tuple of names")
        if rows is not None and not isinstance(rows, Mapping):
            raise SelectionError(f"rows must be a mapping of field to ranges, not {type(rows).__name__}")
        names = None if fields is None else tuple(fields)
        ranges = tuple([(name, tuple(_ranges(name, given))) for name, given in rows.items()]) if rows else ()
        return _made(names, ranges)

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments ``fields`` and ``rows`` of a read."""
        return {"fields": self.fields, "rows": dict(self.rows) if self.rows else None}

    @classmethod
    def decode(cls, text: bytes) -> Selection:
        """The selection that a READ carries, after checking all of it.

        Raises:
            SelectionError: it is not valid.
        """
        return (_cached_decode if len(text) <= _MAX_CACHED_BYTES else _decode)(text)


class Part(NamedTuple):
    """A part of one image, and of all that have the same header.

    Attributes:
        nbytes: the size of its image.
        header: the beginning of its image.
        spans: where the bytes after it lie in the whole image, in their order: offset and size.
        source: the header of the whole image.
        build: makes nested values of the tensors; None where there are arrays alone.
        arrays: the name of each array that is selected, and the key of its tensor, where there are arrays alone.
        rows: the ranges of rows, by name.
    """

    nbytes: int
    header: npt.NDArray[np.uint8]
    spans: tuple[tuple[int, int], ...]
    source: Header
    build: tree.Build | None
    arrays: tuple[tuple[str, str], ...]
    rows: tuple[tuple[str, tuple[tuple[int, int], ...]], ...]

    def values(self, tensors: Tensors) -> Values:
        """The selected values: views on tensors of the whole. Several ranges of one array are a copy."""
        if self.build is not None:
            values: Values = self.build(tensors)
        else:
            values = {name: tensors[key] for name, key in self.arrays}
        for name, ranges in self.rows:
            values[name] = _taken(values[name], ranges)
        return values

    def views(self, image: memoryview) -> list[memoryview]:
        """The bytes of the image of the part, without a copy."""
        return [self.header.data, *[image[offset : offset + size] for offset, size in self.spans]]

    def write(self, root: npt.NDArray[np.uint8], target: npt.NDArray[np.uint8]) -> None:
        """Write the image of the part of `root` into `target`, which has `nbytes` bytes."""
        end = len(self.header)
        target[:end] = self.header
        for offset, size in self.spans:
            target[end : end + size] = root[offset : offset + size]
            end += size


def part_of(root: npt.NDArray[np.uint8], selection: Selection) -> Part:
    """The part of the image `root` that is selected.

    Raises:
        SelectionError: it has no such fields or rows, or no fields at all.
    """
    try:
        text = header_text(root)
        small = len(text) <= MAX_CACHED_HEADER_BYTES and len(selection.text) <= _MAX_CACHED_BYTES
        return (_cached_part if small else _cached_large_part)(text, len(root), selection)
    except PayloadFormatError as error:
        raise SelectionError(f"the payload has no fields to select: {error.message}") from error


# --- selections -------------------------------------------------------------------------------------------------

_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _made(fields: tuple[Any, ...] | None, rows: tuple[tuple[Any, tuple[_Range, ...]], ...]) -> Selection:
    """The selection, after checking it."""
    for name in (*(fields or ()), *[name for name, _ in rows]):
        if type(name) is not str:
            raise SelectionError(f"{printable_value(name)} is not the name of a field, which is text")
    count = len(fields or ()) + sum(len(ranges) for _, ranges in rows)
    if count > MAX_SELECTED:
        raise SelectionError(f"{count} fields and ranges are selected; at most {MAX_SELECTED} can be")
    return (_cached_checked if count <= _MAX_CACHED else _checked)(fields, rows)


def _checked(fields: tuple[str, ...] | None, rows: tuple[tuple[str, tuple[_Range, ...]], ...]) -> Selection:
    for name, ranges in rows:
        _check_order(name, ranges)
    content: dict[str, Any] = {} if fields is None else {"fields": fields}
    if rows:
        content["rows"] = dict(rows)
    try:
        text = _to_json(content).encode()
    except UnicodeEncodeError as error:
        raise SelectionError(f"the name of a field is not valid Unicode: {error}") from error
    if len(text) > MAX_SELECTION_BYTES:
        raise SelectionError(f"the selection has {len(text)} bytes of text; at most {MAX_SELECTION_BYTES} fit")
    return Selection(fields, rows, text)


_cached_checked = lru_cache(MAX_CACHED_HEADERS)(_checked)


def _ranges(name: object, given: Any) -> Iterator[_Range]:
    """The ranges of rows in an argument."""
    if isinstance(given, slice) or (isinstance(given, tuple) and len(given) == 2 and _is_bound(given[1])):
        given = (given,)
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise _no_range(name, given)
    for each in given:
        if isinstance(each, slice):
            if each.step not in (None, 1):
                raise _no_range(name, each)
            each = each.start or 0, each.stop
        if not isinstance(each, tuple | list) or len(each) != 2:
            raise _no_range(name, each)
        try:
            start = int(operator.index(each[0]))
            stop = None if each[1] is None else int(operator.index(each[1]))
        except TypeError:
            raise _no_range(name, each) from None
        yield start, stop


def _is_bound(value: object) -> bool:
    return value is None or hasattr(value, "__index__")


def _check_order(name: str, ranges: Iterable[_Range]) -> None:
    reached: int | None = 0
    for start, stop in ranges:
        if not 0 <= start <= _MAX_ROWS or (stop is not None and not start <= stop <= _MAX_ROWS):
            raise _no_range(name, (start, stop))
        if reached is None or start < reached:
            raise SelectionError(
                f"rows {start} to {stop} of {printable_value(name)} begin before the range before them ends: "
                "ranges must ascend and not overlap"
            )
        reached = stop


def _no_range(name: object, given: object) -> SelectionError:
    return SelectionError(
        f"{printable_value(given)} is no range of rows of {printable_value(name)}: a range is (start, stop) with "
        "0 <= start <= stop, or a slice of step 1"
    )


def _decode(text: bytes) -> Selection:
    try:
        content = from_json(text.decode())
    except (ValueError, RecursionError) as error:
        raise SelectionError(f"the selection is not valid JSON: {error}") from error
    if type(content) is not dict or not content.keys() <= {"fields", "rows"}:
        raise SelectionError("the selection is not an object with 'fields' and 'rows'")
    fields, rows = content.get("fields"), content.get("rows", {})
    if "fields" in content and type(fields) is not list:
        raise SelectionError("the fields of the selection are not a list")
    if type(rows) is not dict or not all(map(_is_ranges, rows.values())):
        raise SelectionError("the rows of the selection are not lists of [start, stop] by field")
    ranges = tuple((name, tuple(map(tuple, each))) for name, each in rows.items())
    return _made(None if fields is None else tuple(fields), ranges)


def _is_ranges(value: object) -> bool:
    return type(value) is list and all(
        type(each) is list
        and len(each) == 2
        and type(each[0]) is int
        and (each[1] is None or type(each[1]) is int)
        for each in value
    )


_cached_decode = lru_cache(MAX_CACHED_HEADERS)(_decode)


# --- parts of structures ----------------------------------------------------------------------------------------

_Wanted: TypeAlias = "dict[str, _Wanted | None]"
"""What is selected of a mapping: keys, each with what is selected below it; None selects all of it."""


def _select(node: Node, fields: Iterable[str]) -> Node:
    """The structure of `fields` alone, in the order of the whole."""
    first_level = frozenset(node[1])
    wanted: _Wanted = {}
    for name in fields:
        path = (name,) if name in first_level else _keys_of(name)
        at = wanted
        for key in path[:-1]:
            deeper = at.setdefault(key, {})
            if deeper is None:
                raise SelectionError(f"field {printable_value(name)} is part of another one that is selected")
            at = deeper
        if path[-1] in at:
            raise SelectionError(f"field {printable_value(name)} is selected twice, as a whole or in part")
        at[path[-1]] = None
    return _selected(node, wanted, "")


def _keys_of(path: str) -> tuple[str, ...]:
    """The keys of a path, which is written like the name of a tensor."""
    keys, key, escaped = [], "", False
    for character in path:
        if escaped or character not in ".\\":
            key, escaped = key + character, False
        elif character == "\\":
            escaped = True
        else:
            keys.append(key)
            key = ""
    return (*keys, key)


def _selected(node: Node, wanted: _Wanted, prefix: str) -> Node:
    kind, keys, nodes = node if type(node) is tuple else (None, None, ())
    if kind != "d":
        shown = printable_value(prefix + tree.escaped(next(iter(wanted))))
        what = "not in a mapping" if kind is None else "in a list, which can be selected as a whole only"
        raise SelectionError(f"field {shown} is {what}")
    children = dict(zip(keys, nodes, strict=True))
    for key in wanted:
        if key not in children:
            known = ", ".join(printable_value(each) for each in keys[:_MAX_SHOWN]) or "none"
            more = f" and {len(keys) - _MAX_SHOWN} more" if len(keys) > _MAX_SHOWN else ""
            where = f"field {printable_value(prefix[:-1])}" if prefix else "the payload"
            raise SelectionError(f"{where} has no field {printable_value(key)}; its fields: {known}{more}")
    kept = tuple(key for key in keys if key in wanted)
    parts = []
    for key in kept:
        below = wanted[key]
        parts.append(
            children[key] if below is None else _selected(children[key], below, f"{prefix}{tree.escaped(key)}.")
        )
    return "d", kept, tuple(parts)


# --- parts of images --------------------------------------------------------------------------------------------


def _part(text: bytes, nbytes: int, selection: Selection) -> Part:
    header = parse_text(text, nbytes)
    members = dict(header.layout.members)
    tensors = dict(zip(members, header.layout.tensors, strict=True))
    flat = header.structure is None
    node = ("d", tuple(members), ("a",) * len(members)) if header.structure is None else header.structure.node
    if selection.fields is not None:
        node = _select(node, selection.fields)
    structure = None if flat else tree.tree_of(node, len(members))
    names = node[1] if structure is None else structure.names
    rows: dict[str, tuple[tuple[int, int], ...]] = {}  # by the names of tensors
    taken = []
    for name, ranges in selection.rows:
        tensor = name if flat else tree.escaped(name)
        rows[tensor] = found = _rows_of(node, name, ranges, tensors.get(tensor))
        taken.append((name, found))
    fields: list[Field] = []
    spans: list[list[tuple[int, int]]] = []
    for name in names:
        shape, dtype, offset = tensors[name]
        if name in rows:
            row = dtype.itemsize * prod(shape[1:])
            spans.append([(offset + start * row, (stop - start) * row) for start, stop in rows[name]])
            shape = (sum(stop - start for start, stop in rows[name]), *shape[1:])
        else:
            spans.append([(offset, dtype.itemsize * prod(shape))])
        fields.append((name, dtype, shape))
    beginning, layout = build_header(fields, None, structure)
    order = sorted(range(len(fields)), key=lambda index: layout.tensors[index][2])
    return Part(
        nbytes=layout.nbytes,
        header=beginning,
        spans=tuple(_joined(span for index in order for span in spans[index])),
        source=header,
        build=None if structure is None else tree.builder(structure, members),
        arrays=tuple((name, members[name]) for name in names) if flat else (),
        rows=tuple(taken),
    )


_cached_part = lru_cache(MAX_CACHED_HEADERS)(_part)
_cached_large_part = lru_cache(_MAX_CACHED_LARGE)(_part)


def _rows_of(
    node: Node, name: str, ranges: Iterable[_Range], tensor: tuple[tuple[int, ...], Any, int] | None
) -> tuple[tuple[int, int], ...]:
    """Ranges of rows of a field with known ends."""
    _, keys, nodes = node
    shown = printable_value(name)
    if name not in keys:
        raise SelectionError(f"rows of {shown} are selected, which is no selected field of the first level")
    if nodes[keys.index(name)] != "a" or tensor is None or not tensor[0]:
        raise SelectionError(f"rows of {shown} are selected, which is not an array with rows")
    length = tensor[0][0]
    found = []
    for start, stop in ranges:
        end = length if stop is None else stop
        if not start <= end <= length:
            raise SelectionError(f"rows {start} to {end} of {shown} are selected, which has {length}")
        found.append((start, end))
    return tuple(found)


def _joined(spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The spans that have bytes, with those joined that follow each other in the whole image."""
    begin = end = 0
    for offset, size in spans:
        if not size:
            continue
        if offset != end and end > begin:
            yield begin, end - begin
        if offset != end or end == begin:
            begin = offset
        end = offset + size
    if end > begin:
        yield begin, end - begin


def _taken(array: Array, ranges: Sequence[tuple[int, int]]) -> Array:
    if len(ranges) == 1:
        ((start, stop),) = ranges
        return array[start:stop]
    return np.concatenate([array[start:stop] for start, stop in ranges]) if ranges else array[:0]
