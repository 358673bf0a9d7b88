"""dray: put, the reference over a socket or through a job's Redis stream, then read or lease."""

from __future__ import annotations

import select
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, cast

from benchmarks.peers.contract import Array, Check, Producer, spawn_module
from benchmarks.peers.redis_stream import StreamReceiver, StreamSender
from dray import PayloadClient, PayloadRef, PayloadServer, SharedRingBuffer

_FIELD = "payload"
_ROOM = 4096
_SECONDS = 60.0


class DraySender:
    """A ring with as many slots as payloads may be on their way, and one server thread."""

    def __init__(self, settings: Mapping[str, Any], references: socket.socket) -> None:
        self._opened = ExitStack()
        self._references = references
        slot_bytes = settings["nbytes"] + _ROOM
        ring = self._opened.enter_context(SharedRingBuffer(settings["window"] + 1, slot_bytes, prefault=True))
        self._server = self._opened.enter_context(
            PayloadServer(ring, lane=(settings["lane"],), threads=1, checksum=False, drain_timeout=1.0)
        )
        self._stream: StreamSender | None = None
        if settings["url"]:
            self._stream = self._opened.enter_context(StreamSender(settings["url"]))

    def send(self, array: Array) -> None:
        ref = self._server.put({_FIELD: array}, timeout=_SECONDS)
        if self._stream is None:
            self._references.send(ref.to_json().encode())
        else:
            self._stream.publish(reference=ref.to_json())

    def close(self) -> None:
        self._opened.close()


class DrayReceiver:
    """``dray:LANE:HOW:OVER``: ``read`` or ``lease``; references over ``socket`` or ``redis``."""

    def __init__(self, kind: str, nbytes: int, window: int) -> None:
        _, self._lane, how, over = kind.split(":")
        self._kind = kind
        self._lease = how == "lease"
        self._opened = ExitStack()
        self._client = self._opened.enter_context(PayloadClient(lane=cast("Any", self._lane)))
        self._references: socket.socket | None = None
        self._stream = self._opened.enter_context(StreamReceiver()) if over == "redis" else None

    def settings(self) -> Mapping[str, Any]:
        return {"lane": self._lane, "url": self._stream.url if self._stream is not None else ""}

    def spawn(self, control: socket.socket, references: socket.socket) -> Producer:
        return spawn_module(self._kind, control, references)

    def connect(self, references: socket.socket) -> None:
        self._references = references

    def receive(self, check: Check, most: int) -> None:
        if self._stream is None:
            self._read(self._arrived(most), check)
        else:
            with self._stream.received(most) as entries:
                self._read([entry.reference or "" for entry in entries], check)

    def close(self) -> None:
        self._opened.close()

    def _arrived(self, most: int) -> list[str]:
        """The next reference, and those that are there as well."""
        assert self._references is not None
        arrived = [self._references.recv(_ROOM)]
        while len(arrived) < most and select.select([self._references], [], [], 0)[0]:
            arrived.append(self._references.recv(_ROOM))
        return [reference.decode() for reference in arrived]

    def _read(self, references: Sequence[str], check: Check) -> None:
        refs = [PayloadRef.from_json(reference) for reference in references]
        if self._lease:
            for ref in refs:
                with self._client.lease(ref, timeout=_SECONDS) as arrays:
                    check(arrays[_FIELD])
        elif len(refs) == 1:
            check(self._client.read(refs[0], timeout=_SECONDS)[_FIELD])
        else:
            for result in self._client.read_many(refs, timeout=_SECONDS):
                check(result.payload[_FIELD])
