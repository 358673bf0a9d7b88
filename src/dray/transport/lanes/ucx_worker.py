"""One UCX worker: progress by epoll, requests whose memory stays alive, orderly teardown.

`ucxx`'s asyncio layer spins on `sleep(0)` while a request is open and shares one worker per process, so this
module uses the low-level objects: a worker for each thread that drives one, blocking progress, no progress thread.
`ucxx` is imported on first use; without it `require` says what to install.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import itertools
import os
import secrets
import select
import socket
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

from dray.clock import Deadline
from dray.errors import (
    ConnectionClosed,
    ConnectionReset,
    MessageTruncated,
    MissingDependencyError,
    TransportError,
    TransportTimeout,
    Unreachable,
)
from dray.resources import check_descriptors, descriptors_exhausted, keep_result
from dray.transport.lanes.ucx_sockets import drop_all_packets, ports_opened

UCXX_AVAILABLE = importlib.util.find_spec("ucxx") is not None
SEGMENT_SIZE = "1m"
"""UCX's TCP segments; its own 8 KiB bind a connection with error handling to 1 GB/s."""

_CLOSE_STEP_NS = 10_000_000
_CLOSE_STEPS = 100
_PROGRESS_STEPS = 10_000
_SETTLE_SECONDS = 0.05
_WORKER_DESCRIPTORS = 11
"""What a worker opens, one listener or connection included; where UCX finds fewer, it may end the process."""
_CONTEXT_DESCRIPTORS = 7
"""What a process's first worker opens besides."""


def require() -> tuple[ModuleType, type]:
    """The low-level module of `ucxx` and its array type.

    Raises:
        MissingDependencyError: the package is not installed, or does not load.
    """
    if not UCXX_AVAILABLE:
        raise MissingDependencyError("ucxx", "the ucx lane", "'dray[ucxx]'")
    # Both libraries print what dray reports as typed errors; whoever debugs them sets these variables.
    os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")
    os.environ.setdefault("UCX_LOG_LEVEL", "fatal")
    os.environ.setdefault("UCXX_LOG_LEVEL", "fatal")
    try:
        from ucxx._lib import libucxx
        from ucxx._lib.arr import Array
    except ImportError as error:
        raise MissingDependencyError("ucxx", "the ucx lane", "'dray[ucxx]'", str(error)) from error
    return libucxx, Array


def from_ucx_error(error: Exception, endpoint: str | None = None) -> TransportError:
    """The dray error that one of `ucxx`'s stands for, by type."""
    ucx, _ = require()
    match error:
        case ucx.UCXNotConnectedError() | ucx.UCXRejectedError():
            return Unreachable(f"nobody listens there: {error}", endpoint=endpoint, refused=True)
        case ucx.UCXUnreachableError() | ucx.UCXInvalidAddrError() | ucx.UCXNoDeviceError():
            return Unreachable(f"UCX finds no way: {error}", endpoint=endpoint)
        case ucx.UCXTimedOutError() | ucx.UCXEndpointTimeoutError():
            return TransportTimeout(f"UCX gave up on the connection: {error}", endpoint=endpoint)
        case ucx.UCXMessageTruncatedError() | ucx.UCXMsgTruncated():
            return MessageTruncated(f"UCX cut a message: {error}", endpoint=endpoint)
        case ucx.UCXCloseError():
            return ConnectionClosed(f"the peer closed the connection: {error}", endpoint=endpoint)
        case _:
            return ConnectionReset(f"the connection failed: {error}", endpoint=endpoint)


class Abandoned:
    """A request that nobody waits for any more, with the memory UCX may still touch until it is `done`."""

    __slots__ = ("_memory", "_request")

    def __init__(self, request: Any, memory: Any) -> None:
        self._request = request
        self._memory = memory

    @property
    def done(self) -> bool:
        """UCX is done with the memory; it is let go."""
        if self._request is not None and self._request.completed:
            self._request = self._memory = None
        return self._request is None

    def take_memory(self) -> Any:
        """Give out the memory and let the request go, as its worker is about to be destroyed."""
        memory, self._request, self._memory = self._memory, None, None
        return memory


