"""The UCX lane's stream: frames and payloads as tagged messages.

Tags are matched on the worker, not on the endpoint, so no two things may share one: each payload has a tag from
the receiving worker's counter, each direction of a connection one of 64 random bits, which no other peer can
guess. The two ends tell each other these in a preamble of 8 bytes: the client's goes over UCX's stream channel,
which belongs to the endpoint; the server's answers it under the tag it named.

Frames are taken off the worker's queue when they are there, not asked for: ucxx never lets go of a worker whose
endpoint was closed while a request on it was open that cannot be cancelled, as a stream receive or a send is.
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

from dray.clock import Deadline
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
from dray.transport.lanes.base import Endpoint, HostPortLane, Lane, ListenAt, Worker
from dray.transport.lanes.socket import PORTS_TO_TRY, no_free_port
from dray.transport.lanes.ucx_sockets import SilentPeers, can_name_peers, confine, listening_socket
from dray.transport.lanes.ucx_worker import UCXX_AVAILABLE, Abandoned, UcxWorker, from_ucx_error, require
from dray.transport.polling import CloseEvent, addresses_of

_PREAMBLE = struct.Struct("<Q")
_MAX_MESSAGE = 64 * 1024
"""Frames that are sent together are cut into messages of at most this size."""


class _Awaited(enum.Enum):
    """What the driver found not to be there when it looked last."""

    MESSAGE = enum.auto()
    PAYLOAD = enum.auto()
    ROOM = enum.auto()


class UcxStream:
    """A `Stream` over a UCX endpoint.

    Args:
        worker: the endpoint's worker.
        endpoint: from `UcxWorker.connect`, or accepted by a listener.
        accepted: this is the server's end.
    """

    wants_write = False
    peer_pid: int | None = None

    def __init__(self, worker: UcxWorker, endpoint: Any, accepted: bool) -> None:
        self.lane: Lane = UCX
        self.worker = worker
        self.closed = False
        self._endpoint = endpoint
        self._accepted = accepted
        self._mine = secrets.randbits(64)
        self._mine_tag = worker.ucx.UCXXTag(self._mine)
        worker.awaited.add(self._mine)
        self._theirs: Any = None
        self._inbox = bytearray()
        self._incoming: tuple[Any, bytearray] | None = None
        self._unsent: list[Outgoing] = []
        self._sends: list[tuple[Any, Any]] = []
        self._expected: deque[tuple[Any, memoryview, int]] = deque()
        self._awaited = _Awaited.MESSAGE
        self._abandoned: list[Abandoned] = []
        self._preamble: tuple[Any, bytearray] | None = None
        if accepted:
            memory = bytearray(_PREAMBLE.size)
            self._preamble = self._post("stream_recv", memory), memory
        else:
            memory = bytearray(_PREAMBLE.pack(self._mine))
            self._sends.append((self._post("stream_send", memory), memory))

    def fileno(self) -> int:
        return self.worker.fileno()

    def idle(self) -> bool:
        self.worker.progress()
        return not self._ready() and self.worker.arm()

    def receive(self, size: int, most: int = 1) -> memoryview | None:
        self._check_open()
        self._awaited = _Awaited.MESSAGE
        while self._theirs is None or len(self._inbox) < size:
            if not (self._agree() if self._theirs is None else self._take()):
                self._check_alive(within=bool(self._inbox))
                return None
        if most > 1:
            size *= min(most, len(self._inbox) // size)
        message = self._inbox[:size]
        del self._inbox[:size]
        return memoryview(message)

    def receive_descriptor(self, size: int) -> tuple[bytes, int] | None:
        message = self.receive(size)
        return None if message is None else (bytes(message), -1)

    def send(self, items: Sequence[Outgoing], descriptor: int | None = None) -> bool:
        self._check_open()
        self._unsent += items
        return self.flush()

    def flush(self) -> bool:
        if self._unsent or self._theirs is None:
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
        self._expected.append((request, memory, tag))
        return tag

    def payload_arrived(self, nbytes: int) -> bool:
        request, memory, _ = self._expected[0]
        if nbytes and nbytes != memory.nbytes:
            raise MessageTruncated(f"the payload has {nbytes} bytes, expected were {memory.nbytes}")
        if not request.completed:
            self._awaited = _Awaited.PAYLOAD
            self._check_alive()
            return False
        self._expected.popleft()
        self._awaited = _Awaited.MESSAGE
        self._check(request)
        return True

    def progress(self) -> object:
        # UCX does not say how far a message has come, and no more of its worker than that it had something to do.
        return self.worker.steps if self._sends else None

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self.worker.awaited.discard(self._mine)
        requests = [*self._sends, *((request, memory) for request, memory, _ in self._expected)]
        requests += [request for request in (self._incoming, self._preamble) if request is not None]
        self._abandoned = self.worker.close_endpoint(self._endpoint, requests)
        for tag in (self._mine, *(tag for _, _, tag in self._expected)):
            self.worker.discard(self.worker.ucx.UCXXTag(tag))
        self._endpoint = None  # it keeps its worker alive
        self._sends, self._unsent, self._incoming, self._preamble = [], [], None, None
        self._expected.clear()

    @property
    def drained(self) -> bool:
        """After `close`: UCX no longer touches memory that was given to this stream."""
        return all(abandoned.done for abandoned in self._abandoned)

    # --- requests ---------------------------------------------------------------------------------------------

    def _post(self, operation: str, memory: Any, *tag: Any) -> Any:
        try:
            return getattr(self._endpoint, operation)(self.worker.array(memory), *tag)
        except self.worker.ucx.UCXError as error:
            raise self._failure(error) from error

    def _agree(self) -> bool:
        """Learn the peer's tag, and tell it ours; whether it is known."""
        if self._preamble is None:
            if not self._take() or len(self._inbox) < _PREAMBLE.size:
                return False
            (tag,) = _PREAMBLE.unpack(self._inbox[: _PREAMBLE.size])
            del self._inbox[: _PREAMBLE.size]
        else:
            request, memory = self._preamble
            if not request.completed:
                return False
            self._preamble = None
            self._check(request)
            (tag,) = _PREAMBLE.unpack(memory)
        self._theirs = self.worker.ucx.UCXXTag(tag)
        if self._accepted:
            self._send_messages(bytearray(_PREAMBLE.pack(self._mine)))
        return True

    def _take(self) -> bool:
        """Move the next message that has come, if any, into the inbox."""
        if self._incoming is None:
            found = self.worker.probe(self._mine_tag)
            if not found.matched:
                return False
            if found.length > _MAX_MESSAGE:
                raise ProtocolError(f"a message of {found.length} bytes is longer than any of the protocol's")
            self._incoming = self.worker.take(found)
        request, memory = self._incoming
        if not request.completed:
            return False
        self._incoming = None
        self._check(request)
        self._inbox += memory
        return True

    def _send_queued(self) -> None:
        if self._theirs is None and not self._agree():
            return
        messages = bytearray()
        for item in self._unsent:
            if isinstance(item, Payload):
                self._send_messages(messages)
                messages = bytearray()
                tag = self.worker.ucx.UCXXTag(item.tag)
                self._sends.append((self._post("tag_send", item.view, tag), item.view))
            else:
                messages += item
        self._unsent = []
        self._send_messages(messages)

    def _send_messages(self, messages: bytearray) -> None:
        for begin in range(0, len(messages), _MAX_MESSAGE):
            part = messages[begin : begin + _MAX_MESSAGE]
            self._sends.append((self._post("tag_send", part, self._theirs), part))

    def _check(self, request: Any) -> None:
        try:
            request.check_error()
        except self.worker.ucx.UCXError as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception | None) -> TransportError:
        """What a failed request, or an endpoint that is not alive any more, stands for."""
        if error is not None and self._endpoint.alive:
            return from_ucx_error(error)
        try:
            self._endpoint.raise_on_error()
        except self.worker.ucx.UCXError as why:
            if isinstance(why, self.worker.ucx.UCXConnectionResetError):
                # UCX reports an orderly close by the peer as a reset as well.
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
        """A request whose completion the driver has not seen yet, or a failure."""
        if not self._endpoint.alive:
            return True
        # What has come before its time must not keep busy who waits for something else.
        if self._awaited is _Awaited.PAYLOAD:
            if self._expected[0][0].completed:
                return True
        elif self._awaited is _Awaited.MESSAGE or self._theirs is None:
            due = self._incoming or self._preamble
            if due[0].completed if due is not None else self.worker.waits(self._mine_tag):
                return True
        return any(request.completed for request, _ in self._sends)

    def __repr__(self) -> str:
        return f"<UcxStream {'closed' if self.closed else 'open'}>"


