"""A simulated UCX under the production streams of the `ucx` lane: workers, endpoints, tagged messages.

Small messages are copied when they are sent. A large payload is not: the transport reads it from the sender's
memory and writes it into the receiver's later, in two pieces, while either side has it posted and, after an end
was closed, until the cancellation is complete.
"""

from __future__ import annotations

import functools
from collections import defaultdict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from dray.transport.lanes import UCX
from dray.transport.lanes.ucx_worker import Abandoned, Ucp, UcxWorker, require
from simulation.faults import Fault, FaultPlan
from simulation.scheduler import Process, Scheduler, Signal, Violation

_EAGER_BYTES = 200


@functools.cache
def ucx_names() -> Any:
    """The part of `ucxx` that streams use: its errors, and tags that are plain integers."""
    ucx, _ = require()
    errors = {name: getattr(ucx, name) for name in dir(ucx) if name.startswith("UCX") and name.endswith("Error")}
    return SimpleNamespace(**errors, UCXXTag=int, UCXXTagMask=int)


class SimulatedRequest:
    """A send or a receive.

    Attributes:
        touchable: the transport may still access the memory.
    """

    __slots__ = ("completed", "error", "memory", "tag", "touchable")

    def __init__(self, memory: memoryview, tag: int = 0) -> None:
        self.memory = memory
        self.tag = tag
        self.completed = False
        self.touchable = True
        self.error: Exception | None = None

    def check_error(self) -> None:
        """Raise the error that the request ended with, if any."""
        if self.error is not None:
            raise self.error

    def end(self, worker: SimulatedWorker, error: Exception | None = None) -> None:
        """End the request; it is complete when its worker makes progress."""
        if not self.touchable:
            return
        self.touchable = False

        def complete() -> None:
            self.error = error
            self.completed = True

        worker.do(complete)


class _Announced:
    """An unexpected message: its length, and a function that moves it into a receive."""

    __slots__ = ("deliver", "length")

    def __init__(self, length: int, deliver: Callable[[SimulatedRequest], None]) -> None:
        self.length = length
        self.deliver = deliver


class _Queues:
    """The low-level worker under a `UcxWorker`: its queues of events and of unexpected messages."""

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
        """Receive a message that has arrived; streams post no receive on a worker before that."""
        request = SimulatedRequest(memory)
        self.unexpected[tag].popleft().deliver(request)
        return request

    def tag_recv_with_handle(self, memory: memoryview, found: Any) -> SimulatedRequest:
        request = SimulatedRequest(memory)
        found.first.deliver(request)
        return request


class SimulatedWorker(UcxWorker):
    """A UCX worker of a simulated process.

    Attributes:
        signal: notified when `progress` has work.
        posted: receives by tag, in the order in which messages match them.
        reading: sends whose memory may still be read, and some that have ended.
    """

    def __init__(self, scheduler: Scheduler, plan: FaultPlan, number: int, process: Process) -> None:
        self._queues = _Queues()
        super().__init__(True, Ucp(ucx_names(), memoryview, self._queues))
        self.scheduler = scheduler
        self.plan = plan
        self.process = process
        self.signal = Signal(scheduler)
        self.posted: defaultdict[int, deque[SimulatedRequest]] = defaultdict(deque)
        self.reading: list[SimulatedRequest] = []
        self._number = number

    def fileno(self) -> int:
        return self._number

    def do(self, event: Callable[[], None]) -> None:
        """Run `event` with the next progress."""
        if not self.closed and not self.process.dead:
            self._queues.due.append(event)
            if self._queues.armed:
                self._queues.signalled = True
                self.signal.notify()

    @property
    def signalled(self) -> bool:
        """An event has come since `arm`: the descriptor is readable."""
        return self._queues.signalled

    def unexpected(self, tag: int) -> deque[_Announced] | None:
        """The messages under a tag that have arrived before a receive."""
        return self._queues.unexpected.get(tag)

    def deliver(self, tag: int, data: bytes) -> None:
        """A small message has arrived under a tag: move it into the posted receive, or queue it."""

        def deliver(request: SimulatedRequest) -> None:
            if len(data) > len(request.memory):
                request.end(self, self.ucx.UCXMessageTruncatedError("simulated"))
            else:
                request.memory[: len(data)] = data
                request.end(self)

        self.announce(tag, len(data), deliver)

    def announce(self, tag: int, length: int, deliver: Callable[[SimulatedRequest], None]) -> None:
        """A message has arrived: deliver it to the posted receive, or queue it."""
        if self.posted[tag]:
            deliver(self.posted[tag].popleft())
        elif not self.closed:
            self._queues.unexpected.setdefault(tag, deque()).append(_Announced(length, deliver))

    def close_endpoint(self, endpoint: Any, requests: list[tuple[Any, Any]]) -> list[Abandoned]:
        endpoint.close(requests)
        self.progress()
        return self.abandon(requests)

    def close(self) -> None:
        """Stop all events; nothing accesses the memory of requests any more."""
        self.closed = True
        self.posted.clear()
        self._queues.due.clear()


