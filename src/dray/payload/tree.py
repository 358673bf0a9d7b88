"""Nested values as tensors: mappings, lists, ragged arrays, text and numbers inside a payload.

A payload that holds more than plain arrays has a description in its metadata, under `KEY`, and one or two tensors
for each leaf. The description is JSON:

| value | description | tensors |
|---|---|---|
| mapping | an object: key → description | |
| list, tuple | ``["l", …]``, ``["t", …]`` | |
| None | ``null`` | |
| array | ``"a"`` | the array |
| bool, int, float | ``"b"``, ``"i"``, ``"f"`` | a scalar: BOOL, I64 or U64, F64 |
| list of numbers of one kind | ``"B"``, ``"I"``, ``"F"`` | one dimension: BOOL, I64 or U64, F64 |
| text | ``"s"`` | its UTF-8 bytes: U8 |
| list of texts | ``"S"`` | their UTF-8 bytes, and offsets: I64 |
| `Ragged` | ``"r"`` | values and offsets |

A tensor has the name of its path: keys and list indices with dots between them. Dots and backslashes in keys have
a backslash before them; the name of offsets ends with ``\\offsets``. So paths are never equal. The description has
no values, so that equal structures have equal headers, which are cached.

Nothing here trusts a description: depth and number of nodes are bounded before anything is made of it, and each
tensor must belong to one leaf, with the dtype and shape that the leaf needs.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np

from dray.errors import PayloadFormatError, SchemaError
from dray.payload import torch_interop
from dray.payload.ragged import Ragged, check_offsets
from dray.payload.schema import (
    Array,
    FittedField,
    PayloadSchema,
    RaggedSpec,
    TensorSpec,
    TextSpec,
    as_array,
)
from dray.text import printable_value

KEY: Final = "dray.tree"
"""The name of the description in the metadata of the header."""

MAX_DEPTH: Final = 64
"""Limit on the levels of mappings, lists and tuples in a payload."""

MAX_NODES: Final = 65_536
"""Limit on the values of all levels in a payload."""

OFFSETS: Final = "\\offsets"

Node: TypeAlias = Any
"""The description of a value: None, the letter of a leaf, or ``(kind, keys, nodes)`` of a container."""

Field: TypeAlias = tuple[str, np.dtype[Any], tuple[int, ...]]
"""Name, dtype and shape of a tensor."""

Shapes: TypeAlias = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]
"""The shape and dtype of each tensor of a payload."""

Tensors: TypeAlias = Mapping[str, Array] | Array
"""Tensors by name: a mapping, or an array with fields."""

Build: TypeAlias = Callable[[Any], Any]
"""Makes a value of the `Tensors` of a payload."""

_NESTED: Final = (dict, str, Ragged, Mapping)  # the quickest to test first
_I64, _U64, _F64 = np.dtype("<i8"), np.dtype("<u8"), np.dtype("<f8")
_U8, _BOOL = np.dtype(np.uint8), np.dtype(np.bool_)

_NUMBERS: Final[Mapping[type, str]] = {bool: "b", int: "i", float: "f"}
_CONTAINERS: Final[Mapping[str, Callable[[list[Any]], Any]]] = {"l": list, "t": tuple}

# letter → the dtypes of its first tensor (None: any), and its dimensions (None: at least one).
_LEAVES: Final[Mapping[str, tuple[tuple[np.dtype[Any], ...] | None, int | None]]] = {
    "b": ((_BOOL,), 0),
    "i": ((_I64, _U64), 0),
    "f": ((_F64,), 0),
    "B": ((_BOOL,), 1),
    "I": ((_I64, _U64), 1),
    "F": ((_F64,), 1),
    "s": ((_U8,), 1),
    "S": ((_U8,), 1),
    "r": (None, None),
}
_WITH_OFFSETS: Final = frozenset("Sr")


class Tree(NamedTuple):
    """The structure of a payload's values.

    Attributes:
        node: the whole.
        names: the name of each tensor, in the order of the leaves.
        description: the JSON text for the header.
    """

    node: Node
    names: tuple[str, ...]
    description: str


def is_nested(value: object) -> bool:
    """Whether `value`, given as a field, is not one array: a mapping, text, None, ragged, or a list of such."""
    if value is None or isinstance(value, _NESTED):
        return True
    if isinstance(value, list | tuple):
        kinds = set(map(type, value))
        if list in kinds or tuple in kinds:
            return any(map(is_nested, value))
        return any(kind is type(None) or issubclass(kind, _NESTED) for kind in kinds)
    return torch_interop.is_jagged(value)


def flatten(values: Mapping[str, Any]) -> tuple[Tree, list[Array]]:
    """The structure of `values`, and an array for each of its tensors.

    What NumPy makes one array of is an array where it is a field of its own; in nested values, numbers and lists
    of numbers come back as such.

    Raises:
        PayloadFormatError: a value cannot be carried, or would not come back as it is; the message names its path.
    """
    found = _Flattening()
    found.enter(values, None, 0)
    nodes = [
        found.nested(value, (name, None), 1) if is_nested(value) else found.array(value, (name, None))
        for name, value in values.items()
    ]
    node = "d", _checked_keys(values, None), tuple(nodes)
    return tree_of(node, len(found.leaves)), found.leaves


def fit(schema: PayloadSchema, values: Mapping[str, Any]) -> tuple[Tree, list[FittedField]]:
    """As `flatten`, for values that must match `schema`; the casts are left to `dray.payload.schema.store`.

    Raises:
        SchemaError: a field is missing, unknown, or does not fit; the message names its path.
        PayloadFormatError: a value cannot be carried.
    """
    fitted: list[FittedField] = []
    node = _fit(schema, values, "", fitted)
    return tree_of(node, len(fitted)), fitted


def largest(schema: PayloadSchema) -> tuple[Tree, list[Field]]:
    """The structure of the largest payload without metadata that fits `schema`, and its tensors.

    Raises:
        SchemaError: a field has no limit; the message names it.
    """
    fields: list[Field] = []
    node = _largest(schema, "", fields)
    tree = tree_of(node, len(fields))
    return tree, [(name, *field[1:]) for name, field in zip(tree.names, fields, strict=True)]


def tree_of(node: Node, leaves: int) -> Tree:
    """The tree of a structure that has so many tensors."""
    return (_cached_tree if leaves <= _MAX_CACHED_LEAVES else _tree)(node)


def parse(description: str, shapes: Shapes) -> Tree:
    """The tree that the header of a payload describes, after checking all of it.

    Args:
        description: the text in the metadata.
        shapes: the tensors of the payload.

    Raises:
        PayloadFormatError: it is not a valid description of these tensors.
    """
    _check_size(description)
    try:
        content = json.loads(description, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        raise PayloadFormatError(f"the description of nested values is not valid JSON: {error}") from error
    if type(content) is not _Pairs:
        raise PayloadFormatError("the description of nested values is not a JSON object")
    tree = _tree(_checked_node(content, [MAX_NODES + 1], 1))
    for name, letter in _tensors(tree.node):
        _check_tensor(name, letter, shapes)
    if len(tree.names) != len(shapes):
        spare = next(iter(shapes.keys() - set(tree.names)))
        raise PayloadFormatError(f"tensor {printable_value(spare)} belongs to no value of the payload")
    return tree


def builder(tree: Tree, members: Mapping[str, str]) -> Build:
    """A function that returns the values of `tree`, given its tensors by the names of `members`.

    Arrays and ragged arrays are the tensors that are given; text and numbers are copies. The function raises
    `PayloadFormatError` if offsets or text are not valid.

    Args:
        tree: the structure.
        members: the name of each tensor in the payload, and that by which the function asks for it.
    """
    return _builder(tree.node, "", members)


# --- values to leaves -------------------------------------------------------------------------------------------

_Path: TypeAlias = "tuple[object, _Path | None]"
"""A key or an index, and the path of the container. A name is made of it when it is needed."""


class _Flattening:
    """Collects the leaves of a payload's values, in their order."""

    def __init__(self) -> None:
        self.leaves: list[Array] = []
        self._nodes = 0

    def nested(self, value: Any, path: _Path, depth: int) -> Node:
        kind = type(value)
        if kind is np.ndarray:
            self.leaves.append(value)
            return "a"
        if kind is dict:
            self.enter(value, path, depth)
            return self.mapping(value, path, depth)
        if kind in _NUMBERS:
            return self._number(value, path)
        if kind is str:
            self.leaves.append(np.frombuffer(_encoded(value, path), np.uint8))
            return "s"
        if value is None:
            return None
        if kind is list or kind is tuple:
            return self._sequence(value, path, depth)
        return self._other(value, path, depth)

    def array(self, value: Any, path: _Path) -> Node:
        self.leaves.append(value if type(value) is np.ndarray else as_array(_name(path), value))
        return "a"

    def mapping(self, value: dict[Any, Any], path: _Path | None, depth: int) -> Node:
        leaves, nodes = self.leaves, []
        for key, each in value.items():
            if type(each) is np.ndarray:
                leaves.append(each)
                nodes.append("a")
            else:
                nodes.append(self.nested(each, (key, path), depth + 1))
        return "d", _checked_keys(value, path), tuple(nodes)

    def enter(self, value: Any, path: _Path | None, depth: int) -> None:
        if depth >= MAX_DEPTH:
            raise _refusal(path, f"is nested more than {MAX_DEPTH} levels deep")
        self._nodes += len(value)
        if self._nodes > MAX_NODES:
            raise _refusal(path, f"and what comes before it have more than {MAX_NODES} values; use arrays")

    def _number(self, value: float, path: _Path) -> str:
        kind = type(value)
        array = _integers(int(value)) if kind is int else np.array(value)
        if array is None:
            raise _refusal(path, "is an integer that does not fit into 64 bits")
        self.leaves.append(array)
        return _NUMBERS[kind]

    def _sequence(self, value: Any, path: _Path, depth: int) -> Node:
        kinds = set(map(type, value))
        if type(value) is list and len(kinds) == 1:
            (kind,) = kinds
            if kind is str:
                texts = [_encoded(text, path) for text in value]
                self.leaves.append(np.frombuffer(b"".join(texts), np.uint8))
                self.leaves.append(_offsets(texts))
                return "S"
            if kind in _NUMBERS and (array := _integers(value) if kind is int else np.array(value)) is not None:
                self.leaves.append(array)
                return _NUMBERS[kind].upper()
        self.enter(value, path, depth)
        nodes = tuple([self.nested(each, (index, path), depth + 1) for index, each in enumerate(value)])
        return "l" if type(value) is list else "t", None, nodes

    def _other(self, value: Any, path: _Path, depth: int) -> Node:
        if torch_interop.is_jagged(value):
            value = Ragged(*torch_interop.jagged_parts(value))
        if isinstance(value, Ragged):
            self.leaves += (value.values, value.offsets)
            return "r"
        if isinstance(value, Mapping):
            # A TensorDict iterates over rows, its items do not.
            return self.nested(dict(value.items()), path, depth)
        if isinstance(value, str | list | tuple | float | int):
            kind = type(value).__name__
            raise _refusal(path, f"is a {kind}, which would come back as another type; convert it first")
        return self.array(value, path)


