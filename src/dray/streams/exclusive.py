"""`Exclusive`: a lock for calls of one object, which refuses its own thread instead of waiting for it for ever."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from dray.errors import StreamError


class Exclusive:
    """A context manager. A signal handler or finaliser that enters it again in the same thread gets an error."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner = 0

    def __enter__(self) -> None:
        me = threading.get_ident()
        if self._owner == me:
            raise StreamError("a call of this object is in progress in this thread: this one came from a handler")
        self._lock.acquire()
        self._owner = me

    def enter_now(self) -> bool:
        """Enter if that needs no wait; then a ``with`` block of `leaving` must follow."""
        if not self._lock.acquire(blocking=False):
            return False
        self._owner = threading.get_ident()
        return True

    @contextlib.contextmanager
    def leaving(self) -> Iterator[None]:
        """A block that leaves at its end what `enter_now` has entered."""
        try:
            yield
        finally:
            self.__exit__()

    def __exit__(self, *_: object) -> None:
        self._owner = 0
        self._lock.release()
