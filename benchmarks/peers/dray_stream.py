"""dray's streams: `dray.Producer` in one process, `dray.Consumer` by name in the other."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np

from benchmarks.peers.contract import Array, Check, Producer, spawn_module
from benchmarks.runtime_folder import own_runtime_folder
from benchmarks.service import end_with_parent
from dray import Consumer
from dray import Producer as StreamProducer
from dray.errors import UndeliveredError

_FIELD = "payload"
_NAME = "payloads"
_SCOPE = "benchmark"
_ROOM = 4096
_SECONDS = 60.0


class StreamSender:
    """Puts payloads. Each slot is written once before the measurement, so that its memory exists."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        nbytes, slots = settings["nbytes"], settings["slots"]
        # The last payload is acknowledged with the next one, which never comes: there is nothing to wait for.
        self._producer = StreamProducer(
            _NAME, slots=slots, slot_bytes=nbytes + _ROOM, scope=_SCOPE, drain_timeout=0.0
        )
        first = np.ones(nbytes // 8, np.uint64)
        for _ in range(slots):
            self.send(first)

    def send(self, array: Array) -> None:
        self._producer.put({_FIELD: array}, timeout=_SECONDS)

    def close(self) -> None:
        with contextlib.suppress(UndeliveredError):
            self._producer.close()


class StreamReceiver:
    """``stream:HOW``: iterates; ``in-place`` uses the arrays in the producer's memory, ``copy`` copies them."""

    def __init__(self, kind: str, nbytes: int, window: int) -> None:
        end_with_parent()  # an iteration whose producer has been killed has no end
        self._kind = kind
        self._copies = kind.partition(":")[2] == "copy"
        # As many as are in flight, and as many that the consumer and the ring have not given back.
        self._slots = 2 * window + 2
        self._opened = ExitStack()
        self._opened.enter_context(own_runtime_folder())
        self._consumer = self._opened.enter_context(Consumer(_NAME, scope=_SCOPE, prefetch=window))

    def settings(self) -> Mapping[str, Any]:
        return {"slots": self._slots}

    def spawn(self, control: socket.socket, references: socket.socket) -> Producer:
        return _StreamProducer(spawn_module(self._kind, control, references), self._consumer)

    def connect(self, references: socket.socket) -> None:
        # Every slot is read once, so that this process has mapped its memory.
        for _ in range(self._slots):
            payload = self._consumer.get(timeout=_SECONDS)
            if not payload.copy()[_FIELD].all():
                raise ValueError("a payload of the first lap is another one")
        payload.acknowledge()

    def receive(self, check: Check, most: int) -> None:
        payload = next(self._consumer)
        check((payload.copy() if self._copies else payload)[_FIELD])

    def close(self) -> None:
        self._opened.close()


class _StreamProducer:
    """The producer's process. Its server would wait for the payload that the consumer used last."""

    def __init__(self, process: Producer, consumer: Consumer) -> None:
        self._process = process
        self._consumer = consumer

    def wait(self, timeout: float | None = None) -> int:
        self._consumer.close()
        return self._process.wait(timeout)

    def kill(self) -> None:
        self._process.kill()
