"""multiprocessing.Queue of the standard library: a thread pickles arrays into a pipe."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Mapping
from typing import Any

from benchmarks.peers.contract import Array, Check, Producer, produce

_SECONDS = 60.0


class QueueSender:
    """Puts arrays."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def send(self, array: Array) -> None:
        self._queue.put(array)

    def close(self) -> None:
        self._queue.cancel_join_thread()
        self._queue.close()


class QueueReceiver:
    """Gets arrays."""

    def __init__(self, nbytes: int, window: int) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._queue: Any = self._context.Queue()

    def settings(self) -> Mapping[str, Any]:
        return {}

    def spawn(self, control: socket.socket, references: socket.socket) -> Producer:
        process = self._context.Process(target=_produce, args=(self._queue, control))
        process.start()
        return SpawnedProcess(process)

    def connect(self, references: socket.socket) -> None:
        pass

    def receive(self, check: Check, most: int) -> None:
        check(self._queue.get(timeout=_SECONDS))

    def close(self) -> None:
        self._queue.close()


class SpawnedProcess:
    """A process of multiprocessing as a `Producer`."""

    def __init__(self, process: Any) -> None:
        self._process = process

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError("the producer is still running")
        return int(self._process.exitcode)

    def kill(self) -> None:
        self._process.kill()


def _produce(queue: Any, control: socket.socket) -> None:
    with control:
        produce(lambda _: QueueSender(queue), control)
