"""TransferQueue with its SimpleStorage: put into a storage process, get from it.

The metadata that `put` returns goes to the consumer over a socket, which is shorter than asking the controller.
"""

from __future__ import annotations

import functools
import importlib
import pickle
import socket
from collections.abc import Mapping
from typing import Any

from benchmarks.peers.contract import Array, Check, Producer, spawn_module
from benchmarks.peers.ray_store import start_ray

_FIELD = "payload"
_PARTITION = "bench"
_PACKET = 1 << 17
_CPUS = 8
"""What TransferQueue's own processes reserve, whatever the machine has."""


@functools.cache
def _client(**ray_options: Any) -> Any:
    """One per process: Ray and TransferQueue start within seconds, and end with the process."""
    start_ray(**ray_options)
    queue: Any = importlib.import_module("transfer_queue")
    queue.init()
    return queue.get_client()


class TransferQueueSender:
    """Puts a batch of one sample."""

    def __init__(self, settings: Mapping[str, Any], references: socket.socket) -> None:
        self._references = references
        self._torch: Any = importlib.import_module("torch")
        self._batch: Any = importlib.import_module("tensordict").TensorDict
        self._client = _client(address=settings["address"], namespace="bench")

    def send(self, array: Array) -> None:
        row = self._torch.from_numpy(array).view(self._torch.int64)[None]
        metadata = self._client.put(self._batch({_FIELD: row}, batch_size=1), partition_id=_PARTITION)
        self._references.send(pickle.dumps(metadata))

    def close(self) -> None:
        pass


class TransferQueueReceiver:
    """Gets a batch of one sample, then clears it."""

    def __init__(self, nbytes: int, window: int) -> None:
        self._ray: Any = importlib.import_module("ray")
        self._client = _client(num_cpus=_CPUS, namespace="bench")
        self._references: socket.socket | None = None

    def settings(self) -> Mapping[str, Any]:
        return {"address": self._ray.get_runtime_context().gcs_address}

    def spawn(self, control: socket.socket, references: socket.socket) -> Producer:
        return spawn_module("transferqueue", control, references)

    def connect(self, references: socket.socket) -> None:
        self._references = references

    def receive(self, check: Check, most: int) -> None:
        assert self._references is not None
        metadata = pickle.loads(self._references.recv(_PACKET))  # noqa: S301  (from our own producer)
        found = self._client.get_data(metadata)
        check(found[_FIELD][0].numpy().view("u8"))
        self._client.clear_samples(metadata)

    def close(self) -> None:
        pass
