"""The ``ucx`` lane: frames and payloads as tagged messages.

UCX matches tags on a worker, not on an endpoint, so each kind of message needs a tag of its own: a payload has one
from the counter of the receiving worker; each direction of a connection has 64 random bits, which other peers
cannot guess. The two ends exchange the latter in a preamble of 8 bytes. The client sends its preamble over UCX's
stream channel, which belongs to the endpoint; the server answers with its own under the client's tag.

A stream removes frames from the worker's queue of unexpected messages, and does not post receives for them: ucxx
never releases a worker whose endpoint was closed while a request was open that cannot be cancelled, such as a
stream receive or a send.
"""

from __future__ import annotations

import contextlib
import enum
import os
import secrets
import socket
import struct
from collections import deque
from collections.abc import Sequence
from typing import Any

from dray.clock import MONOTONIC, Clock, Deadline
from dray.errors import (
    ConnectionClosed,
    ConnectionReset,
    MessageTruncated,
    ProtocolError,
    TransportError,
    Unreachable,
)
from dray.name_resolution import is_loopback
from dray.protocol.frames import Outgoing, Payload
from dray.transport.lanes.base import Endpoint, HostPortLane, Lane, ListenAt, Listener, Stream, Worker
from dray.transport.lanes.socket import messages_only, no_free_port
from dray.transport.lanes.ucx_sockets import SilentPeers, can_name_peers, confine, listening_socket
from dray.transport.lanes.ucx_worker import (
    MAX_MESSAGE,
    UCXX_AVAILABLE,
    Abandoned,
    Memory,
    UcxWorker,
    from_ucx_error,
    require,
)
from dray.transport.polling import CloseEvent, addresses_of

_PREAMBLE = struct.Struct("<Q")


class _Awaited(enum.Enum):
    """What was missing at the last call of the stream's user."""

    MESSAGE = enum.auto()
    PAYLOAD = enum.auto()
    ROOM = enum.auto()


