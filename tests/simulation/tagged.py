"""A simulated UCX, for the production streams of the `ucx` lane to run over: workers, endpoints, tagged messages.

Small messages are copied when they are sent. A large payload is not: the transport reads it from the sender's
memory and writes it into the receiver's at a time of its own, in two pieces, as long as either side has it posted
and, after its end was closed, until the cancellation is through.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from dray.transport.lanes import UCX
from dray.transport.lanes.ucx_worker import Abandoned, UcxWorker, require
from simulation.faults import Fault, FaultPlan
from simulation.scheduler import Process, Scheduler, Signal, Violation

_EAGER_BYTES = 200


@functools.cache
def ucx_names() -> Any:
    """What of `ucxx` streams use: its errors, and tags that are plain integers."""
    ucx, _ = require()
    errors = {name: getattr(ucx, name) for name in dir(ucx) if name.startswith("UCX") and name.endswith("Error")}
    return SimpleNamespace(**errors, UCXXTag=int, UCXXTagMask=int)


class SimulatedRequest:
    """A send or a receive that is under way."""

    __slots__ = ("_ended", "completed", "error", "memory", "tag")

    def __init__(self, memory: memoryview, tag: int = 0) -> None:
        self.memory = memory
        self.tag = tag
        self.completed = False
        self._ended = False
        self.error: Exception | None = None

    @property
    def touchable(self) -> bool:
        """The transport may still read from or write to the memory."""
        return not self._ended

    def check_error(self) -> None:
        """Raise what it ended with."""
        if self.error is not None:
            raise self.error

    def end(self, worker: SimulatedWorker, error: Exception | None = None) -> None:
        """The transport is done with it; its worker sees that when it makes progress."""
        if self._ended:
            return
        self._ended = True

        def complete() -> None:
            self.error = error
            self.completed = True

        worker.do(complete)


class _Announced:
    """A message that nobody has asked for so far: how long it is, and how to get it."""

    __slots__ = ("length", "take")

    def __init__(self, length: int, take: Callable[[SimulatedRequest], None]) -> None:
        self.length = length
        self.take = take


class _Ucp:
    """What a `UcxWorker` drives: a worker's queue of events and of unexpected messages."""

    def __init__(self) -> None:
        self.due: deque[Callable[[], None]] = deque()
        self.armed = self.signalled = False
        self.unexpected: dict[int, deque[_Announced]] = {}

    def progress_once(self) -> bool:
        self.armed = self.signalled = False
        if not self.due:
            return False
        self.due.popleft()()
        return True

    def arm(self) -> bool:
        if self.due:
            return False
        self.armed, self.signalled = True, False
        return True

    def tag_probe(self, tag: int, mask: int = -1, remove: bool = False) -> Any:
        if not mask:
            tag = next((tag for tag, waiting in self.unexpected.items() if waiting), tag)
        waiting = self.unexpected.get(tag)
        if not waiting:
            return SimpleNamespace(matched=False, length=0)
        first = waiting[0]
        if remove:
            waiting.popleft()
        sender = SimpleNamespace(value=tag)
        return SimpleNamespace(matched=True, length=first.length, first=first, sender_tag=sender)

    def tag_recv(self, memory: memoryview, tag: int) -> SimulatedRequest:
        """For a message that has come: nobody receives one on a worker before that."""
        request = SimulatedRequest(memory)
        self.unexpected[tag].popleft().take(request)
        return request

    def tag_recv_with_handle(self, memory: memoryview, found: Any) -> SimulatedRequest:
        request = SimulatedRequest(memory)
        found.first.take(request)
        return request


