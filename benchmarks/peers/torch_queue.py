"""torch.multiprocessing.SimpleQueue: tensors move to shared memory, their names through the queue."""

from __future__ import annotations

import importlib
import socket
from collections.abc import Mapping
from typing import Any

from benchmarks.peers.contract import Array, Check, Producer, produce
from benchmarks.peers.multiprocessing_queue import SpawnedProcess


class TorchSender:
    """Puts tensors; putting copies what they hold into shared memory of their own."""

    def __init__(self, queue: Any) -> None:
        self._torch: Any = importlib.import_module("torch")
        # Copies by several threads wait for each other where there are few processors.
        self._torch.set_num_threads(1)
        # Quicker than handing descriptors over, which takes a connection for each.
        self._torch.multiprocessing.set_sharing_strategy("file_system")
        self._queue = queue

    def send(self, array: Array) -> None:
        self._queue.put(self._torch.from_numpy(array))

    def close(self) -> None:
        pass


class TorchReceiver:
    """Gets tensors; what they hold is mapped, not copied."""

    def __init__(self, nbytes: int, window: int) -> None:
        self._context: Any = importlib.import_module("torch.multiprocessing").get_context("spawn")
        self._queue: Any = self._context.SimpleQueue()

    def settings(self) -> Mapping[str, Any]:
        return {}

    def spawn(self, control: socket.socket, references: socket.socket) -> Producer:
        process = self._context.Process(target=_produce, args=(self._queue, control))
        process.start()
        return SpawnedProcess(process)

    def connect(self, references: socket.socket) -> None:
        pass

    def receive(self, check: Check, most: int) -> None:
        check(self._queue.get().numpy())

    def close(self) -> None:
        self._queue.close()


def _produce(queue: Any, control: socket.socket) -> None:
    with control:
        produce(lambda _: TorchSender(queue), control)