class UcxStream(Stream):
    """A `Stream` over a UCX endpoint.

    Args:
        worker: the endpoint's worker.
        endpoint: from `UcxWorker.connect`, or accepted by a listener.
        accepted: this is the server's end.

    Attributes:
        tag: the tag under which the peer's messages arrive.
        peer_tag: the tag of messages to the peer; None before its preamble has arrived.
    """

    worker: UcxWorker

    def __init__(self, worker: UcxWorker, endpoint: Any, accepted: bool) -> None:
        self.lane: Lane = UCX
        self.worker = worker
        self.closed = False
        self._endpoint = endpoint
        self._accepted = accepted
        self.tag = secrets.randbits(64)
        self.peer_tag: int | None = None
        self._own = worker.ucx.UCXXTag(self.tag)
        self._peer: Any = None
        worker.awaited.add(self.tag)
        self._inbox = memoryview(b"")
        self._begin = self._end = 0
        self._incoming: tuple[Any, Memory, int] | None = None
        self._unsent: list[Outgoing] = []
        self._sends: list[tuple[Any, Any]] = []
        self.expected: deque[tuple[Any, memoryview, int]] = deque()
        self._reserved: deque[int] = deque()
        self._awaited = _Awaited.MESSAGE
        self._abandoned: list[Abandoned] = []
        self._preamble: tuple[Any, bytearray] | None = None
        if accepted:
            memory = bytearray(_PREAMBLE.size)
            self._preamble = self._post("stream_recv", memory), memory
        else:
            memory = bytearray(_PREAMBLE.pack(self.tag))
            self._sends.append((self._post("stream_send", memory), memory))

    def fileno(self) -> int:
        return self.worker.fileno()

    def idle(self) -> bool:
        self.worker.progress()
        return not self._ready() and self.worker.arm()

    def receive(self, size: int, most: int = 1) -> memoryview | None:
        if self.closed or self._end - self._begin < size or self._peer is None:
            self._check_open()
            self._awaited = _Awaited.MESSAGE
            while self._peer is None or self._end - self._begin < size:
                if not (self._exchange_tags() if self._peer is None else self._collect()):
                    self._check_alive(within=self._end > self._begin)
                    return None
        begin = self._begin
        if most > 1:
            size *= min(most, (self._end - begin) // size)
        self._begin = begin + size
        return self._inbox[begin : begin + size]

    def send(self, items: Sequence[Outgoing], descriptors: Sequence[int] = ()) -> bool:
        self._check_open()
        if self._peer is not None and not self._sends and not self._unsent:
            message = messages_only(items)
            if message and len(message) <= MAX_MESSAGE:  # most messages leave at once
                return self._send_message(message) or self.flush()
        self._unsent += items
        return self.flush()

    def flush(self) -> bool:
        if self._unsent or self._peer is None:
            self._send_queued()
        if not self._sends and not self._unsent:
            return True
        waiting = []
        for request, memory in self._sends:
            if request.completed:
                self._check(request)
            else:
                waiting.append((request, memory))
        self._sends = waiting
        if waiting or self._unsent:
            self._awaited = _Awaited.ROOM
            self._check_alive()
            return False
        self._awaited = _Awaited.MESSAGE
        return True

    def expect(self, target: memoryview) -> int:
        self._check_open()
        tag = self.worker.next_tag()
        memory = target if target.nbytes else memoryview(bytearray(1))
        request = self._post("tag_recv", memory, self.worker.ucx.UCXXTag(tag))
        self.expected.append((request, memory, tag))
        return tag

    def reserve(self) -> int:
        self._check_open()
        tag = self.worker.next_tag()
        self.worker.awaited.add(tag)  # its messages may arrive before their receives are posted
        self._reserved.append(tag)
        return tag

    def expect_reserved(self, targets: Sequence[memoryview]) -> None:
        self._check_open()
        tag = self._reserved[0]
        for target in targets:  # they are matched in the order in which they are posted
            self.expected.append((self._post("tag_recv", target, self.worker.ucx.UCXXTag(tag)), target, tag))
        self.worker.awaited.discard(self._reserved.popleft())

    def payload_arrived(self, nbytes: int) -> bool:
        request, memory, _ = self.expected[0]
        if nbytes and nbytes != memory.nbytes:
            raise MessageTruncated(f"the payload has {nbytes} bytes instead of {memory.nbytes}")
        if not request.completed:
            self._awaited = _Awaited.PAYLOAD
            self._check_alive()
            return False
        self.expected.popleft()
        self._awaited = _Awaited.MESSAGE
        self._check(request)
        return True

    def progress(self) -> object:
        # UCX does not report progress within a message, only that its worker had work.
        return self.worker.steps if self._sends else None

    def close(self) -> None:
        """See `Stream.close`. After an exception of a signal handler, another call does the rest."""
        if self._endpoint is None:
            return
        self.closed = True
        self.worker.awaited -= {self.tag, *self._reserved}
        requests = [*self._sends, *((request, memory) for request, memory, _ in self.expected)]
        if self._incoming is not None:
            request, memory, _ = self._incoming
            requests.append((request, memory))
        if self._preamble is not None:
            requests.append(self._preamble)
        self._abandoned = self.worker.close_endpoint(self._endpoint, requests)
        for tag in {self.tag, *self._reserved, *(tag for _, _, tag in self.expected)}:
            self.worker.discard(self.worker.ucx.UCXXTag(tag))
        self._sends, self._unsent, self._incoming, self._preamble = [], [], None, None
        self.expected.clear()
        self._reserved.clear()
        self._endpoint = None  # an endpoint keeps its worker alive

    @property
    def drained(self) -> bool:
        return all(abandoned.done for abandoned in self._abandoned)

    # --- requests ---------------------------------------------------------------------------------------------

    def _post(self, operation: str, memory: Any, *tag: Any) -> Any:
        try:
            return getattr(self._endpoint, operation)(self.worker.array(memory), *tag)
        except self.worker.ucx.UCXError as error:
            raise self._failure(error) from error

    def _exchange_tags(self) -> bool:
        """Receive the peer's tag, and send this end's; False if it has not arrived yet."""
        if self._preamble is None:
            if not self._collect() or self._end < _PREAMBLE.size:
                return False
            (self.peer_tag,) = _PREAMBLE.unpack_from(self._inbox)
            self._begin = _PREAMBLE.size
        else:
            request, memory = self._preamble
            if not request.completed:
                return False
            self._preamble = None
            self._check(request)
            (self.peer_tag,) = _PREAMBLE.unpack(memory)
        self._peer = self.worker.ucx.UCXXTag(self.peer_tag)
        if self._accepted:
            self._send_messages(_PREAMBLE.pack(self.tag))
        return True

    def _collect(self) -> bool:
        """Move the next message that has arrived to the inbox; False if there is none."""
        if self._incoming is None:
            found = self.worker.probe(self._own)
            if not found.matched:
                return False
            if found.length > MAX_MESSAGE:
                raise ProtocolError(f"a message has {found.length} bytes; the limit is {MAX_MESSAGE}")
            self._incoming = *self.worker.receive(found), found.length
        request, memory, length = self._incoming
        if not request.completed:
            return False
        self._incoming = None
        self._check(request)
        message = memory.view[:length].tobytes()
        self.worker.reuse(memory)
        if self._end > self._begin:
            message = self._inbox[self._begin :].tobytes() + message
        self._inbox = memoryview(message)
        self._begin, self._end = 0, len(message)
        return True

    def _send_queued(self) -> None:
        if self._peer is None and not self._exchange_tags():
            return
        messages: list[bytes] = []
        for item in self._unsent:
            if isinstance(item, Payload):
                self._send_messages(b"".join(messages))
                messages.clear()
                tag = self.worker.ucx.UCXXTag(item.tag)
                self._sends.append((self._post("tag_send", item.view, tag), item.view))
            else:
                messages.append(item)
        self._unsent = []
        self._send_messages(b"".join(messages))

    def _send_messages(self, messages: bytes) -> None:
        for begin in range(0, len(messages), MAX_MESSAGE):
            self._send_message(messages[begin : begin + MAX_MESSAGE])

    def _send_message(self, message: bytes) -> bool:
        """Send one tagged message; True if it has left."""
        memory = self.worker.memory(len(message))
        memory.view[:] = message
        try:
            request = self._endpoint.tag_send(memory.array, self._peer)
        except self.worker.ucx.UCXError as error:
            raise self._failure(error) from error
        if not request.completed:
            self._sends.append((request, memory))
            return False
        self._check(request)
        self.worker.reuse(memory)
        return True

    def _check(self, request: Any) -> None:
        try:
            request.check_error()
        except self.worker.ucx.UCXError as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception | None) -> TransportError:
        """The error for a failed request, or for an endpoint that is no longer alive."""
        if error is not None and self._endpoint.alive:
            return from_ucx_error(error)
        try:
            self._endpoint.raise_on_error()
        except self.worker.ucx.UCXError as why:
            if isinstance(why, self.worker.ucx.UCXConnectionResetError):
                # UCX also reports an orderly close by the peer as a reset.
                return ConnectionClosed("the peer closed the connection")
            return from_ucx_error(why)
        return ConnectionReset("the connection failed") if error is None else from_ucx_error(error)

    def _check_alive(self, within: bool = False) -> None:
        if not self._endpoint.alive:
            if within:
                raise MessageTruncated("the peer closed the connection within a message")
            raise self._failure(None)

    def _check_open(self) -> None:
        if self.closed:
            raise ConnectionClosed("this side closed the connection")

    def _ready(self) -> bool:
        """The stream can advance, or has failed."""
        if not self._endpoint.alive:
            return True
        # What arrives early must not end a wait for something else.
        if self._awaited is _Awaited.PAYLOAD:
            if self.expected[0][0].completed:
                return True
        elif self._awaited is _Awaited.MESSAGE or self._peer is None:
            due = self._incoming or self._preamble
            if due[0].completed if due is not None else self.worker.has_message(self._own):
                return True
        return any(request.completed for request, _ in self._sends)

    def __repr__(self) -> str:
        return f"<UcxStream {'closed' if self.closed else 'open'}{', sending' if self._sends else ''}>"


