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

import threading
import weakref
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from dray.errors import LeaseInUseError
from dray.payload import Arrays, unpack
from dray.protocol.client_session import Request
from dray.transport.connection import Held
from dray.transport.lease_reaper import LeaseReaper


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
        reaper: ends the lease where this object does not.
    """

    def __init__(self, held: Held, kept: Kept, reaper: LeaseReaper) -> None:
        self._in_place = held.in_place
        self._root: np.ndarray[Any, Any] | None = held.root
        self._kept = kept
        self._reaper = reaper
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
                self._reaper.forget(self._watched)
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

        return self._reaper.watch(root, end)
