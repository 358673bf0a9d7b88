"""A UCX worker: progress by epoll, requests whose memory stays alive, and an orderly end.

`ucxx`'s asyncio layer polls without pause while a request is open, and shares one worker in a process. This module
uses its low-level objects instead: a worker for each thread that drives one, blocking progress, no progress
thread. `ucxx` is imported on first use; without the package, `require` raises an error that names the command to
install it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import itertools
import os
import secrets
import select
import socket
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

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
from dray.transport.lanes.base import Worker
from dray.transport.lanes.ucx_sockets import drop_all_packets, library_function, ports_opened

UCXX_AVAILABLE = importlib.util.find_spec("ucxx") is not None
SEGMENT_SIZE = "1m"
"""UCX's TCP segments; its own 8 KiB limit a connection with error handling to 1 GB/s."""

MAX_MESSAGE = 64 * 1024
"""Frames that are sent together are split into messages of at most this size, in bytes."""

MAX_SPARE = 8
"""Sizes of messages for which a worker keeps memory."""

RETIRED_SECONDS = 0.05
"""How long a worker that closes waits for connections that its closed listeners have accepted."""

_CLOSE_STEP_NS = 10_000_000
_CLOSE_STEPS = 100
_PROGRESS_STEPS = 10_000
_WORKER_DESCRIPTORS = 11
"""What a worker opens, one listener or connection included; UCX may end the process if fewer are free."""
_CONTEXT_DESCRIPTORS = 7
"""What the first worker of a process opens in addition."""


def require() -> tuple[ModuleType, type]:
    """The low-level module of `ucxx` and its array type.

    Raises:
        MissingDependencyError: the package is not installed, or does not load.
    """
    if not UCXX_AVAILABLE:
        raise MissingDependencyError("ucxx", "the ucx lane", "'dray-rl[ucxx]'")
    # Both libraries print what dray reports as typed errors. These variables turn the output on again.
    os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")
    os.environ.setdefault("UCX_LOG_LEVEL", "fatal")
    os.environ.setdefault("UCXX_LOG_LEVEL", "fatal")
    try:
        from ucxx._lib import libucxx
        from ucxx._lib.arr import Array
    except ImportError as error:
        raise MissingDependencyError("ucxx", "the ucx lane", "'dray-rl[ucxx]'", str(error)) from error
    return libucxx, Array


def from_ucx_error(error: Exception, endpoint: str | None = None) -> TransportError:
    """The dray error for an error of `ucxx`, by its type."""
    ucx, _ = require()
    match error:
        case ucx.UCXNotConnectedError() | ucx.UCXRejectedError():
            return Unreachable(f"no server listens there: {error}", endpoint=endpoint, refused=True)
        case ucx.UCXUnreachableError() | ucx.UCXInvalidAddrError() | ucx.UCXNoDeviceError():
            return Unreachable(f"UCX has no route to the address: {error}", endpoint=endpoint)
        case ucx.UCXTimedOutError() | ucx.UCXEndpointTimeoutError():
            return TransportTimeout(f"UCX timed out on the connection: {error}", endpoint=endpoint)
        case ucx.UCXMessageTruncatedError() | ucx.UCXMsgTruncated():
            return MessageTruncated(f"UCX truncated a message: {error}", endpoint=endpoint)
        case ucx.UCXCloseError():
            return ConnectionClosed(f"the peer closed the connection: {error}", endpoint=endpoint)
        case _:
            return ConnectionReset(f"the connection failed: {error}", endpoint=endpoint)


class Ucp(NamedTuple):
    """The objects that a `UcxWorker` drives: those of `ucxx`, or of a simulation.

    Attributes:
        names: has UCX's errors and the types of its tags, listeners and endpoints.
        array: wraps memory for a request.
        worker: UCX's worker.
        data_ports: TCP ports at which the worker accepts connections for data.
    """

    names: Any
    array: Callable[[Any], Any]
    worker: Any
    data_ports: frozenset[int] = frozenset()


