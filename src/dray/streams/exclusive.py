"""`Exclusive`: a lock for the calls of one object, which refuses its own thread instead of waiting for it."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from typing import Any

from dray.errors import StreamError


class Exclusive:
    """The lock of one object."""

    def __init__(self) -> None:
        self._lock: Any = threading.RLock()

    @property
    def entered(self) -> bool:
        """This thread has it."""
        return bool(self._lock._is_owned())  # noqa: SLF001  (there is no other way to know)

    def call(self) -> AbstractContextManager[Any]:
        """What a call enters: the lock itself, so that an exception of a signal handler cannot leave it acquired.

        Raises:
            StreamError: this thread has it: the call came from a signal handler or a finaliser.
        """
        if self.entered:
            raise StreamError("a call of this object is in progress in this thread: this one came from a handler")
        lock: AbstractContextManager[Any] = self._lock
        return lock

    def enter_now(self) -> bool:
        """Acquire it if that needs no wait; `leave` must follow."""
        return not self.entered and bool(self._lock.acquire(blocking=False))

    def leave(self) -> None:
        """Release what `enter_now` has acquired."""
        self._lock.release()
