"""A publisher of weights, and a bare copy of the same arrays in the same process."""

from __future__ import annotations

import contextlib
import mmap
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.service import Reply
from dray import Publisher
from dray.streams.weights import DeltaMode

_TENSORS = 8


class PublishingService:
    """Publishes versions on request."""

    def __init__(self) -> None:
        self._opened = ExitStack()
        self._publishers: dict[str, Publisher] = {}
        self._arrays: dict[str, np.ndarray[Any, Any]] = {}
        self._copies = [np.empty(0, np.uint8)]
        self._random = np.random.default_rng(0)

    def do(self, command: str, **arguments: Any) -> Reply:
        if command == "open":
            return Reply(self._open(**arguments))
        if command == "publish":
            return Reply(self._publish(**arguments))
        if command == "copy":
            return Reply({"seconds": self._bare_copy()})
        return Reply({"bytes": _memfd_bytes()})

    def close(self) -> None:
        """End the publishers. Twice is fine."""
        self._copies.clear()
        self._opened.close()

    def _open(self, nbytes: int, scope: str, secret: str) -> dict[str, str]:
        for index in range(_TENSORS):
            bits = self._random.integers(0, 1 << 16, nbytes // _TENSORS // 2, np.uint16)
            self._arrays[f"layer{index}"] = bits.view(ml_dtypes.bfloat16)
        self._copies = [np.frombuffer(mmap.mmap(-1, nbytes), np.uint8) for _ in range(2)]
        for copy in self._copies:
            copy[:] = 0
        modes: tuple[DeltaMode, ...] = ("full", "sparse")
        for delta in modes:
            publisher = Publisher(
                delta, delta=delta, listen="tcp://127.0.0.1:0", secret=bytes.fromhex(secret), scope=scope
            )
            self._publishers[delta] = self._opened.enter_context(publisher)
        return {delta: publisher.addresses[0] for delta, publisher in self._publishers.items()}

    def _bare_copy(self) -> float:
        """Copy all arrays, to one of two places in turn, as the versions are; seconds."""
        self._copies.reverse()
        began, offset = time.perf_counter(), 0
        for array in self._arrays.values():
            np.copyto(self._copies[0][offset : offset + array.nbytes], array.view(np.uint8))
            offset += array.nbytes
        return time.perf_counter() - began

    def _publish(self, delta: str, share: float) -> dict[str, Any]:
        for array in self._arrays.values():
            where = self._random.integers(0, len(array), int(len(array) * share))
            array.view(np.uint16)[where] ^= 1
        began = time.perf_counter()
        version = self._publishers[delta].publish(self._arrays)
        return {"seconds": time.perf_counter() - began, "version": version}


def _memfd_bytes() -> int:
    """The memory of all memfds of this process, as the kernel counts it."""
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if str(entry.readlink()).startswith("/memfd:"):
                total += entry.stat().st_blocks * 512
    return total