class SimulatedWorker(UcxWorker):
    """A UCX worker of a simulated process.

    Attributes:
        signal: notified when `progress` has something to do.
        posted: receives by tag.
        reading: sends that may still be read from their memory, and some that are over.
    """

    def __init__(self, scheduler: Scheduler, plan: FaultPlan, number: int, process: Process) -> None:
        self.ucx = ucx_names()
        self.array = memoryview
        self.scheduler = scheduler
        self.plan = plan
        self.process = process
        self.signal = Signal(scheduler)
        self.posted: dict[int, SimulatedRequest] = {}
        self.reading: list[SimulatedRequest] = []
        self.loopback = True
        self.awaited: set[int] = set()
        self.steps = 0
        self.closed = False
        self._number = number
        self._tags = itertools.count(1 << 32)
        self._worker = _Ucp()
        self._abandoned: list[Abandoned] = []

    def fileno(self) -> int:
        return self._number

    def do(self, event: Callable[[], None]) -> None:
        """Have something happen with the next progress."""
        if not self.closed and not self.process.dead:
            self._worker.due.append(event)
            if self._worker.armed:
                self._worker.signalled = True
                self.signal.notify()

    @property
    def signalled(self) -> bool:
        """Something has happened since `arm`: its descriptor is readable."""
        return bool(self._worker.signalled)

    def deliver(self, tag: int, data: bytes) -> None:
        """A small message under a tag: into the receive that is posted, or to those that nobody asked for."""

        def take(request: SimulatedRequest) -> None:
            if len(data) > len(request.memory):
                request.end(self, self.ucx.UCXMessageTruncatedError("simulated"))
            else:
                request.memory[: len(data)] = data
                request.end(self)

        self.announce(tag, len(data), take)

    def announce(self, tag: int, length: int, take: Callable[[SimulatedRequest], None]) -> None:
        """A message has come: for the receive that is posted, or to wait until it is asked for."""
        request = self.posted.pop(tag, None)
        if request is not None:
            take(request)
        elif not self.closed:
            self._worker.unexpected.setdefault(tag, deque()).append(_Announced(length, take))

    def close_endpoint(self, endpoint: Any, requests: list[tuple[Any, Any]]) -> list[Abandoned]:
        endpoint.close(requests)
        self.progress()
        return self.abandon(requests)

    def close(self) -> None:
        """Nothing touches its memory any more."""
        self.closed = True
        self.posted.clear()
        self._worker.due.clear()
        self._abandoned.clear()


