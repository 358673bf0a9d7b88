"""The two ends of a peer, and the loop that measures them.

The consumer's process asks the producer's for payloads by credits, so that as many are on their way as the
measurement wants: one for the time of each, a window of them for the throughput. Both read the same clock
(CLOCK_MONOTONIC is one per host): a payload's time begins when its producer has an array, and ends when its
consumer has read the first and the last number of one.
"""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from benchmarks.service import Reply

Array = np.ndarray[Any, np.dtype[np.uint64]]
Check = Callable[[Array], None]

_CREDIT = b"c"
_READY = b"ready"
_PACKET = 1 << 17
_MAX_TIMES = 10_000
_ANSWER_SECONDS = 60.0
_END_SECONDS = 10.0


class Sender(Protocol):
    """The producer's end."""

    def send(self, array: Array) -> None:
        """Hand on what `array` holds; its memory is left alone until the consumer has it."""
        ...

    def close(self) -> None:
        """Give back what the sender holds."""
        ...


class Producer(Protocol):
    """The producer's process, as `subprocess.Popen` has it."""

    def wait(self, timeout: float | None = None) -> int: ...

    def kill(self) -> None: ...


class Receiver(Protocol):
    """The consumer's end."""

    def settings(self) -> Mapping[str, Any]:
        """What the sender must know, as JSON values."""
        ...

    def spawn(self, control: socket.socket, references: socket.socket) -> Producer:
        """Start the producer's process."""
        ...

    def connect(self, references: socket.socket) -> None:
        """The producer is there; references, where there are any, come over this socket."""
        ...

    def receive(self, check: Check, most: int) -> None:
        """Wait for the next payload, and call `check` with its array; where it is faster to take several together,
        the same for those that are there as well, `most` in all."""
        ...

    def close(self) -> None:
        """Give back what the receiver holds."""
        ...


MakeReceiver = Callable[[int, int], Receiver]
"""From payload size in bytes and window."""


def spawn_module(kind: str, control: socket.socket, references: socket.socket) -> Producer:
    """Start a producer that shares nothing with this process but two sockets."""
    fds = (control.fileno(), references.fileno())
    command = [sys.executable, "-m", "benchmarks.peers.producer", kind, *map(str, fds)]
    return subprocess.Popen(command, pass_fds=fds, stdin=subprocess.DEVNULL)


class PairedService:
    """The consumer's process: opens both ends, and measures."""

    def __init__(self, make: MakeReceiver) -> None:
        self._make = make
        self._receiver: Receiver | None = None
        self._producer: Producer | None = None
        self._sockets: list[socket.socket] = []
        self._window = 1
        self._sequence = 0

    def do(self, command: str, **arguments: Any) -> Reply:
        if command == "open":
            self._open(**arguments)
            return Reply({})
        if command == "latency":
            began, ended = self._measure(arguments["count"], 1)
            return Reply({"seconds": [b - a for a, b in zip(began, ended, strict=True)]})
        if command == "stream":
            began, ended = self._measure(arguments["count"], self._window)
            return Reply({"seconds": ended[-1] - began[0]})
        self.close()
        return Reply({})

    def close(self) -> None:
        for each in self._sockets:
            each.close()
        self._sockets.clear()
        if self._producer is not None:
            try:
                self._producer.wait(_END_SECONDS)
            except (TimeoutError, subprocess.TimeoutExpired):
                self._producer.kill()
                self._producer.wait(_END_SECONDS)
            self._producer = None
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None

    def _open(self, nbytes: int, window: int) -> None:
        self._window, self._sequence = window, 0
        self._receiver = self._make(nbytes, window)
        control, far_control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        references, far_references = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sockets = [control, references]
        with far_control, far_references:
            self._producer = self._receiver.spawn(far_control, far_references)
        for each in self._sockets:
            each.settimeout(_ANSWER_SECONDS)
        settings = {"nbytes": nbytes, "window": window, **self._receiver.settings()}
        control.send(json.dumps(settings).encode())
        if control.recv(_PACKET) != _READY:
            raise ConnectionError("the producer has ended")
        self._receiver.connect(references)

    def _measure(self, count: int, window: int) -> tuple[Sequence[float], Sequence[float]]:
        """When each payload began, and when it was there; seconds."""
        assert self._receiver is not None
        receive, control = self._receiver.receive, self._sockets[0]
        count = min(count, _MAX_TIMES)
        ended: list[float] = []

        def check(array: Array) -> None:
            self._sequence += 1
            if array[0] != self._sequence or array[-1] != self._sequence:
                raise ValueError(f"payload {self._sequence} is another one")
            ended.append(time.monotonic())

        control.send(json.dumps(count).encode())
        asked = 0
        while len(ended) < count:
            due = min(count, len(ended) + window)
            for _ in range(asked, due):
                control.send(_CREDIT)
            asked = due
            receive(check, asked - len(ended))
        return struct.unpack(f"<{count}d", control.recv(_PACKET)), ended


def produce(make: Callable[[Mapping[str, Any]], Sender], control: socket.socket) -> None:
    """The producer's process: send what credits ask for, until the consumer closes `control`."""
    settings = json.loads(control.recv(_PACKET))
    sender = make(settings)
    try:
        # As many arrays as payloads may be on their way: none is written to while another process reads it.
        generator = np.random.default_rng(0)
        shape = settings["nbytes"] // 8
        arrays = [generator.integers(0, 2**63, shape, np.uint64) for _ in range(settings["window"])]
        control.send(_READY)
        sequence = 0
        while asked := control.recv(_PACKET):
            count = json.loads(asked)
            began: list[float] = []
            for _ in range(count):
                if not control.recv(len(_CREDIT)):
                    return
                array = arrays[sequence % len(arrays)]
                sequence += 1
                array[0] = array[-1] = sequence
                began.append(time.monotonic())
                sender.send(array)
            control.send(struct.pack(f"<{count}d", *began))
    finally:
        sender.close()
