"""Bare sockets: a request of one frame, answered by `nbytes` bytes; blocking calls, one thread at each end."""

from __future__ import annotations

import os
import socket
import struct
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.partner import ANSWER_SECONDS, Partner
from benchmarks.service import Reply

REQUEST_BYTES = 64

_TIMEVAL = struct.Struct("@ll")

Family = Literal["unix", "tcp"]


def prepare_socket(sock: socket.socket, family: Family) -> None:
    """Blocking, with a time limit; the kernel keeps the time, so that it costs no further call."""
    bound = _TIMEVAL.pack(int(ANSWER_SECONDS), 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, bound)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, bound)
    if family == "tcp":
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def receive_all(sock: socket.socket, target: memoryview) -> None:
    """Fill `target`."""
    filled = 0
    while filled < len(target):
        received = sock.recv_into(target[filled:])
        if not received:
            raise ConnectionError("the peer closed the connection")
        filled += received


class SocketService:
    """The answering end."""

    def __init__(self) -> None:
        self._listening: socket.socket | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._connection: socket.socket | None = None
        self._family: Family = "tcp"
        self._answered = 0
        self._payload = np.empty(0, np.uint8)
        self._slots = np.empty((0, 0), np.uint8)

    def do(self, command: str, **arguments: Any) -> Reply:
        if command == "listen":
            return Reply({"address": self._listen(arguments["family"])}, self._accept)
        if command == "open":
            self._payload = np.random.default_rng(0).integers(0, 256, arguments["nbytes"], np.uint8)
            self._slots = np.zeros((arguments["slots"], arguments["nbytes"]), np.uint8)
            self._answered = arguments["answered"]
            return Reply({})
        count = arguments["count"]
        for slot in self._slots[:count]:
            np.copyto(slot, self._payload)
        return Reply({}, lambda: self._exchange(count))

    def close(self) -> None:
        for sock in (self._connection, self._listening):
            if sock is not None:
                sock.close()
        if self._folder is not None:
            self._folder.cleanup()

    def _listen(self, family: Family) -> Any:
        self._family = family
        self._listening = socket.socket(socket.AF_UNIX if family == "unix" else socket.AF_INET)
        if family == "unix":
            self._folder = tempfile.TemporaryDirectory(prefix="dray-bench-")
            self._listening.bind(str(Path(self._folder.name) / "socket"))
        else:
            self._listening.bind(("127.0.0.1", 0))
        self._listening.listen(1)
        return self._listening.getsockname()

    def _accept(self) -> None:
        assert self._listening is not None
        self._listening.settimeout(ANSWER_SECONDS)
        self._connection, _ = self._listening.accept()
        self._connection.setblocking(True)
        prepare_socket(self._connection, self._family)

    def _exchange(self, count: int) -> None:
        sock, answered = self._connection, self._answered
        assert sock is not None
        request = memoryview(bytearray(REQUEST_BYTES))
        for slot in self._slots[:count]:
            receive_all(sock, request)
            sock.sendall(slot[:answered].data)


class SocketExchange:
    """A request, and an answer of the payload's size, or of one frame with ``round_trip``.

    As in dray, each payload of a batch lies in memory of its own and is written before the batch, round trips
    included, and all answers arrive in the same memory: both find the caches as cold.
    """

    def __init__(self, family: Family, *, round_trip: bool) -> None:
        self.name = f"bare {'Unix' if family == 'unix' else 'TCP'}" + (
            " round trip" if round_trip else ", same size"
        )
        self._round_trip = round_trip
        self._partner = Partner("socket")
        address = self._partner.ask("listen", family=family)["address"]
        self._socket = socket.socket(socket.AF_UNIX if family == "unix" else socket.AF_INET)
        self._socket.connect(os.fspath(address) if family == "unix" else tuple(address))
        prepare_socket(self._socket, family)
        self._request = bytes(REQUEST_BYTES)
        self._target = memoryview(b"")

    def open(self, nbytes: int, batch: int) -> None:
        answered = REQUEST_BYTES if self._round_trip else nbytes
        self._partner.ask("open", nbytes=nbytes, answered=answered, slots=batch)
        self._target = np.zeros(answered, np.uint8).data

    def prepare(self, count: int) -> None:
        self._partner.ask("prepare", count=count)

    def once(self) -> None:
        self._socket.sendall(self._request)
        receive_all(self._socket, self._target)

    def shut(self) -> None:
        self._partner.ask("open", nbytes=0, answered=0, slots=0)
        self._target = memoryview(b"")

    def close(self) -> None:
        self._socket.close()
        self._partner.close()
