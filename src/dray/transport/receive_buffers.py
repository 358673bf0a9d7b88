"""Memory for payloads that arrive. It is reused, so that its pages are warm, but never while it is in use.

A program gets an array over a pooled block. Every view of the payload, and every request of a transport that may
still write into it, keeps that array alive. The block is free again when the array is gone.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from typing import Any

import numpy as np

from dray.errors import PayloadTooLargeError
from dray.payload.selection import Selection, part_of

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

MIN_POOLED_BYTES = 64 * 1024
"""Payloads below this size get fresh memory, which the allocator has warm anyway."""

MAX_FREE_BYTES = 256 * 1024 * 1024
"""Free memory that a pool keeps; the rest goes back to the system."""


class ReceiveBuffers:
    """A pool of blocks whose sizes are powers of two, up to its limit. Thread-safe; nothing to close.

    Args:
        max_free_bytes: free memory that is kept, in bytes.
    """

    def __init__(self, max_free_bytes: int = MAX_FREE_BYTES) -> None:
        self._max_free = max_free_bytes
        self._lock = threading.Lock()
        self._free: dict[int, list[Bytes]] = {}
        self._free_bytes = 0
        # An array may die anywhere, even within a locked section: its reference waits here for `allocate`.
        self._returned: deque[weakref.ref[Bytes]] = deque()
        self._lent: dict[int, tuple[weakref.ref[Bytes], Bytes]] = {}

    def allocate(self, nbytes: int) -> Bytes:
        """Uninitialised memory, uint8 of shape (nbytes,).

        Raises:
            PayloadTooLargeError: the system does not have that much.
        """
        if nbytes < MIN_POOLED_BYTES:
            return np.empty(nbytes, np.uint8)
        # What is too large to be kept is not rounded up: the system may not have twice a large payload.
        capacity = nbytes if nbytes > self._max_free else 1 << (nbytes - 1).bit_length()
        with self._lock:
            self._collect()
            kept = self._free.get(capacity)
            block = kept.pop() if kept else None
            if block is not None:
                self._free_bytes -= capacity
        if block is None:
            try:
                block = np.empty(capacity, np.uint8)
            except (MemoryError, ValueError) as error:  # a reference and a server may name any size
                raise PayloadTooLargeError(f"there is no memory for a payload of {nbytes} bytes") from error
        # Views of an array have the array that owns the memory as their base. With a buffer in between they all
        # keep `lent` alive.
        lent: Bytes = np.frombuffer(block.data, np.uint8, nbytes)
        # A callback in C: an exception of a signal handler could end a Python function before it has done this.
        watched = weakref.ref(lent, self._returned.append)
        self._lent[id(watched)] = watched, block
        return lent

    def copy(self, payload: Bytes, selection: Selection | None = None) -> Bytes:
        """A copy of a payload, or an image of the part that is selected.

        Raises:
            SelectionError: the payload does not have that part.
            PayloadTooLargeError: there is no memory for the copy.
        """
        if selection is None:
            copy = self.allocate(payload.nbytes)
            np.copyto(copy, payload)
            return copy
        part = part_of(payload, selection)
        copy = self.allocate(part.nbytes)
        part.write(payload, copy)
        return copy

    @property
    def free_bytes(self) -> int:
        """Memory that is ready for reuse, in bytes."""
        with self._lock:
            self._collect()
            return self._free_bytes

    def _collect(self) -> None:
        while self._returned:
            # Not in `_lent`: an exception of a signal handler came before `allocate` had put it there.
            _, block = self._lent.pop(id(self._returned.popleft()), (None, None))
            if block is not None and self._free_bytes + block.nbytes <= self._max_free:
                self._free.setdefault(block.nbytes, []).append(block)
                self._free_bytes += block.nbytes
