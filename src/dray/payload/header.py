"""Builds and checks the header of an image, and computes where its tensors lie.

`dray.payload.codec` shows the whole image. Headers are cached, because most payloads of a job have equal ones.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from dray.errors import PayloadFormatError
from dray.payload import tree
from dray.payload.schema import DTYPE_NAMES, DTYPES, MAX_DIMENSIONS, carried_dtype
from dray.payload.tree import Build, Field, Tree
from dray.text import printable_value

ALIGNMENT = 64
"""Tensors start at a multiple of this many bytes from the start of the image."""

MAX_HEADER_BYTES = 4 << 20
"""Limit on the JSON header of an image that is written or read."""

MAX_TENSORS = 16_384
"""Limit on the tensors of a payload."""

MAX_RECORD_BYTES = (1 << 31) - 1
"""Limit that NumPy sets on the size of a structured dtype. Views of larger images are made one by one."""

MAX_CACHED_HEADERS = 512
"""Entries of each cache. The limits below bound the size of an entry."""
MAX_CACHED_FIELDS = 256
MAX_CACHED_METADATA = 4096
MAX_CACHED_HEADER_BYTES = 16 << 10
MAX_CACHED_LARGE_HEADERS = 2
"""Headers above that size, such as those of a model's weights, that are kept: one takes up to 87 ms to check."""

_LENGTH = struct.Struct("<Q")
_length_of: Callable[[Any], tuple[int]] = _LENGTH.unpack_from  # an ndarray is a buffer, unlike in its stubs
_METADATA = "__metadata__"
_TENSOR_KEYS = {"dtype", "shape", "data_offsets"}
_MAX_BYTES = (1 << 63) - 1


class Layout(NamedTuple):
    """Where the tensors of an image lie."""

    tensors: tuple[tuple[tuple[int, ...], np.dtype[Any], int], ...]  # shape, dtype, offset in the image
    nbytes: int
    members: tuple[tuple[str, str], ...]  # the name of each tensor, and its field in `record`
    # The image as one structured dtype: a view of a field costs a fifth of `np.ndarray(…)`.
    record: np.dtype[Any] | None


class Header(NamedTuple):
    """The content of an image's header."""

    layout: Layout
    metadata: tuple[tuple[str, str], ...]
    aligned: bool  # every tensor lies at a multiple of its alignment from the image's start
    widest: tuple[str, str]  # the member of the largest alignment: when `aligned`, its address decides for all
    build: Build | None  # makes the values of a payload with nested ones of its tensors, by the keys of `members`
    structure: Tree | None  # that of nested values


def build_header(
    fields: list[Field], metadata: Mapping[str, str] | None, structure: Tree | None = None
) -> tuple[npt.NDArray[np.uint8], Layout]:
    """Return the header of an image with `fields`, preceded by its length, and the layout of the image.

    Args:
        fields: the tensors.
        metadata: strings by name.
        structure: that of nested values.

    Raises:
        PayloadFormatError: a name, dtype, shape or the metadata cannot be carried.
    """
    described = () if structure is None else ((tree.KEY, structure.description),)
    if metadata is None:
        return (cached_build if len(fields) <= MAX_CACHED_FIELDS else _build)(tuple(fields), described)
    if not isinstance(metadata, Mapping):
        raise PayloadFormatError(f"metadata must be a mapping, not {type(metadata).__name__}")
    strings = tuple(metadata.items())
    for pair in strings:
        if not all(isinstance(text, str) for text in pair):
            raise PayloadFormatError(f"metadata must map strings to strings; found {printable_value(pair)}")
    if tree.KEY in metadata:
        raise PayloadFormatError(f"{tree.KEY!r} cannot be a name in the metadata: nested values use it")
    small = (
        len(fields) <= MAX_CACHED_FIELDS
        and sum(len(key) + len(text) for key, text in strings) <= MAX_CACHED_METADATA
    )
    return (cached_build if small else _build)(tuple(fields), (*strings, *described))