def _checked_keys(value: Mapping[Any, Any], path: _Path | None) -> tuple[str, ...]:
    keys = tuple(value.keys())
    for key in keys:
        if type(key) is not str:
            where = "" if path is None else f" of field {printable_value(_name(path))}"
            raise PayloadFormatError(f"key {printable_value(key)}{where} is not text, which keys must be")
    return keys


def _integers(value: int | list[int]) -> Array | None:
    """A scalar or an array of Python's integers; None if they do not fit into one of the dtypes."""
    lowest, highest = (value, value) if isinstance(value, int) else (min(value), max(value))
    if lowest >= -(1 << 63) and highest < 1 << 63:
        return np.array(value, _I64)
    return np.array(value, _U64) if lowest >= 0 and highest < 1 << 64 else None


def _offsets(texts: list[bytes]) -> Array:
    return np.fromiter(accumulate(map(len, texts), initial=0), np.int64, len(texts) + 1)


def _encoded(text: str, path: _Path) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise _refusal(path, f"is text that is not valid Unicode: {error}") from error


def _name(path: _Path | None) -> str:
    parts = []
    while path is not None:
        parts.append(escaped(path[0]))
        path = path[1]
    return ".".join(reversed(parts))


def escaped(part: object) -> str:
    """A key or an index as a part of the name of a tensor."""
    text = str(part)
    return text.replace("\\", "\\\\").replace(".", "\\.") if "." in text or "\\" in text else text


