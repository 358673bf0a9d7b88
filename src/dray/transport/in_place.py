"""Leases that a program works on in place: they end when the last array into the slot is gone, not before."""

from __future__ import annotations

import itertools
import queue
import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np

from dray.errors import LeaseInUseError
from dray.payload.codec import unpack
from dray.transport.connection import Held
from dray.wire.client_session import Request

Arrays = dict[str, "np.ndarray[Any, np.dtype[Any]]"]
End = Callable[[Request, bool], None]


class Graveyard:
    """Ends leases whose last array dies after their ``with`` block.

    An array may die anywhere, in the middle of a locked section too, so its death only puts the lease into a
    queue; a thread, started with the first such lease, ends it.
    """

    def __init__(self) -> None:
        self._dead: queue.SimpleQueue[tuple[int, Callable[[], None]] | None] = queue.SimpleQueue()
        self._watched: dict[int, weakref.ref[Any]] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False

    def watch(self, root: np.ndarray[Any, Any], end: Callable[[], None]) -> None:
        """Call `end`, in a thread of its own, once `root` is gone."""
        number = next(self._numbers)
        with self._lock:
            self._watched[number] = weakref.ref(root, lambda _: self._dead.put((number, end)))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="dray-leases", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """End the thread, or let it end with the last lease that is still in use. Twice is fine."""
        with self._lock:
            self._closed = True
            thread = None if self._watched else self._thread
        if thread is not None:
            self._dead.put(None)
            thread.join()

    def _run(self) -> None:
        while (dead := self._dead.get()) is not None:
            number, end = dead
            end()
            with self._lock:
                del self._watched[number]
                if self._closed and not self._watched:
                    return


class InPlaceLease:
    """A payload, held for the length of a ``with`` block; made by `PayloadClient.lease`."""

    def __init__(self, held: Held, end: End, graveyard: Graveyard) -> None:
        self._request = held.request
        self._in_place = held.in_place
        self._root: np.ndarray[Any, Any] | None = held.root
        self._end = end
        self._graveyard = graveyard
        self._arrays: Arrays = held.arrays or {}
        held.arrays = None

    def __enter__(self) -> Arrays:
        try:
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
                slot=self._request.slot,
                sequence=self._request.sequence,
            )

    def close(self) -> None:
        """Return the payload, if the block was never entered. Twice is fine."""
        self._finish(consumed=False)

    def _finish(self, consumed: bool) -> bool:
        """End the lease now, or when the last array into the slot is gone; whether it is the latter."""
        if self._root is None:
            return False
        self._arrays.clear()
        alive, self._root = weakref.ref(self._root), None
        request, end = self._request, self._end
        root = alive() if self._in_place else None
        if root is None:
            end(request, consumed)
            return False
        self._graveyard.watch(root, lambda: end(request, consumed))
        return True
