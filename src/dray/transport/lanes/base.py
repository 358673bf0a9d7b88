"""The contract of a lane: its properties, and the streams, listeners and workers that it makes.

A lane is one module with a subclass of `Lane`, and one entry in `dray.transport.lanes.LANES`. Its connections are
`Stream` objects, which carry *messages* (the handshake and frames, whose sizes both ends know) and *payloads*. No
method of a stream waits. If `idle()` returns True, the user of the stream waits for `fileno()`: a server thread
for all its streams at once, a client for one stream.
"""

from __future__ import annotations

import abc
import encodings.idna  # noqa: F401  (`encode` cannot load it once the process has no descriptor left)
import errno
import os
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

from dray.clock import Deadline
from dray.name_resolution import bracketed
from dray.protocol.frames import Outgoing
from dray.protocol.handshake import AttachRequest, ServerIdentity
from dray.protocol.ref import has_control
from dray.resources import Closing, needing
from dray.ring import membarrier
from dray.ring.attachment import Attachment
from dray.ring.consumer_events import Bell, Descriptor
from dray.ring.direct import direct_problem, kernel_digest
from dray.ring.shared_words import SharedWords
from dray.ring.stream_words import StreamWords
from dray.transport.lease_reaper import LeaseReaper
from dray.transport.polling import CloseEvent, PollWaiter
from dray.transport.receive_buffers import ReceiveBuffers

_REFUSED_CALLS: Final = frozenset({errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EINVAL})
"""The errors of a system call that a sandbox refuses or a kernel does not know."""


class Stream(Closing):
    """One connection.

    Every method raises a `TransportError` when the connection has failed: `ConnectionClosed` if the peer closed it
    between messages, `MessageTruncated` if the peer closed it within one, `ConnectionReset` for any other failure.

    Attributes:
        lane: the lane of the connection.
        worker: what must make progress for this stream to advance; None where the kernel does that.
        peer_pid: the process at the other end, where the lane reports it; else None.
        expected: one entry for each payload, or message of one, that `expect` or `expect_reserved` announced and
            `payload_arrived` has not reported.
        filled: bytes at the beginning of the oldest such payload that have arrived, on lanes that report it.
    """

    lane: Lane
    worker: Worker | None = None
    peer_pid: int | None = None
    expected: deque[Any]
    filled: int = 0

    @abc.abstractmethod
    def fileno(self) -> int:
        """The descriptor that becomes readable when the stream can advance."""

    @abc.abstractmethod
    def idle(self) -> bool:
        """Prepare for a wait on `fileno`; False if the stream can advance now."""

    @property
    def wants_write(self) -> bool:
        """`flush` needs room: wait until `fileno` is writable, not readable."""
        return False

    @abc.abstractmethod
    def receive(self, size: int, most: int = 1) -> memoryview | None:
        """The next message of exactly `size` bytes, valid until the next call; None if it is not complete yet.

        If the messages after it have the same size, up to `most` that are complete are returned together. After
        None, call `idle` and wait before the next call.
        """

    def receive_with_descriptors(self, size: int, taken: list[int]) -> bytes | None:
        """The next message; None if it is not complete yet.

        The descriptors that came with it are added to `taken`; the caller closes them. A lane whose payloads stay
        in shared memory sends some in the handshake.

        Raises:
            OutOfResources: there were more than this process has room for.
        """
        message = self.receive(size)
        return None if message is None else bytes(message)

    @abc.abstractmethod
    def send(self, items: Sequence[Outgoing], descriptors: Sequence[int] = ()) -> bool:
        """Send messages and payloads in order, with descriptors; True if all of it has left.

        Otherwise the stream uses their memory until `flush` returns True.
        """

    @abc.abstractmethod
    def flush(self) -> bool:
        """Continue to send; True if everything has left and its memory is free again."""

    @abc.abstractmethod
    def expect(self, target: memoryview) -> int:
        """Set the memory for the payload of the next request; returns the tag for that request, or 0."""

    @abc.abstractmethod
    def reserve(self) -> int:
        """The tag, or 0, for the next request, whose payload has a size that is not known yet."""

    @abc.abstractmethod
    def expect_reserved(self, targets: Sequence[memoryview]) -> None:
        """Set the memory for the messages of the payload of the oldest `reserve`; without any, none comes."""

    @abc.abstractmethod
    def payload_arrived(self, nbytes: int) -> bool:
        """True if the oldest expected payload is complete, or its oldest message.

        `nbytes` is its size according to the server, 0 for no payload.
        """

    def progress(self) -> object:
        """A value that changes while bytes travel in either direction, as far as this end can observe that."""
        return None

    def abort(self) -> None:
        """Let the connection fail, from any thread, where the lane can: its thread will find out and close it."""

    @property
    @abc.abstractmethod
    def drained(self) -> bool:
        """After `close`, which drops what was not flushed: no memory that was given to this stream is in use."""


