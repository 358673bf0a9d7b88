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
_TENSOR_KEYS = {"dtype", "shape", "data_offsets"}
_MAX_BYTES = (1 << 63) - 1
_MAX_RECORD_BYTES = (1 << 31) - 1
_UINT8 = np.dtype(np.uint8)

# What the caches hold is bounded in number and, through these, in size.
_CACHED = 512
_CACHED_FIELDS = 256
_CACHED_METADATA = 4096
_CACHED_HEADER_BYTES = 16 << 10

_Field = tuple[str, np.dtype[Any], tuple[int, ...]]


class PackPlan:
    """Arrays that are ready to be written as one image of `nbytes` bytes. It keeps the arrays alive."""

    __slots__ = ("_fitted", "_header", "_layout", "_sources", "nbytes")

    def __init__(
        self, header: npt.NDArray[np.uint8], layout: _Layout, sources: list[Array], fitted: list[Fitted] | None
    ) -> None:
        self.nbytes: int = layout.nbytes
        self._header = header
        self._layout = layout
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
        if len(root) < self.nbytes:
            raise PayloadTooLargeError(f"the payload has {self.nbytes} bytes, the target only {len(root)}")
        if not root.flags.writeable:
            raise PayloadFormatError("the target is read-only")
        root[: len(self._header)] = self._header
        views = _views(root, self._layout)
        if self._fitted is None:
            for view, source in zip(views, self._sources, strict=True):
                view[...] = source
        else:
            for view, (name, source, _, cast) in zip(views, self._fitted, strict=True):
                store(name, source, view, cast)


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
    if type(arrays) is not dict and not isinstance(arrays, Mapping):
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
    return PackPlan(*_image_of(fields, metadata), sources, fitted)


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
    views = _views(root, parsed.layout)
    if views and not (parsed.aligned and views[parsed.widest].flags.aligned):
        views = [view if view.flags.aligned else _aligned_copy(view) for view in views]
    arrays = dict(zip(parsed.names, views, strict=True))
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
    return _image_of(fields, None)[1].nbytes


# --- layout ---------------------------------------------------------------------------------------------------


class _Layout(NamedTuple):
    """Where the tensors of an image lie."""

    tensors: tuple[tuple[tuple[int, ...], np.dtype[Any], int], ...]  # shape, dtype, offset in the image
    nbytes: int
    keys: tuple[str, ...]
    # The image as one structured dtype with a field per key: a view of a field costs a fifth of `np.ndarray(…)`.
    record: np.dtype[Any] | None


def _layout(tensors: tuple[tuple[tuple[int, ...], np.dtype[Any], int], ...], nbytes: int) -> _Layout:
    keys = tuple(map(str, range(len(tensors))))
    record = None
    if nbytes <= _MAX_RECORD_BYTES:
        try:
            record = np.dtype(
                {
                    "names": keys,
                    "formats": [(dtype, shape) for shape, dtype, _ in tensors],
                    "offsets": [offset for _, _, offset in tensors],
                    "itemsize": nbytes,
                }
            )
        except ValueError:  # an empty tensor with a dimension that a structured dtype cannot express
            record = None
    return _Layout(tensors, nbytes, keys, record)


def _views(root: npt.NDArray[np.uint8], layout: _Layout) -> list[Array]:
    """Arrays on the tensors of an image that `root` starts with; `root` is their base."""
    if layout.record is None:
        return [np.ndarray(shape, dtype, root, offset) for shape, dtype, offset in layout.tensors]
    image: Array = np.ndarray((), layout.record, root)
    return [image[key] for key in layout.keys]


def _aligned_copy(view: Array) -> Array:
    copy = view.copy()
    copy.flags.writeable = view.flags.writeable
    return copy


def _as_root(image: Image) -> npt.NDArray[np.uint8]:
    if isinstance(image, np.ndarray):
        if image.dtype != _UINT8 or image.ndim != 1 or not image.flags.c_contiguous:
            raise PayloadFormatError("an image given as an array must be one-dimensional contiguous uint8")
        return image
    try:
        return np.frombuffer(image, np.uint8)
    except (TypeError, ValueError, BufferError) as error:
        raise PayloadFormatError(f"{type(image).__name__} is not a contiguous buffer of bytes: {error}") from error


# --- writing --------------------------------------------------------------------------------------------------


def _image_of(fields: list[_Field], metadata: Mapping[str, str] | None) -> tuple[npt.NDArray[np.uint8], _Layout]:
    """The header, with its length in front, and the layout of an image with `fields`."""
    if metadata is None:
        return (_cached_build if len(fields) <= _CACHED_FIELDS else _build)(tuple(fields), ())
    if not isinstance(metadata, Mapping):
        raise PayloadFormatError(f"metadata must be a mapping, not {type(metadata).__name__}")
    strings = tuple(metadata.items())
    for pair in strings:
        if not all(isinstance(text, str) for text in pair):
            raise PayloadFormatError(f"metadata must map strings to strings; found {pair!r}")
    small = (
        len(fields) <= _CACHED_FIELDS and sum(len(key) + len(text) for key, text in strings) <= _CACHED_METADATA
    )
    return (_cached_build if small else _build)(tuple(fields), strings)