class SimulatedUcxEndpoint:
    """One end of a UCX connection."""

    def __init__(self, worker: SimulatedWorker) -> None:
        self.worker = worker
        self.peer: SimulatedUcxEndpoint | None = None
        self.alive = True
        self.closed = False
        self.why: type[Exception] = Exception
        self._backlog: list[Callable[[], None]] = []
        self._streamed: deque[bytes] = deque()
        self._stream_receive: SimulatedRequest | None = None
        self._open: list[SimulatedRequest] = []
        self._delay = worker.plan.delay()
        self._last = 0.0
        self._lost = False

    # --- what streams use -------------------------------------------------------------------------------------

    def stream_send(self, memory: memoryview) -> SimulatedRequest:
        data = bytes(memory)
        request = SimulatedRequest(memory)
        self._send(lambda peer: peer._stream_arrived(data))
        request.end(self.worker)
        return request

    def stream_recv(self, memory: memoryview) -> SimulatedRequest:
        request = SimulatedRequest(memory)
        self._stream_receive = request
        self._open.append(request)
        self._match_stream()
        return request

    def tag_send(self, memory: memoryview, tag: int) -> SimulatedRequest:
        request = SimulatedRequest(memory, tag)
        fault = self.worker.plan.strike(UCX)
        if fault is not None and self.peer is not None:
            self._suffer(fault)
        if len(memory) <= _EAGER_BYTES or self.worker.scheduler.rng.random() < 0.3:
            data = bytes(memory)
            self._send(lambda peer: peer.worker.deliver(tag, data))
            request.end(self.worker)
        else:
            image = bytes(memory)
            self._open.append(request)
            self.worker.reading.append(request)
            self._send(
                lambda peer: peer.worker.announce(
                    tag, len(memory), lambda receive: self._transfer(request, image, receive, peer)
                )
            )
        return request

    def tag_recv(self, memory: memoryview, tag: int) -> SimulatedRequest:
        request = SimulatedRequest(memory, tag)
        self._open.append(request)
        self.worker.posted[tag] = request
        return request

    def raise_on_error(self) -> None:
        if not self.alive:
            raise self.why("simulated")

    # --- life -------------------------------------------------------------------------------------------------

    def join(self, peer: SimulatedUcxEndpoint) -> None:
        """The connection stands: what has been sent on either side goes out."""
        self.peer, peer.peer = peer, self
        for end in (self, peer):
            backlog, end._backlog = end._backlog, []
            for event in backlog:
                event()

    def fail(self, why: type[Exception]) -> None:
        """The connection has failed; streams hear of it with the next progress."""
        if self.closed or not self.alive:
            return

        def failed() -> None:
            self.alive = False
            self.why = why
            for request in self._open:
                if request.tag not in self.worker.posted:
                    request.end(self.worker, why("simulated"))

        self.worker.do(failed)

    def reset(self) -> None:
        """The network ends the connection."""
        for end in (self, self.peer):
            if end is not None:
                end.fail(ucx_names().UCXEndpointTimeoutError)

    def close(self, requests: list[tuple[Any, Any]]) -> None:
        """Close this end: the peer hears of it, and what is open is cancelled sooner or later."""
        self.closed = True
        scheduler, plan = self.worker.scheduler, self.worker.plan
        for request, _ in requests:
            if not request.completed:
                when = plan.soon()
                if when:
                    scheduler.at(scheduler.now() + when, functools.partial(self._cancel, request))
                else:
                    self._cancel(request)
        if self.peer is not None and not self._lost:
            due = max(scheduler.now() + self._delay, self._last)
            scheduler.at(due, functools.partial(self.peer.fail, ucx_names().UCXConnectionResetError))

    def vanish(self) -> None:
        """Its process is gone."""
        self.closed = True
        for request in self._open:
            request._ended = True
        if self.peer is not None:
            self.peer.fail(ucx_names().UCXConnectionResetError)

    # --- inside -----------------------------------------------------------------------------------------------

    def _cancel(self, request: SimulatedRequest) -> None:
        if self.worker.posted.get(request.tag) is request:
            del self.worker.posted[request.tag]
        request.end(self.worker, ucx_names().UCXCanceledError("simulated"))

    def _send(self, arrive: Callable[[SimulatedUcxEndpoint], None]) -> None:
        if self.peer is None:
            self._backlog.append(lambda: self._send(arrive))
            return
        if self._lost:
            return
        peer, scheduler = self.peer, self.worker.scheduler
        due = max(scheduler.now() + self._delay, self._last)
        self._last = due

        def arrived() -> None:
            if not peer.closed and peer.alive and not peer.worker.process.dead:
                peer.worker.do(lambda: arrive(peer))

        if due > scheduler.now():
            scheduler.at(due, arrived)
        else:
            arrived()

    def _transfer(
        self, request: SimulatedRequest, image: bytes, receive: SimulatedRequest, peer: SimulatedUcxEndpoint
    ) -> None:
        """The receiver asks for a payload: the transport moves it when it likes."""
        if len(receive.memory) < len(request.memory):
            receive.end(peer.worker, ucx_names().UCXMessageTruncatedError("simulated"))
            request.end(self.worker)
            return
        scheduler, plan = self.worker.scheduler, self.worker.plan
        half = len(request.memory) // 2

        def move(begin: int, end: int) -> bool:
            if not (request.touchable and receive.touchable):
                for side, worker in ((request, self.worker), (receive, peer.worker)):
                    side.end(worker, ucx_names().UCXCanceledError("simulated"))
                return False
            if request.memory[begin:end] != image[begin:end]:
                raise Violation("a payload changed while UCX still read it from its slot")
            receive.memory[begin:end] = image[begin:end]
            return True

        def finish() -> None:
            if move(half, len(request.memory)):
                receive.end(peer.worker)
                request.end(self.worker)

        def start() -> None:
            if move(0, half):
                scheduler.at(scheduler.now() + plan.soon(), finish)

        scheduler.at(scheduler.now() + plan.soon(), start)

    def _stream_arrived(self, data: bytes) -> None:
        self._streamed.append(data)
        self._match_stream()

    def _match_stream(self) -> None:
        request = self._stream_receive
        if request is not None and self._streamed:
            self._stream_receive = None
            request.memory[:] = self._streamed.popleft()
            request.end(self.worker)

    def _suffer(self, fault: Fault) -> None:
        self.worker.scheduler.note(f"{fault.value} strikes a ucx connection")
        match fault:
            case Fault.RESET:
                self.reset()
            case Fault.TRUNCATION | Fault.SILENCE:
                self._lost = True
                if self.peer is not None and self.worker.scheduler.rng.random() < 0.5:
                    self.peer._lost = True
                if fault is Fault.TRUNCATION:
                    self.reset()
            case Fault.DELAY:
                self._delay += self.worker.plan.long_delay()
            case _:
                raise AssertionError(fault)