def _refusal(path: _Path | None, problem: str) -> PayloadFormatError:
    what = "the payload" if path is None else f"field {printable_value(_name(path))}"
    return PayloadFormatError(f"{what} {problem}")


# --- schemas ----------------------------------------------------------------------------------------------------


def _fit(schema: PayloadSchema, values: Mapping[str, Any], prefix: str, fitted: list[FittedField]) -> Node:
    nodes = []
    for name, value, spec in schema.specified(values, prefix):
        path = prefix + name
        if isinstance(spec, TensorSpec):
            fitted.append(schema.fit_field(path, spec, value))
        elif isinstance(spec, RaggedSpec):
            rows = spec.ragged(path, value)
            fitted.append(schema.fit_field(path, spec.parts[0], rows.values))
            fitted.append((path, rows.offsets, _I64, "same"))
        elif isinstance(spec, TextSpec):
            spec.verify(path, value)
            texts = [_encoded(text, (path, None)) for text in ([value] if isinstance(value, str) else value)]
            fitted.append((path, np.frombuffer(b"".join(texts), np.uint8), _U8, "same"))
            if spec.many:
                fitted.append((path, _offsets(texts), _I64, "same"))
        elif isinstance(value, Mapping):
            nodes.append(_fit(spec, value, path + ".", fitted))
            continue
        else:
            raise SchemaError(f"field {path!r} is a {type(value).__name__}, expected a mapping")
        nodes.append(_letter(spec))
    return "d", tuple(values.keys()), tuple(nodes)