def _build(
    fields: tuple[_Field, ...], metadata: tuple[tuple[str, str], ...]
) -> tuple[npt.NDArray[np.uint8], _Layout]:
    dtypes, sizes = [], []
    for name, dtype, shape in fields:
        if not isinstance(name, str) or name == _METADATA:
            raise PayloadFormatError(f"{name!r} cannot be the name of a field")
        if len(shape) > MAX_DIMENSIONS:
            raise PayloadFormatError(f"field {name!r} has {len(shape)} dimensions, more than {MAX_DIMENSIONS}")
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
    return np.frombuffer(_LENGTH.pack(len(text)) + text, np.uint8), _layout(tensors, base + end)


_cached_build = lru_cache(_CACHED)(_build)
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


# --- reading --------------------------------------------------------------------------------------------------


class _Parsed(NamedTuple):
    names: tuple[str, ...]
    layout: _Layout
    metadata: tuple[tuple[str, str], ...]
    aligned: bool  # every tensor lies at a multiple of its alignment from the image's start
    widest: int  # index of a tensor of the largest alignment: when `aligned`, its address decides for all


def _parse(root: npt.NDArray[np.uint8]) -> _Parsed:
    nbytes = len(root)
    if nbytes < _LENGTH.size:
        raise PayloadFormatError(f"the image has {nbytes} bytes, too few for a header")
    (length,) = _LENGTH.unpack_from(root.data)
    if length > MAX_HEADER_BYTES or length > nbytes - _LENGTH.size:
        raise PayloadFormatError(f"the header claims {length} bytes in an image of {nbytes}")
    header = root[_LENGTH.size : _LENGTH.size + length].tobytes()
    parsed = (_cached_parse if length <= _CACHED_HEADER_BYTES else _parse_header)(header)
    if parsed.layout.nbytes != nbytes:
        raise PayloadFormatError(f"the image has {nbytes} bytes, its header describes {parsed.layout.nbytes}")
    return parsed


def _parse_header(header: bytes) -> _Parsed:
    if header[:1] != b"{":
        raise PayloadFormatError("the header is not a JSON object")
    try:
        content = _from_json(header.decode())
        # A lone surrogate can be written as an escape, but a name that holds one could not be packed again.
        "".join(content).encode()
    except (ValueError, RecursionError) as error:
        raise PayloadFormatError(f"the header is not valid JSON: {error}") from error
    base = _LENGTH.size + len(header)
    metadata = content.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise PayloadFormatError(f"{_METADATA} does not map strings to strings")
    tensors, spans = [], []
    aligned, widest = True, 0
    for index, (name, described) in enumerate(content.items()):
        shape, dtype, start, end = _check_tensor(name, described)
        tensors.append((shape, dtype, base + start))
        spans.append((start, end, name))
        aligned = aligned and (base + start) % dtype.alignment == 0
        if dtype.alignment > tensors[widest][1].alignment:
            widest = index
    reached = 0
    for start, end, name in sorted(spans):
        if start != reached:
            raise PayloadFormatError(f"tensor {name!r} starts at {start}, expected {reached}: overlap or hole")
        reached = end
    return _Parsed(
        tuple(content), _layout(tuple(tensors), base + reached), tuple(metadata.items()), aligned, widest
    )


_cached_parse = lru_cache(_CACHED)(_parse_header)


def _check_tensor(name: str, described: object) -> tuple[tuple[int, ...], np.dtype[Any], int, int]:
    if not isinstance(described, dict) or described.keys() != _TENSOR_KEYS:
        raise PayloadFormatError(f"tensor {name!r} is not described by dtype, shape and data_offsets")
    code, shape, offsets = described["dtype"], described["shape"], described["data_offsets"]
    dtype = DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise PayloadFormatError(f"tensor {name!r} has dtype {code!r}, which is not known")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
        raise PayloadFormatError(
            f"tensor {name!r} has a shape that is not a list of {MAX_DIMENSIONS} sizes or less"
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise PayloadFormatError(f"tensor {name!r} has data_offsets that are not two sizes")
    size = dtype.itemsize * prod(shape)
    # NumPy's own bound leaves zeros out of the product: the shape of an empty array must be addressable too.
    if size > _MAX_BYTES or (size == 0 and dtype.itemsize * prod(filter(None, shape)) > _MAX_BYTES):
        raise PayloadFormatError(f"tensor {name!r} has shape {shape}, more than can be addressed")
    start, end = offsets
    if end - start != size:
        raise PayloadFormatError(f"tensor {name!r} has data_offsets {offsets}, which do not fit its shape {shape}")
    return tuple(shape), dtype, start, end


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_BYTES  # JSON's true is an `int` by `isinstance`


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key appears twice")
    return content


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


_from_json = json.JSONDecoder(object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant).decode
