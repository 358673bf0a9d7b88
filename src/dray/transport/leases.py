"""Leases that a program works on in place: they end when the last array into the slot is gone, not before.

A lease is in one of these states; its connection is kept by its caller in the first, by arrays in the second and
third:

| state | ends with |
|---|---|
| not entered | `close`, the end of the lease object, or the client's `close`: released |
| entered | the block's end: consumed, or released after an exception |
| lingering: the block has ended, an array lives | the array: as the block has ended |

Where an exception of a signal handler comes in the middle of an end, the lease ends with its last array as well.
"""

from __future__ import annotations

import _thread
import queue
import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from dray.errors import LeaseInUseError
from dray.payload import Arrays, unpack
from dray.protocol.client_session import Request
from dray.transport.connection import Held


class Graveyard:
    """Ends leases whose last array dies before they have ended.

    An array may die anywhere, in the middle of a locked section too, so its death only puts the lease into a
    queue; a thread, started with the first lease, ends it.
    """

    def __init__(self) -> None:
        self._dead: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._watched: dict[int, tuple[weakref.ref[Any], Callable[[], None]]] = {}
        self._lock = threading.Lock()
        self._running: _thread.LockType | None = None  # locked while the thread runs
        self._closed = False

    def watch(self, root: np.ndarray[Any, Any], end: Callable[[], None]) -> int:
        """Call `end`, in a thread of its own, once `root` is gone; the number is for `forget`."""
        # Without a function in Python, which an exception of a signal handler could end before it has done this.
        watched = weakref.ref(root, self._dead.put)
        with self._lock:
            self._watched[id(watched)] = watched, end
            self._start()
        return id(watched)

    def forget(self, number: int) -> None:
        """Watch it no longer."""
        self._watched.pop(number, None)
        if self._closed:
            self._dead.put(None)

    def close(self) -> None:
        """End the thread, or let it end with the last lease that is still in use. Twice is fine."""
        with self._lock:
            self._closed = True
            running = None if self._watched else self._running
        self._dead.put(None)
        if running is not None:
            with running:
                pass

    def _start(self) -> None:
        if self._running is None and not self._closed:
            running = _thread.allocate_lock()
            running.acquire()
            # Not a `threading.Thread`: an exception of a signal handler in its `start` may leave the new thread
            # waiting for ever.
            _thread.start_new_thread(self._run, (running,))
            self._running = running

    def _end(self, dead: object) -> None:
        _, end = self._watched.pop(id(dead), (None, None))
        if end is not None:
            end()

    def _run(self, running: _thread.LockType) -> None:
        try:
            while not (self._closed and not self._watched):
                self._end(self._dead.get())
            self._dead.put(None)  # there is another thread where an exception came right after its start
        finally:
            running.release()


class Kept(Protocol):
    """What a lease is to its connection: see `dray.transport.connections.KeptLease`."""

    request: Request
    inside: threading.Lock

    def hand_out(self) -> None: ...
    def end(self, consumed: bool) -> None: ...
    def drop(self) -> None: ...


class InPlaceLease:
    """A payload, held for the length of a ``with`` block; made by `PayloadClient.lease`.

    Args:
        held: the payload.
        kept: its lease.
        graveyard: ends the lease where this object does not.
    """

    def __init__(self, held: Held, kept: Kept, graveyard: Graveyard) -> None:
        self._in_place = held.in_place
        self._root: np.ndarray[Any, Any] | None = held.root
        self._kept = kept
        self._graveyard = graveyard
        self._arrays: Arrays = held.arrays or {}
        held.arrays = None
        self._watched = self._watch(held.root, consumed=False)

    def __enter__(self) -> Arrays:
        """The payload's arrays.

        Raises:
            BufferClosedError: the lease has ended, or the client was closed meanwhile.
        """
        try:
            self._kept.hand_out()
            assert self._root is not None
            if not self._arrays:
                self._arrays.update(unpack(self._root))
        except BaseException:
            self._finish(consumed=False)
            raise
        return self._arrays

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        in_use = self._finish(consumed=kind is None)
        if in_use and kind is None:
            raise LeaseInUseError(
                "an array of this lease is still referenced; its slot stays leased until that is gone",
                slot=self._kept.request.slot,
                sequence=self._kept.request.sequence,
            )

    def close(self) -> None:
        """Release the payload, if the block was never entered. Twice is fine."""
        self._finish(consumed=False)

    def _finish(self, consumed: bool) -> bool:
        """End the lease now, or when the last array into the slot is gone; whether it is the latter."""
        if self._root is None:
            return False
        alive = weakref.ref(self._root)
        self._arrays.clear()
        with self._kept.inside:
            try:
                self._graveyard.forget(self._watched)
                self._root = None
                root = alive() if self._in_place else None
                if root is not None:
                    self._watch(root, consumed)
                    return True
                self._kept.end(consumed)
            except BaseException:
                root = alive()
                if root is None:
                    self._kept.drop()
                else:
                    self._watch(root, consumed)
                raise
        return False

    def _watch(self, root: np.ndarray[Any, Any], consumed: bool) -> int:
        """End the lease once `root` is gone."""
        kept = self._kept

        def end() -> None:
            with kept.inside:
                kept.end(consumed)

        return self._graveyard.watch(root, end)
