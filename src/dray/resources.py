"""Descriptors and memory of the system: their limits as one typed error, and a way to make them without a loss."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

from dray.errors import OutOfResources

if sys.platform != "win32":
    import resource  # now: without a descriptor it could not be loaded

_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})

T = TypeVar("T")


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


def keep_result(results: list[T], call: Callable[..., T], *arguments: object) -> None:
    """Append what `call`, a function in C, returns to `results`, without a moment in between.

    Python lets an exception of a signal handler come after each call, and what the call returned is lost then: a
    descriptor would stay open for good.
    """
    results.extend(map(call, *((each,) for each in arguments)))


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