class Worker(Closing):
    """What several connections share and only one thread can use at a time: a UCX worker.

    Attributes:
        steps: grows with everything that `progress` has done.
    """

    steps: int = 0

    @abc.abstractmethod
    def fileno(self) -> int:
        """The descriptor that becomes readable, after `arm`, when `progress` has work."""

    @abc.abstractmethod
    def progress(self) -> None:
        """Do the work that is due, without waiting."""

    def has_progressed(self) -> bool:
        """`progress`; True if there was work."""
        steps = self.steps
        self.progress()
        return self.steps != steps

    @abc.abstractmethod
    def arm(self) -> bool:
        """Make `fileno` readable at the next event; False if there is one already."""

    @abc.abstractmethod
    def drop_strays(self) -> None:
        """Drop messages that have arrived and that no stream expects."""


class SilentPeers(Protocol):
    """Limits the connections that a worker has accepted by itself and whose peers have sent nothing valid."""

    def filenos(self) -> list[int]: ...
    def hasten(self) -> None: ...
    @property
    def remaining(self) -> float: ...
    def shut_down(self) -> int: ...


class Listener(Closing):
    """Accepts the connections of one lane at one address.

    Attributes:
        endpoint: the address for clients.
        worker: what must make progress for connections to arrive; None where the kernel does that.
        silent: limits what the worker accepts by itself; None where there is nothing to limit.
    """

    endpoint: str
    worker: Worker | None = None
    silent: SilentPeers | None = None

    @abc.abstractmethod
    def fileno(self) -> int:
        """The descriptor that becomes readable when there is a connection; -1 where the worker reports it."""

    @property
    def waiting(self) -> int:
        """How many connections `accept` has, as far as that is known without a system call."""
        return 0

    @abc.abstractmethod
    def accept(self) -> Stream | None:
        """The next connection; None if there is none."""


@dataclass(frozen=True, slots=True)
class ListenAt:
    """Where a server thread listens.

    Attributes:
        host: a numeric address.
        ports: the ports to try, in this order; 0 is any free one.
        path: the path of a Unix socket, if a lane that is served needs one.
    """

    host: str
    ports: range = range(1)
    path: Path | None = None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An address in its parts.

    Attributes:
        lane: the lane of the address.
        host: host name or numeric address; for a Unix socket its path, in the form of `dray.text`.
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
        name: its name in configuration, logs and statistics.
        number: its number in the handshake, 1 … 255.
        scheme: what its endpoints begin with.
        form: the form of its endpoints, for messages.
        in_band: payloads travel over the connection; otherwise they stay in the segment, which readers map.
        tagged: a READ carries the tag under which its payload arrives.
        local: only processes of the same user on the same host can connect. No secret is needed, and a lease needs
            no time limit, because the kernel reports a peer that has ended.
        ipv4_only: it cannot listen at an IPv6 address.
        extra: the extra of dray that installs its packages; empty where it needs none.
        install: the command that installs them.
        min_bytes_per_second: a slower transfer is cut, because the lane cannot report progress within a payload;
            None where it can.
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
            MissingDependencyError: a package is not installed; the message names the command to install it.
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
        """A stream to an address. On a lane with workers, only the first exchange shows whether it is connected.

        Raises:
            Unreachable: the host is unknown, or no server listens there.
            TransportTimeout: the name server or the host did not answer before the deadline.
            OutOfResources: no descriptor is left for the connection.
            BufferClosedError: the client was closed meanwhile.
        """

    @abc.abstractmethod
    def listen(self, place: ListenAt) -> Listener:
        """Listen at an address.

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
        return f"{bracketed(host)}:{port}"


def _is_host(text: str) -> bool:
    """The system's resolver accepts this host."""
    try:
        return bool(text.encode("idna")) and not has_control(text)
    except UnicodeError:
        return False


