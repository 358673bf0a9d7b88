"""A process that puts payloads for as long as there is room, and hands the references on through a pipe."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.exchanges.lanes import READ_SECONDS
from benchmarks.exchanges.payloads import one_array
from benchmarks.partner import Partner
from benchmarks.plan import LaneName
from benchmarks.service import Reply
from dray import PayloadClient, PayloadRef, PayloadServer, SharedRingBuffer
from dray.errors import BufferClosedError


class ProducingService:
    """Puts without end; waits while the ring is full."""

    def __init__(self, descriptor: int) -> None:
        self._references = descriptor
        self._opened = ExitStack()

    def do(self, command: str, **arguments: Any) -> Reply:
        if command == "memory":
            return Reply({"bytes": anonymous_memory()})
        self._open(**arguments)
        return Reply({})

    def close(self) -> None:
        self._opened.close()

    def _open(self, nbytes: int, slots: int, lane: LaneName) -> None:
        arrays = one_array(nbytes)
        ring = SharedRingBuffer(slots, nbytes, prefault=True)
        server = self._opened.enter_context(
            PayloadServer(ring, lane=(lane,), threads=1, checksum=False, drain_timeout=1.0)
        )

        def produce() -> None:
            try:
                while True:
                    # A line that is shorter than PIPE_BUF is written as a whole, whatever other processes write.
                    os.write(self._references, server.put(arrays).to_json().encode() + b"\n")
            except (BufferClosedError, BrokenPipeError):
                return

        thread = threading.Thread(target=produce, name="producer")
        thread.start()
        # Closing the ring ends the wait for room, and with it the thread.
        self._opened.callback(thread.join)
        self._opened.callback(ring.close)


class Fleet:
    """Some producing processes, and one client that reads what they put."""

    def __init__(self, producers: int, slots: int, nbytes: int, lane: LaneName = "shm") -> None:
        self._opened = ExitStack()
        self._lane: LaneName = lane
        self.partners: list[Partner] = []
        with ExitStack() as opened:
            reading, writing = os.pipe()
            self._lines = opened.enter_context(os.fdopen(reading, "rb"))
            with os.fdopen(writing, "wb"):
                for _ in range(producers):
                    self.partners.append(opened.enter_context(Partner("producing", [writing])))
            for partner in self.partners:
                partner.ask("open", nbytes=nbytes, slots=slots, lane=lane)
            self._client = opened.enter_context(PayloadClient(lane=lane))
            self._opened = opened.pop_all()

    def read(self, count: int) -> None:
        """Read the next `count` payloads, whosever they are."""
        for ref in self._next(count):
            self._client.read(ref, timeout=READ_SECONDS)

    def close(self) -> None:
        """End everything. Twice is fine."""
        self._opened.close()

    def _next(self, count: int) -> Iterator[PayloadRef]:
        for _ in range(count):
            yield PayloadRef.from_json(self._lines.readline().decode())


def anonymous_memory() -> int:
    """Bytes of this process that are resident and not a file's: heap and stacks, without segments."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")