def open_ucp(loopback: bool) -> Ucp:
    """A new worker of `ucxx`; raises as `UcxWorker`."""
    key = loopback, os.getpid()
    needed = _WORKER_DESCRIPTORS + (0 if key in _contexts else _CONTEXT_DESCRIPTORS)
    check_descriptors(needed, "a UCX worker")
    ucx, array = require()
    try:
        context = _context(key)
        worker, opened = ports_opened(lambda: ucx.UCXWorker(context))
        address = ucx.UCXAddress.create_from_worker(worker).tobytes()
        worker.init_blocking_progress_mode()
    except (ucx.UCXShmemSegmentError, ucx.UCXNoDeviceError) as error:
        shared = "" if os.access("/dev/shm", os.W_OK) else "; it needs a /dev/shm that can be written to"
        message = f"UCX cannot be used on this machine: {error}{shared}"
        raise Unreachable(message, lane_unusable=True) from error
    except ucx.UCXError as error:
        raise descriptors_exhausted("a UCX worker") or from_ucx_error(error) from error
    # Another thread may have opened other ports meanwhile.
    return Ucp(ucx, array, worker, frozenset(port for port in opened if port.to_bytes(2, "big") in address))


class Memory:
    """Memory for messages that is used for one after the other.

    Attributes:
        nbytes: its size.
        view: the memory.
        array: the same as UCX takes it.
    """

    __slots__ = ("array", "nbytes", "view")

    def __init__(self, array: Callable[[Any], Any], nbytes: int) -> None:
        self.nbytes = nbytes
        self.view = memoryview(bytearray(nbytes))
        self.array = array(self.view)


class Abandoned:
    """A request without a user, and the memory that UCX may still access until the request is `done`."""

    __slots__ = ("_memory", "_request")

    def __init__(self, request: Any, memory: Any) -> None:
        self._request = request
        self._memory = memory

    @property
    def done(self) -> bool:
        """UCX no longer uses the memory, which is released."""
        if self._request is not None and self._request.completed:
            self._request = self._memory = None
        return self._request is None

    def detach_memory(self) -> Any:
        """Release the request and return its memory, before the worker is destroyed."""
        memory, self._request, self._memory = self._memory, None, None
        return memory


