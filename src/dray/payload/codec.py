"""Packs arrays into bytes and unpacks them. No other module makes arrays of bytes.

A payload is a safetensors file image::

    0        8                       8 + n (a multiple of 64)                          nbytes
    ├────────┼───────────────────────┼─────────────────────────────────────────────────┤
    │ n, u64 │ JSON header, padded   │ tensors by falling item size, without gaps      │
    │ little │ with spaces           │ offsets in the header count from 8 + n          │
    └────────┴───────────────────────┴─────────────────────────────────────────────────┘

The header names the tensors in the order of the mapping that was packed. `unpack` trusts no image: it checks the
whole header before it makes a view. `dray.payload.header` builds and checks headers and computes the layout.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from math import prod
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dray.errors import PayloadFormatError, PayloadTooLargeError, SchemaError
from dray.payload import tree
from dray.payload.header import Header, Layout, build_header, parse_header
from dray.payload.schema import Array, Arrays, FittedField, PayloadSchema, TensorSpec, Values, as_array, store
from dray.payload.selection import Selection, part_of
from dray.payload.tree import Field, Tensors, Tree
from dray.text import printable_value

Image: TypeAlias = bytes | bytearray | memoryview | mmap.mmap | npt.NDArray[np.uint8]
"""Memory that holds an image."""

_UINT8 = np.dtype(np.uint8)


class PackPlan:
    """Arrays that are checked and ready to be written as one image of `nbytes` bytes. Keeps the arrays alive."""

    __slots__ = ("_fitted", "_header", "_layout", "_sources", "nbytes")

    def __init__(
        self, header: npt.NDArray[np.uint8], layout: Layout, sources: list[Array], fitted: list[FittedField] | None
    ) -> None:
        self.nbytes: int = layout.nbytes
        self._header = header
        self._layout = layout
        self._sources = sources
        self._fitted = fitted

    def write(self, target: Image) -> None:
        """Write the image into the first `nbytes` bytes of `target`. Each array is copied once.

        Raises:
            PayloadTooLargeError: `target` is too small.
            SchemaError: a value is outside the range of its field's dtype; `target` is then partly written.
            PayloadFormatError: `target` is not a writable, contiguous buffer.
        """
        root = _as_root(target)
        if len(root) < self.nbytes:
            raise PayloadTooLargeError(f"the payload has {self.nbytes} bytes, the target only {len(root)}")
        if not root.flags.writeable:
            raise PayloadFormatError("the target is read-only")
        root[: len(self._header)] = self._header
        views = _views(root, self._layout).values()
        if self._fitted is None:
            for view, source in zip(views, self._sources, strict=True):
                view[...] = source
        else:
            for view, (name, source, _, cast) in zip(views, self._fitted, strict=True):
                store(name, source, view, cast)


def plan(
    arrays: Mapping[str, Any],
    schema: PayloadSchema | None = None,
    metadata: Mapping[str, str] | None = None,
) -> PackPlan:
    """Check `arrays` and return the plan of their image. Only tensors on a device are copied, to the host.

    Args:
        arrays: field name → NumPy array, torch tensor, list or number, which become arrays; or a nested value:
            text, None, `Ragged`, or a mapping, list or tuple of nested values and arrays. Arrays need not be
            contiguous. Big-endian arrays become little-endian.
        schema: the fields, dtypes and shapes that are required; see `PayloadSchema`.
        metadata: strings by name, stored in the header.

    Raises:
        SchemaError: a field is missing, unknown, or does not fit; the message names it.
        PayloadFormatError: a name, dtype, value or the metadata cannot be carried.
    """
    if type(arrays) is not dict and not isinstance(arrays, Mapping):
        raise PayloadFormatError(f"arrays must be a mapping of name to array, not {type(arrays).__name__}")
    sources: list[Array] = []
    fields: list[Field] = []
    fitted: list[FittedField] | None = None
    structure: Tree | None = None
    if schema is None:
        for name, value in arrays.items():
            if type(value) is np.ndarray:
                array = value
            elif tree.is_nested(value):
                structure, sources = tree.flatten(arrays)
                named = zip(structure.names, sources, strict=True)
                fields = [(name, array.dtype, array.shape) for name, array in named]
                break
            else:
                array = as_array(name, value)
            sources.append(array)
            fields.append((name, array.dtype, array.shape))
    elif schema.flat:
        fitted = schema.fit(arrays)
        fields = [(name, dtype, array.shape) for name, array, dtype, _ in fitted]
    else:
        structure, fitted = tree.fit(schema, arrays)
        fields = [
            (name, dtype, array.shape) for name, (_, array, dtype, _) in zip(structure.names, fitted, strict=True)
        ]
    return PackPlan(*build_header(fields, metadata, structure), sources, fitted)


class RowsPlan:
    """Rows of columns that are ready to be written as images of one layout, each of `nbytes` bytes.

    Attributes:
        count: the number of rows.
        nbytes: bytes of each image.
    """

    __slots__ = ("_columns", "_header", "_layout", "count", "nbytes")

    def __init__(self, header: npt.NDArray[np.uint8], layout: Layout, columns: list[Array], count: int) -> None:
        self.count = count
        self.nbytes: int = layout.nbytes
        self._header = header
        self._layout = layout
        self._columns = columns

    def write(self, targets: npt.NDArray[np.uint8], first: int = 0) -> None:
        """Write the images of the rows from `first` on, one into each row of `targets`, of `nbytes` bytes each."""
        targets[:, : len(self._header)] = self._header
        rows = slice(first, first + len(targets))
        for (shape, dtype, offset), column in zip(self._layout.tensors, self._columns, strict=True):
            if nbytes := prod(shape) * dtype.itemsize:
                target = targets[:, offset : offset + nbytes].view(dtype)
                target[...] = column[rows].reshape(len(targets), -1)


def plan_rows(columns: Mapping[str, Array]) -> RowsPlan:
    """Return the plan of the images of the rows of `columns`; each is that of the row's arrays, see `plan`.

    Raises:
        PayloadFormatError: a name or dtype cannot be carried, there is no column, or their lengths differ.
    """
    lengths = {name: len(column) if column.ndim else None for name, column in columns.items()}
    if len(set(lengths.values())) != 1 or None in lengths.values():
        raise PayloadFormatError(f"columns must be arrays of one length, not of {printable_value(lengths)}")
    arrays = list(columns.values())
    header, layout = build_header(
        [(name, column.dtype, column.shape[1:]) for name, column in columns.items()], None
    )
    return RowsPlan(header, layout, arrays, len(arrays[0]))


class BlankPlan:
    """An image of `nbytes` bytes whose arrays are still to be filled."""

    __slots__ = ("_header", "_layout", "nbytes")

    def __init__(self, header: npt.NDArray[np.uint8], layout: Layout) -> None:
        self.nbytes: int = layout.nbytes
        self._header = header
        self._layout = layout

    def begin(self, target: Image) -> Arrays:
        """Write the header into `target`, which has `nbytes` bytes; returns its arrays, to be filled in place."""
        root = _as_root(target)
        root[: len(self._header)] = self._header
        return _views(root, self._layout)


def plan_blank(fields: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None) -> BlankPlan:
    """Return the plan of an image with arrays of these dtypes and shapes, which are filled later.

    Raises:
        SchemaError: a shape has a dimension of no fixed length; the message names the field.
        PayloadFormatError: a name or the metadata cannot be carried.
    """
    described: list[Field] = []
    for name, spec in fields.items():
        shape = tuple(length for length in spec.shape if length is not None)
        if len(shape) < len(spec.shape):
            raise SchemaError(f"field {printable_value(name)} has shape {spec.shape}, and lengths must be numbers")
        described.append((name, spec.numpy_dtype, shape))
    return BlankPlan(*build_header(described, metadata))


def pack(
    arrays: Mapping[str, Any],
    schema: PayloadSchema | None = None,
    metadata: Mapping[str, str] | None = None,
) -> bytearray:
    """Return the image of `arrays` in new memory; see `plan` for arguments and errors."""
    planned = plan(arrays, schema, metadata)
    image = bytearray(planned.nbytes)
    planned.write(image)
    return image


def unpack(image: Image, schema: PayloadSchema | None = None, selection: Selection | None = None) -> Values:
    """Return the content of `image`: its tensors as arrays, in the order of its header, or its nested values.

    The arrays are views on the image, read-only if it is read-only. Misaligned tensors, which other libraries may
    write, are copied. If `image` is a uint8 array whose own base is not an array, such as ``np.frombuffer(…)``, it
    is the base of every view: a weak reference to it is valid as long as any view, slice of one, or tensor on one.

    Args:
        image: bytes-like object or one-dimensional contiguous uint8 array that holds exactly one image.
        schema: fields that must be there, with exactly these dtypes and shapes.
        selection: the part that is wanted; all by default. Several ranges of rows of one array are a copy.

    Raises:
        PayloadFormatError: `image` is not a valid payload.
        SelectionError: it has not what is selected, or is not a valid payload to select from.
        SchemaError: the payload, or the part of it, does not fit the schema; the message names the field.
    """
    root = _as_root(image)
    if selection is not None:
        part = part_of(root, selection)
        values: Values = part.values(_tensors(root, part.source))
    else:
        header = parse_header(root)
        values = _aligned_views(root, header) if header.build is None else header.build(_tensors(root, header))
    if schema is not None:
        schema.verify(values)
    return values


def unpack_metadata(image: Image) -> dict[str, str]:
    """Return the metadata in the header of `image`; empty when there is none.

    Raises:
        PayloadFormatError: `image` is not a valid payload.
    """
    return dict(parse_header(_as_root(image)).metadata)


def max_nbytes(schema: PayloadSchema) -> int:
    """Return the size in bytes of the largest image without metadata that fits `schema`. A slot needs this size.

    Raises:
        SchemaError: a field has no limit; the message names it.
    """
    structure, fields = tree.largest(schema)
    return build_header(fields, None, None if schema.flat else structure)[1].nbytes


def _views(root: npt.NDArray[np.uint8], layout: Layout) -> Arrays:
    """Views on the tensors of the image at the start of `root`, which is their base."""
    if layout.record is None:
        named = zip(layout.members, layout.tensors, strict=True)
        return {name: np.ndarray(shape, dtype, root, offset) for (name, _), (shape, dtype, offset) in named}
    image: Array = np.ndarray((), layout.record, root)
    return {name: image[key] for name, key in layout.members}


def _aligned_views(root: npt.NDArray[np.uint8], header: Header) -> Arrays:
    """As `_views`, with copies of the tensors that are misaligned."""
    arrays = _views(root, header.layout)
    if arrays and not (header.aligned and arrays[header.widest[0]].flags.aligned):
        for name, view in arrays.items():
            if not view.flags.aligned:
                arrays[name] = view.copy()
                arrays[name].flags.writeable = view.flags.writeable
    return arrays


def _tensors(root: npt.NDArray[np.uint8], header: Header) -> Tensors:
    """The tensors by the keys of the members of their layout, without views of those that are not asked for."""
    if header.layout.record is not None and header.aligned and header.layout.members:
        image: Array = np.ndarray((), header.layout.record, root)
        if image[header.widest[1]].flags.aligned:
            return image
    arrays = _aligned_views(root, header)
    return {key: arrays[name] for name, key in header.layout.members}


def _as_root(image: Image) -> npt.NDArray[np.uint8]:
    if isinstance(image, np.ndarray):
        if image.dtype != _UINT8 or image.ndim != 1 or not image.flags.c_contiguous:
            raise PayloadFormatError("an image given as an array must be one-dimensional contiguous uint8")
        return image
    try:
        return np.frombuffer(image, np.uint8)
    except (TypeError, ValueError, BufferError) as error:
        raise PayloadFormatError(f"{type(image).__name__} is not a contiguous buffer of bytes: {error}") from error
