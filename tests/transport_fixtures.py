"""What tests of the transport share: servers, payloads and other processes."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from waiting import wait_until

from dray.clock import Deadline
from dray.errors import TransportError
from dray.protocol import PayloadRef
from dray.protocol.frames import FRAME_BYTES
from dray.ring import SharedRingBuffer
from dray.transport import PayloadServer
from dray.transport.lanes import parse_endpoint
from dray.transport.lanes.base import Endpoint, Network, Stream, Worker
from dray.transport.polling import CloseEvent

LANES = ("shm", "tcp", "ucx")
SIZES = (0, 1, 63, 4096, 65_537, 1 << 20, (16 << 20) + 3, 64 << 20)
MAX_BYTES = 64 << 20


def pattern(seed: int, nbytes: int) -> bytes:
    """Bytes that differ at every place and for every seed."""
    return np.random.default_rng(seed).bytes(nbytes)


@contextlib.contextmanager
def serving(
    lanes: Any = "auto",
    *,
    slots: int = 4,
    slot_bytes: int = 1 << 16,
    threads: int = 1,
    readers: int = 1,
    **options: Any,
) -> Iterator[PayloadServer]:
    """A server with a ring of its own."""
    ring = SharedRingBuffer(slots, slot_bytes, readers=readers)
    with ring, PayloadServer(ring, lane=lanes, threads=threads, drain_timeout=0.5, **options) as server:
        yield server


def over_connections(lanes: Any = "auto", **options: Any) -> Any:
    """`serving` without direct leases: every read goes over a connection, also on the shm lane."""
    return serving(lanes, direct=False, **options)


def ring_of(server: PayloadServer) -> SharedRingBuffer:
    return server.ring


def endpoint_of(server: PayloadServer, lane: str) -> Endpoint:
    """The first endpoint of the server on a lane."""
    return next(e for e in map(parse_endpoint, server.endpoints) if e.lane.name == lane)


def counted(server: PayloadServer, name: str) -> int:
    """One of the server's counters."""
    return int(getattr(server.statistics().counters, name))


class WatchedStream:
    """A client's stream whose messages a test sees before they are sent."""

    def __init__(self, stream: Stream, on_send: Callable[[Stream, Sequence[Any]], bool]) -> None:
        self._stream = stream
        self._on_send = on_send

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def send(self, items: Sequence[Any], descriptors: Sequence[int] = ()) -> bool:
        return self._on_send(self._stream, items) or self._stream.send(items, descriptors)


class WatchedNetwork(Network):
    """The network of this machine.

    Args:
        on_send: called before each message of a client; it may raise, and True loses the message.

    Attributes:
        streams: every stream so far.
    """

    def __init__(self, on_send: Callable[[Stream, Sequence[Any]], bool] = lambda stream, items: False) -> None:
        super().__init__(CloseEvent())
        self.streams: list[Stream] = []
        self._on_send = on_send

    def connect(self, address: Endpoint, deadline: Deadline, worker: Worker | None) -> Stream:
        stream: Any = WatchedStream(super().connect(address, deadline, worker), self._on_send)
        self.streams.append(stream)
        return stream  # type: ignore[no-any-return]


def has_ended(stream: Stream) -> bool:
    """The peer has closed an idle connection."""
    try:
        stream.idle()
        stream.receive(FRAME_BYTES)
    except TransportError:
        return True
    return False


class Child:
    """Another Python process that runs `script`, and talks in lines of JSON over its standard streams.

    The script finds `send(value)`, `receive()` (None at the end), `pattern` and `arguments`.
    """

    PRELUDE = """
import json, os, sys
import numpy as np
from dray import *
from dray.errors import *
from dray.ring import SharedRingBuffer
from dray.clock import Deadline, Stopwatch
from dray.transport.connection import Connection
from dray.transport.lanes.ucx_worker import UcxWorker
arguments = json.loads(sys.argv[1])
def send(value=None):
    print(json.dumps(value), flush=True)
def receive():
    line = sys.stdin.readline()
    return json.loads(line) if line else None
def pattern(seed, nbytes):
    return np.random.default_rng(seed).bytes(nbytes)
"""

    def __init__(self, script: str, **arguments: Any) -> None:
        command = [sys.executable, "-c", self.PRELUDE + script, json.dumps(arguments)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def send(self, value: Any = None) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(value) + "\n")
        self.process.stdin.flush()

    def receive(self, seconds: float = 30.0) -> Any:
        """The child's next line."""
        out = self.process.stdout
        assert out is not None
        readable, _, _ = select.select([out], [], [], seconds)
        assert readable, f"the child wrote nothing for {seconds} s"
        line = out.readline()
        assert line, "the child ended"
        return json.loads(line)

    def ask(self, value: Any = None, seconds: float = 30.0) -> Any:
        self.send(value)
        return self.receive(seconds)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)

    def stop(self) -> None:
        """SIGSTOP; returns when it has stopped."""
        self.process.send_signal(signal.SIGSTOP)
        wait_until(lambda: self._state() == "T", "the child to stop")

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate(timeout=30)

    def _state(self) -> str:
        with open(f"/proc/{self.pid}/stat") as stat:  # noqa: PTH123
            return stat.read().rsplit(")", 1)[1].split()[0]


class Footprint(NamedTuple):
    """What a process holds at one moment."""

    megabytes: float  # resident
    descriptors: int
    threads: int
    mappings: int

    @classmethod
    def of(cls, pid: int) -> "Footprint":
        process = Path(f"/proc/{pid}")
        pages = int((process / "statm").read_text().split()[1])
        megabytes = round(pages * os.sysconf("SC_PAGESIZE") / 2**20, 1)
        descriptors, threads = (len(list((process / name).iterdir())) for name in ("fd", "task"))
        return cls(megabytes, descriptors, threads, (process / "maps").read_bytes().count(b"\n"))


SERVER = """
ring = SharedRingBuffer(arguments["slots"], arguments["slot_bytes"])
secret = bytes.fromhex(arguments["secret"]) if "secret" in arguments else None
server = PayloadServer(ring, secret=secret, drain_timeout=0.5, **arguments.get("options", {}))
send(server.endpoints)
forked = 0
while (wanted := receive()) is not None:
    if wanted == "fork":
        forked = os.fork()
        if not forked:
            import signal
            signal.pause()
        send(forked)
    elif wanted == "statistics":
        send(server.statistics().to_dict())
    else:
        seed, nbytes = wanted
        send(json.loads(server.put_bytes(pattern(seed, nbytes), timeout=20).to_json()))
server.close()
"""
"""Serves a ring; puts ``[seed, nbytes]`` and prints the reference, forks, prints its statistics."""

READER = """
ref = PayloadRef.from_json(json.dumps(arguments["ref"]))
endpoint = next(e for e in ref.endpoints if e.startswith(arguments["scheme"]))
worker = UcxWorker(True) if arguments["scheme"] == "ucx" else None
deadline = Deadline.after(30)
connection = Connection.open(endpoint, ref.producer, None, deadline, worker=worker)
(target,) = connection.ask([ref], 0, deadline)
if arguments["stage"] == "received":
    held = connection.answer(target, deadline, deadline)
    assert held.data().nbytes == ref.nbytes
send("there")
receive()
connection.acknowledge([(held.request, True)], deadline)
connection.stat(deadline)
send("acknowledged")
"""
"""Reads a payload on one connection up to a stage ("asked", "received") and waits; then acknowledges it."""


def reference(found: Any) -> PayloadRef:
    """A reference that came out of a child."""
    return PayloadRef.from_json(json.dumps(found))