class UcxWorker:
    """A UCX worker for one thread at a time.

    Args:
        loopback: confine the worker's own sockets to the loopback interface.

    Attributes:
        data_ports: TCP ports to which UCX connects other workers with this one.
        awaited: the tags under which peers send messages to the streams of this worker.

    Raises:
        MissingDependencyError: the package is not installed, or does not load.
        OutOfResources: too few descriptors are left for it.
        Unreachable: UCX cannot be used on this machine (`lane_unusable`).
        TransportError: UCX makes no worker.
    """

    def __init__(self, loopback: bool) -> None:
        check_descriptors(
            _WORKER_DESCRIPTORS + (0 if _has_context(loopback) else _CONTEXT_DESCRIPTORS), "a UCX worker"
        )
        self.ucx, self.array = require()
        try:
            context = _context(loopback, os.getpid())
            self._worker, opened = ports_opened(lambda: self.ucx.UCXWorker(context))
            address = self.ucx.UCXAddress.create_from_worker(self._worker).tobytes()
            self._worker.init_blocking_progress_mode()
        except (self.ucx.UCXShmemSegmentError, self.ucx.UCXNoDeviceError) as error:
            message = f"UCX cannot be used on this machine: {error}{_shared_memory_remark()}"
            raise Unreachable(message, lane_unusable=True) from error
        except self.ucx.UCXError as error:
            raise descriptors_exhausted("a UCX worker") or from_ucx_error(error) from error
        # Another thread may have opened others meanwhile.
        self.data_ports = frozenset(port for port in opened if port.to_bytes(2, "big") in address)
        self.loopback = loopback
        self.awaited: set[int] = set()
        self.steps = 0
        # Nobody who has not been told a tag should hit upon one.
        self._tags = itertools.count(secrets.randbits(62))
        self._abandoned: list[Abandoned] = []
        self._retired: list[tuple[Any, Callable[[Any], None]]] = []
        self._settled = Deadline.after(0)
        self._endpoints: list[Any] = []  # that `connect` has made, and that are not closed
        self._memory: list[Any] = []
        self.closed = False

    def fileno(self) -> int:
        """Readable when `progress` has something to do, after `arm`."""
        return int(self._worker.epoll_file_descriptor)

    def next_tag(self) -> int:
        """A tag that this worker never gave before."""
        return next(self._tags)

    def progress(self) -> None:
        """Do what there is to do, without waiting."""
        step = self._worker.progress_once
        for _ in range(_PROGRESS_STEPS):
            if not step():
                break
            self.steps += 1
        if self._abandoned:
            self._abandoned = [abandoned for abandoned in self._abandoned if not abandoned.done]

    def arm(self) -> bool:
        """Make `fileno` readable at the next event; False if there already is one."""
        return bool(self._worker.arm())

    def listen(self, port: int, on_request: Callable[[int], None]) -> Any:
        """A listener on `port` of every interface; `on_request` is called within `progress`.

        Raises:
            Unreachable: UCX cannot listen there; `refused` if the port is taken.
            OutOfResources: no descriptor is left for it.
        """
        try:
            return self.ucx.UCXListener.create(self._worker, port, on_request)
        except self.ucx.UCXBusyError as error:
            raise Unreachable(f"port {port} is taken: {error}", refused=True) from error
        except self.ucx.UCXError as error:
            if (exhausted := descriptors_exhausted("a UCX listener")) is not None:
                raise exhausted from error
            raise Unreachable(f"UCX cannot listen on port {port}: {error}") from error

    def retire(self, listener: Any, listening: socket.socket, refuse: Callable[[Any], None]) -> None:
        """Have a listener, whose socket is `listening`, take no more connections; it is kept until `close`.

        The endpoints it accepted keep it going, and it calls back into the object that made it. UCX (1.21) crashes
        when a listener goes before a connection that it accepted has said what it wants, so `close` gives those
        a moment, and has `refuse` end them.
        """
        drop_all_packets(listening)
        self._retired.append((listener, refuse))
        self._settled = Deadline.after(_SETTLE_SECONDS)

    def connect(self, host: str, port: int) -> Any:
        """An endpoint towards a listener; whether it stands shows in its first exchange.

        Args:
            host: a numeric IPv4 address; a name would be looked up without a bound.
        """
        try:
            keep_result(self._endpoints, self.ucx.UCXEndpoint.create, self._worker, host, port, True)
            return self._endpoints[-1]
        except self.ucx.UCXError as error:
            raise descriptors_exhausted("a UCX connection") or from_ucx_error(error) from error

    def probe(self, tag: Any) -> Any:
        """The oldest message that nobody asked for under a tag, taken off the queue: `matched` and `length`."""
        return self._worker.tag_probe(tag, remove=True)

    def waits(self, tag: Any) -> bool:
        """A message that nobody asked for has come under a tag."""
        return bool(self._worker.tag_probe(tag, remove=False).matched)

    def take(self, found: Any) -> tuple[Any, bytearray]:
        """Receive what `probe` found: the request, and the memory it fills."""
        memory = bytearray(found.length)
        return self._worker.tag_recv_with_handle(self.array(memory), found), memory

    def discard(self, tag: Any) -> None:
        """Drop the messages that came under a tag nobody waits for any more, however long they are."""
        while self.waits(tag):
            memory = bytearray(1)
            # UCX cuts the message to what there is room for, and is done with all of it.
            self.abandon([(self._worker.tag_recv(self.array(memory), tag), memory)])

    def drop_strays(self) -> None:
        """Drop the oldest messages that were not asked for, up to the first under an `awaited` tag.

        UCX would keep them as long as the worker lives.
        """
        any_tag = self.ucx.UCXXTag(0), self.ucx.UCXXTagMask(0)
        while (found := self._worker.tag_probe(*any_tag)).matched and found.sender_tag.value not in self.awaited:
            self.discard(self.ucx.UCXXTag(found.sender_tag.value))

    def close_endpoint(self, endpoint: Any, requests: list[tuple[Any, Any]]) -> list[Abandoned]:
        """Close an endpoint at once; what it still had open is cancelled, and its memory kept until it is."""
        # ucxx raises when the endpoint has already failed; it is closed then all the same.
        with contextlib.suppress(self.ucx.UCXError):
            endpoint.close_blocking(_CLOSE_STEP_NS, _CLOSE_STEPS)
        self.progress()
        _let_cancelled_go(endpoint)
        if endpoint in self._endpoints:
            self._endpoints.remove(endpoint)
        return self.abandon(requests)

    def abandon(self, requests: list[tuple[Any, Any]]) -> list[Abandoned]:
        """Keep the memory of requests that nobody waits for until UCX is done with it."""
        abandoned = [Abandoned(request, memory) for request, memory in requests if not request.completed]
        self._abandoned += abandoned
        return abandoned

    def close(self) -> None:
        """Destroy the worker; its listeners and the endpoints that it accepted must be closed. Twice is fine.

        Where an exception of a signal handler ends it, another call does the rest.
        """
        if self._worker is None:
            return
        for endpoint in list(self._endpoints):  # an exception came before they were anybody's
            self.close_endpoint(endpoint, [])
        self._settle()
        self._worker.cancel_inflight_requests(_CLOSE_STEP_NS, _CLOSE_STEPS)
        self._refuse_waiting()
        # A request that UCX could not cancel ends with its worker, which lives as long as its requests do: so they
        # go first, and the memory last.
        self._memory += [abandoned.take_memory() for abandoned in self._abandoned]
        self._abandoned.clear()
        self._retired.clear()
        self._worker, self.closed = None, True
        self._memory.clear()

    def _settle(self) -> None:
        """Go on until what the retired listeners have accepted has been heard; one look at least, however late."""
        poll = select.poll()
        poll.register(self.fileno(), select.POLLIN)
        self._refuse_waiting()
        while not self._settled.expired:
            if self.arm():
                poll.poll(self._settled.remaining * 1000)
            self._refuse_waiting()

    def _refuse_waiting(self) -> None:
        self.progress()
        for listener, refuse in self._retired:
            refuse(listener)


