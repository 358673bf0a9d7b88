"""The memory of a ring: a sealed memfd, mapped writable by its creator and read-only by all others.

The creator seals it after mapping it, so that no process can shrink it under a reader or map it writable.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Final

from dray.errors import BufferClosedError, ConfigError, ProtocolError, SlotError
from dray.identifiers import PRODUCER_ID_BYTES
from dray.resources import close_all, keep_result, needing, out_of_resources
from dray.ring.layout import SEGMENT_HEADER, SegmentLayout, unpack_segment_header
from dray.ring.mapping import SEALS, SharedMemory, fork_lock, map_shared, new_memfd, populate, seal, seals_of

_NO_MEMORY: Final = frozenset({errno.ENOMEM, errno.ENOSPC, errno.EFBIG, errno.EINVAL, errno.EOVERFLOW})


class Segment(SharedMemory):
    """Shared memory with the layout of `dray.ring.layout`. Use `create` or `attach` to make one.

    Views stay valid after `close`: the memory is unmapped with the last view and the last array made from one.

    Attributes:
        layout: the offsets of the slots.
        producer_id: the 16 bytes that name the ring.
        nbytes: size of the segment.
        writable: true only for the creator.
    """

    def __init__(
        self, layout: SegmentLayout, producer_id: bytes, view: memoryview, numbers: list[int], *, writable: bool
    ) -> None:
        self.layout = layout
        self.producer_id = producer_id
        self.nbytes = layout.nbytes
        self.writable = writable
        self._view: memoryview | None = view
        self.numbers = numbers

    @classmethod
    def create(cls, layout: SegmentLayout, producer_id: bytes, *, prefault: bool = False) -> Segment:
        """A new segment: its header, and zeros.

        Args:
            layout: its slots.
            producer_id: 16 bytes.
            prefault: reserve and map all pages now instead of at the first write to each.

        Raises:
            ConfigError: this system has no sealed memfd, a sandbox refuses a system call, or the segment is too
                large to be mapped or reserved.
            OutOfResources: the process has no file descriptor left.
        """
        if len(producer_id) != PRODUCER_ID_BYTES:
            raise ConfigError("producer_id", producer_id, f"{PRODUCER_ID_BYTES} bytes")
        with fork_lock, new_memfd("a ring") as made:
            (fd,) = made
            with _sized(layout):
                os.ftruncate(fd, layout.nbytes)
                view = map_shared(fd, layout.nbytes, writable=True)
            seal(fd, SEALS)
            segment = cls(layout, producer_id, view, made, writable=True)
            segment.keep_from_children()
        try:
            if prefault:
                with _sized(layout):
                    os.posix_fallocate(fd, 0, layout.nbytes)
                populate(view)
        except BaseException:
            segment.close()
            raise
        view[: SEGMENT_HEADER.size] = layout.pack_segment_header(producer_id)
        return segment

    @classmethod
    def attach(cls, fd: int) -> Segment:
        """Map the segment behind `fd` for reading. The caller may close `fd` at once.

        Raises:
            ConfigError: a sandbox refuses a system call.
            ProtocolError: `fd` is not a dray segment, is not sealed, or its size contradicts its header.
            SlotError: the memory cannot be mapped.
            OutOfResources: the process has no memory or no mapping left.
        """
        layout, producer_id = identify_segment(fd)
        with fork_lock:
            view = _mapped(fd, layout.nbytes, private=False)
            segment = cls(layout, producer_id, view, [], writable=False)
            segment.keep_from_children()
        return segment

    @classmethod
    def inherit(cls, fd: int) -> Segment:
        """Map the segment behind `fd`, whose creator has died, and keep a descriptor of it for readers.

        What is written to the view stays in this process: readers see what the creator has left. The caller may
        close `fd` at once. Raises the same as `attach`.
        """
        layout, producer_id = identify_segment(fd)
        numbers: list[int] = []
        with fork_lock:
            try:
                with needing("a descriptor of a segment"):
                    keep_result(numbers, os.dup, fd)
                view = _mapped(fd, layout.nbytes, private=True)
                segment = cls(layout, producer_id, view, numbers, writable=True)
            except BaseException:
                close_all(numbers)
                raise
            segment.keep_from_children()
        return segment

    @property
    def closed(self) -> bool:
        return self._view is None

    @property
    def view(self) -> memoryview:
        """All bytes of the segment; writable only for its creator.

        Raises:
            BufferClosedError: the segment is closed, or belongs to the parent of this process.
        """
        if self._view is None:
            raise BufferClosedError("the segment is closed")
        return self._view

    def slot_offset(self, slot: int) -> int:
        """Byte offset of `slot` in the segment."""
        return self.layout.slot_offset(slot)

    def fileno(self) -> int:
        """The memfd, for readers to attach. The segment closes it.

        Raises:
            BufferClosedError: the segment is closed.
            SlotError: this process attached the segment, and so has no descriptor.
        """
        if self.closed:
            raise BufferClosedError("the segment is closed")
        if not self.numbers:
            raise SlotError("only the creator of a segment has its descriptor")
        return self.numbers[0]

    def __repr__(self) -> str:
        state = "closed" if self.closed else "writable" if self.writable else "read-only"
        size = f"{self.layout.slots} x {self.layout.slot_bytes} bytes"
        return f"<Segment {self.producer_id.hex()[:8]} {size}, {state}>"

    def forget(self) -> None:
        """Close the descriptor and drop the view."""
        self._view = None
        close_all(self.numbers)


def identify_segment(fd: int) -> tuple[SegmentLayout, bytes]:
    """The layout and the producer id of the segment behind `fd`. Maps nothing.

    Raises:
        ConfigError: a sandbox refuses a system call.
        ProtocolError: `fd` is not a dray segment, is not sealed, or its size contradicts its header.
    """
    try:
        nbytes = os.fstat(fd).st_size
        seals = seals_of(fd)
        header = os.pread(fd, SEGMENT_HEADER.size, 0)
    except OSError as error:
        raise ProtocolError(f"descriptor {fd} is not shared memory: {error.strerror}") from error
    if seals & SEALS != SEALS:
        raise ProtocolError(f"the segment is not sealed: its seals are {seals:#x}, not {SEALS:#x}")
    layout, producer_id = unpack_segment_header(header)
    if nbytes != layout.nbytes:
        raise ProtocolError(f"the segment has {nbytes} bytes, its header requires {layout.nbytes}")
    return layout, producer_id


def _mapped(fd: int, nbytes: int, *, private: bool) -> memoryview:
    try:
        return map_shared(fd, nbytes, writable=private, private=private)
    except OSError as error:
        why = f"a segment of {nbytes} bytes cannot be mapped: {error.strerror}"
        raise out_of_resources(error, f"a mapping of {nbytes} bytes") or SlotError(why) from error


@contextlib.contextmanager
def _sized(layout: SegmentLayout) -> Iterator[None]:
    """Name the setting that is too large when the system refuses the memory."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_MEMORY:
            raise
        value = f"{layout.slots} x {layout.slot_bytes}"
        allowed = f"a segment of {layout.nbytes} bytes must fit into this machine's memory ({error.strerror})"
        raise ConfigError("slots x slot_bytes", value, allowed, f"= {value} is too much") from error
