"""`Exclusive`: a lock that refuses its own thread, and that no exception of a signal handler leaves acquired."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from dray.errors import StreamError

T = TypeVar("T")


class Exclusive:
    """The lock of one object."""

    def __init__(self) -> None:
        self._lock: Any = threading.RLock()

    @property
    def entered(self) -> bool:
        """This thread has it."""
        return bool(self._lock._is_owned())  # noqa: SLF001  (there is no other way to know)

    def call(self) -> AbstractContextManager[Any]:
        """What a call enters: the lock itself, whose `with` no signal handler interrupts half-way.

        Raises:
            StreamError: this thread has it: the call came from a signal handler, or from the end of an object.
        """
        if self.entered:
            raise StreamError("a call of this object is in progress in this thread: this one came from a handler")
        lock: AbstractContextManager[Any] = self._lock
        return lock

    def try_call(self, act: Callable[[], T], otherwise: T) -> T:
        """The result of `act`, called with the lock if that needs no wait and this thread does not have it."""
        if self.entered:
            return otherwise
        lock = self._lock
        try:
            # A signal handler may raise when `acquire` has acquired it, before or while this thread releases it.
            return act() if lock.acquire(blocking=False) else otherwise
        finally:
            try:
                if lock._is_owned():  # noqa: SLF001
                    lock.release()
            finally:
                if lock._is_owned():  # noqa: SLF001
                    lock.release()
