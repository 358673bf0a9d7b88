"""`membarrier(2)`: makes all stores of other registered processes visible, at the expense of the caller alone.

A consumer that leases directly stores its lease word and then loads the generation, without a fence, which Python
does not have. The owner stores the generation, calls `barrier`, and then loads the lease words: it sees the word,
or the consumer sees the new generation.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import struct
import sys
from collections import deque
from collections.abc import Callable
from typing import Final

from dray.clock import MONOTONIC, Clock

_NUMBERS: Final = {("x86_64", 8): 324}
"""System call numbers by machine and size of a pointer: a 32-bit process has other numbers."""

_QUERY, _GLOBAL_EXPEDITED, _REGISTER_GLOBAL_EXPEDITED = 0, 1 << 1, 1 << 2

MAX_SECONDS: Final = 0.001
"""With a longer p99, direct leases are not offered to further consumers."""

_MIN_TIMED, _MAX_TIMED = 50, 500
"""Barriers that a p99 is made of."""


@functools.cache
def problem() -> str:
    """Why this process cannot use membarrier; empty if it can."""
    if not sys.platform.startswith("linux"):
        return f"{sys.platform} has no membarrier"
    if _number() is None:
        machine, bits = platform.machine(), struct.calcsize("P") * 8
        return f"{bits}-bit processes on {machine} are not supported"
    try:
        supported = _call(_QUERY)
    except OSError as error:
        return f"membarrier is refused ({error.strerror})"
    wanted = _GLOBAL_EXPEDITED | _REGISTER_GLOBAL_EXPEDITED
    return "" if supported & wanted == wanted else "this kernel has no membarrier of the kind GLOBAL_EXPEDITED"


def register() -> None:
    """Let the barriers of other processes reach this one. To be called for each attachment: `exec` undoes it.

    Raises:
        OSError: the kernel or a sandbox refuses it.
    """
    _call(_REGISTER_GLOBAL_EXPEDITED)


def barrier() -> None:
    """Return when every registered process has passed a full memory barrier.

    Raises:
        OSError: the kernel or a sandbox refuses it; nothing is known then.
    """
    _call(_GLOBAL_EXPEDITED)


class Barriers:
    """The barriers of one ring.

    Args:
        clock: measures them.
        call: what passes one, and raises `OSError` if it fails; by default `barrier`.

    Attributes:
        count: how many have succeeded.
        failures: how many have failed.
        error: what the last one failed with; empty if none has.
    """

    def __init__(self, clock: Clock = MONOTONIC, call: Callable[[], None] = barrier) -> None:
        self.count = self.failures = 0
        self.error = ""
        self._now = clock.now
        self._call = call
        self._seconds: deque[float] = deque(maxlen=_MAX_TIMED)

    def pass_one(self) -> bool:
        """`barrier`; False if it has failed."""
        began = self._now()
        try:
            self._call()
        except OSError as error:
            self.failures += 1
            self.error = error.strerror or str(error)
            return False
        self._seconds.append(self._now() - began)
        self.count += 1
        return True

    @property
    def p99(self) -> float | None:
        """Seconds that the slowest hundredth of the last ones took at least; None if there were too few."""
        timed = sorted(self._seconds)
        return timed[len(timed) * 99 // 100] if len(timed) >= _MIN_TIMED else None

    @property
    def usable(self) -> bool:
        """None has failed, and they are fast enough."""
        p99 = self.p99
        return not self.failures and (p99 is None or p99 <= MAX_SECONDS)


def _number() -> int | None:
    return _NUMBERS.get((platform.machine(), struct.calcsize("P")))


@functools.cache
def _syscall() -> ctypes._NamedFuncPointer:
    # `PyDLL` keeps the interpreter lock: to get it back can take 5 ms where a thread runs pure Python.
    call = ctypes.PyDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    call.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_uint, ctypes.c_int]
    return call


def _call(command: int) -> int:
    number = _number()
    if number is None:
        raise OSError(0, "no system call number is known for this machine")
    result: int = _syscall()(number, command, 0, 0)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