class UcxWorker(Worker):
    """A UCX worker for one thread at a time.

    Args:
        loopback: confine the worker's own sockets to the loopback interface.
        ucp: what the worker drives; by default a new worker of `ucxx`.

    Attributes:
        ucx: has UCX's errors and types.
        data_ports: TCP ports at which other workers connect to this one for data.
        awaited: the tags under which peers send messages to the streams of this worker.

    Raises:
        MissingDependencyError: the package is not installed, or does not load.
        OutOfResources: too few descriptors are left for the worker.
        Unreachable: UCX cannot be used on this machine (`lane_unusable`).
        TransportError: UCX cannot make a worker.
    """

    def __init__(self, loopback: bool, ucp: Ucp | None = None) -> None:
        self.ucx, self.array, self._worker, self.data_ports = ucp or open_ucp(loopback)
        self.loopback = loopback
        self.awaited: set[int] = set()
        self.steps = 0
        self._tags = itertools.count(secrets.randbits(62))  # other peers must not guess a tag
        self._abandoned: list[Abandoned] = []
        self._retired: list[tuple[Any, Callable[[Any], None]]] = []
        self._retired_until = Deadline.after(0)
        self._endpoints: list[Any] = []  # made by `connect` and not closed
        self._memory: list[Any] = []
        self._spare: dict[int, Memory] = {}
        self.closed = False

    def fileno(self) -> int:
        return int(self._worker.epoll_file_descriptor)

    def next_tag(self) -> int:
        """A tag that this worker has not returned before."""
        return next(self._tags)

    def progress(self, steps: int = _PROGRESS_STEPS) -> None:
        """Do the work that is due, in at most `steps` steps, without waiting."""
        step, done = self._worker.progress_once, 0
        while done < steps and step():
            done += 1
        self.steps += done
        if self._abandoned:
            self._abandoned = [abandoned for abandoned in self._abandoned if not abandoned.done]

    def has_progressed(self) -> bool:
        if not self._worker.progress_once():
            return False
        self.steps += 1
        self.progress()
        return True

    def arm(self) -> bool:
        return bool(self._worker.arm())

    def listen(self, port: int, on_request: Callable[[int], None]) -> Any:
        """A listener on `port` of every interface; `progress` calls `on_request` for each connection.

        Raises:
            Unreachable: UCX cannot listen there; `refused` if the port is in use.
            OutOfResources: no descriptor is left for it.
        """
        try:
            return self.ucx.UCXListener.create(self._worker, port, on_request)
        except self.ucx.UCXBusyError as error:
            raise Unreachable(f"port {port} is in use: {error}", refused=True) from error
        except self.ucx.UCXError as error:
            if (exhausted := descriptors_exhausted("a UCX listener")) is not None:
                raise exhausted from error
            raise Unreachable(f"UCX cannot listen on port {port}: {error}") from error

    def retire(self, listener: Any, listening: socket.socket, refuse: Callable[[Any], None]) -> None:
        """Stop a listener, whose socket is `listening`, from accepting; keep it until `close`.

        The endpoints that it accepted need it, and it calls back into the object that made it. UCX (1.21) crashes
        if a listener is destroyed before an accepted connection has sent its request. `close` therefore waits for
        these connections for `RETIRED_SECONDS`, and ends them with `refuse`.
        """
        drop_all_packets(listening)
        self._retired.append((listener, refuse))
        self._retired_until = Deadline.after(RETIRED_SECONDS)

    def connect(self, host: str, port: int) -> Any:
        """An endpoint towards a listener; only the first exchange shows whether it is connected.

        Args:
            host: a numeric IPv4 address, because UCX looks names up without a time limit.
        """
        try:
            keep_result(self._endpoints, self.ucx.UCXEndpoint.create, self._worker, host, port, True)
            return self._endpoints[-1]
        except self.ucx.UCXError as error:
            raise descriptors_exhausted("a UCX connection") or from_ucx_error(error) from error

    def probe(self, tag: Any) -> Any:
        """Remove the oldest message under a tag from the queue of unexpected ones: `matched` and `length`."""
        return self._worker.tag_probe(tag, remove=True)

    def has_message(self, tag: Any) -> bool:
        """An unexpected message has arrived under a tag."""
        return bool(self._worker.tag_probe(tag, remove=False).matched)

    def memory(self, nbytes: int) -> Memory:
        """Memory for one message. Give it to `reuse` once no request can access it."""
        spare = self._spare.pop(nbytes, None)
        return Memory(self.array, nbytes) if spare is None else spare

    def reuse(self, memory: Memory) -> None:
        """Keep memory for the next message of its size."""
        if len(self._spare) >= MAX_SPARE:
            self._spare.clear()
        self._spare[memory.nbytes] = memory

    def receive(self, found: Any) -> tuple[Any, Memory]:
        """Receive what `probe` found, of up to `MAX_MESSAGE` bytes: the request, and the memory that it fills."""
        memory = self.memory(MAX_MESSAGE)
        return self._worker.tag_recv_with_handle(memory.array, found), memory

    def discard(self, tag: Any) -> None:
        """Drop the unexpected messages under a tag, of any size."""
        while self.has_message(tag):
            memory = bytearray(1)
            # UCX truncates the message to this memory and drops the rest.
            self.abandon([(self._worker.tag_recv(self.array(memory), tag), memory)])

    def drop_strays(self) -> None:
        """Drop the oldest unexpected messages, up to the first under an `awaited` tag.

        UCX would keep them until the worker is closed.
        """
        any_tag = self.ucx.UCXXTag(0), self.ucx.UCXXTagMask(0)
        while (found := self._worker.tag_probe(*any_tag)).matched and found.sender_tag.value not in self.awaited:
            self.discard(self.ucx.UCXXTag(found.sender_tag.value))

    def close_endpoint(self, endpoint: Any, requests: list[tuple[Any, Any]]) -> list[Abandoned]:
        """Close an endpoint at once; cancel its open requests, and keep their memory until UCX has ended them."""
        # ucxx raises if the endpoint has already failed, and closes it in this case too.
        with contextlib.suppress(self.ucx.UCXError):
            endpoint.close_blocking(_CLOSE_STEP_NS, _CLOSE_STEPS)
        self.progress()
        _forget_cancelled(endpoint)
        if endpoint in self._endpoints:
            self._endpoints.remove(endpoint)
        return self.abandon(requests)

    def abandon(self, requests: list[tuple[Any, Any]]) -> list[Abandoned]:
        """Keep the memory of requests that no longer have a user until UCX has ended them."""
        abandoned = [Abandoned(request, memory) for request, memory in requests if not request.completed]
        self._abandoned += abandoned
        return abandoned

    def close(self) -> None:
        """Destroy the worker; its listeners and the endpoints that it accepted must be closed. Twice is fine.

        After an exception of a signal handler, another call does the rest.
        """
        if self._worker is None:
            return
        for endpoint in list(self._endpoints):  # an exception came before a stream had them
            self.close_endpoint(endpoint, [])
        self._refuse_retired()
        self._worker.cancel_inflight_requests(_CLOSE_STEP_NS, _CLOSE_STEPS)
        self._refuse_pending()
        # A request that UCX could not cancel ends with its worker, and the worker exists as long as its requests.
        # The requests are released first, then the worker, and their memory last.
        self._memory += [abandoned.detach_memory() for abandoned in self._abandoned]
        self._abandoned.clear()
        self._retired.clear()
        self._worker, self.closed = None, True
        self._memory.clear()

    def _refuse_retired(self) -> None:
        """Refuse the connections that retired listeners have accepted, at least once, until `_retired_until`."""
        poll = select.poll()
        poll.register(self.fileno(), select.POLLIN)
        self._refuse_pending()
        while not self._retired_until.expired:
            if self.arm():
                poll.poll(self._retired_until.remaining * 1000)
            self._refuse_pending()

    def _refuse_pending(self) -> None:
        self.progress()
        for listener, refuse in self._retired:
            refuse(listener)


