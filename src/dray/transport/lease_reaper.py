"""Ends leases whose last array is gone before they have ended."""

from __future__ import annotations

import _thread
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np


class Queue(Protocol):
    """What a `LeaseReaper` needs of `queue.SimpleQueue`."""

    def put(self, item: Any, /) -> None: ...
    def get(self) -> Any: ...


def start_thread(run: Callable[[], None]) -> Callable[[], None]:
    """Start a thread; returns a function that waits for its end."""
    running = _thread.allocate_lock()
    running.acquire()

    def run_and_release() -> None:
        try:
            run()
        finally:
            running.release()

    def join() -> None:
        with running:
            pass

    # Not a `threading.Thread`: an exception of a signal handler in its `start` may leave the new thread waiting
    # without a limit.
    _thread.start_new_thread(run_and_release, ())
    return join


class LeaseReaper:
    """Calls a function for each array that is gone, in a thread that starts with the first one.

    An array may die anywhere, in the middle of a locked section too. So its death only puts it into a queue.

    Args:
        dead: the queue.
        start: starts the thread, as `start_thread` does.
    """

    def __init__(
        self, dead: Queue | None = None, start: Callable[[Callable[[], None]], Callable[[], None]] = start_thread
    ) -> None:
        self._dead = dead or queue.SimpleQueue()
        self._start = start
        self._watched: dict[int, tuple[weakref.ref[Any], Callable[[], None]]] = {}
        self._lock = threading.Lock()
        self._join: Callable[[], None] | None = None  # set while the thread runs
        self._closed = False

    def watch(self, root: np.ndarray[Any, Any], end: Callable[[], None]) -> int:
        """Call `end`, in the thread, once `root` is gone; the number is for `forget`."""
        # Without a function in Python, which an exception of a signal handler could end before it has done this.
        watched = weakref.ref(root, self._dead.put)
        with self._lock:
            self._watched[id(watched)] = watched, end
            if self._join is None or self._closed:  # once closed, a thread ends with the last array
                self._join = self._start(self._run)
        return id(watched)

    def forget(self, number: int) -> None:
        """Watch it no longer."""
        self._watched.pop(number, None)  # without the lock: one step of a dict
        if self._closed:
            self._dead.put(None)

    def close(self) -> None:
        """End the thread, or let it end with the last lease that is still in use. Twice is fine."""
        with self._lock:
            self._closed = True
            join = None if self._watched else self._join
        self._dead.put(None)
        if join is not None:
            join()

    def _run(self) -> None:
        while not (self._closed and not self._watched):
            _, end = self._watched.pop(id(self._dead.get()), (None, None))
            if end is not None:
                end()
        self._dead.put(None)  # there is another thread if an exception came right after its start
