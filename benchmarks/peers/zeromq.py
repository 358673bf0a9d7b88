"""ZeroMQ PUSH and PULL over ipc or tcp: dtype and shape in one frame, the array in the next."""

from __future__ import annotations

import importlib
import json
import socket
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.peers.contract import Array, Check, Producer, spawn_module

_LINGER = 0
_TIMEOUT_MS = 60_000


class ZeroMQSender:
    """Pushes arrays. pyzmq copies what is smaller than 64 KiB, where that is faster."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        zmq: Any = importlib.import_module("zmq")
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.linger = _LINGER
        self._socket.sndtimeo = _TIMEOUT_MS
        self._socket.connect(settings["address"])

    def send(self, array: Array) -> None:
        header = json.dumps({"dtype": array.dtype.str, "shape": array.shape}).encode()
        self._socket.send_multipart([header, array.data], copy=False)

    def close(self) -> None:
        self._socket.close()
        self._context.term()


class ZeroMQReceiver:
    """Pulls frames and wraps them."""

    def __init__(self, transport: str, nbytes: int, window: int) -> None:
        zmq: Any = importlib.import_module("zmq")
        self._transport = transport
        self._folder = tempfile.TemporaryDirectory(prefix="dray-bench-")
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.linger = _LINGER
        self._socket.rcvtimeo = _TIMEOUT_MS
        self._socket.bind("tcp://127.0.0.1:*" if transport == "tcp" else f"ipc://{self._folder.name}/socket")
        self._address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def settings(self) -> Mapping[str, Any]:
        return {"address": self._address}

    def spawn(self, control: socket.socket, references: socket.socket) -> Producer:
        return spawn_module(f"zeromq:{self._transport}", control, references)

    def connect(self, references: socket.socket) -> None:
        pass

    def receive(self, check: Check, most: int) -> None:
        header, body = self._socket.recv_multipart(copy=False)
        found = json.loads(header.bytes)
        check(np.frombuffer(body.buffer, found["dtype"]).reshape(found["shape"]))

    def close(self) -> None:
        self._socket.close()
        self._context.term()
        self._folder.cleanup()
