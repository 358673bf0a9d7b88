"""What happens on connections, step by step, for logs, statistics, tests and programs that want to watch.

A trace is a function that gets one event after the other: `PayloadClient(trace=…)`, `PayloadServer(trace=…)`.
It runs in the thread that the event happens in, and must neither wait nor raise. `at` is in seconds on the clock
of the client or server. An endpoint is the address of the connection; a server reports its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from dray.errors import DrayError
from dray.protocol.frames import Kind
from dray.protocol.frames import Status as StatusCode


class Connect(NamedTuple):
    """A connection is open: connected, and both sides have proven the secret where there is one.

    Attributes:
        seconds: how long that took.
        version: the protocol version that both sides speak.
    """

    at: float
    endpoint: str
    seconds: float
    version: int


class Checkout(NamedTuple):
    """A call begins to use a connection.

    Attributes:
        idle: seconds for which it was not used; None for a new one.
    """

    at: float
    endpoint: str
    idle: float | None


class Request(NamedTuple):
    """A request leaves the client, or arrives at the server."""

    at: float
    endpoint: str
    kind: Kind
    slot: int
    sequence: int
    reader: int


class Status(NamedTuple):
    """The answer to a request arrives at the client, or leaves the server."""

    at: float
    endpoint: str
    kind: Kind
    slot: int
    sequence: int
    status: StatusCode


class Payload(NamedTuple):
    """A payload is complete at the client, or has left the server."""

    at: float
    endpoint: str
    slot: int
    sequence: int
    nbytes: int


class Acknowledgement(NamedTuple):
    """A lease ends: the payload is consumed, or released."""

    at: float
    endpoint: str
    slot: int
    sequence: int
    reader: int
    consumed: bool


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
    leases: int = 0


class FailedAttempt(NamedTuple):
    """An attempt of a client at an endpoint has failed.

    Attributes:
        error: why.
        quarantine: seconds for which the endpoint is skipped.
        following: the endpoint of the next attempt; None if there is none.
    """

    at: float
    endpoint: str
    error: DrayError
    quarantine: float
    following: str | None


TraceEvent: TypeAlias = Connect | Checkout | Request | Status | Payload | Acknowledgement | Discard | FailedAttempt
Trace: TypeAlias = Callable[[TraceEvent], None]
