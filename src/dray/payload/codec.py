"""Arrays to bytes and back: the only place where bytes become arrays.

A payload is a safetensors file image::

    0        8                       8 + n (a multiple of 64)                          nbytes
    ├────────┼───────────────────────┼─────────────────────────────────────────────────┤
    │ n, u64 │ JSON header, padded   │ tensors by falling item size, without gaps      │
    │ little │ with spaces           │ offsets in the header count from 8 + n          │
    └────────┴───────────────────────┴─────────────────────────────────────────────────┘

The header names the tensors in the order of the mapping that was packed. An image that comes from elsewhere is
untrusted: everything its header says is checked before a view is made. Only its tensors' values are taken as they
are.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Mapping
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from dray.errors import PayloadFormatError, PayloadTooLargeError, SchemaError
from dray.payload.tensor_spec import (
    DTYPE_NAMES,
    DTYPES,
    MAX_DIMENSIONS,
    Array,
    Fitted,
    PayloadSchema,
    as_array,
    carried_dtype,
    store,
)

Image: TypeAlias = bytes | bytearray | memoryview | mmap.mmap | npt.NDArray[np.uint8]
"""What an image is written into and read from."""

ALIGNMENT = 64
"""The data region starts at a multiple of this many bytes from the start of the image."""

MAX_HEADER_BYTES = 16 << 20
"""The longest JSON header that is written or read."""

_LENGTH = struct.Struct("<Q")
_METADATA = "__metadata__"
_MAX_BYTES = (1 << 63) - 1
_UINT8 = np.dtype(np.uint8)

# What the caches hold is bounded in number and, through these, in size.
_CACHED_LAYOUTS = 256
_CACHED_FIELDS = 256
_CACHED_METADATA = 4096
_CACHED_HEADER_BYTES = 64 << 10

_Entry = tuple[tuple[int, ...], np.dtype[Any], int]  # shape, dtype as stored, offset in the image
_Field = tuple[str, np.dtype[Any], tuple[int, ...]]


class PackPlan:
    """Arrays that are ready to be written as one image of `nbytes` bytes. It keeps the arrays alive."""

    __slots__ = ("_entries", "_fitted", "_header", "_sources", "nbytes")

    def __init__(self, layout: _Layout, sources: list[Array], fitted: list[Fitted] | None) -> None:
        self.nbytes: int = layout.nbytes
        self._header = layout.header
        self._entries = layout.entries
        self._sources = sources
        self._fitted = fitted

    def write(self, target: Image) -> None:
        """Write the image into the first `nbytes` bytes of `target`, in one copy per array.

        Raises:
            PayloadTooLargeError: `target` is too small.
            SchemaError: a cast met a value outside the range of its field; `target` is then partly written.
            PayloadFormatError: `target` is not a writable, contiguous buffer.
        """
        root = _as_root(target)
        if root.nbytes < self.nbytes:
            raise PayloadTooLargeError(f"the payload has {self.nbytes} bytes, the target only {root.nbytes}")
        if not root.flags.writeable:
            raise PayloadFormatError("the target is read-only")
        header = self._header
        root.data[: len(header)] = header
        if self._fitted is None:
            for (shape, dtype, offset), source in zip(self._entries, self._sources, strict=True):
                np.ndarray(shape, dtype, root, offset)[...] = source
        else:
            for (shape, dtype, offset), (name, source, _, cast) in zip(self._entries, self._fitted, strict=True):
                store(name, source, np.ndarray(shape, dtype, root, offset), cast)


def plan(
    arrays: Mapping[str, npt.ArrayLike],
    schema: PayloadSchema | None = None,
    metadata: Mapping[str, str] | None = None,
) -> PackPlan:
    """Check `arrays` and work out their image; nothing is copied yet.

    Args:
        arrays: field name → NumPy array, torch tensor, list or number. Big-endian arrays become little-endian;
            arrays need not be contiguous; a tensor on a device is copied to the host here.
        schema: what the fields must look like, see `PayloadSchema`.
        metadata: further strings, kept in the header.

    Raises:
        SchemaError: a field is missing, unknown, or does not fit; the message names it.
        PayloadFormatError: a name, dtype, value or the metadata cannot be carried.
    """
    if not isinstance(arrays, Mapping):
        raise PayloadFormatError(f"arrays must be a mapping of name to array, not {type(arrays).__name__}")
    sources: list[Array] = []
    fields: list[_Field] = []
    fitted: list[Fitted] | None = None
    if schema is None:
        for name, value in arrays.items():
            array = value if type(value) is np.ndarray else as_array(name, value)
            sources.append(array)
            fields.append((name, array.dtype, array.shape))
    else:
        fitted = schema.fit(arrays)
        fields = [(name, dtype, array.shape) for name, array, dtype, _ in fitted]
    return PackPlan(_layout(fields, metadata), sources, fitted)


def pack(
    arrays: Mapping[str, npt.ArrayLike],
    schema: PayloadSchema | None = None,
    metadata: Mapping[str, str] | None = None,
) -> bytearray:
    """Return the image of `arrays` in memory of its own; see `plan` for arguments and errors."""
    planned = plan(arrays, schema, metadata)
    image = bytearray(planned.nbytes)
    planned.write(image)
    return image


def unpack(image: Image, schema: PayloadSchema | None = None) -> dict[str, Array]:
    """Return the tensors of `image` as arrays, in the order of its header.

    The arrays are views on the image, read-only if it is read-only; tensors that lie misaligned (in an image
    from elsewhere) are copied. Where `image` is a uint8 array whose own base is not an array, such as
    ``np.frombuffer(…)``, it is the base of every view: a weak reference to it lives as long as any view, slice of
    a view, or tensor on one.

    Args:
        image: bytes-like object or one-dimensional contiguous uint8 array, exactly one safetensors image.
        schema: if given, the fields must have exactly its dtypes and shapes.

    Raises:
        PayloadFormatError: `image` is not a valid payload.
        SchemaError: the payload does not fit the schema; the message names the field.
    """
    root = _as_root(image)
    parsed = _parse(root)
    arrays = {name: np.ndarray(shape, dtype, root, offset) for name, (shape, dtype, offset) in parsed.entries}
    if parsed.entries and not (parsed.aligned and arrays[parsed.widest].flags.aligned):
        for name, array in arrays.items():
            if not array.flags.aligned:
                arrays[name] = array.copy()
                arrays[name].flags.writeable = root.flags.writeable
    if schema is not None:
        schema.verify(arrays)
    return arrays


def unpack_metadata(image: Image) -> dict[str, str]:
    """Return the metadata in the header of `image`; empty when there is none.

    Raises:
        PayloadFormatError: `image` is not a valid payload.
    """
    return dict(_parse(_as_root(image)).metadata)


def max_nbytes(schema: PayloadSchema) -> int:
    """Return the size of the largest image without metadata that fits `schema`: what a slot must hold.

    Raises:
        SchemaError: a dimension has no bound; the message names the field.
    """
    fields: list[_Field] = []
    for name, spec in schema.items():
        shape = spec.max_shape
        if shape is None:
            raise SchemaError(f"field {name!r} has a dimension without a bound: {spec.shape}")
        fields.append((name, spec.numpy_dtype, shape))
    return _layout(fields, None).nbytes


# --- writing --------------------------------------------------------------------------------------------------


class _Layout(NamedTuple):
    header: bytes  # with its length in front
    entries: tuple[_Entry, ...]  # in the order of the fields
    nbytes: int


def _layout(fields: list[_Field], metadata: Mapping[str, str] | None) -> _Layout:
    strings: tuple[tuple[str, str], ...] = ()
    if metadata is not None:
        if not isinstance(metadata, Mapping):
            raise PayloadFormatError(f"metadata must be a mapping, not {type(metadata).__name__}")
        strings = tuple(metadata.items())
        for pair in strings:
            if not all(isinstance(text, str) for text in pair):
                raise PayloadFormatError(f"metadata must map strings to strings; found {pair!r}")
    characters = sum(len(key) + len(value) for key, value in strings)
    small = len(fields) <= _CACHED_FIELDS and characters <= _CACHED_METADATA
    return (_cached_layout if small else _build_layout)(tuple(fields), strings)


def _build_layout(fields: tuple[_Field, ...], metadata: tuple[tuple[str, str], ...]) -> _Layout:
    stored = []
    for name, dtype, shape in fields:
        if not isinstance(name, str) or name == _METADATA:
            raise PayloadFormatError(f"{name!r} cannot be the name of a field")
        if len(shape) > MAX_DIMENSIONS:
            raise PayloadFormatError(
                f"field {name!r} has {len(shape)} dimensions; at most {MAX_DIMENSIONS} can be carried"
            )
        stored.append(carried_dtype(name, dtype))
    starts = [0] * len(fields)
    end = 0
    for index in sorted(range(len(fields)), key=lambda index: -stored[index].itemsize):
        starts[index] = end
        end += prod(fields[index][2]) * stored[index].itemsize
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    for (name, _, shape), dtype, start in zip(fields, stored, starts, strict=True):
        nbytes = prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": shape,
            "data_offsets": (start, start + nbytes),
        }
    try:
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise PayloadFormatError(f"a name or metadata is not valid Unicode: {error}") from error
    text += b" " * (-(_LENGTH.size + len(text)) % ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise PayloadFormatError(f"the header needs {len(text)} bytes; at most {MAX_HEADER_BYTES} are allowed")
    base = _LENGTH.size + len(text)
    entries = tuple(
        (shape, dtype, base + start) for (_, _, shape), dtype, start in zip(fields, stored, starts, strict=True)
    )
    return _Layout(_LENGTH.pack(len(text)) + text, entries, base + end)


_cached_layout = lru_cache(_CACHED_LAYOUTS)(_build_layout)


# --- reading --------------------------------------------------------------------------------------------------


class _Parsed(NamedTuple):
    entries: tuple[tuple[str, _Entry], ...]
    metadata: tuple[tuple[str, str], ...]
    nbytes: int
    aligned: bool  # every tensor lies at a multiple of its alignment from the image's start
    widest: str  # a tensor of the largest alignment: when `aligned`, its address decides for all


def _as_root(image: Image) -> npt.NDArray[np.uint8]:
    if isinstance(image, np.ndarray):
        if image.dtype != _UINT8 or image.ndim != 1 or not image.flags.c_contiguous:
            raise PayloadFormatError("an image given as an array must be one-dimensional contiguous uint8")
        return image
    try:
        return np.frombuffer(image, np.uint8)
    except (TypeError, ValueError, BufferError) as error:
        raise PayloadFormatError(f"{type(image).__name__} is not a contiguous buffer of bytes: {error}") from error


def _parse(root: npt.NDArray[np.uint8]) -> _Parsed:
    if root.nbytes < _LENGTH.size:
        raise PayloadFormatError(f"the image has {root.nbytes} bytes, too few for a header")
    (length,) = _LENGTH.unpack_from(root.data)
    if length > min(MAX_HEADER_BYTES, root.nbytes - _LENGTH.size):
        raise PayloadFormatError(f"the header claims {length} bytes in an image of {root.nbytes}")
    header = root[_LENGTH.size : _LENGTH.size + length].tobytes()
    parsed = _cached_header(header) if length <= _CACHED_HEADER_BYTES else _parse_header(header)
    if parsed.nbytes != root.nbytes:
        raise PayloadFormatError(f"the image has {root.nbytes} bytes, its header describes {parsed.nbytes}")
    return parsed


def _parse_header(header: bytes) -> _Parsed:
    if header[:1] != b"{":
        raise PayloadFormatError("the header is not a JSON object")
    try:
        content = json.loads(
            header.decode(), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant
        )
        # A lone surrogate can be written as an escape, but no name that holds one can be passed on.
        for name in content:
            name.encode()
    except (ValueError, RecursionError) as error:
        raise PayloadFormatError(f"the header is not valid JSON: {error}") from error
    base = _LENGTH.size + len(header)
    metadata = _check_metadata(content.pop(_METADATA, {}))
    entries = []
    spans = []
    for name, tensor in content.items():
        shape, dtype, start, end = _check_tensor(name, tensor)
        entries.append((name, (shape, dtype, base + start)))
        spans.append((start, end, name))
    reached = 0
    for start, end, name in sorted(spans):
        if start != reached:
            raise PayloadFormatError(f"tensor {name!r} starts at {start}, expected {reached}: overlap or hole")
        reached = end
    return _Parsed(
        tuple(entries),
        metadata,
        base + reached,
        all(offset % dtype.alignment == 0 for _, (_, dtype, offset) in entries),
        max(entries, key=lambda entry: entry[1][1].alignment)[0] if entries else "",
    )


_cached_header = lru_cache(_CACHED_LAYOUTS)(_parse_header)


def _check_tensor(name: str, tensor: object) -> tuple[tuple[int, ...], np.dtype[Any], int, int]:
    if not isinstance(tensor, dict) or tensor.keys() != {"dtype", "shape", "data_offsets"}:
        raise PayloadFormatError(f"tensor {name!r} is not described by dtype, shape and data_offsets")
    dtype = DTYPES.get(tensor["dtype"]) if isinstance(tensor["dtype"], str) else None
    if dtype is None:
        raise PayloadFormatError(f"tensor {name!r} has unknown dtype {tensor['dtype']!r}")
    shape, offsets = tensor["shape"], tensor["data_offsets"]
    for numbers in (shape, offsets):
        # `type` and not `isinstance`: JSON's true is not a length.
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n <= _MAX_BYTES for n in numbers):
            raise PayloadFormatError(f"tensor {name!r} has a shape or data_offsets not made of sizes")
    if len(shape) > MAX_DIMENSIONS:
        raise PayloadFormatError(f"tensor {name!r} has {len(shape)} dimensions; at most {MAX_DIMENSIONS} are read")
    # Over the non-zero lengths, as NumPy does: an empty array's shape must be addressable too.
    if dtype.itemsize * prod(n for n in shape if n) > _MAX_BYTES:
        raise PayloadFormatError(f"tensor {name!r} has shape {shape}, more than can be addressed")
    if len(offsets) != 2 or offsets[1] - offsets[0] != dtype.itemsize * prod(shape):
        raise PayloadFormatError(f"tensor {name!r} has data_offsets {offsets}, which do not fit its shape {shape}")
    return tuple(shape), dtype, offsets[0], offsets[1]


def _check_metadata(metadata: object) -> tuple[tuple[str, str], ...]:
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise PayloadFormatError(f"{_METADATA} does not map strings to strings")
    return tuple(metadata.items())


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key appears twice")
    return content


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")