def _largest(schema: PayloadSchema, prefix: str, fields: list[Field]) -> Node:
    nodes = []
    for name, spec in schema.items():
        path = prefix + name
        if isinstance(spec, Mapping):
            nodes.append(_largest(spec, path + ".", fields))
            continue
        parts = (spec,) if isinstance(spec, TensorSpec) else spec.parts
        for part in parts:
            shape = part.max_shape
            if shape is None:
                raise SchemaError(f"field {path!r} has a dimension without a limit: {spec}")
            fields.append((path, part.numpy_dtype, shape))
        nodes.append(_letter(spec))
    return "d", tuple(schema), tuple(nodes)


def _letter(spec: TensorSpec | RaggedSpec | TextSpec) -> str:
    if isinstance(spec, TextSpec):
        return "S" if spec.many else "s"
    return "r" if isinstance(spec, RaggedSpec) else "a"


# --- structures -------------------------------------------------------------------------------------------------


def _tree(node: Node) -> Tree:
    names = []
    for name, letter in _tensors(node):
        names.append(name)
        if letter in _WITH_OFFSETS:
            names.append(name + OFFSETS)
    description = _to_json(_described(node))
    _check_size(description)
    return Tree(node, tuple(names), description)


def _check_size(description: str) -> None:
    """Called before JSON is read: each value but the first follows one of these characters; keys may have them."""
    if sum(map(description.count, ",[{")) > 2 * MAX_NODES:
        raise PayloadFormatError(
            f"the description of nested values is too large: more than {2 * MAX_NODES} of ,[{{"
        )


_MAX_CACHED_LEAVES: Final = 256
_cached_tree = lru_cache(512)(_tree)
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _described(node: Node) -> Any:
    if type(node) is not tuple:
        return node
    kind, keys, nodes = node
    if kind == "d":
        return dict(zip(keys, map(_described, nodes), strict=True))
    return [kind, *map(_described, nodes)]


