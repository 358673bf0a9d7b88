"""Redis with the payload inline: what a job with ``transfer = "inline"`` does."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

from benchmarks.peers.contract import Array, Check, Producer, spawn_module
from benchmarks.peers.redis_stream import StreamReceiver, StreamSender
from dray import pack, unpack

_FIELD = "payload"


class RedisSender:
    """Packs, and publishes the image."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._stream = StreamSender(settings["url"])

    def send(self, array: Array) -> None:
        self._stream.publish(payload=bytes(pack({_FIELD: array})))

    def close(self) -> None:
        with self._stream:
            pass


class RedisReceiver:
    """Receives images, and unpacks a copy, because trainers may write to what they are given."""

    def __init__(self, nbytes: int, window: int) -> None:
        self._stream = StreamReceiver()

    def settings(self) -> Mapping[str, Any]:
        return {"url": self._stream.url}

    def spawn(self, control: socket.socket, references: socket.socket) -> Producer:
        return spawn_module("redis", control, references)

    def connect(self, references: socket.socket) -> None:
        pass

    def receive(self, check: Check, most: int) -> None:
        with self._stream.received(most) as entries:
            for entry in entries:
                assert entry.payload is not None
                check(unpack(bytearray(entry.payload))[_FIELD])

    def close(self) -> None:
        with self._stream:
            pass