def parse_header(root: npt.NDArray[np.uint8]) -> Header:
    """Return the header of the image `root` after checking all of it.

    Raises:
        PayloadFormatError: `root` is not a valid payload.
    """
    return parse_text(header_text(root), len(root))


def header_text(root: npt.NDArray[np.uint8]) -> bytes:
    """Return the JSON text of the header of the image `root`, unchecked.

    Raises:
        PayloadFormatError: `root` is too short to have one.
    """
    nbytes = len(root)
    if nbytes < _LENGTH.size:
        raise PayloadFormatError(f"the image has {nbytes} bytes, too few for a header")
    (length,) = _length_of(root)
    if length > MAX_HEADER_BYTES or length > nbytes - _LENGTH.size:
        raise PayloadFormatError(f"the header claims {length} bytes in an image of {nbytes}")
    return root[_LENGTH.size : _LENGTH.size + length].tobytes()


def parse_text(text: bytes, nbytes: int) -> Header:
    """Return the header with this text, of an image of `nbytes` bytes, after checking all of it.

    Raises:
        PayloadFormatError: it is not valid.
    """
    header = (cached_parse if len(text) <= MAX_CACHED_HEADER_BYTES else _cached_large_parse)(text)
    if header.layout.nbytes != nbytes:
        raise PayloadFormatError(f"the image has {nbytes} bytes, its header describes {header.layout.nbytes}")
    return header


def _layout(
    names: Iterable[str], tensors: tuple[tuple[tuple[int, ...], np.dtype[Any], int], ...], nbytes: int
) -> Layout:
    keys = tuple(map(str, range(len(tensors))))
    record = None
    if nbytes <= MAX_RECORD_BYTES:
        try:
            formats = [(dtype, shape) for shape, dtype, _ in tensors]
            offsets = [offset for _, _, offset in tensors]
            record = np.dtype({"names": keys, "formats": formats, "offsets": offsets, "itemsize": nbytes})
        except ValueError:  # a structured dtype cannot have the dimensions of some empty tensors
            record = None
    return Layout(tensors, nbytes, tuple(zip(names, keys, strict=True)), record)


def _check_count(tensors: int) -> None:
    if tensors > MAX_TENSORS:
        raise PayloadFormatError(f"a payload has at most {MAX_TENSORS} tensors; this one has {tensors}")