class UcxListener:
    """Listens for UCX connections on the interface that has `host`, on `port` or the next free one.

    Attributes:
        silent: bounds the connections that UCX accepts and that do not speak UCX; None where UCX cannot name
            the peers that do.
    """

    def __init__(self, worker: UcxWorker, host: str, port: int = 0) -> None:
        self.worker = worker
        self._requests: deque[int] = deque()
        self.silent: SilentPeers | None = None
        self._listening: socket.socket | None = None
        self._listener = self._bind(port)
        try:
            self._listening = listening_socket(self._listener.port)
            confine(self._listening, host)
            if can_name_peers():
                self.silent = SilentPeers(self._listener.port, worker.data_ports)
        except BaseException:
            self.close()
            raise
        # UCX answers at no other address of the loopback network, such as the 127.0.1.1 of Debian's host names.
        advertised = "127.0.0.1" if is_loopback(host) else host
        self.endpoint = UCX.endpoint(advertised, self._listener.port)

    def fileno(self) -> int:
        return -1

    @property
    def waiting(self) -> bool:
        """`accept` has a connection."""
        return self._listener is not None and bool(self._requests)

    def accept(self) -> UcxStream | None:
        """The next connection, or None when there is none."""
        if self._listener is None or not self._requests:
            return None
        ucx = self.worker.ucx
        try:
            endpoint = self._listener.create_endpoint_from_conn_request(self._requests.popleft(), True)
        except ucx.UCXError as error:
            raise from_ucx_error(error, self.endpoint) from error
        return UcxStream(self.worker, endpoint, accepted=True)

    def close(self) -> None:
        """Take no more connections. The port is free again when the worker is closed."""
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
        """End the connections that wait to be accepted: UCX keeps what nobody answers."""
        ucx, listener = self.worker.ucx, listener or self._listener
        while self._requests:
            with contextlib.suppress(ucx.UCXError):  # it has ended by itself
                endpoint = listener.create_endpoint_from_conn_request(self._requests.popleft(), True)
                self.worker.close_endpoint(endpoint, [])

    def _requested(self, request: int) -> None:
        if self.silent is not None:
            self.silent.requested(request)
        self._requests.append(request)

    def _bind(self, port: int) -> Any:
        for candidate in range(port, min(port + PORTS_TO_TRY, 65536)) if port else (0,):
            try:
                return self.worker.listen(candidate, self._requested)
            except Unreachable as error:
                if not error.refused:
                    raise
        raise no_free_port(port)


