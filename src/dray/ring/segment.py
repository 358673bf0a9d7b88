"""The memory of a ring: a sealed memfd, mapped writable by its creator and read-only by all others.

A memfd has no name: the kernel frees it with its last mapping and descriptor. The creator seals it after mapping
it, so that no process can shrink it under a reader or map it writable.

The memory is mapped with `mmap` of the C library. A Python `mmap` object keeps a copy of the descriptor that a
forked child cannot close, and unmaps its address range in the child, where other memory may lie by then.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Final, NoReturn

from dray.errors import BufferClosedError, ConfigError, ProtocolError, SlotError
from dray.identifiers import PRODUCER_ID_BYTES
from dray.resources import Closing, keep_result, needing, out_of_resources
from dray.ring.layout import SEGMENT_HEADER, SegmentLayout, unpack_segment_header
from dray.system_calls import needed

if sys.platform != "win32":
    import fcntl  # at import: a process without a free descriptor cannot load the module later

# Constants of Linux; the modules `mmap` and `fcntl` do not have all of them.
_PROT_READ, _PROT_WRITE, _MAP_SHARED = 1, 2, 1
_MAP_FAILED: Final = ctypes.c_void_p(-1).value
_MADV_DONTFORK, _MADV_POPULATE_WRITE = 10, 23
_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034
_F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW, _F_SEAL_FUTURE_WRITE = 0x01, 0x02, 0x04, 0x10
SEALS: Final = _F_SEAL_SHRINK | _F_SEAL_GROW | _F_SEAL_FUTURE_WRITE | _F_SEAL_SEAL

_NO_MEMORY: Final = frozenset({errno.ENOMEM, errno.ENOSPC, errno.EFBIG, errno.EINVAL, errno.EOVERFLOW})


class Segment(Closing):
    """Shared memory with the layout of `dray.ring.layout`. Use `create` or `attach` to make one.

    Views stay valid after `close`: the memory is unmapped with the last view and the last array made from one.

    Attributes:
        layout: the offsets of the slots.
        producer_id: the 16 bytes that name the ring.
        nbytes: size of the segment.
        writable: true only for the creator.
    """

    def __init__(
        self, layout: SegmentLayout, producer_id: bytes, view: memoryview, fd: int, *, writable: bool
    ) -> None:
        self.layout = layout
        self.producer_id = producer_id
        self.nbytes = layout.nbytes
        self.writable = writable
        self._view: memoryview | None = view
        self._fd = fd

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
        if not sys.platform.startswith("linux") or not hasattr(os, "memfd_create"):
            needs = "shared memory needs memfd_create of Linux 5.1 or later"
            raise ConfigError("sys.platform", sys.platform, needs)
        with _fork_lock:
            made: list[int] = []
            try:
                with needing("a ring"), needed("memfd_create"):
                    keep_result(made, os.memfd_create, "dray", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
                (fd,) = made
                with _sized(layout):
                    os.ftruncate(fd, layout.nbytes)
                    view = _map(fd, layout.nbytes, writable=True)
                _seal(fd)
            except BaseException:
                for each in made:
                    os.close(each)
                raise
            segment = cls(layout, producer_id, view, fd, writable=True)
            _segments.add(segment)
        try:
            if prefault:
                with _sized(layout):
                    os.posix_fallocate(fd, 0, layout.nbytes)
                address = ctypes.addressof(ctypes.c_ubyte.from_buffer(view))
                _advise(address, layout.nbytes, _MADV_POPULATE_WRITE, optional=True)
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
        try:
            nbytes = os.fstat(fd).st_size
            with needed("fcntl"):
                seals = fcntl.fcntl(fd, _F_GET_SEALS)
            header = os.pread(fd, SEGMENT_HEADER.size, 0)
        except OSError as error:
            raise ProtocolError(f"descriptor {fd} is not shared memory: {error.strerror}") from error
        if seals & SEALS != SEALS:
            raise ProtocolError(f"the segment is not sealed: its seals are {seals:#x}, not {SEALS:#x}")
        layout, producer_id = unpack_segment_header(header)
        if nbytes != layout.nbytes:
            raise ProtocolError(f"the segment has {nbytes} bytes, its header requires {layout.nbytes}")
        with _fork_lock:
            try:
                view = _map(fd, nbytes, writable=False)
            except OSError as error:
                why = f"a segment of {nbytes} bytes cannot be mapped: {error.strerror}"
                raise out_of_resources(error, f"a mapping of {nbytes} bytes") or SlotError(why) from error
            segment = cls(layout, producer_id, view, -1, writable=False)
            _segments.add(segment)
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
        if self._fd < 0:
            raise SlotError("only the creator of a segment has its descriptor")
        return self._fd

    def close(self) -> None:
        """Close the descriptor; unmap the memory now, or with the last view in use. Twice is fine."""
        with _fork_lock:
            self.forget()

    def __repr__(self) -> str:
        state = "closed" if self.closed else "writable" if self.writable else "read-only"
        size = f"{self.layout.slots} x {self.layout.slot_bytes} bytes"
        return f"<Segment {self.producer_id.hex()[:8]} {size}, {state}>"

    def forget(self) -> None:
        """Close the descriptor and drop the view."""
        fd, self._fd, self._view = self._fd, -1, None
        if fd >= 0:
            os.close(fd)


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.argtypes = [address, size, number, number, number, ctypes.c_long]
    libc.munmap.argtypes = [address, size]
    libc.madvise.argtypes = [address, size, number]
    return libc


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


def _map(fd: int, nbytes: int, *, writable: bool) -> memoryview:
    """Map `fd`; the memory is unmapped with the last view of it."""
    libc = _libc()
    protection = _PROT_READ | _PROT_WRITE if writable else _PROT_READ
    _unmap_dead()
    mapped: list[int] = []
    try:
        keep_result(mapped, libc.mmap, None, nbytes, protection, _MAP_SHARED, fd, 0)
        if mapped == [_MAP_FAILED]:
            with needed("mmap"):
                _raise_errno()
        (address,) = mapped
        _advise(address, nbytes, _MADV_DONTFORK)
        memory = (ctypes.c_ubyte * nbytes).from_address(address)
        _mappings[address] = weakref.ref(memory, _unmap_dead), nbytes
    except BaseException:
        for address in mapped:
            if address != _MAP_FAILED and address not in _mappings:
                libc.munmap(address, nbytes)
        raise
    view = memoryview(memory).cast("B")
    return view if writable else view.toreadonly()


def _raise_errno() -> NoReturn:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number))


def _unmap_dead(_: object = None) -> None:
    """Unmap all memory whose last view was deleted.

    The garbage collector of any thread calls this, so it takes no lock. If a signal handler raises in it, the next
    call unmaps the rest. It removes an entry before it unmaps, because the address may be used again after that.
    """
    for address, (memory, nbytes) in list(_mappings.items()):
        if memory() is None and _mappings.pop(address, None) is not None:
            _libc().munmap(address, nbytes)


def _advise(address: int, nbytes: int, advice: int, *, optional: bool = False) -> None:
    """Give the kernel `advice` about memory; a kernel that does not know it may refuse what is `optional`."""
    if _libc().madvise(address, nbytes, advice) != 0 and not (optional and ctypes.get_errno() == errno.EINVAL):
        with needed("madvise"):
            _raise_errno()


def _seal(fd: int) -> None:
    try:
        with needed("fcntl"):
            fcntl.fcntl(fd, _F_ADD_SEALS, SEALS)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        allowed = "shared memory needs the seals of Linux 5.1 or later"
        release = os.uname().release
        raise ConfigError("kernel", release, allowed, f"{release} is too old") from error


# --- fork -----------------------------------------------------------------------------------------------------
#
# A child does not inherit the mappings. It closes the descriptors, so that it does not keep the memory alive, and
# drops the addresses: other memory may lie there in the child. The lock prevents a fork between the creation of a
# descriptor or mapping and its entry here. It is reentrant, because a signal handler may fork while it is held.

_fork_lock = threading.RLock()
_segments: weakref.WeakSet[Segment] = weakref.WeakSet()
_mappings: dict[int, tuple[weakref.ref[ctypes.Array[ctypes.c_ubyte]], int]] = {}


def _disown_in_child() -> None:
    _mappings.clear()
    for segment in _segments:
        segment.forget()
    _segments.clear()
    _fork_lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_fork_lock.acquire, after_in_parent=_fork_lock.release, after_in_child=_disown_in_child
    )
