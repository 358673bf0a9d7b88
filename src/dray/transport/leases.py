"""Leases that a program works on in place. Each ends when the last array into its slot is gone, not before.

A lease is in one of these states. In the first its caller keeps its connection, in the others arrays do:

| state | ends with |
|---|---|
| not entered | `close`, the end of the lease object, or the client's `close`: released |
| entered | the end of the block: consumed, or released after an exception |
| lingering: the block has ended, an array exists | the end of the array: as the block has ended |

If an exception of a signal handler comes in the middle of an end, the lease ends with its last array as well.
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
from dray.transport.connection import ReceivedPayload
from dray.transport.lease_reaper import LeaseReaper


class Kept(Protocol):
    """A lease whose connection is kept: see `dray.transport.connections.KeptLease`."""

    request: Request
    inside: threading.Lock

    def hand_out(self) -> None: ...
    def end(self, consumed: bool) -> None: ...
    def drop(self) -> None: ...


class InPlaceLease:
    """The arrays of one payload for the length of a ``with`` block; made by `PayloadClient.lease`. It ends itself.

    Args:
        received: the payload.
        kept: its lease.
        reaper: ends the lease if this object does not.
    """

    def __init__(self, received: ReceivedPayload, kept: Kept, reaper: LeaseReaper) -> None:
        self._in_place = received.in_place
        self._root: np.ndarray[Any, Any] | None = received.root
        self._kept = kept
        self._reaper = reaper
        self._arrays: Arrays = received.arrays or {}
        received.arrays = None
        self._watched = self._watch(received.root, consumed=False)

    def __enter__(self) -> Arrays:
        """The payload's arrays.

        Raises:
            BufferClosedError: the lease has ended, or the client was closed meanwhile.
            PayloadFormatError: the bytes are not arrays.
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
        """Release the payload if the block was never entered. Twice is fine."""
        self._finish(consumed=False)

    def _finish(self, consumed: bool) -> bool:
        """End the lease now, or let it end with the last array into the slot; True in the latter case."""
        if self._root is None:
            return False
        alive = weakref.ref(self._root)
        self._arrays.clear()
        with self._kept.inside:
            # The reaper watches until here, and again while an array exists. After an exception of a signal
            # handler the lease is either dropped with its connection or watched, so that it ends in each case.
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
        """Let the lease end once `root` is gone."""
        kept = self._kept

        def end() -> None:
            with kept.inside:
                kept.end(consumed)

        return self._reaper.watch(root, end)