class UcxListener(Listener):
    """Listens for UCX connections on the interface that has `host`, on the first free one of `ports`.

    Attributes:
        silent: limits the connections that UCX accepts and that do not speak UCX; None if this UCX cannot name the
            peer of a request.
    """

    worker: UcxWorker

    def __init__(self, worker: UcxWorker, host: str, ports: range = range(1), *, clock: Clock = MONOTONIC) -> None:
        self.worker = worker
        self._requests: deque[int] = deque()
        self.silent: SilentPeers | None = None
        self._listening: socket.socket | None = None
        self._listener = self._bind(ports)
        try:
            self._listening = listening_socket(self._listener.port)
            confine(self._listening, host)
            if can_name_peers():
                self.silent = SilentPeers(self._listener.port, worker.data_ports, clock)
        except BaseException:
            self.close()
            raise
        # UCX does not answer at other loopback addresses, such as the 127.0.1.1 of Debian's host names.
        advertised = "127.0.0.1" if is_loopback(host) else host
        self.endpoint = UCX.endpoint(advertised, self._listener.port)

    def fileno(self) -> int:
        return -1

    @property
    def waiting(self) -> int:
        return len(self._requests) if self._listener is not None else 0

    def accept(self) -> UcxStream | None:
        if self._listener is None or not self._requests:
            return None
        ucx = self.worker.ucx
        try:
            endpoint = self._listener.create_endpoint_from_conn_request(self._requests.popleft(), True)
        except ucx.UCXError as error:
            raise from_ucx_error(error, self.endpoint) from error
        return UcxStream(self.worker, endpoint, accepted=True)

    def close(self) -> None:
        """Accept no more connections. The port is free again when the worker is closed."""
        if self._listener is None:
            return
        if self._listening is not None:
            self.worker.retire(self._listener, self._listening, self._refuse)
            self._listening.close()
        if self.silent is not None:
            self.silent.close()
        self._refuse()
        self._listener = None

    def _refuse(self, listener: Any = None) -> None:
        """End the connections that were not accepted; UCX would keep them."""
        ucx, listener = self.worker.ucx, listener or self._listener
        while self._requests:
            with contextlib.suppress(ucx.UCXError):  # it has already ended
                endpoint = listener.create_endpoint_from_conn_request(self._requests.popleft(), True)
                self.worker.close_endpoint(endpoint, [])

    def _requested(self, request: int) -> None:
        if self.silent is not None:
            self.silent.requested(request)
        self._requests.append(request)

    def _bind(self, ports: range) -> Any:
        for candidate in ports:
            try:
                return self.worker.listen(candidate, self._requested)
            except Unreachable as error:
                if not error.refused:
                    raise
        raise no_free_port(ports)