class SimulatedUcxEndpoint:
    """One end of a UCX connection.

    Attributes:
        lost: what this end sends disappears.
    """

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
        self.lost = False

    # --- what streams use -------------------------------------------------------------------------------------

    def stream_send(self, memory: memoryview) -> SimulatedRequest:
        data = bytes(memory)
        request = SimulatedRequest(memory)
        self._send(lambda peer: peer.stream_arrived(data))
        request.end(self.worker)
        return request

    def stream_recv(self, memory: memoryview) -> SimulatedRequest:
        request = SimulatedRequest(memory)
        self._stream_receive = request
        self._open.append(request)
        self._match_stream()
        return request

    def stream_arrived(self, data: bytes) -> None:
        """Data of the peer's `stream_send` has arrived."""
        self._streamed.append(data)
        self._match_stream()

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
        if waiting := self.worker.unexpected(tag):
            waiting.popleft().deliver(request)
        else:
            self.worker.posted[tag].append(request)
        return request

    def raise_on_error(self) -> None:
        if not self.alive:
            raise self.why("simulated")

    # --- states -----------------------------------------------------------------------------------------------

    def join(self, peer: SimulatedUcxEndpoint) -> None:
        """Connect two ends: messages that either side has sent leave now."""
        self.peer, peer.peer = peer, self
        for end in (self, peer):
            end.send_backlog()

    def send_backlog(self) -> None:
        """Send the messages from before the connection was made."""
        backlog, self._backlog = self._backlog, []
        for event in backlog:
            event()

    def fail(self, why: type[Exception]) -> None:
        """The connection has failed; streams notice it with the next progress."""
        if self.closed or not self.alive:
            return

        def failed() -> None:
            self.alive = False
            self.why = why
            for request in self._open:
                if request not in self.worker.posted[request.tag]:
                    request.end(self.worker, why("simulated"))

        self.worker.do(failed)

    def reset(self) -> None:
        """The network ends the connection."""
        for end in (self, self.peer):
            if end is not None:
                end.fail(ucx_names().UCXEndpointTimeoutError)

    def close(self, requests: list[tuple[Any, Any]]) -> None:
        """Close this end: notify the peer, and cancel open requests at once or later."""
        self.closed = True
        scheduler, plan = self.worker.scheduler, self.worker.plan
        for request, _ in requests:
            if not request.completed:
                when = plan.soon()
                if when:
                    scheduler.at(scheduler.now() + when, functools.partial(self._cancel, request))
                else:
                    self._cancel(request)
        if self.peer is not None and not self.lost:
            due = max(scheduler.now() + self._delay, self._last)
            scheduler.at(due, functools.partial(self.peer.fail, ucx_names().UCXConnectionResetError))

    def vanish(self) -> None:
        """The process has ended."""
        self.closed = True
        for request in self._open:
            request.touchable = False
        if self.peer is not None:
            self.peer.fail(ucx_names().UCXConnectionResetError)

    # --- inside -----------------------------------------------------------------------------------------------

    def _cancel(self, request: SimulatedRequest) -> None:
        if request in self.worker.posted[request.tag]:
            self.worker.posted[request.tag].remove(request)
        request.end(self.worker, ucx_names().UCXCanceledError("simulated"))

    def _send(self, arrive: Callable[[SimulatedUcxEndpoint], None]) -> None:
        if self.peer is None:
            self._backlog.append(lambda: self._send(arrive))
            return
        if self.lost:
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
        """The receiver has posted a receive: move the payload, at a random time."""
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
                self.lost = True
                if self.peer is not None and self.worker.scheduler.rng.random() < 0.5:
                    self.peer.lost = True
                if fault is Fault.TRUNCATION:
                    self.reset()
            case Fault.DELAY:
                self._delay += self.worker.plan.long_delay()
            case _:
                raise AssertionError(fault)
