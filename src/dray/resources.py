"""What a process holds: the base of everything that closes, and the error when descriptors or memory run out."""

from __future__ import annotations

import abc
import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from dray.errors import OutOfResources

if sys.platform != "win32":
    import resource  # loaded here, because loading it needs a descriptor

_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})

T = TypeVar("T")


class Closing(abc.ABC):
    """A context manager whose block ends with `close`."""

    @abc.abstractmethod
    def close(self) -> None:
        """Give back what this object holds. Twice is fine."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def out_of_resources(error: OSError, wanted: str, endpoint: str | None = None) -> OutOfResources | None:
    """The typed error for `error`; None if it is of another kind.

    Args:
        error: from a system call.
        wanted: what could not be made, such as ``"a socket"``.
        endpoint: the address in the error.
    """
    if error.errno not in _EXHAUSTED:
        return None
    message = f"cannot make {wanted}: {_limit(error.errno)}"
    return OutOfResources(message, error.errno, os.strerror(error.errno), endpoint=endpoint)


def descriptors_exhausted(wanted: str, endpoint: str | None = None) -> OutOfResources | None:
    """The typed error if no descriptor is free, else None: for libraries that do not report the reason."""
    try:
        os.close(os.dup(0))
    except OSError as error:
        return out_of_resources(error, wanted, endpoint)
    return None


def check_descriptors(count: int, wanted: str) -> None:
    """Check that `count` descriptors are free: for libraries that end the process if they are not.

    Raises:
        OutOfResources: fewer are free.
    """
    with needing(wanted):
        used = len(list(Path("/proc/self/fd").iterdir())) - 1  # without the one that lists them
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft - used < count:
        limits = f"RLIMIT_NOFILE: soft limit {soft}, hard limit {hard}"
        message = f"cannot make {wanted}: it needs {count} descriptors, {soft - used} are free ({limits})"
        raise OutOfResources(message, errno.EMFILE, os.strerror(errno.EMFILE))


def raise_descriptor_limit() -> int:
    """Raise this process's soft limit on open descriptors to the hard limit, which is returned.

    Children inherit it. `select.select` cannot use descriptors from 1,024 on; `selectors`, `poll` and `epoll` can.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def keep_result(results: list[T], call: Callable[..., T], *arguments: object) -> None:
    """Append the result of `call`, a function in C, to `results` in one step.

    A signal handler can raise after any call; the result would then be lost, and its descriptor would stay open.
    """
    results.extend(map(call, *((each,) for each in arguments)))


def close_all(numbers: list[int]) -> None:
    """Close descriptors and take them out of their list, each once, whatever a signal handler raises."""
    while numbers:
        # No call between these, after which an exception of a signal handler could come.
        number = numbers[-1]
        del numbers[-1]
        os.close(number)


class Descriptors(list[int]):
    """Descriptors that are closed with their list, also if an exception of a signal handler ends `close`."""

    def close(self) -> None:
        """Close those that are in the list, and take them out."""
        close_all(self)

    def __del__(self) -> None:
        close_all(self)


@contextlib.contextmanager
def needing(wanted: str) -> Iterator[None]:
    """Raise `OutOfResources` if a system call in the block reaches a limit; `wanted` as in `out_of_resources`."""
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
