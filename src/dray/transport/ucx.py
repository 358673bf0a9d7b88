"""The UCX lane's stream: frames over UCX's stream channel, each payload as one tagged message.

The stream channel belongs to one endpoint, so connections cannot receive each other's frames; tags are matched on
the worker, so each comes from the receiving worker's counter and is never used again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from dray.errors import (
    ConfigError,
    ConnectionClosed,
    ConnectionReset,
    MessageTruncated,
    TransportError,
    Unreachable,
)
from dray.transport.stream import Endpoint
from dray.transport.ucx_worker import UcxWorker, confine, from_ucx_error
from dray.wire.handshake import Lane
from dray.wire.session import Outgoing, Payload

_PORTS_TO_TRY = 64


class UcxStream:
    """A `Stream` over a UCX endpoint."""

    lane = Lane.UCX
    wants_write = False

    def __init__(self, worker: UcxWorker, endpoint: Any) -> None:
        self.worker = worker
        self._endpoint = endpoint
        self._incoming: tuple[Any, bytearray] | None = None
        self._sends: list[tuple[Any, Any]] = []
        self._expected: deque[tuple[Any, memoryview, int]] = deque()
        self._open_requests: list[tuple[Any, Any]] = []
        self.closed = False

    def fileno(self) -> int:
        return self.worker.fileno()

    def idle(self) -> bool:
        self.worker.progress()
        return not self._ready() and self.worker.arm()

    def receive(self, size: int) -> memoryview | None:
        self._check_open()
        if self._incoming is None:
            memory = bytearray(size)
            self._incoming = self._post("stream_recv", memory), memory
        request, memory = self._incoming
        if len(memory) != size:
            raise MessageTruncated(f"a message of {len(memory)} bytes is due, not one of {size}")
        if not request.completed:
            if not self._endpoint.alive:
                raise self._failure(None)
            return None
        self._incoming = None
        self._check(request)
        return memoryview(memory)

    def send(self, items: Sequence[Outgoing], descriptor: int | None = None) -> None:
        self._check_open()
        messages = bytearray()
        for item in items:
            if isinstance(item, Payload):
                self._send_messages(messages)
                messages = bytearray()
                tag = self.worker.ucx.UCXXTag(item.tag)
                self._sends.append((self._post("tag_send", item.view, tag), item.view))
            else:
                messages += item
        self._send_messages(messages)

    def flush(self) -> bool:
        if not self._sends:
            return True
        waiting = []
        for request, memory in self._sends:
            if request.completed:
                self._check(request)
            else:
                waiting.append((request, memory))
        self._sends = waiting
        if waiting and not self._endpoint.alive:
            raise self._failure(None)
        return not waiting

    def expect(self, target: memoryview, tag: int) -> None:
        self._check_open()
        memory = target if target.nbytes else memoryview(bytearray(1))
        request = self._post("tag_recv", memory, self.worker.ucx.UCXXTag(tag))
        self._expected.append((request, memory, tag))

    def payload_arrived(self, nbytes: int) -> bool:
        request, memory, _ = self._expected[0]
        if nbytes and nbytes != memory.nbytes:
            raise MessageTruncated(f"the payload has {nbytes} bytes, expected were {memory.nbytes}")
        if not request.completed:
            if not self._endpoint.alive:
                raise self._failure(None)
            return False
        self._expected.popleft()
        self._check(request)
        return True

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        requests = [*self._sends, *((request, memory) for request, memory, _ in self._expected)]
        if self._incoming is not None:
            requests.append(self._incoming)
        self.worker.close_endpoint(self._endpoint, requests)
        for _, _, tag in self._expected:
            self.worker.discard(tag)
        self._open_requests = requests
        self._sends, self._incoming = [], None
        self._expected.clear()

    @property
    def drained(self) -> bool:
        """After `close`: UCX no longer touches memory that was given to this stream."""
        self._open_requests = [pair for pair in self._open_requests if self.worker.using(pair[0])]
        return not self._open_requests

    # --- requests ---------------------------------------------------------------------------------------------

    def _post(self, operation: str, memory: Any, *tag: Any) -> Any:
        try:
            return getattr(self._endpoint, operation)(self.worker.array(memory), *tag)
        except self.worker.ucx.UCXError as error:
            raise self._failure(error) from error

    def _send_messages(self, messages: bytearray) -> None:
        if messages:
            self._sends.append((self._post("stream_send", messages), messages))

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

    def _check_open(self) -> None:
        if self.closed:
            raise ConnectionClosed("this side closed the connection")

    def _ready(self) -> bool:
        """A request whose completion the driver has not seen yet, or a failure."""
        if not self._endpoint.alive:
            return True
        if self._incoming is not None and self._incoming[0].completed:
            return True
        if self._expected and self._expected[0][0].completed:
            return True
        return any(request.completed for request, _ in self._sends)

    def __repr__(self) -> str:
        return f"<UcxStream {'closed' if self.closed else 'open'}>"


class UcxListener:
    """Listens for UCX connections on the interface that has `host`, on `port` or the next free one."""

    def __init__(self, worker: UcxWorker, host: str, port: int = 0) -> None:
        self._worker = worker
        self._requests: deque[int] = deque()
        self._listener = self._bind(port)
        try:
            confine(self._listener.port, host)
        except BaseException:
            self.close()
            raise
        self.endpoint = str(Endpoint(Lane.UCX, host, self._listener.port))

    def accept(self) -> UcxStream | None:
        """The next connection, or None when there is none."""
        if not self._requests:
            return None
        ucx = self._worker.ucx
        try:
            endpoint = self._listener.create_endpoint_from_conn_request(self._requests.popleft(), True)
        except ucx.UCXError as error:
            raise from_ucx_error(error, self.endpoint) from error
        return UcxStream(self._worker, endpoint)

    def close(self) -> None:
        self._listener = None

    def _bind(self, port: int) -> Any:
        for candidate in range(port, min(port + _PORTS_TO_TRY, 65536)) if port else (0,):
            try:
                return self._worker.listen(candidate, self._requests.append)
            except Unreachable as error:
                if not error.refused:
                    raise
        raise ConfigError("port", port, f"a port with a free one among the {_PORTS_TO_TRY} from it on, or 0")


def connect(worker: UcxWorker, host: str, port: int) -> UcxStream:
    """Begin a connection to a server's UCX endpoint; the handshake shows whether it stands.

    Raises:
        Unreachable: the host is unknown.
    """
    return UcxStream(worker, worker.connect(host, port))