def _tensors(node: Node, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The path of each leaf that has tensors, and its letter."""
    _, keys, nodes = node
    for key, each in zip(range(len(nodes)) if keys is None else keys, nodes, strict=True):
        path = prefix + escaped(key)
        if type(each) is tuple:
            yield from _tensors(each, path + ".")
        elif each is not None:
            yield path, each


# --- descriptions -----------------------------------------------------------------------------------------------


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as it was read."""


def _checked_node(content: Any, left: list[int], depth: int) -> Node:
    left[0] -= 1
    if left[0] < 0:
        raise PayloadFormatError(f"the description of nested values has more than {MAX_NODES} values")
    if content is None or (type(content) is str and (content == "a" or content in _LEAVES)):
        return content
    if type(content) is _Pairs:
        keys = tuple([key for key, _ in content])
        if len(set(keys)) != len(keys):
            raise PayloadFormatError("a mapping in the description of nested values has a key twice")
        try:
            "".join(keys).encode()
        except UnicodeEncodeError as error:
            raise PayloadFormatError(
                f"a key in the description of nested values is not valid Unicode: {error}"
            ) from error
        kind, parts = "d", [part for _, part in content]
    elif type(content) is list and content and type(content[0]) is str and content[0] in _CONTAINERS:
        keys, kind, parts = None, content[0], content[1:]
    else:
        raise PayloadFormatError(f"{printable_value(content)} does not describe a nested value that is known")
    if depth >= MAX_DEPTH + 1:
        raise PayloadFormatError(f"the values are nested more than {MAX_DEPTH} levels deep")
    return kind, keys, tuple([_checked_node(part, left, depth + 1) for part in parts])


def _check_tensor(name: str, letter: str, shapes: Shapes) -> None:
    parts = [(name, _LEAVES.get(letter, (None, -1)))]
    if letter in _WITH_OFFSETS:
        parts.append((name + OFFSETS, ((_I64,), 1)))
    for each, (dtypes, dimensions) in parts:
        if each not in shapes:
            raise PayloadFormatError(f"tensor {printable_value(each)}, which is described, is missing")
        shape, dtype = shapes[each]
        if letter == "a":
            continue
        fits = len(shape) >= 1 if dimensions is None else len(shape) == dimensions
        if not fits or (dtypes is not None and dtype not in dtypes):
            what = f"has dtype {dtype} and shape {shape}"
            raise PayloadFormatError(
                f"tensor {printable_value(each)} {what}, which its value {letter!r} cannot have"
            )


# --- leaves to values -------------------------------------------------------------------------------------------


def _builder(node: Node, prefix: str, members: Mapping[str, str]) -> Build:
    kind, keys, nodes = node
    parts: list[Build] = []
    arrays: list[tuple[str, str]] = []
    for key, each in zip(range(len(nodes)) if keys is None else keys, nodes, strict=True):
        path = prefix + escaped(key)
        if type(each) is tuple:
            parts.append(_builder(each, path + ".", members))
        elif each is None:
            parts.append(_to_none)
        elif each == "a":
            parts.append(operator.itemgetter(members[path]))
            arrays.append((key, members[path]))
        else:
            parts.append(_leaf_builder(each, path, members))
    if kind != "d":
        container = _CONTAINERS[kind]
        return lambda tensors: container([build(tensors) for build in parts])
    if len(arrays) == len(parts):
        return lambda tensors: {key: tensors[member] for key, member in arrays}
    named = tuple(zip(keys, parts, strict=True))
    return lambda tensors: {key: build(tensors) for key, build in named}


def _leaf_builder(letter: str, path: str, members: Mapping[str, str]) -> Build:
    first = members[path]
    if letter in "bif":
        return lambda tensors: tensors[first].item()
    if letter in "BIF":
        return lambda tensors: tensors[first].tolist()
    if letter == "s":
        return lambda tensors: _text(tensors[first].tobytes())
    offsets = members[path + OFFSETS]
    if letter == "S":
        return lambda tensors: _texts(tensors[first].tobytes(), tensors[offsets])
    return lambda tensors: Ragged(tensors[first], tensors[offsets])


def _to_none(tensors: Tensors) -> None:
    del tensors


def _text(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise PayloadFormatError(f"text in the payload is not UTF-8: {error}") from error


def _texts(content: bytes, offsets: Array) -> list[str]:
    check_offsets(offsets, len(content))
    return [_text(content[start:end]) for start, end in pairwise(offsets.tolist())]
