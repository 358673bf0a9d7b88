"""Many producers of one stream, forked from one process, and their consumer."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from benchmarks.exchanges.payloads import FIELD, one_array
from benchmarks.service import Reply, end_with_parent
from dray import Consumer, Producer
from dray.resources import raise_descriptor_limit

SCOPE: Final = "benchmark"
PREFETCH: Final = 8
_READY: Final = b"r"


class ProducersService:
    """Forks producers, which put for as long as there is room. The kernel kills them when this process ends."""

    def __init__(self) -> None:
        raise_descriptor_limit()
        self._arrays: dict[str, Any] = {}
        self._children: list[int] = []
        self._pid = os.getpid()

    def do(self, command: str, **arguments: Any) -> Reply:
        if command == "memory":
            held = [held_by(pid) for pid in self._children]
            return Reply({"private": [each[0] for each in held], "descriptors": [each[1] for each in held]})
        self._add(**arguments)
        return Reply({})

    def close(self) -> None:
        """Kill the producers that are left. Twice is fine."""
        if os.getpid() == self._pid:
            for pid in self._children:
                os.kill(pid, signal.SIGKILL)
            for pid in self._children:
                os.waitpid(pid, 0)
            self._children.clear()

    def _add(self, name: str, count: int, slots: int, nbytes: int) -> None:
        """Fork `count` producers; returns when all of them have put a payload."""
        if not self._arrays:
            self._arrays = one_array(nbytes)
            # A collection of garbage in a child would write to every object, and so copy its memory.
            gc.collect()
            gc.freeze()
        reading, writing = os.pipe()
        with os.fdopen(reading, "rb") as ready:
            for _ in range(count):
                pid = os.fork()
                if pid == 0:
                    self._produce(name, slots, nbytes, writing)
                self._children.append(pid)
            os.close(writing)
            # The end of the file comes when no child is left that could still write.
            found = len(ready.read(count))
        if found != count:
            raise ChildProcessError(f"{count - found} of {count} producers have ended")

    def _produce(self, name: str, slots: int, nbytes: int, ready: int) -> None:
        """What a child does; it does not return."""
        try:
            end_with_parent()
            if os.getppid() == self._pid:
                with Producer(name, slots=slots, slot_bytes=nbytes, scope=SCOPE) as producer:
                    producer.put(self._arrays)
                    os.write(ready, _READY)
                    os.close(ready)
                    while True:
                        producer.put(self._arrays, timeout=None)
        finally:
            os._exit(1)


class StreamReaderService:
    """A consumer that uses payloads in place."""

    def __init__(self) -> None:
        end_with_parent()  # a wait for producers that have been killed has no end
        raise_descriptor_limit()
        self._opened = ExitStack()
        self._consumer: Consumer | None = None

    def do(self, command: str, **arguments: Any) -> Reply:
        if command == "open":
            self._consumer = self._opened.enter_context(
                Consumer(arguments["name"], scope=SCOPE, prefetch=PREFETCH)
            )
        elif command == "attach":
            self._attach(arguments["count"])
        elif command == "read":
            began = time.perf_counter()
            payloads = self._read(arguments["seconds"], arguments["nbytes"])
            return Reply({"rate": payloads / (time.perf_counter() - began), "payloads": payloads})
        private, descriptors = held_by(os.getpid())
        return Reply({"private": private, "descriptors": descriptors})

    def close(self) -> None:
        self._opened.close()

    def _attach(self, count: int) -> None:
        """Read until every one of `count` producers has given a payload."""
        assert self._consumer is not None
        found: set[bytes] = set()
        while len(found) < count:
            found.add(next(self._consumer).id.producer)

    def _read(self, seconds: float, nbytes: int) -> int:
        """Read for so long, both ends of each payload; returns how many payloads that were."""
        consumer, now = self._consumer, time.perf_counter
        assert consumer is not None
        expected = one_array(nbytes)[FIELD]
        first, last = expected[0], expected[-1]
        payloads = 0
        end = now() + seconds
        while now() < end:
            array = next(consumer)[FIELD]
            if array[0] != first or array[-1] != last:
                raise ValueError("a payload is another one")
            payloads += 1
        return payloads


def held_by(pid: int) -> tuple[int, int]:
    """Bytes of memory that only this process has, and its descriptors."""
    private = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith(("Private_Clean:", "Private_Dirty:")):
            private += int(line.split()[1]) * 1024
    with contextlib.closing(os.scandir(f"/proc/{pid}/fd")) as descriptors:
        return private, sum(1 for _ in descriptors)
