"""Bare copies: within this process, and of memory that another process wrote last."""

from __future__ import annotations

import mmap
import os
from typing import Any, Literal

import numpy as np

from benchmarks.partner import Partner
from benchmarks.service import Reply

Into = Literal["warm memory", "new memory"]


class MemoryService:
    """Writes shared memory."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._slots = np.empty((0, 0), np.uint8)
        self._source = np.empty(0, np.uint8)

    def do(self, command: str, **arguments: Any) -> Reply:
        if command == "open":
            nbytes = arguments["nbytes"]
            self._slots = map_slots(self._descriptor, arguments["batch"], nbytes)
            self._source = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)
        elif command == "prepare":
            for slot in self._slots[: arguments["count"]]:
                np.copyto(slot, self._source)
        else:
            self._slots = np.empty((0, 0), np.uint8)
        return Reply({})

    def close(self) -> None:
        os.close(self._descriptor)


def map_slots(descriptor: int, batch: int, nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Map `batch` slots of `nbytes` bytes, as uint8 of shape (batch, nbytes)."""
    mapped = mmap.mmap(descriptor, batch * nbytes, mmap.MAP_SHARED)
    return np.frombuffer(mapped, np.uint8).reshape(batch, nbytes)


class ForeignCopy:
    """Copy what another process wrote last, into warm memory or into memory allocated for it."""

    def __init__(self, into: Into) -> None:
        self.name = "bare copy, foreign" + (", new" if into == "new memory" else "")
        self._fresh = into == "new memory"
        self._descriptor = os.memfd_create("dray-bench")
        self._partner = Partner("memory", [self._descriptor])
        self._slots = np.empty((0, 0), np.uint8)
        self._target = np.empty(0, np.uint8)
        self._next = 0

    def open(self, nbytes: int, batch: int) -> None:
        os.ftruncate(self._descriptor, batch * nbytes)
        self._partner.ask("open", nbytes=nbytes, batch=batch)
        self._slots = map_slots(self._descriptor, batch, nbytes)
        self._target = np.zeros(nbytes, np.uint8)

    def prepare(self, count: int) -> None:
        self._partner.ask("prepare", count=count)
        self._next = 0

    def once(self) -> None:
        slot = self._slots[self._next]
        self._next += 1
        if self._fresh:
            slot.copy()
        else:
            np.copyto(self._target, slot)

    def shut(self) -> None:
        self._slots = self._target = np.empty((0, 0), np.uint8)
        self._partner.ask("shut")

    def close(self) -> None:
        if self._descriptor >= 0:
            self._partner.close()
            os.close(self._descriptor)
            self._descriptor = -1


class PrivateCopy:
    """Copy warm memory of this process: the same two arrays repeatedly."""

    name = "bare copy, private"

    def __init__(self) -> None:
        self._source = self._target = np.empty(0, np.uint8)

    def open(self, nbytes: int, batch: int) -> None:
        self._source = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)
        self._target = np.zeros(nbytes, np.uint8)

    def prepare(self, count: int) -> None:
        pass

    def once(self) -> None:
        np.copyto(self._target, self._source)

    def shut(self) -> None:
        self._source = self._target = np.empty(0, np.uint8)

    def close(self) -> None:
        pass