def _let_cancelled_go(endpoint: Any) -> None:
    """Have a closed endpoint forget the requests it has cancelled.

    ucxx (0.52) drops cancelled requests that have ended only when it is asked how many are left, and Python cannot
    ask. Until then endpoint and request keep each other, and their worker with its descriptors, alive for ever.
    """
    count = _canceling_size()
    if count is not None:
        count(endpoint.ucxx_ptr)


@functools.cache
def _canceling_size() -> Any:
    """`ucxx::Endpoint::getCancelingSize`, or None where the loaded library does not have it."""
    try:
        function = ctypes.CDLL("libucxx.so")._ZNK4ucxx8Endpoint16getCancelingSizeEv
    except (OSError, AttributeError):
        return None
    function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_size_t
    return function


_CONTEXT_LOCK = threading.Lock()
_contexts: set[tuple[bool, int]] = set()


def _has_context(loopback: bool) -> bool:
    return (loopback, os.getpid()) in _contexts


def _context(loopback: bool, pid: int) -> Any:
    with _CONTEXT_LOCK:
        context = _make_context(loopback, pid)
        _contexts.add((loopback, pid))
        return context


@functools.lru_cache(maxsize=4)
def _make_context(loopback: bool, pid: int) -> Any:  # noqa: ARG001  (pid is there to be a key)
    """One UCX context for each use of the network and each process: a context does not survive a fork."""
    ucx, _ = require()
    options = {"TCP_TX_SEG_SIZE": SEGMENT_SIZE, "TCP_RX_SEG_SIZE": SEGMENT_SIZE, "TCP_CM_REUSEADDR": "y"}
    if loopback:
        options["NET_DEVICES"] = "lo"
    chosen = {name: value for name, value in options.items() if f"UCX_{name}" not in os.environ}
    features = (ucx.Feature.TAG, ucx.Feature.STREAM, ucx.Feature.WAKEUP)
    return ucx.UCXContext(chosen, features)


def _shared_memory_remark() -> str:
    """UCX keeps memory that it shares in /dev/shm: what is wrong with that folder, if anything."""
    folder = "/dev/shm"
    return "" if os.access(folder, os.W_OK) else f"; it needs a {folder} that can be written to"
