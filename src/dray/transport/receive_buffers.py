"""Memory for payloads as they arrive: used again, so that its pages are warm, never while anything can touch it.

What a program gets is an array over a pooled block. Every view of the payload, and every request of a transport
that may still write into it, keeps that array alive; the block is free again when the array is gone, not before.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from typing import Any

import numpy as np

from dray.errors import PayloadTooLargeError

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

SMALLEST_BYTES = 64 * 1024
"""Payloads below this get fresh memory: the allocator has it warm anyway."""

MOST_FREE_BYTES = 256 * 1024 * 1024
"""Free memory a pool keeps; what comes back beyond it goes to the system."""


class ReceiveBuffers:
    """A pool of blocks whose sizes are powers of two. Thread-safe; nothing to close.

    Args:
        most_free_bytes: how much free memory is kept.
    """

    def __init__(self, most_free_bytes: int = MOST_FREE_BYTES) -> None:
        self._most_free = most_free_bytes
        self._lock = threading.Lock()
        self._free: dict[int, list[Bytes]] = {}
        self._free_bytes = 0
        # Arrays die anywhere, within a locked section too: what is known of them waits here for the next `take`.
        self._returned: deque[weakref.ref[Bytes]] = deque()
        self._lent: dict[int, tuple[weakref.ref[Bytes], Bytes]] = {}

    def take(self, nbytes: int) -> Bytes:
        """Uninitialised memory, uint8 of shape (nbytes,).

        Raises:
            PayloadTooLargeError: there is not so much.
        """
        if nbytes < SMALLEST_BYTES:
            return np.empty(nbytes, np.uint8)
        capacity = 1 << (nbytes - 1).bit_length()
        with self._lock:
            self._collect()
            kept = self._free.get(capacity)
            block = kept.pop() if kept else None
            if block is not None:
                self._free_bytes -= capacity
        if block is None:
            try:
                block = np.empty(capacity, np.uint8)
            except (MemoryError, ValueError) as error:  # a reference and a server may say anything
                raise PayloadTooLargeError(f"there is no memory for a payload of {nbytes} bytes") from error
        # Views of an array have the array that owns the memory as their base; a buffer in between makes `lent` the
        # one that they all keep alive.
        lent: Bytes = np.frombuffer(block.data, np.uint8, nbytes)
        self._watch(lent, block)
        return lent

    @property
    def free_bytes(self) -> int:
        """Memory that waits to be used again."""
        with self._lock:
            self._collect()
            return self._free_bytes

    def _watch(self, lent: Bytes, block: Bytes) -> None:
        # Without a function in Python, which an exception of a signal handler could end before it has done this.
        watched = weakref.ref(lent, self._returned.append)
        self._lent[id(watched)] = watched, block

    def _collect(self) -> None:
        while self._returned:
            _, block = self._lent.pop(id(self._returned.popleft()))
            if self._free_bytes + block.nbytes <= self._most_free:
                self._free.setdefault(block.nbytes, []).append(block)
                self._free_bytes += block.nbytes
