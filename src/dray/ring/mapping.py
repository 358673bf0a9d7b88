"""Memory that processes share: memfds, their seals and their mappings.

A memfd has no name: the kernel frees it with its last mapping and descriptor. The memory is mapped with `mmap` of
the C library. A Python `mmap` object keeps a copy of the descriptor that a forked child cannot close, and unmaps
its address range in the child, where other memory may lie by then.

A forked child does not inherit the mappings. It closes the descriptors, so that it does not keep the memory alive,
and drops the addresses: other memory may lie there in the child.
"""

from __future__ import annotations

import abc
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

import numpy as np
import numpy.typing as npt

from dray.errors import ConfigError
from dray.resources import Closing, close_all, keep_result, needing
from dray.system_calls import needed

if sys.platform != "win32":
    import fcntl  # at import: a process without a free descriptor cannot load the module later

# Constants of Linux; the modules `mmap` and `fcntl` do not have all of them.
_PROT_READ, _PROT_WRITE, _MAP_SHARED, _MAP_PRIVATE, _MAP_NORESERVE = 1, 2, 1, 2, 0x4000
_MAP_FAILED: Final = ctypes.c_void_p(-1).value
_MADV_DONTFORK, _MADV_POPULATE_WRITE = 10, 23
_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034
_F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW, _F_SEAL_FUTURE_WRITE = 0x01, 0x02, 0x04, 0x10

FIXED_SIZE: Final = _F_SEAL_SHRINK | _F_SEAL_GROW | _F_SEAL_SEAL
"""The seals of memory that several processes write: none of them can shrink it under another."""

SEALS: Final = FIXED_SIZE | _F_SEAL_FUTURE_WRITE
"""The seals of memory that only its creator writes: no other process can map it writable."""

fork_lock = threading.RLock()
"""Held while a descriptor or a mapping is made and entered here, so that no fork comes in between.

It is reentrant, because a signal handler may fork while it is held.
"""

_mappings: dict[int, tuple[weakref.ref[npt.NDArray[np.uint8]], int]] = {}
_shared: weakref.WeakSet[SharedMemory] = weakref.WeakSet()


class SharedMemory(Closing):
    """Memory behind a memfd. Views stay valid after `close`: the memory is unmapped with the last of them.

    Attributes:
        numbers: the creator's descriptor, until it is closed.
    """

    numbers: list[int] = []  # for `__del__`, if an exception of a signal handler came before `__init__` began

    @abc.abstractmethod
    def forget(self) -> None:
        """Close the descriptor and drop the view; also called in a forked child."""

    def close(self) -> None:
        """Close the descriptor; unmap the memory now, or with the last view in use. Twice is fine."""
        with fork_lock:
            self.forget()

    def keep_from_children(self) -> None:
        """A forked child is to `forget` this memory. With `fork_lock`."""
        _shared.add(self)

    def __del__(self) -> None:
        close_all(self.numbers)


@contextlib.contextmanager
def new_memfd(wanted: str) -> Iterator[list[int]]:
    """A list with a memfd, for the block to map and seal. After an exception, it is closed. With `fork_lock`.

    Raises:
        ConfigError: this system has no memfd with seals, or a sandbox refuses a system call.
        OutOfResources: the process has no file descriptor left for `wanted`.
    """
    if not sys.platform.startswith("linux") or not hasattr(os, "memfd_create"):
        needs = "shared memory needs memfd_create of Linux 5.1 or later"
        raise ConfigError("sys.platform", sys.platform, needs)
    made: list[int] = []
    try:
        with needing(wanted), needed("memfd_create"):
            keep_result(made, os.memfd_create, "dray", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        yield made
    except BaseException:
        close_all(made)
        raise


def map_shared(fd: int, nbytes: int, *, writable: bool, private: bool = False) -> memoryview:
    """Map `fd`; the memory is unmapped with the last view of it. With `fork_lock`.

    Args:
        fd: the memfd.
        nbytes: its size.
        writable: the view can be written.
        private: pages that are written are copied first, and no other process sees what was written.
    """
    libc = _libc()
    protection = _PROT_READ | _PROT_WRITE if writable else _PROT_READ
    flags = _MAP_PRIVATE | _MAP_NORESERVE if private else _MAP_SHARED
    _unmap_dead()
    mapped: list[int] = []
    try:
        keep_result(mapped, libc.mmap, None, nbytes, protection, flags, fd, 0)
        if mapped == [_MAP_FAILED]:
            with needed("mmap"):
                _raise_errno()
        (address,) = mapped
        _advise(address, nbytes, _MADV_DONTFORK)
        # The garbage collector clears weak references to what it tracks before it calls `__del__`, which may
        # still use the memory. It does not track arrays.
        memory = np.frombuffer(memoryview((ctypes.c_ubyte * nbytes).from_address(address)), np.uint8)
        _mappings[address] = weakref.ref(memory, _unmap_dead), nbytes
    except BaseException:
        for address in mapped:
            if address != _MAP_FAILED and address not in _mappings:
                libc.munmap(address, nbytes)
        raise
    view = memory.data
    return view if writable else view.toreadonly()


def populate(view: memoryview) -> None:
    """Map all pages of a writable view now, if the kernel knows how."""
    address = ctypes.addressof(ctypes.c_ubyte.from_buffer(view))
    _advise(address, view.nbytes, _MADV_POPULATE_WRITE, optional=True)


def seal(fd: int, seals: int) -> None:
    """Add seals to a memfd.

    Raises:
        ConfigError: the kernel does not know them, or a sandbox refuses the call.
    """
    try:
        with needed("fcntl"):
            fcntl.fcntl(fd, _F_ADD_SEALS, seals)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        allowed = "shared memory needs the seals of Linux 5.1 or later"
        release = os.uname().release
        raise ConfigError("kernel", release, allowed, f"{release} is too old") from error


def seals_of(fd: int) -> int:
    """The seals of a memfd.

    Raises:
        ConfigError: a sandbox refuses the call.
        OSError: `fd` is no memfd.
    """
    with needed("fcntl"):
        return fcntl.fcntl(fd, _F_GET_SEALS)


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.argtypes = [address, size, number, number, number, ctypes.c_long]
    libc.munmap.argtypes = [address, size]
    libc.madvise.argtypes = [address, size, number]
    return libc


def _raise_errno() -> NoReturn:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number))


def _unmap_dead(_: object = None) -> None:
    """Unmap all memory whose last view was deleted.

    The garbage collector of any thread calls this, so it takes no lock. If a signal handler raises in it, the next
    call unmaps the rest. It removes an entry before it unmaps, because the address may be used again after that.
    """
    # No list of items: allocating their tuples may run the garbage collector, which would change the dictionary.
    for address in list(_mappings):
        entry = _mappings.get(address)
        if entry is None or entry[0]() is not None:
            continue
        removed = _mappings.pop(address, None)
        if removed is entry:
            _libc().munmap(address, entry[1])
        elif removed is not None:  # another thread has unmapped it, and mapped other memory there
            _mappings[address] = removed


def _advise(address: int, nbytes: int, advice: int, *, optional: bool = False) -> None:
    """Give the kernel `advice` about memory; a kernel that does not know it may refuse what is `optional`."""
    if _libc().madvise(address, nbytes, advice) != 0 and not (optional and ctypes.get_errno() == errno.EINVAL):
        with needed("madvise"):
            _raise_errno()


def _forget_in_child() -> None:
    _mappings.clear()
    for memory in _shared:
        memory.forget()
    _shared.clear()
    fork_lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=fork_lock.acquire, after_in_parent=fork_lock.release, after_in_child=_forget_in_child
    )
