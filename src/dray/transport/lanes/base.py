"""The contract of a lane: its properties, and the streams, listeners and workers it brings.

A lane is one module with a subclass of `Lane` and one entry in `dray.transport.lanes.LANES`. A `Stream` has two
channels: *messages* (the handshake and frames, whose sizes both ends know) and *payloads*. No method of a stream
waits. Its user waits for `fileno()` when `idle()` allows, until a deadline: a server thread for all its streams at
once, a client for the one that it uses.
"""

from __future__ import annotations

import abc
import encodings.idna  # noqa: F401  (loaded now: `encode` could not load it when no descriptor is left)
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dray.clock import Deadline
from dray.protocol.frames import Outgoing
from dray.protocol.ref import has_control
from dray.transport.lease_reaper import LeaseReaper
from dray.transport.polling import CloseEvent, PollWaiter
from dray.transport.receive_buffers import ReceiveBuffers


class Stream(Protocol):
    """One connection.

    Every method raises a `TransportError` when the connection has failed: `ConnectionClosed` when the peer closed
    it between messages, `MessageTruncated` within one, `ConnectionReset` for any other failure.

    Attributes:
        lane: the lane it belongs to.
        worker: what must make progress for this stream to go on; None where the kernel sees to that.
        peer_pid: the process at the other end, where the lane tells; else None.
    """

    @property
    def lane(self) -> Lane: ...
    @property
    def worker(self) -> Worker | None: ...
    @property
    def peer_pid(self) -> int | None: ...

    def fileno(self) -> int:
        """The descriptor that becomes readable when the stream can go on."""
        ...

    def idle(self) -> bool:
        """Prepare for waiting on `fileno`; False if the stream can go on now."""
        ...

    @property
    def wants_write(self) -> bool:
        """`flush` needs room: wait for writability."""
        ...

    def receive(self, size: int, most: int = 1) -> memoryview | None:
        """The next message of exactly `size` bytes, valid until the next call; None if it is not complete yet.

        If the following messages have the same size, up to `most` of those that are here come together, one behind
        the other. After None, call `idle` and wait before the next call.
        """
        ...

    def receive_descriptor(self, size: int) -> tuple[bytes, int] | None:
        """The next message and the descriptor that came with it, or -1; None if the message is not here yet.

        The caller closes the descriptor. A lane whose payloads stay in shared memory sends one with WELCOME.

        Raises:
            OutOfResources: no descriptor was left to receive it.
        """
        ...

    def send(self, items: Sequence[Outgoing], descriptor: int | None = None) -> bool:
        """Send messages and payloads in order; True when all of it has left.

        Otherwise the stream uses their memory until `flush` returns True.
        """
        ...

    def flush(self) -> bool:
        """Continue sending; True when everything has left and its memory is free again."""
        ...

    def expect(self, target: memoryview) -> int:
        """Name the memory for the payload of the request that is sent next; the tag for that request, or 0."""
        ...

    def payload_arrived(self, nbytes: int) -> bool:
        """True when the oldest expected payload is complete; `nbytes` is the size in STATUS, 0 for none."""
        ...

    def progress(self) -> object:
        """A value that changes while bytes travel in either direction, as far as this end can observe that."""
        ...

    def close(self) -> None:
        """End the connection at once; what was not flushed is lost. Twice is fine."""
        ...

    @property
    def drained(self) -> bool:
        """After `close`: nothing reads or writes memory that was given to this stream any more."""
        ...


class Worker(Hashable, Protocol):
    """What several connections share, and what only one thread can use at a time: a UCX worker.

    Attributes:
        steps: grows with everything that `progress` has done.
    """

    @property
    def steps(self) -> int: ...

    def fileno(self) -> int:
        """Becomes readable when `progress` has work, after `arm`."""
        ...

    def progress(self) -> None:
        """Do the work that is due, without waiting."""
        ...

    def arm(self) -> bool:
        """Make `fileno` readable at the next event; False if there is one already."""
        ...

    def drop_strays(self) -> None:
        """Drop messages that arrived and that no stream expects."""
        ...

    def close(self) -> None:
        """End it; its connections are closed. Twice is fine."""
        ...