def _forget_cancelled(endpoint: Any) -> None:
    """Make a closed endpoint release the requests that it has cancelled.

    ucxx (0.52) releases cancelled requests that have ended only when it is asked for their number, which Python
    cannot do. Until then endpoint and requests keep each other alive, and their worker with its descriptors.
    """
    name = "_ZNK4ucxx8Endpoint16getCancelingSizeEv"  # ucxx::Endpoint::getCancelingSize
    count = library_function("libucxx.so", name, (ctypes.c_void_p,), ctypes.c_size_t)
    if count is not None:
        count(endpoint.ucxx_ptr)


_context_lock = threading.Lock()
_contexts: dict[tuple[bool, int], Any] = {}
"""UCX contexts by (loopback, process): a context cannot be used in a forked child."""


def _context(key: tuple[bool, int]) -> Any:
    with _context_lock:
        if key not in _contexts:
            ucx, _ = require()
            options = {"TCP_TX_SEG_SIZE": SEGMENT_SIZE, "TCP_RX_SEG_SIZE": SEGMENT_SIZE, "TCP_CM_REUSEADDR": "y"}
            if key[0]:
                options["NET_DEVICES"] = "lo"
            chosen = {name: value for name, value in options.items() if f"UCX_{name}" not in os.environ}
            features = (ucx.Feature.TAG, ucx.Feature.STREAM, ucx.Feature.WAKEUP)
            _contexts[key] = ucx.UCXContext(chosen, features)
        return _contexts[key]
