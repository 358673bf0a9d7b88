"""Descriptors and memory of the system: their limits as one typed error, and a way to make them without a loss."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from dray.errors import OutOfResources

if sys.platform != "win32":
    import resource  # now: without a descriptor it could not be loaded

_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})

T = TypeVar("T")


def out_of_resources(error: OSError, wanted: str, endpoint: str | None = None) -> OutOfResources | None:
    """The typed error that `error` stands for, or None where it is of another kind.

    Args:
        error: from a system call.
        wanted: what could not be made, e.g. ``"a socket"``.
        endpoint: the address it was meant for.
    """
    if error.errno not in _EXHAUSTED:
        return None
    message = f"there is no room for {wanted}: {_limit(error.errno)}"
    return OutOfResources(message, error.errno, os.strerror(error.errno), endpoint=endpoint)


def descriptors_exhausted(wanted: str, endpoint: str | None = None) -> OutOfResources | None:
    """The typed error if no further descriptor can be had now, else None: for libraries that do not say why."""
    try:
        os.close(os.dup(0))
    except OSError as error:
        return out_of_resources(error, wanted, endpoint)
    return None


def check_descriptors(count: int, wanted: str) -> None:
    """Make sure that so many descriptors are left: for libraries that end the process where they are not.

    Raises:
        OutOfResources: there are fewer.
    """
    with needing(wanted):
        used = len(list(Path("/proc/self/fd").iterdir())) - 1  # the one that lists them
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft - used < count:
        limits = f"RLIMIT_NOFILE: soft limit {soft}, hard limit {hard}"
        message = f"there is no room for {wanted}: it needs {count} descriptors, {soft - used} are left ({limits})"
        raise OutOfResources(message, errno.EMFILE, os.strerror(errno.EMFILE))


def raise_descriptor_limit() -> int:
    """Raise this process's soft limit on open descriptors to the hard one; returns it.

    Children inherit it. A program that waits with `select.select` cannot use descriptors from 1,024 on, with any
    limit; `selectors`, `poll` and `epoll` can.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def keep_result(results: list[T], call: Callable[..., T], *arguments: object) -> None:
    """Append what `call`, a function in C, returns to `results`, without a moment in between.

    Python lets an exception of a signal handler come after each call, and what the call returned is lost then: a
    descriptor would stay open for good.
    """
    results.extend(map(call, *((each,) for each in arguments)))


@contextlib.contextmanager
def needing(wanted: str) -> Iterator[None]:
    """Raise `OutOfResources` where a system call in the block finds a limit reached.

    Args:
        wanted: as for `out_of_resources`.
    """
    try:
        yield
    except OutOfResources:
        raise
    except OSError as error:
        typed = out_of_resources(error, wanted)
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
