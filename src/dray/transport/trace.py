"""What happens on connections, step by step, for logs, statistics, tests and programs.

A trace is a function that receives each event: `PayloadClient(trace=…)`, `PayloadServer(trace=…)`. It runs in the
thread in which the event happens, and must neither wait nor raise. In every event `at` is in seconds on the clock
of the client or server, and `endpoint` the address of the connection; a server reports its own. `connection` is a
number that no other connection of the client has while this one is open.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from dray.errors import DrayError
from dray.protocol.frames import Kind
from dray.protocol.frames import Status as StatusCode


class Attempt(NamedTuple):
    """A client begins an attempt; it must have connected and received its first STATUS at `deadline`."""

    at: float
    endpoint: str
    producer: bytes
    deadline: float


class SuccessfulAttempt(NamedTuple):
    """An attempt has succeeded, after `latency` seconds until the first STATUS, connecting included."""

    at: float
    endpoint: str
    latency: float | None


class FailedAttempt(NamedTuple):
    """An attempt has failed: why, for how many seconds the endpoint is skipped, and where the next one is made."""

    at: float
    endpoint: str
    error: DrayError
    quarantine: float
    following: str | None


class Connect(NamedTuple):
    """A connection is open, after `seconds`, with the protocol version that both sides speak."""

    at: float
    endpoint: str
    seconds: float
    version: int
    connection: int


class Checkout(NamedTuple):
    """A call begins to use a connection, which was idle for some seconds; None for a new one."""

    at: float
    endpoint: str
    idle: float | None
    connection: int


class Checkin(NamedTuple):
    """A call has used a connection, which is idle now."""

    at: float
    endpoint: str
    connection: int


class Discard(NamedTuple):
    """A connection is closed.

    Attributes:
        error: why, if it failed. At a server, `ConnectionClosed` if the client has closed it; None if the server
            closes it because it was idle, silent or late, or because the server is closed.
        leases: how many leases the connection of a server held; they end with it.
    """

    at: float
    endpoint: str
    error: DrayError | None
    connection: int
    leases: int = 0


class Request(NamedTuple):
    """A request leaves the client, or arrives at the server."""

    at: float
    endpoint: str
    kind: Kind
    slot: int
    sequence: int
    reader: int
    connection: int


class Status(NamedTuple):
    """The answer to a request arrives at the client, or leaves the server."""

    at: float
    endpoint: str
    kind: Kind
    slot: int
    sequence: int
    status: StatusCode
    connection: int


class Payload(NamedTuple):
    """A payload is complete at the client, or has left the server."""

    at: float
    endpoint: str
    slot: int
    sequence: int
    nbytes: int
    connection: int


class Acknowledgement(NamedTuple):
    """A lease ends: the payload is consumed, or released."""

    at: float
    endpoint: str
    slot: int
    sequence: int
    reader: int
    consumed: bool
    connection: int


TraceEvent: TypeAlias = (
    Attempt | SuccessfulAttempt | FailedAttempt | Connect | Checkout | Checkin | Discard
    | Request | Status | Payload | Acknowledgement
)  # fmt: skip
Trace: TypeAlias = Callable[[TraceEvent], None]