class UcxLane(HostPortLane):
    """UCX, over RDMA or TCP: payloads as tagged messages, between any two machines."""

    name, number, scheme, form = "ucx", 3, "ucx", "ucx:HOST:PORT"
    tagged = True
    ipv4_only = True
    extra = "ucxx"
    install = "pip install 'dray[ucxx]' (or 'dray[ucxx-cu12]'); no GPU is needed"
    min_bytes_per_second = 1 << 20

    def check(self) -> None:
        require()

    @property
    def available(self) -> bool:
        return UCXX_AVAILABLE

    def advice(self) -> str:
        chosen = sorted(name for name in os.environ if name.startswith("UCX_"))
        return f"check the environment: {', '.join(chosen)}" if chosen else "UCX_LOG_LEVEL=info shows more"

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
        """Begin a connection to a server's UCX endpoint; the handshake shows whether it stands.

        Raises:
            Unreachable: the host is unknown, or has no IPv4 address.
        """
        assert isinstance(worker, UcxWorker)
        # UCX asks the system's resolver itself, without a limit: it gets numeric addresses only.
        found = addresses_of(address.host, address.port, deadline, endpoint=str(address), closing=closing)
        for family, place in found:
            if family is socket.AF_INET:
                return UcxStream(worker, worker.connect(place[0], address.port), accepted=False)
        raise Unreachable("the host has no IPv4 address, which UCX needs", endpoint=str(address))

    def listen(self, place: ListenAt) -> UcxListener:
        worker = UcxWorker(is_loopback(place.host))
        try:
            return UcxListener(worker, place.host, place.port)
        except BaseException:
            worker.close()
            raise


UCX = UcxLane()