def _build(
    fields: tuple[Field, ...], metadata: tuple[tuple[str, str], ...]
) -> tuple[npt.NDArray[np.uint8], Layout]:
    _check_count(len(fields))
    dtypes, sizes = [], []
    for name, dtype, shape in fields:
        if not isinstance(name, str):
            raise PayloadFormatError(f"field name {printable_value(name)} is not text, which names must be")
        if name == _METADATA:
            raise PayloadFormatError(f"{name!r} cannot be the name of a field")
        if len(shape) > MAX_DIMENSIONS:
            shown = printable_value(name)
            raise PayloadFormatError(f"field {shown} has {len(shape)} dimensions, more than {MAX_DIMENSIONS}")
        stored = carried_dtype(name, dtype)
        dtypes.append(stored)
        sizes.append(prod(shape) * stored.itemsize)
    starts = [0] * len(fields)
    end = 0
    for index in sorted(range(len(fields)), key=lambda index: -dtypes[index].itemsize):
        starts[index] = end
        end += sizes[index]
    members = [f'"{_METADATA}":{_to_json(dict(metadata))}'] if metadata else []
    for (name, _, shape), dtype, start, size in zip(fields, dtypes, starts, sizes, strict=True):
        members.append(
            f'{_to_json(name)}:{{"dtype":"{DTYPE_NAMES[dtype]}","shape":[{",".join(map(str, shape))}],'
            f'"data_offsets":[{start},{start + size}]}}'
        )
    try:
        text = f"{{{','.join(members)}}}".encode()
    except UnicodeEncodeError as error:
        raise PayloadFormatError(f"a name or metadata is not valid Unicode: {error}") from error
    text += b" " * (-(_LENGTH.size + len(text)) % ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise PayloadFormatError(f"the header needs {len(text)} bytes; at most {MAX_HEADER_BYTES} are allowed")
    base = _LENGTH.size + len(text)
    tensors = tuple(
        (shape, dtype, base + start) for (_, _, shape), dtype, start in zip(fields, dtypes, starts, strict=True)
    )
    layout = _layout((name for name, _, _ in fields), tensors, base + end)
    return np.frombuffer(_LENGTH.pack(len(text)) + text, np.uint8), layout


cached_build = lru_cache(MAX_CACHED_HEADERS)(_build)
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _parse(text: bytes) -> Header:
    if text[:1] != b"{":
        raise PayloadFormatError("the header is not a JSON object")
    try:
        content = from_json(text.decode())
        # A lone surrogate can be written as an escape, but a name that holds one could not be packed again.
        "".join(content).encode()
    except (ValueError, RecursionError) as error:
        raise PayloadFormatError(f"the header is not valid JSON: {error}") from error
    base = _LENGTH.size + len(text)
    metadata = content.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise PayloadFormatError(f"{_METADATA} does not map strings to strings")
    _check_count(len(content))
    tensors, spans = [], []
    aligned, widest, alignment = True, 0, 0
    for index, (name, described) in enumerate(content.items()):
        shape, dtype, start, end = _check_tensor(name, described)
        tensors.append((shape, dtype, base + start))
        spans.append((start, end, name))
        aligned = aligned and (base + start) % dtype.alignment == 0
        if dtype.alignment > alignment:
            widest, alignment = index, dtype.alignment
    reached = 0
    for start, end, name in sorted(spans):
        if start != reached:
            raise PayloadFormatError(
                f"tensor {printable_value(name)} starts at {start}, expected {reached}: overlap or hole"
            )
        reached = end
    description = metadata.pop(tree.KEY, None)
    layout = _layout(content, tuple(tensors), base + reached)
    build = structure = None
    if description is not None:
        shapes = {name: (shape, dtype) for name, (shape, dtype, _) in zip(content, tensors, strict=True)}
        structure = tree.parse(description, shapes)
        build = tree.builder(structure, dict(layout.members))
    member = layout.members[widest] if layout.members else ("", "")
    return Header(layout, tuple(metadata.items()), aligned, member, build, structure)


cached_parse = lru_cache(MAX_CACHED_HEADERS)(_parse)
_cached_large_parse = lru_cache(MAX_CACHED_LARGE_HEADERS)(_parse)


def _check_tensor(name: str, described: object) -> tuple[tuple[int, ...], np.dtype[Any], int, int]:
    if not isinstance(described, dict) or described.keys() != _TENSOR_KEYS:
        raise _refusal(name, "is not described by dtype, shape and data_offsets")
    code, shape, offsets = described["dtype"], described["shape"], described["data_offsets"]
    dtype = DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise _refusal(name, f"has dtype {printable_value(code)}, which is not known")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
        raise _refusal(name, f"has a shape that is not a list of {MAX_DIMENSIONS} sizes or less")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise _refusal(name, "has data_offsets that are not two sizes")
    size = dtype.itemsize * prod(shape)
    # NumPy leaves zeros out of the product: it also limits the other dimensions of an empty array.
    if size > _MAX_BYTES or (size == 0 and dtype.itemsize * prod(filter(None, shape)) > _MAX_BYTES):
        raise _refusal(name, f"has shape {shape}, which is too large to address")
    start, end = offsets
    if end - start != size:
        raise _refusal(name, f"has data_offsets {offsets}, which do not fit its shape {shape}")
    return tuple(shape), dtype, start, end


def _refusal(name: str, problem: str) -> PayloadFormatError:
    return PayloadFormatError(f"tensor {printable_value(name)} {problem}")


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_BYTES  # `isinstance` would accept JSON's true


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key appears twice")
    return content


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


from_json = json.JSONDecoder(object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant).decode
"""Reads JSON that is not trusted: a key that appears twice, or a constant such as NaN, is a ValueError."""
