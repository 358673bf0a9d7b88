"""What has changed from one version of arrays to the next: a delta. No I/O.

`encode` compares the images of two versions (`dray.payload.codec`) by their bits. `apply` makes the newer image of
the older one and the delta, in other memory, and compares a hash of the whole result. All integers are
little-endian; each piece is padded to a multiple of 8 bytes::

    0     ┌───────────────────────────────────────────┐
          │ magic "DRAYDELT"                       8s │    an image begins with the length of its header, which
    8     ├───────────────────────────────────────────┤    is always a smaller number
          │ number of the version that it changes u64 │
    16    ├───────────────────────────────────────────┤
          │ bytes of the image                    u64 │
    24    ├───────────────────────────────────────────┤
          │ xxh3-64 of the newer image            u64 │
    32    ├───────────────────────────────────────────┤
          │ its slot                              u64 │
    40    ├───────────────────────────────────────────┤
          │ its sequence number                   u64 │
    48    ├───────────────────────────────────────────┤
          │ elements of 8, 4, 2 and 1 bytes    4 x u64 │    they lie at the end of the image, in this order
    80    ├───────────────────────────────────────────┤
          │ for each span: kind u32, changed u32       │
          ├───────────────────────────────────────────┤
          │ for each span: its pieces                 │
          └───────────────────────────────────────────┘

A span is up to `SPAN_ELEMENTS` elements of one size. Its pieces depend on its kind, the smallest of:

| kind | pieces |
|---|---|
| EQUAL | |
| INDICES | how many elements of each block have changed, u32; their indices in the block, rising, u16; values |
| BITMAP | a bit for each element, the lowest bit of a byte first; values |
| ALL | all values |
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from math import prod
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from dray.errors import PayloadFormatError
from dray.payload.header import parse_header
from dray.payload.schema import Array

Bytes = npt.NDArray[np.uint8]

MAGIC: Final = b"DRAYDELT"
HEADER: Final = struct.Struct("<8sQQQQQ4Q")

SPAN_ELEMENTS: Final = 1 << 20
"""Elements that are compared and changed together: temporary memory does not depend on the size of a version."""

BLOCK_ELEMENTS: Final = 1 << 16
"""Elements that one index of 16 bits can distinguish."""

METADATA: Final = {"dray.delta": "sparse"}
"""In the header of each image that may be the base of a delta: a subscriber keeps it."""

_UNITS: Final = tuple(np.dtype(f"<u{size}") for size in (8, 4, 2, 1))
_SPAN: Final = np.dtype([("kind", "<u4"), ("changed", "<u4")])
_U16, _U32, _U8 = np.dtype("<u2"), np.dtype("<u4"), np.dtype(np.uint8)


class Kind(enum.IntEnum):
    """How a span is encoded."""

    EQUAL = 0
    INDICES = 1
    BITMAP = 2
    ALL = 3


class Delta(NamedTuple):
    """The header of a delta.

    Attributes:
        base: the number of the version that it changes.
        nbytes: the size of the image, before and after.
        digest: xxh3-64 of the newer image.
        slot, sequence: the payload that is the newer image.
        elements: how many elements of 8, 4, 2 and 1 bytes the image has.
    """

    base: int
    nbytes: int
    digest: int
    slot: int
    sequence: int
    elements: tuple[int, ...]

    @classmethod
    def parse(cls, payload: Bytes) -> Delta | None:
        """The header of a payload that is a delta; None if the payload is none.

        Raises:
            PayloadFormatError: its sizes contradict each other.
        """
        if payload[: len(MAGIC)].tobytes() != MAGIC:
            return None
        if len(payload) < HEADER.size:
            raise PayloadFormatError(f"a delta has {HEADER.size} bytes at least, not {len(payload)}")
        _, base, nbytes, digest, slot, sequence, *elements = HEADER.unpack_from(payload.data)
        delta = cls(base, nbytes, digest, slot, sequence, tuple(elements))
        if delta.first < 0:
            raise PayloadFormatError(f"a delta names {elements} elements in an image of {nbytes} bytes")
        return delta

    @property
    def first(self) -> int:
        """Where the elements begin in the image."""
        return self.nbytes - sum(n * unit.itemsize for n, unit in zip(self.elements, _UNITS, strict=True))

    def spans(self) -> Iterator[tuple[int, np.dtype[Any], int]]:
        """The offset in the image, the dtype of the elements, and their number, for each span."""
        offset = self.first
        for elements, unit in zip(self.elements, _UNITS, strict=True):
            for begin in range(0, elements, SPAN_ELEMENTS):
                yield offset + begin * unit.itemsize, unit, min(SPAN_ELEMENTS, elements - begin)
            offset += elements * unit.itemsize

    @property
    def table_bytes(self) -> int:
        """The size of the table of spans."""
        return _SPAN.itemsize * sum(-(-elements // SPAN_ELEMENTS) for elements in self.elements)


def encode(old: Bytes, new: Bytes, target: Bytes, *, base: int, slot: int, sequence: int) -> int:
    """Write the delta that makes the image `new` of the image `old`; returns its size in bytes.

    Args:
        old: the older image.
        new: the newer image.
        target: where to write.
        base: the number of the older version.
        slot, sequence: the payload that is the newer image.

    Returns:
        0 if there is no delta: names, dtypes or shapes have changed, or `target` is too small.
    """
    elements = dict.fromkeys((unit.itemsize for unit in _UNITS), 0)
    for shape, dtype, _ in parse_header(new).layout.tensors:
        elements[dtype.itemsize] += prod(shape)
    delta = Delta(base, len(new), 0, slot, sequence, tuple(elements.values()))
    end = HEADER.size + delta.table_bytes
    if len(old) != len(new) or not np.array_equal(old[: delta.first], new[: delta.first]) or end > len(target):
        return 0
    table = np.frombuffer(target.data, _SPAN, delta.table_bytes // _SPAN.itemsize, HEADER.size)
    digest = xxhash.xxh3_64(new[: delta.first].data)
    for index, (offset, unit, length) in enumerate(delta.spans()):
        values = _elements(new, offset, unit, length)
        digest.update(values.data)
        kind, changed, pieces = _encoded(_elements(old, offset, unit, length), values)
        table[index] = kind, changed
        for piece in pieces:
            begin, end = end, end + _padded(piece.nbytes)
            if end > len(target):
                return 0
            target[begin : begin + piece.nbytes] = piece.view(_U8)
            target[begin + piece.nbytes : end] = 0
    HEADER.pack_into(target.data, 0, MAGIC, base, len(new), digest.intdigest(), slot, sequence, *delta.elements)
    return end


def apply(payload: Bytes, delta: Delta, old: Bytes, target: Bytes) -> None:
    """Make the newer image of the older one.

    Args:
        payload: the delta.
        delta: its header.
        old: the older image.
        target: where to write the newer image: memory of its size. After an error, what is there has no meaning.

    Raises:
        PayloadFormatError: the delta is not valid, which is found before `target` is written to; or `old` is not
            the image that it was made of, as the hash shows.
    """
    if not len(old) == len(target) == delta.nbytes:
        raise PayloadFormatError(f"a delta for an image of {delta.nbytes} bytes does not fit {len(old)} bytes")
    for _ in _changes(payload, delta):
        pass
    target[: delta.first] = old[: delta.first]
    digest = xxhash.xxh3_64(target[: delta.first].data)
    for offset, unit, length, indices, values in _changes(payload, delta):
        made = _elements(target, offset, unit, length)
        if indices is None:
            made[:] = values
        else:
            made[:] = _elements(old, offset, unit, length)
            made[indices] = values
        digest.update(made.data)
    if digest.intdigest() != delta.digest:
        raise PayloadFormatError("a delta does not fit the version that it is applied to: the hash is another one")


# --- spans ------------------------------------------------------------------------------------------------------


def _encoded(old: Array, new: Array) -> tuple[Kind, int, tuple[Array, ...]]:
    """The smallest encoding of a span: its kind, the number of changed elements, and its pieces."""
    different = old != new  # integers: bits are compared, not numbers
    length, changed = len(new), int(np.count_nonzero(different))
    if not changed:
        return Kind.EQUAL, 0, ()
    blocks = -(-length // BLOCK_ELEMENTS)
    mask_bytes = min(_U32.itemsize * blocks + _U16.itemsize * changed, -(-length // 8))
    if mask_bytes + changed * new.itemsize >= new.nbytes:
        return Kind.ALL, length, (new,)
    indices = np.flatnonzero(different)
    values = new[indices]
    if mask_bytes == -(-length // 8):
        return Kind.BITMAP, changed, (np.packbits(different, bitorder="little"), values)
    counts = np.bincount(indices // BLOCK_ELEMENTS, minlength=blocks).astype(_U32)
    return Kind.INDICES, changed, (counts, indices.astype(_U16), values)  # the cast keeps the lowest 16 bits


def _changes(
    payload: Bytes, delta: Delta
) -> Iterator[tuple[int, np.dtype[Any], int, Array | None, Array]]:  # fmt: skip
    """Offset, dtype and number of elements of each span, the indices that have changed (None: all), their values.

    Raises:
        PayloadFormatError: a span is not valid.
    """
    end = HEADER.size + delta.table_bytes
    if end > len(payload):
        raise PayloadFormatError(f"a delta of {len(payload)} bytes is too short for its table of spans")
    table = np.frombuffer(payload.data, _SPAN, delta.table_bytes // _SPAN.itemsize, HEADER.size)
    pieces = _Pieces(payload, end)
    for index, (offset, unit, length) in enumerate(delta.spans()):
        kind, changed = map(int, table[index])
        indices: Array | None
        if kind == Kind.EQUAL and changed == 0:
            indices = np.empty(0, np.int64)
        elif kind == Kind.INDICES and 0 < changed <= length:
            counts = pieces.next(_U32, -(-length // BLOCK_ELEMENTS)).astype(np.int64)
            if counts.sum() != changed:
                raise PayloadFormatError(f"span {index} of a delta has {counts.sum()} indices, not {changed}")
            indices = np.repeat(np.arange(len(counts)) * BLOCK_ELEMENTS, counts) + pieces.next(_U16, changed)
            if indices[-1] >= length or not (indices[1:] > indices[:-1]).all():
                raise PayloadFormatError(
                    f"span {index} of a delta has indices that do not rise, or leave the span"
                )
        elif kind == Kind.BITMAP and 0 < changed <= length:
            bits = np.unpackbits(pieces.next(_U8, -(-length // 8)), bitorder="little")
            indices = np.flatnonzero(bits.view(np.bool_))
            if len(indices) != changed or indices[-1] >= length:
                raise PayloadFormatError(f"span {index} of a delta has {len(indices)} bits, not {changed}")
        elif kind == Kind.ALL and changed == length:
            indices = None
        else:
            raise PayloadFormatError(f"span {index} of a delta has kind {kind} for {changed} of {length} elements")
        yield offset, unit, length, indices, pieces.next(unit, changed)
    if pieces.end != len(payload):
        raise PayloadFormatError(f"a delta has {len(payload)} bytes, its spans describe {pieces.end}")


class _Pieces:
    """The pieces of a delta, one after the other."""

    def __init__(self, payload: Bytes, begin: int) -> None:
        self.end = begin
        self._payload = payload

    def next(self, dtype: np.dtype[Any], length: int) -> Array:
        """The next piece."""
        begin, nbytes = self.end, length * dtype.itemsize
        self.end = begin + _padded(nbytes)
        if self.end > len(self._payload):
            raise PayloadFormatError(f"a delta of {len(self._payload)} bytes ends within a span")
        return self._payload[begin : begin + nbytes].view(dtype)


def _elements(image: Bytes, offset: int, unit: np.dtype[Any], length: int) -> Array:
    return image[offset : offset + length * unit.itemsize].view(unit)


def _padded(nbytes: int) -> int:
    return -(-nbytes // 8) * 8
