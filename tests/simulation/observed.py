"""A `PayloadClient` in the simulation whose trace is checked: endpoints, deadlines, the pool, stale references."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from typing import Any

from dray.errors import DrayError, ServerBusy, StaleSlotError
from dray.payload.selection import Fields, Rows
from dray.protocol import PayloadRef
from dray.protocol.frames import Kind
from dray.protocol.frames import Status as StatusCode
from dray.protocol.server_session import MAX_INLINE_BYTES
from dray.transport.attempts import MAX_QUARANTINE_GROWTH, QUARANTINE_SECONDS, by_lane
from dray.transport.client import PayloadClient
from dray.transport.direct_reads import DIRECT
from dray.transport.lanes import LANES, chosen_lanes
from dray.transport.leases import InPlaceLease
from dray.transport.pipeline import ReadResult
from dray.transport.receive_buffers import Bytes
from dray.transport.server_statistics import ServerStatistics
from dray.transport.trace import (
    Attempt,
    Checkin,
    Checkout,
    Connect,
    Discard,
    FailedAttempt,
    Payload,
    Request,
    Status,
    SuccessfulAttempt,
    TraceEvent,
)
from simulation.network import SimulatedKernel, SimulatedNetwork, Wire
from simulation.scheduler import Actor, Process, Scheduler, Violation

_ROUNDING = 1e-9
"""Deadlines of a batch are sums of times, rounded differently on both sides."""


class _Call:
    """A call of a program, and what its attempts have shown.

    Attributes:
        ref: the reference, if there is one alone.
        deadline: of the call.
        endpoints: those that it may use, by producer.
        tried: those where its attempts have failed, by producer.
        stale: the server has answered that the payload is gone.
    """

    def __init__(self, refs: list[PayloadRef], lanes: Any, deadline: float) -> None:
        self.ref = refs[0] if len(refs) == 1 else None
        self.deadline = deadline
        self.endpoints: dict[bytes, list[str]] = {}
        self.tried: dict[bytes, set[str]] = {}
        self.stale = False
        self.producer = refs[0].producer
        for ref in reversed(refs):  # a batch uses the endpoints of the first reference to a producer
            with contextlib.suppress(DrayError):
                self.endpoints[ref.producer] = [each for lane in by_lane(ref.endpoints, lanes) for each in lane]
            self.tried[ref.producer] = set()


class ObservedClient(PayloadClient):
    """A client over the simulated network.

    Attributes:
        inline_bytes: payloads of up to this size come with their STATUS.
    """

    def __init__(self, kernel: SimulatedKernel, process: Process, **options: Any) -> None:
        self.network = SimulatedNetwork(kernel, process)
        super().__init__(clock=kernel.scheduler.clock, network=self.network, trace=self._observe, **options)
        self.inline_bytes = options.get("inline_bytes", MAX_INLINE_BYTES)
        self._scheduler: Scheduler = kernel.scheduler
        self._plan = kernel.plan
        self._allowed = chosen_lanes("lane", options.get("lane", "auto")) or tuple(LANES.values())
        self._skipped: dict[str, tuple[float, float]] = {}  # until when, and for how many seconds in all
        self._asked: Counter[tuple[bytes, int]] = Counter()
        self._stale: Counter[tuple[bytes, int]] = Counter()
        self._calls: dict[Actor | None, _Call] = {}
        self._wires: dict[int, Wire] = {}
        self._kept: dict[Actor | None, Wire] = {}
        self._pending: Counter[int] = Counter()  # requests without an answer, by connection
        kernel.memory_of(process, late=True).delayed = self._grant
        self.network.buffers.stalled = self._stalled

    @property
    def kept(self) -> Wire | None:
        """The connection that the running actor has used last; None after a direct lease."""
        return self._kept.get(self._scheduler.actor)

    # --- stale references -------------------------------------------------------------------------------------

    def asks(self, refs: Iterable[PayloadRef]) -> None:
        """A program asks once for each of these."""
        self._asked.update(ref.identity for ref in refs)

    def answered(self, ref: PayloadRef, outcome: object) -> None:
        """The outcome that the program, or prefetch, has received."""
        if isinstance(outcome, StaleSlotError):
            self._stale[ref.identity] += 1
            if self._stale[ref.identity] > self._asked[ref.identity]:
                raise Violation(f"slot {ref.slot} sequence {ref.sequence} was read again after it was found stale")

    # --- calls ------------------------------------------------------------------------------------------------

    def read_bytes(self, ref: PayloadRef, *, timeout: float | None = 30.0, consume: bool = True) -> Bytes:
        with self._watched([ref], timeout):
            return super().read_bytes(ref, timeout=timeout, consume=consume)

    def lease(
        self,
        ref: PayloadRef,
        *,
        timeout: float | None = 30.0,
        fields: Fields | None = None,
        rows: Rows | None = None,
    ) -> InPlaceLease[Any]:
        with self._watched([ref], timeout):
            return super().lease(ref, timeout=timeout, fields=fields, rows=rows)

    def consume(self, refs: Iterable[PayloadRef], *, timeout: float | None = 30.0) -> int:
        refs = list(refs)
        with self._watched(refs, timeout):
            return super().consume(refs, timeout=timeout)

    def stat(self, ref: PayloadRef, *, timeout: float | None = 30.0) -> ServerStatistics:
        with self._watched([ref], timeout):
            return super().stat(ref, timeout=timeout)

    def read_many(
        self,
        refs: Iterable[PayloadRef],
        *,
        timeout: float | None = 30.0,
        consume: bool = True,
        return_errors: bool = False,
        in_place: bool = False,
        fields: Fields | None = None,
        rows: Rows | None = None,
    ) -> Generator[ReadResult[Any], None, None]:
        refs = list(refs)
        actor = self._scheduler.actor
        assert actor is not None
        assert timeout is not None
        outer, actor.bound, actor.late = actor.bound, min(actor.bound, self._scheduler.now() + timeout), 0.0
        granted = actor.granted
        try:
            found = super().read_many(
                refs, timeout=timeout, consume=consume, return_errors=return_errors, fields=fields, rows=rows
            )
            with contextlib.closing(found), self._watched(refs, timeout) as call:
                for result in found:
                    self.answered(result.ref, result.outcome)
                    left = self._scheduler.now()
                    yield result
                    # The program's own time does not count.
                    spent = self._scheduler.now() - left
                    actor.bound += spent
                    outer += spent
                    call.deadline += spent
        finally:
            actor.bound = outer + actor.granted - granted

    @contextlib.contextmanager
    def _watched(self, refs: list[PayloadRef], timeout: float | None) -> Iterator[_Call]:
        actor = self._scheduler.actor
        deadline = math.inf if timeout is None else self._scheduler.now() + timeout
        self._calls[actor] = call = _Call(refs, self._allowed, deadline)
        try:
            yield call
        finally:
            if self._calls.get(actor) is call:
                del self._calls[actor]

    def _grant(self, seconds: float) -> None:
        """The running actor has accessed shared memory for so long."""
        actor = self._scheduler.actor
        if seconds and actor is not None:
            actor.granted += seconds
            actor.bound += seconds
            if actor in self._calls:
                self._calls[actor].deadline += seconds

    def _stalled(self, seconds: float) -> None:
        if self.kept is None:  # in the middle of a copy of a direct lease
            self._grant(seconds)

    # --- the trace --------------------------------------------------------------------------------------------

    def _observe(self, event: TraceEvent) -> None:
        actor = self._scheduler.actor
        match event:
            case Attempt():
                self._begins(event, self._calls[actor])
            case SuccessfulAttempt():
                self._skipped.pop(event.endpoint, None)
            case FailedAttempt():
                self._fails(event, self._calls[actor])
            case Connect():
                self._wires[event.connection] = self.network.opened[actor]
                self._pending[event.connection] = 0
            case Checkout():
                self._kept[actor] = self._wires[event.connection]
            case Payload() if event.endpoint == DIRECT:
                self._kept.pop(actor, None)
                self._plan.count("direct lease")
            case Checkin():
                self._becomes_idle(event.endpoint, event.connection)
            case Discard():
                del self._wires[event.connection]
            case Request():
                self._requests(event, self._calls.get(actor))
                self._pending[event.connection] += 1
            case Status():
                call = self._calls.get(actor)
                if call is not None and event.kind == Kind.READ and event.status == StatusCode.STALE:
                    call.stale = True
                self._pending[event.connection] -= 1

    def _begins(self, event: Attempt, call: _Call) -> None:
        endpoint, tried = event.endpoint, call.tried[event.producer]
        if self._quarantined(endpoint, event.at):
            better = [
                other
                for other in call.endpoints[event.producer]
                if other not in tried and not self._quarantined(other, event.at)
            ]
            if better:
                raise Violation(f"{endpoint} is tried although it is in quarantine and {better} are not")
        if event.deadline > call.deadline + _ROUNDING:
            more = event.deadline - call.deadline
            raise Violation(f"an attempt at {endpoint} has {more} s more than its read")
        call.producer = event.producer
        self._scheduler.note(f"chooses {endpoint}")

    def _fails(self, event: FailedAttempt, call: _Call) -> None:
        call.tried[call.producer].add(event.endpoint)
        self._scheduler.note(f"failed at {event.endpoint}: {type(event.error).__name__}")
        if isinstance(event.error, ServerBusy):
            return
        until, seconds = self._skipped.get(event.endpoint, (math.inf, QUARANTINE_SECONDS))
        if event.at >= until:
            seconds = min(2 * seconds, MAX_QUARANTINE_GROWTH * QUARANTINE_SECONDS)
        self._skipped[event.endpoint] = event.at + seconds, seconds
        if event.quarantine != seconds:
            raise Violation(f"{event.endpoint} is in quarantine for {event.quarantine} s instead of {seconds} s")

    def _quarantined(self, endpoint: str, now: float) -> bool:
        until, _ = self._skipped.get(endpoint, (now, 0.0))
        return now < until

    def _requests(self, event: Request, call: _Call | None) -> None:
        ref = call.ref if call is not None else None
        if (
            call is not None
            and call.stale
            and ref is not None
            and event.kind == Kind.READ
            and (ref.slot, ref.sequence) == (event.slot, event.sequence)
        ):
            raise Violation(f"slot {ref.slot} sequence {ref.sequence} is asked for again, and was stale")

    def _becomes_idle(self, endpoint: str, connection: int) -> None:
        wire = self._wires[connection]
        if wire.failed:
            raise Violation(f"a connection to {endpoint} goes into the pool after it failed")
        if self._pending[connection]:
            raise Violation(f"a connection to {endpoint} goes into the pool in the middle of an exchange")
        self._plan.count(f"exchange over {wire.lane.name}")
