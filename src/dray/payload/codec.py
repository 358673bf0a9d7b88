"""Arrays to bytes and back: the only place where bytes become arrays.

A payload is a safetensors file image::

    0        8                       8 + n (a multiple of 64)                          nbytes
    ├────────┼───────────────────────┼─────────────────────────────────────────────────┤
    │ n, u64 │ JSON header, padded   │ tensors by falling item size, without gaps      │
    │ little │ with spaces           │ offsets in the header count from 8 + n          │
    └────────┴───────────────────────┴─────────────────────────────────────────────────┘

The header names the tensors in the order of the mapping that was packed. An image that comes from elsewhere is
untrusted: everything its header says is checked before a view is made. Only its tensors' values are taken as they
are. `dray.payload.header` builds and checks headers, and works out where the tensors lie.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from dray.errors import PayloadFormatError, PayloadTooLargeError, SchemaError
from dray.payload.header import Field, Layout, build_header, parse_header
from dray.payload.schema import Array, Fitted, PayloadSchema, as_array, store

Image: TypeAlias = bytes | bytearray | memoryview | mmap.mmap | npt.NDArray[np.uint8]
"""What an image is written into and read from."""

_UINT8 = np.dtype(np.uint8)


class PackPlan:
    """Arrays that are ready to be written as one image of `nbytes` bytes. It keeps the arrays alive."""

    __slots__ = ("_fitted", "_header", "_layout", "_sources", "nbytes")

    def __init__(
        self, header: npt.NDArray[np.uint8], layout: Layout, sources: list[Array], fitted: list[Fitted] | None
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
    fields: list[Field] = []
    fitted: list[Fitted] | None = None
    if schema is None:
        for name, value in arrays.items():
            array = value if type(value) is np.ndarray else as_array(name, value)
            sources.append(array)
            fields.append((name, array.dtype, array.shape))
    else:
        fitted = schema.fit(arrays)
        fields = [(name, dtype, array.shape) for name, array, dtype, _ in fitted]
    return PackPlan(*build_header(fields, metadata), sources, fitted)


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
    header = parse_header(root)
    views = _views(root, header.layout)
    if views and not (header.aligned and views[header.widest].flags.aligned):
        views = [view if view.flags.aligned else _aligned_copy(view) for view in views]
    arrays = dict(zip(header.names, views, strict=True))
    if schema is not None:
        schema.verify(arrays)
    return arrays


def unpack_metadata(image: Image) -> dict[str, str]:
    """Return the metadata in the header of `image`; empty when there is none.

    Raises:
        PayloadFormatError: `image` is not a valid payload.
    """
    return dict(parse_header(_as_root(image)).metadata)


def max_nbytes(schema: PayloadSchema) -> int:
    """Return the size of the largest image without metadata that fits `schema`: what a slot must hold.

    Raises:
        SchemaError: a dimension has no bound; the message names the field.
    """
    fields: list[Field] = []
    for name, spec in schema.items():
        shape = spec.max_shape
        if shape is None:
            raise SchemaError(f"field {name!r} has a dimension without a bound: {spec.shape}")
        fields.append((name, spec.numpy_dtype, shape))
    return build_header(fields, None)[1].nbytes


# --- views ----------------------------------------------------------------------------------------------------


def _views(root: npt.NDArray[np.uint8], layout: Layout) -> list[Array]:
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
