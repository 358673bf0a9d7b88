"""System calls that dray needs and that a sandbox may refuse."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping

from dray.errors import ConfigError

_REFUSALS = frozenset({errno.EPERM, errno.EACCES, errno.ENOSYS})
"""The errors of a call that a filter of system calls refuses."""

ALLOW = (
    "must be allowed by the sandbox of this process, such as the seccomp profile of its container or service, and "
    "known to the kernel (Linux 5.3 or later)"
)


@contextlib.contextmanager
def needed(call: str) -> Iterator[None]:
    """A block with the system call `call`, which only a sandbox refuses.

    Raises:
        ConfigError: the call is refused; the message names it.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        raise ConfigError("system call", call, ALLOW, f"{call} is refused ({error.strerror})") from error


def refused_calls() -> tuple[str, ...]:
    """The names of the needed system calls that this process may not make, found by making each."""
    refused = []
    for call, attempt in _ATTEMPTS.items():
        try:
            with needed(call):
                attempt()
        except ConfigError:
            refused.append(call)
    return tuple(refused)


def _memfd_create() -> None:
    os.close(os.memfd_create("dray", os.MFD_CLOEXEC))


def _madvise() -> None:
    with mmap.mmap(-1, mmap.PAGESIZE) as memory:
        memory.madvise(mmap.MADV_DONTFORK)


def _flock() -> None:
    import fcntl  # not available on every system that imports this module

    with tempfile.TemporaryFile() as file:
        fcntl.flock(file, fcntl.LOCK_EX)


def _pidfd_open() -> None:
    os.close(os.pidfd_open(os.getpid()))


_ATTEMPTS: Mapping[str, Callable[[], None]] = (
    {"memfd_create": _memfd_create, "madvise": _madvise, "flock": _flock, "pidfd_open": _pidfd_open}
    if sys.platform.startswith("linux")
    else {}
)
