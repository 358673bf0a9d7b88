"""Limits of the system that a process can reach: descriptors and the kernel's memory, told as one typed error."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator

from dray.errors import OutOfResources

if sys.platform != "win32":
    import resource  # now: without a descriptor it could not be loaded

_DESCRIPTORS = frozenset({errno.EMFILE, errno.ENFILE})
_EXHAUSTED = _DESCRIPTORS | {errno.ENOMEM, errno.ENOBUFS}


def out_of_resources(error: OSError, awaited: str, endpoint: str | None = None) -> OutOfResources | None:
    """The typed error that `error` stands for, or None where it is of another kind.

    Args:
        error: from a system call.
        awaited: what could not be made, e.g. ``"a socket"``.
        endpoint: the address it was meant for.
    """
    if error.errno not in _EXHAUSTED:
        return None
    message = f"there is no room for {awaited}: {_limit(error.errno)}"
    return OutOfResources(message, error.errno, os.strerror(error.errno), endpoint=endpoint)


def descriptors_exhausted(awaited: str, endpoint: str | None = None) -> OutOfResources | None:
    """The typed error if no further descriptor can be had now, else None: for libraries that do not say why."""
    try:
        os.close(os.dup(0))
    except OSError as error:
        return out_of_resources(error, awaited, endpoint)
    return None


@contextlib.contextmanager
def needing(awaited: str) -> Iterator[None]:
    """Raise `OutOfResources` where a system call in the block finds a limit reached.

    Args:
        awaited: as for `out_of_resources`.
    """
    try:
        yield
    except OutOfResources:
        raise
    except OSError as error:
        typed = out_of_resources(error, awaited)
        if typed is None:
            raise
        raise typed from error


def _limit(number: int | None) -> str:
    if number == errno.EMFILE:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        return f"all descriptors of this process are in use (RLIMIT_NOFILE: soft limit {soft}, hard limit {hard})"
    if number == errno.ENFILE:
        return "all descriptors of this machine are in use (fs.file-max)"
    return "the kernel has no memory left"
