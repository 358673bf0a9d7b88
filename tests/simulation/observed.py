"""A `PayloadClient` in the simulation, its decisions watched from outside: endpoints, pool, stale references."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Generator, Iterable
from typing import Any

from dray.clock import Deadline
from dray.errors import ServerBusy, StaleSlotError
from dray.protocol import PayloadRef
from dray.transport.attempts import MAX_QUARANTINE_GROWTH, QUARANTINE_SECONDS
from dray.transport.client import PayloadClient
from dray.transport.connection import Connection
from dray.transport.connections import ConnectionHolder, Exchange, Refused
from dray.transport.lanes.socket import SocketStream, UnixStream
from dray.transport.lanes.ucx import UcxStream
from dray.transport.leases import LeaseReaper
from dray.transport.pipeline import ReadResult
from dray.transport.receive_buffers import Bytes, ReceiveBuffers
from simulation.network import SimulatedKernel, SimulatedNetwork, SimulatedWaiter
from simulation.scheduler import Process, Scheduler, Signal, Violation


class SimulatedReaper(LeaseReaper):
    """Ends leases whose arrays have outlived their block, in an actor instead of a thread."""

    def __init__(self, scheduler: Scheduler, process: Process) -> None:
        super().__init__()
        self._scheduler = scheduler
        self._process = process
        self._signal = Signal(scheduler)
        self._dead: Any = self
        self._ended_arrays: list[object] = []
        self._reaping = False

    def put(self, dead: object) -> None:
        """What is put into the queue of the real one."""
        self._ended_arrays.append(dead)
        self._signal.notify()

    def _start(self) -> None:
        if not self._reaping:
            self._reaping = True
            self._scheduler.spawn(self._process, "leases", self._reap, idles=True)

    def close(self) -> None:
        pass

    def _reap(self) -> None:
        while True:
            while self._ended_arrays:
                self._end(self._ended_arrays.pop())
            self._scheduler.wait((self._signal,), float("inf"))


class SimulatedBuffers(ReceiveBuffers):
    """Memory for payloads; whoever takes some may be held up, between STATUS and a copy for example."""

    def __init__(self, kernel: SimulatedKernel) -> None:
        super().__init__()
        self._kernel = kernel

    def allocate(self, nbytes: int) -> Bytes:
        seconds = self._kernel.plan.stall()
        if seconds:
            self._kernel.scheduler.stall(seconds)
        return super().allocate(nbytes)


class ObservedClient(PayloadClient):
    """A client over the simulated network.

    Attributes:
        kept: the connection of the lease made last.
    """

    def __init__(self, kernel: SimulatedKernel, process: Process, **options: Any) -> None:
        self.network = SimulatedNetwork(kernel, process)
        clock = kernel.scheduler.clock
        super().__init__(clock=clock, network=self.network, **options)
        self._scheduler = kernel.scheduler
        self._plan = kernel.plan
        self._reaper = SimulatedReaper(kernel.scheduler, process)
        self._skipped: dict[str, tuple[float, float]] = {}  # until when, and for how many seconds in all
        self._tried: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()
        self._asked: Counter[tuple[bytes, int]] = Counter()
        self._stale: Counter[tuple[bytes, int]] = Counter()
        self.kept: Connection | None = None
        exchanges: Any = self._exchanges
        exchanges._buffers = SimulatedBuffers(kernel)
        self._choose, self._note_failed = exchanges.choose, exchanges.failed
        self._run_holding, self._check_in = exchanges.run_holding, exchanges._pool.checkin
        exchanges.choose = self._watched_choose
        exchanges.failed = self._watched_failed
        self._note_answered, exchanges.answered = exchanges.answered, self._watched_answered
        exchanges.run_holding = self._watched_run
        exchanges._pool.checkin = self._watched_checkin

    # --- stale references -------------------------------------------------------------------------------------

    def asks(self, refs: Iterable[PayloadRef]) -> None:
        """A program asks once for each of these."""
        self._asked.update(ref.identity for ref in refs)

    def answered(self, ref: PayloadRef, outcome: object) -> None:
        """What the program, or prefetch, was told."""
        if isinstance(outcome, StaleSlotError):
            self._stale[ref.identity] += 1
            if self._stale[ref.identity] > self._asked[ref.identity]:
                raise Violation(f"slot {ref.slot} sequence {ref.sequence} was read again after it was found stale")

    # --- what prefetch reads from -----------------------------------------------------------------------------

    def read_many(
        self,
        refs: Iterable[PayloadRef],
        *,
        timeout: float | None = 30.0,
        consume: bool = True,
        return_errors: bool = False,
    ) -> Generator[ReadResult[Any], None, None]:
        actor = self._scheduler.actor
        assert actor is not None
        assert timeout is not None
        bound = self._scheduler.now() + timeout
        outer, actor.bound, actor.late = actor.bound, min(actor.bound, bound), 0.0
        try:
            for result in super().read_many(refs, timeout=timeout, consume=consume, return_errors=return_errors):
                self.answered(result.ref, result.outcome)
                left = self._scheduler.now()
                yield result
                # The program's own time does not count.
                actor.bound += self._scheduler.now() - left
                outer += self._scheduler.now() - left
        finally:
            actor.bound = outer

    # --- inside -----------------------------------------------------------------------------------------------

    def _watched_choose(self, attempts: Any, deadline: Deadline) -> tuple[str, Deadline]:
        endpoint, status_by = self._choose(attempts, deadline)
        now = self._scheduler.now()
        tried = self._tried.setdefault(attempts, set())
        if self._quarantined(endpoint, now):
            better = [
                other
                for lane in attempts._by_lane
                for other in lane
                if other not in tried and not self._quarantined(other, now)
            ]
            if better:
                raise Violation(f"{endpoint} is tried although it is in quarantine and {better} are not")
        if status_by.at > deadline.at:
            raise Violation(f"an attempt at {endpoint} has more time than its read")
        self._scheduler.note(f"chooses {endpoint}")
        return endpoint, status_by

    def _watched_failed(
        self, attempts: Any, endpoint: str, producer: bytes, error: Any, deadline: Deadline
    ) -> None:
        self._tried.setdefault(attempts, set()).add(endpoint)
        self._scheduler.note(f"failed at {endpoint}: {type(error).__name__}")
        if not isinstance(error, ServerBusy):
            now = self._scheduler.now()
            until, seconds = self._skipped.get(endpoint, (math.inf, QUARANTINE_SECONDS))
            if now >= until:
                seconds = min(2 * seconds, MAX_QUARANTINE_GROWTH * QUARANTINE_SECONDS)
            self._skipped[endpoint] = now + seconds, seconds
        self._note_failed(attempts, endpoint, producer, error, deadline)

    def _watched_answered(self, connection: Connection) -> None:
        self._skipped.pop(connection.endpoint, None)
        self._note_answered(connection)

    def _quarantined(self, endpoint: str, now: float) -> bool:
        until, _ = self._skipped.get(endpoint, (now, 0.0))
        return now < until

    def _watched_run(
        self, holder: ConnectionHolder, ref: PayloadRef, deadline: Deadline, exchange: Exchange[Any]
    ) -> Any:
        stale = False

        def watched(connection: Connection, status_by: Deadline, limit: Deadline) -> Any:
            nonlocal stale
            if stale:
                raise Violation(f"slot {ref.slot} sequence {ref.sequence} is asked for again, and was stale")
            try:
                return exchange(connection, status_by, limit)
            except Refused as refused:
                stale = isinstance(refused.error, StaleSlotError)
                raise

        result = self._run_holding(holder, ref, deadline, watched)
        self.kept = holder.connection
        return result

    def _watched_checkin(self, endpoint: str, connection: Connection, group: Any, now: float) -> Any:
        stream = connection._stream
        waiter = connection._waiter
        assert isinstance(waiter, SimulatedWaiter)
        assert isinstance(stream, SocketStream | UcxStream)
        sock: Any = stream._sock if isinstance(stream, SocketStream) else None
        if waiter.failed or (sock is not None and sock.failed):
            raise Violation(f"a connection to {endpoint} goes into the pool after it failed")
        if connection._session.pending or stream._expected:
            raise Violation(f"a connection to {endpoint} goes into the pool in the middle of an exchange")
        self._plan.count(f"exchange over {connection.lane.name}")
        return self._check_in(endpoint, connection, group, now)


def is_alive(connection: Connection | None) -> bool:
    """Nothing has ended the connection so far."""
    stream: Any = connection._stream if connection is not None else None
    if isinstance(stream, SocketStream):
        sock: Any = stream._sock
        return bool(sock.alive)
    return stream is not None and not stream.closed


def has_failed(connection: Connection | None) -> bool:
    """The client was told that the connection, on the shm lane, is over."""
    stream: Any = connection._stream if connection is not None else None
    return isinstance(stream, UnixStream) and bool(stream.__dict__["_sock"].failed)