class SilentPeers(Protocol):
    """Limits connections that a worker has accepted by itself and that have not begun to speak."""

    def filenos(self) -> list[int]: ...
    def hasten(self) -> None: ...
    @property
    def remaining(self) -> float: ...
    def shut_down(self) -> int: ...


class Listener(Protocol):
    """Where connections of one lane come in.

    Attributes:
        endpoint: the address for clients.
        worker: what must make progress for connections to come in; None where the kernel sees to that.
        silent: limits what the worker accepts by itself; None where there is nothing to limit.
    """

    @property
    def endpoint(self) -> str: ...
    @property
    def worker(self) -> Worker | None: ...
    @property
    def silent(self) -> SilentPeers | None: ...

    def fileno(self) -> int:
        """Becomes readable when there is a connection; -1 where the worker reports it."""
        ...

    @property
    def waiting(self) -> bool:
        """`accept` has a connection, as far as that is known without a system call."""
        ...

    def accept(self) -> Stream | None:
        """The next connection; None when there is none."""
        ...

    def close(self) -> None:
        """Stop listening. Twice is fine."""
        ...


@dataclass(frozen=True, slots=True)
class ListenAt:
    """Where a server thread listens.

    Attributes:
        host: a numeric address.
        port: the first port to try; 0 for any.
        path: the path of a Unix socket, if a lane that is served needs one.
    """

    host: str
    port: int = 0
    path: Path | None = None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An address in its parts.

    Attributes:
        lane: the lane that serves it.
        host: host name or numeric address; for a Unix socket its path, in the form of `dray.path_text`.
        port: port number; 0 for a Unix socket.
    """

    lane: Lane
    host: str
    port: int = 0

    def __str__(self) -> str:
        return f"{self.lane.scheme}:{self.lane.format_address(self.host, self.port)}"


class Lane(abc.ABC):
    """One way for bytes to travel. What differs between lanes is an attribute here.

    Attributes:
        name: its name in configuration, logs and figures.
        number: its number in the handshake, 1 … 255.
        scheme: what its endpoints begin with.
        form: the form of its endpoints, for messages.
        in_band: payloads travel over the connection; otherwise they stay in the segment, which readers map.
        tagged: a READ carries the tag under which its payload arrives.
        local: only processes of the same user on the same host can connect. No secret is needed, and a lease needs
            no time limit, because the kernel reports a peer that has ended.
        ipv4_only: it cannot listen at an IPv6 address.
        extra: the extra of dray that brings its packages; empty where it needs none.
        install: how to install them, in words.
        min_bytes_per_second: a transfer that is slower than this is cut, because the lane cannot report how far it
            has come; None where it can.
    """

    name: str
    number: int
    scheme: str
    form: str
    in_band: bool = True
    tagged: bool = False
    local: bool = False
    ipv4_only: bool = False
    extra: str = ""
    install: str = ""
    min_bytes_per_second: int | None = None

    def check(self) -> None:  # noqa: B027
        """Raise unless this process can use the lane.

        Raises:
            MissingDependencyError: a package is not installed; the message says what to install.
        """

    @property
    def available(self) -> bool:
        """Everything that the lane needs is installed."""
        return True

    def advice(self) -> str:
        """What to do when a transfer over this lane fails on this machine; empty if nothing is known."""
        return ""

    @abc.abstractmethod
    def parse_address(self, text: str) -> tuple[str, int] | None:
        """(host, port) from what follows the scheme; None if it is not an address of this lane."""

    @abc.abstractmethod
    def format_address(self, host: str, port: int) -> str:
        """The opposite of `parse_address`."""

    def endpoint(self, host: str, port: int = 0) -> str:
        """The endpoint for an address."""
        return str(Endpoint(self, host, port))

    @abc.abstractmethod
    def connect(
        self,
        address: Endpoint,
        deadline: Deadline,
        worker: Worker | None = None,
        closing: CloseEvent | None = None,
    ) -> Stream:
        """A stream to an address. Where `make_worker` makes one, the first exchange shows whether it stands.

        Raises:
            TransportError: it cannot be reached in time.
            BufferClosedError: the client was closed meanwhile.
        """

    @abc.abstractmethod
    def listen(self, place: ListenAt) -> Listener:
        """Listen there.

        Raises:
            ConfigError: this machine has no such address, or no port is free.
            Unreachable: this machine cannot use the lane (`lane_unusable`).
            OutOfResources: no descriptor is left.
        """

    def make_worker(self, address: Endpoint) -> Worker | None:
        """A worker for connections to this address; None where they need none."""
        return None

    def fits(self, worker: Worker, address: Endpoint) -> bool:
        """Connections to this address can use a worker that another connection uses."""
        return False

    def __repr__(self) -> str:
        return f"<lane {self.name}>"


class HostPortLane(Lane):
    """A lane whose addresses are HOST:PORT; an IPv6 host stands in brackets."""

    def parse_address(self, text: str) -> tuple[str, int] | None:
        host, _, digits = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        port = int(digits) if digits.isascii() and digits.isdecimal() and len(digits) < 6 else 0
        return (host, port) if _is_host(host) and 0 < port < 65536 else None

    def format_address(self, host: str, port: int) -> str:
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_host(text: str) -> bool:
    """The system can be asked for this host."""
    try:
        return bool(text.encode("idna")) and not has_control(text)
    except UnicodeError:
        return False


class Waiter(Protocol):
    """Waits for one stream, in the thread that uses it."""

    def wait(self, stream: Stream, deadline: Deadline, awaited: str, endpoint: str) -> None:
        """Wait until a stream that is `idle` can go on.

        Raises:
            TransportTimeout: the deadline came first; the message says what was awaited.
            BufferClosedError: the client is closed.
        """
        ...


class Network(Protocol):
    """Where a client's connections come from. A simulation brings its own."""

    def fits(self, worker: Worker, address: Endpoint) -> bool:
        """See `Lane.fits`."""
        ...

    def make_worker(self, address: Endpoint) -> Worker | None:
        """See `Lane.make_worker`."""
        ...

    def connect(self, address: Endpoint, deadline: Deadline, worker: Worker | None) -> Stream:
        """See `Lane.connect`."""
        ...

    def waiter(self, lasting: bool = False) -> Waiter:
        """A waiter for one connection; a `lasting` one waits although the network is closed."""
        ...

    def receive_buffers(self) -> ReceiveBuffers:
        """Memory for the payloads of one client."""
        ...

    def lease_reaper(self) -> LeaseReaper:
        """What ends the leases of one client whose last array is gone."""
        ...

    def close(self) -> None:
        """End all waits with `BufferClosedError`. Twice is fine."""
        ...


class MachineNetwork:
    """The network of this machine, through the lanes.

    Args:
        closing: ends waits in other threads; without it, waits end by their deadlines.
    """

    def __init__(self, closing: CloseEvent | None = None) -> None:
        self._closing = closing

    def fits(self, worker: Worker, address: Endpoint) -> bool:
        return address.lane.fits(worker, address)

    def make_worker(self, address: Endpoint) -> Worker | None:
        return address.lane.make_worker(address)

    def connect(self, address: Endpoint, deadline: Deadline, worker: Worker | None) -> Stream:
        return address.lane.connect(address, deadline, worker, self._closing)

    def waiter(self, lasting: bool = False) -> Waiter:
        return PollWaiter(None if lasting else self._closing)

    def receive_buffers(self) -> ReceiveBuffers:
        return ReceiveBuffers()

    def lease_reaper(self) -> LeaseReaper:
        return LeaseReaper()

    def close(self) -> None:
        if self._closing is not None:
            self._closing.close()