class Waiter(Protocol):
    """Waits for one stream, in the thread that uses it."""

    def wait(self, stream: Stream, deadline: Deadline, awaited: str, endpoint: str) -> None:
        """See `PollWaiter.wait`. It calls the stream's `idle` before the thread sleeps."""
        ...


class WantedAttachment(NamedTuple):
    """A request for direct leases, and the pidfd that goes with it."""

    request: AttachRequest
    process: Descriptor


class Network(Closing):
    """A client's connections, over the lanes of this machine. A simulation overrides all methods.

    Args:
        closing: ends waits in other threads; without it, waits end at their deadlines.
    """

    def __init__(self, closing: CloseEvent | None = None) -> None:
        self._closing = closing

    def fits(self, worker: Worker, address: Endpoint) -> bool:
        """See `Lane.fits`."""
        return address.lane.fits(worker, address)

    def make_worker(self, address: Endpoint) -> Worker | None:
        """See `Lane.make_worker`."""
        return address.lane.make_worker(address)

    def connect(self, address: Endpoint, deadline: Deadline, worker: Worker | None) -> Stream:
        """See `Lane.connect`."""
        return address.lane.connect(address, deadline, worker, self._closing)

    def waiter(self, lasting: bool = False) -> Waiter:
        """A waiter for one connection; a `lasting` one also waits after the network is closed."""
        return PollWaiter(None if lasting else self._closing)

    def attach_request(self, reader: int) -> WantedAttachment | None:
        """What a client sends to lease directly; None if this process cannot.

        Raises:
            OutOfResources: no descriptor is left.
        """
        if direct_problem():
            return None
        with needing("a pidfd"):
            try:
                membarrier.register()
                process = Descriptor(os.pidfd_open, os.getpid())
            except OSError as error:
                if error.errno in _REFUSED_CALLS:
                    return None
                raise
        return WantedAttachment(AttachRequest(kernel_digest(), reader), process)

    def open_attachment(
        self, descriptors: list[int], identity: ServerIdentity, reader: int, *, newest: bool
    ) -> Attachment:
        """See `Attachment.open`."""
        return Attachment.open(
            descriptors,
            slots=identity.slots,
            readers=identity.readers,
            leases=identity.max_leases,
            reader=reader,
            newest=newest,
        )

    def open_stream_words(self, words: Descriptor, bell: Bell, slots: int) -> tuple[StreamWords, Bell]:
        """What came with the answer to SUBSCRIBE: memory, and the bell of the producer.

        Raises:
            ProtocolError: the memory is not what it should be.
            OutOfResources, SlotError: it cannot be mapped.
        """
        shared = SharedWords.attach(words.fileno(), StreamWords.count(slots), writable=True)
        return StreamWords(shared, slots), bell

    def lock(self) -> threading.Lock:
        """A new lock, for what is shared with owners of rings."""
        return threading.Lock()

    def receive_buffers(self) -> ReceiveBuffers:
        return ReceiveBuffers()

    def lease_reaper(self) -> LeaseReaper:
        return LeaseReaper()

    def close(self) -> None:
        """End all waits with `BufferClosedError`. Twice is fine."""
        if self._closing is not None:
            self._closing.close()