class UcxLane(HostPortLane):
    """Connects any two machines: messages and payloads as tagged messages of UCX, over RDMA or TCP."""

    name, number, scheme, form = "ucx", 3, "ucx", "ucx:HOST:PORT"
    tagged = True
    ipv4_only = True
    extra = "ucxx"
    install = "pip install 'dray-rl[ucxx]' (or 'dray-rl[ucxx-cu12]'); no GPU is needed"
    min_bytes_per_second = 1 << 20

    def check(self) -> None:
        require()

    @property
    def available(self) -> bool:
        return UCXX_AVAILABLE

    def advice(self) -> str:
        chosen = sorted(name for name in os.environ if name.startswith("UCX_"))
        return f"check these variables: {', '.join(chosen)}" if chosen else "set UCX_LOG_LEVEL=info for details"

    def make_worker(self, address: Endpoint) -> UcxWorker:
        return UcxWorker(is_loopback(address.host))

    def fits(self, worker: Worker, address: Endpoint) -> bool:
        return isinstance(worker, UcxWorker) and worker.loopback is is_loopback(address.host)

    def connect(
        self,
        address: Endpoint,
        deadline: Deadline,
        worker: Worker | None = None,
        closing: CloseEvent | None = None,
    ) -> UcxStream:
        """See `Lane.connect`. Only the handshake shows whether the connection is established."""
        assert isinstance(worker, UcxWorker)
        # UCX gets numeric addresses only, because it looks names up without a time limit.
        found = addresses_of(address.host, address.port, deadline, endpoint=str(address), closing=closing)
        for family, place in found:
            if family is socket.AF_INET:
                return UcxStream(worker, worker.connect(place[0], address.port), accepted=False)
        raise Unreachable("the host has no IPv4 address, which UCX needs", endpoint=str(address))

    def listen(self, place: ListenAt) -> UcxListener:
        worker = UcxWorker(is_loopback(place.host))
        try:
            return UcxListener(worker, place.host, place.ports)
        except BaseException:
            worker.close()
            raise


UCX = UcxLane()
