"""Layer 1: the connections of a client, and the one loop that runs a request and tries it again elsewhere.

A connection is idle, in the pool; held, by a thread, a caller or the arrays of a lease; or unused, and then it is
closed. No hand-over depends on clean-up, see `dray.transport.pool`.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

from dray.clock import Clock, Deadline
from dray.errors import (
    BufferClosedError,
    DrayError,
    OutOfResources,
    ProducerLostError,
    TransportError,
    Unreachable,
)
from dray.protocol import PayloadRef
from dray.protocol.client_session import Request
from dray.transport import trace as events
from dray.transport.attempts import (
    Attempts,
    Latencies,
    OtherProducerError,
    Quarantine,
    by_lane,
    heirs_by_lane,
    is_unusable,
)
from dray.transport.client_statistics import ClientStatistics, Recorder
from dray.transport.connection import Connection
from dray.transport.direct_reads import DirectReads
from dray.transport.lanes import parse_endpoint
from dray.transport.lanes.base import Lane, Network, Worker
from dray.transport.pool import ConnectionPool, Holder, Keeper, held
from dray.transport.trace import Trace

logger = logging.getLogger("dray.client")

MAX_PRODUCERS = 256
"""Producers of which a client remembers ACKs that may be lost; most that it does not reach again are dead."""

_REPLAY_SECONDS = 1.0
"""How long `close` tries to confirm ACKs."""

_LEASE_END_SECONDS = 1.0
"""How long sending the end of a lease may take; then the connection is closed instead, which ends the lease."""

_SURELY_OPEN_SECONDS = 0.05
"""A connection used this recently is used without a check whether the server has closed it."""

T = TypeVar("T")


ConnectionHolder: TypeAlias = Holder[Connection, Worker]
RequestFunction: TypeAlias = Callable[[Connection, Deadline, Deadline], T]
"""Uses a connection; gets it, the deadline for connecting and the first STATUS, and that of the whole."""


class Refused(Exception):
    """Carries a server's refusal out of a `RequestFunction`: its connection can be used again."""

    def __init__(self, error: DrayError) -> None:
        super().__init__(str(error))
        self.error = error


class Connections:
    """The connections of a client, and how they are used, tried again and replaced. Thread-safe.

    Args:
        lanes: the lanes that may be used, best first.
        network: where connections come from.
        clock: where time comes from.
        max_idle: idle connections kept for each endpoint.
        idle_seconds: a connection that was idle for longer is replaced.
        quarantine_seconds: how long a failed endpoint is skipped the first time.
        attempts: how many transport failures end a request.
        direct: the client's direct leases, which new connections on the shm lane make possible.
        trace: receives the events of `dray.transport.trace`.
        options: keyword arguments of `Connection.open`.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        network: Network,
        clock: Clock,
        *,
        max_idle: int,
        idle_seconds: float,
        quarantine_seconds: float,
        attempts: int,
        direct: DirectReads,
        trace: Trace | None = None,
        **options: Any,
    ) -> None:
        self._network = network
        self._direct = direct
        self._clock = clock
        self._attempts = attempts
        self._trace = trace
        self._options = options
        self._recorder = Recorder(trace)
        self._latencies = Latencies()
        self._rotation = itertools.count()
        self._closer = threading.RLock()  # held by the thread that closes unused connections
        self._lock = threading.Lock()  # guards all that follows
        self._lanes = tuple(lanes)
        self._quarantine = Quarantine(quarantine_seconds)
        self._pool: ConnectionPool[Connection, Worker] = ConnectionPool(max_idle, idle_seconds)
        self._open: dict[Connection, Worker | None] = {}
        self._workers: dict[Worker, bool] = {}  # whether it is closed once it is free
        self._blocked: set[Worker] = set()  # workers that have a connection to close
        self._holders: set[ConnectionHolder] = set()
        self._unconfirmed: dict[bytes, dict[tuple[int, int, int], str]] = {}
        self._closing = False
        self._closed = False

    def attempts(self, ref: PayloadRef, deadline: Deadline) -> Attempts:
        """The attempts of a request to the producer of a reference, for `run`.

        Raises:
            Unreachable: the reference has no endpoint on an allowed lane.
            ConfigError: it has no valid endpoint.
            BufferClosedError: the client is closed.
        """
        lanes = self._lanes  # without the lock: it is replaced as a whole
        reachable = by_lane(ref.endpoints, lanes)
        if not reachable:
            names = "/".join(lane.name for lane in lanes)
            raise Unreachable(f"no endpoint of {list(ref.endpoints)} is on a lane of {names}")
        if self._closed:  # without the lock: a call that misses it is ended by the network, which is closed
            raise BufferClosedError("the client is closed")
        return Attempts(
            ref.producer,
            reachable,
            deadline,
            heirs=heirs_by_lane(ref.endpoints, lanes),
            quarantine=self._quarantine,
            latencies=self._latencies,
            rotation=next(self._rotation),
            attempts=self._attempts,
        )

    def run(self, attempts: Attempts, request: RequestFunction[T], holder: ConnectionHolder | None = None) -> T:
        """The result of `request`, over another connection or endpoint if the first fails.

        If `request` sets the keeper of `holder`, the connection stays there: the next `run` with the same attempts
        continues over it, or a `KeptLease` ends it.

        Raises:
            DrayError: what the server answered, or the error of the last attempt.
        """
        holder = holder or Holder()
        with holder.inside:
            try:
                # Not the loop first: CPython 3.11 misses an exception of a signal handler that comes with the jump
                # back to a loop that is the first statement of a block.
                connection = self.resume(holder) if attempts.under_way else None
                refusal: DrayError | None = None
                while True:
                    if connection is None:
                        now = self._clock.now()
                        attempts.begin(now)
                        if self._trace is not None:
                            begun = attempts.endpoint, attempts.producer, attempts.status_deadline.at
                            self._trace(events.Attempt(now, *begun))
                    try:
                        if connection is None:
                            connection = self.checkout(
                                holder, attempts.endpoint, attempts.producer, attempts.status_deadline, began=now
                            )
                        result = request(connection, attempts.status_deadline, attempts.deadline)
                    except Refused as refused:
                        refusal = refused.error
                    except TransportError as error:
                        connection = None
                        self.discard(holder, error)
                        self._fail(attempts, error)
                    else:
                        self._succeed(attempts, holder)
                        return result
                    if refusal is not None:
                        self._succeed(attempts, holder)
                        raise refusal
            except BaseException:
                self.discard(holder)
                raise
            finally:
                refusal = None  # its traceback has this frame, and those of the callers with what these read

    def _succeed(self, attempts: Attempts, holder: ConnectionHolder) -> None:
        connection = holder.connection
        assert connection is not None
        latency = connection.latency
        attempts.succeed(connection.lane, latency)
        if self._trace is not None:
            self._trace(events.SuccessfulAttempt(self._clock.now(), attempts.endpoint, latency))
        if holder.keeper is Keeper.NONE:
            self.checkin(holder)

    def _fail(self, attempts: Attempts, error: TransportError) -> None:
        """Note a failed attempt; returns if another one follows, else raises the error of the request."""
        now, endpoint = self._clock.now(), attempts.endpoint
        with self._lock:
            final, following, quarantine = attempts.fail(endpoint, error, now)
            if isinstance(final, ProducerLostError) and isinstance(error, OtherProducerError):
                # Not if the address refuses connections: the producer may be about to listen again.
                self._unconfirmed.pop(attempts.producer, None)
            if is_unusable(error) and final is not error:
                lane = parse_endpoint(endpoint).lane
                self._lanes = tuple(each for each in self._lanes if each != lane)
        self._recorder.report(events.FailedAttempt(now, endpoint, error, quarantine, following))
        try:
            if final is error:
                raise error
            if final is not None:
                raise final from error
        finally:
            del final, error  # as in `run`

    # --- connections ------------------------------------------------------------------------------------------

    def checkout(
        self, holder: ConnectionHolder, endpoint: str, producer: bytes, deadline: Deadline, *, began: float
    ) -> Connection:
        """Give `holder`, which the thread is inside, an open connection for an attempt that began at `began`."""
        pool, now = self._pool, began
        while True:
            with self._lock:
                self._holders.add(holder)
                found = pool.at_hand(endpoint, now, alone=len(self._holders) == 1 and not self._blocked)
                expired = found is None and pool.expire(endpoint, now)
                if found is None and not expired:
                    found = pool.checkout(endpoint, self._busy())
                if found is not None:
                    holder.connection, holder.worker, since = found
            if expired:
                self._close_unused()
                with self._lock:
                    found = pool.checkout(endpoint, self._busy())
                    if found is not None:
                        holder.connection, holder.worker, since = found
            connection = holder.connection
            idle: float | None = None
            if connection is None:
                connection = self._connect(holder, endpoint, producer, deadline)
            else:
                idle = now - since
                if connection.identity.producer != producer or not (
                    idle < _SURELY_OPEN_SECONDS or connection.usable()
                ):
                    self.discard(holder)
                    now = self._clock.now()
                    continue
            if self._trace is not None:
                self._trace(events.Checkout(self._clock.now(), endpoint, idle, id(connection)))
            if producer in self._unconfirmed:  # without the lock: one step of a dict, and checked again with it
                self._replay_acks(connection, deadline)
            connection.asked_since(began)
            return connection

    def checkin(self, holder: ConnectionHolder) -> None:
        """Put the holder's connection into the pool, or close it if it has failed."""
        connection = holder.connection
        if connection is None or connection.failure is not None:
            self.discard(holder)
            return
        now = self._clock.now()
        if self._trace is not None:  # before another thread can use it
            self._trace(events.Checkin(now, connection.endpoint, id(connection)))
        with self._lock:
            kept = self._pool.checkin(connection.endpoint, connection, holder.worker, now)
            holder.clear()
            self._holders.discard(holder)
            closed = self._closed
        if not kept:
            self._close_unused()
        if closed:
            self._close_idle()

    def discard(self, holder: ConnectionHolder, error: DrayError | None = None) -> None:
        """Close the holder's connection, if any; ACKs that may be lost with it are remembered."""
        with self._lock:
            connection, worker = holder.connection, holder.worker
            if worker is not None:
                self._blocked.add(worker)
            holder.clear()
            self._holders.discard(holder)
            closed = self._closed
        if connection is not None:
            connection.failure = connection.failure or error
        if connection is not None or worker is not None:
            self._close_unused()
        if closed:
            self._close_idle()

    def abandon(self, holder: ConnectionHolder, deadline: Deadline) -> None:
        """`discard` a connection on which answers are still on their way.

        The server may notice its end before it reads the last ACKs. So they are sent again at once, if the
        producer can be reached before the deadline and soon.
        """
        connection = holder.connection
        self.discard(holder)
        if connection is not None:
            self._replay_at(connection.endpoint, connection.identity.producer, deadline.capped_at(_REPLAY_SECONDS))

    # --- connections that are kept between two calls ----------------------------------------------------------

    def resume(self, holder: ConnectionHolder, keeper: Keeper = Keeper.NONE) -> Connection:
        """The connection that was kept in `holder`, and what keeps it from now on.

        Raises:
            BufferClosedError: the lease has ended, or closing the client has closed it.
        """
        with self._lock:
            if holder.connection is None:
                raise BufferClosedError("the lease has ended, or the client was closed meanwhile")
            holder.keeper = keeper
            return holder.connection

    def end_lease(self, holder: ConnectionHolder, request: Request, consumed: bool) -> None:
        """End a lease that was kept, by a thread inside `holder`, unless it has ended."""
        try:
            connection = self.resume(holder)
        except BufferClosedError:
            return
        try:
            connection.acknowledge([(request, consumed)], Deadline.after(_LEASE_END_SECONDS, self._clock))
            self.checkin(holder)
        except (TransportError, BufferClosedError) as error:
            # The lease ends with the connection; the producer may be gone altogether.
            logger.debug("the end of a lease could not be sent to %s: %s", connection.endpoint, error)
            self._recorder.count("leases_ended_late")
            self.discard(holder, error)
        except BaseException:
            self.discard(holder)
            raise

    # --- statistics and end -----------------------------------------------------------------------------------

    def statistics(self, *, consumed: int = 0, failed_reads: int = 0) -> ClientStatistics:
        """The statistics of the client, with what it counts itself."""
        with self._lock:
            return self._recorder.statistics(
                self._open,
                direct=self._direct.totals(),
                consumed=consumed,
                failed_reads=failed_reads,
                idle_connections=len(self._pool.connections()),
                unconfirmed_acks=sum(map(len, self._unconfirmed.values())),
                quarantined=self._quarantine.endpoints(self._clock.now()),
            )

    def close(self) -> None:
        """End waits and close every connection that no thread is inside; that thread closes it. Twice is fine.

        Connections of leases whose arrays were handed out are closed with them.
        """
        with self._lock:
            closed, self._closing = self._closed, True
        if not closed:
            self._close_unused()
            self._close_idle()
            # The threads that use these are about to be ended, and will not repeat their ACKs.
            with self._lock:
                in_use = list(self._open)
            for connection in in_use:
                self._remember_acks(connection)
            deadline = Deadline.after(_REPLAY_SECONDS, self._clock)
            with self._lock:
                lost = [(where, each) for each, acks in self._unconfirmed.items() for where in acks.values()]
            for endpoint, producer in dict.fromkeys(lost):
                self._replay_at(endpoint, producer, deadline)
        with self._lock:
            self._closed = True
        self._network.close()
        self._close_idle()

    def __repr__(self) -> str:
        with self._lock:
            idle = len(self._pool.connections())
            state = "closed, " if self._closed else "closing, " if self._closing else ""
            return f"<Connections: {state}{len(self._open) - idle} in use, {idle} idle>"

    def _connect(self, holder: ConnectionHolder, endpoint: str, producer: bytes, deadline: Deadline) -> Connection:
        began = self._clock.now()
        self._close_unused()
        address = parse_endpoint(endpoint)
        with self._lock:
            busy = self._busy()
            for worker, retired in self._workers.items():
                if not retired and worker not in busy and self._network.fits(worker, address):
                    holder.worker = worker
                    break
        while True:
            try:
                if holder.worker is None and (made := self._network.make_worker(address)) is not None:
                    with self._lock:
                        self._workers[made] = False
                        holder.worker = made
                connection = Connection.open(
                    endpoint,
                    producer,
                    deadline=deadline,
                    worker=holder.worker,
                    network=self._network,
                    clock=self._clock,
                    report=self._trace,
                    attach_as=None if address.lane.in_band else self._direct.attach_as(producer),
                    **self._options,
                )
                break
            except OutOfResources:
                if not self._give_up_idle():
                    raise
        with self._lock:
            self._open[connection] = holder.worker
            holder.connection = connection
        now = self._clock.now()
        self._recorder.report(events.Connect(now, endpoint, now - began, connection.version, id(connection)))
        if connection.attachment is not None:  # last: an exception of a signal handler ends the connection
            self._direct.add(connection.attachment)
        return connection

    def _give_up_idle(self) -> bool:
        """Close the idle connections and free workers to make room for another one; whether there were any."""
        with self._lock:
            connections, workers = self._drain()
        self._close_unused()
        if connections or workers:
            self._recorder.count("connections_given_up", len(connections))
            logger.debug("closed %d idle connections to free descriptors for another one", len(connections))
        return bool(connections or workers)

    # --- closing; methods with "With the lock" need it held ----------------------------------------------------

    def _drain(self) -> tuple[list[Connection], list[Worker]]:
        """Take idle connections and free workers out of use permanently. With the lock."""
        busy = self._busy()
        workers = [worker for worker, retired in self._workers.items() if worker not in busy and not retired]
        for worker in workers:
            self._workers[worker] = True
        return self._pool.drain(busy), workers

    def _unused(self) -> tuple[list[Connection], set[Worker]]:
        """The connections that are neither idle nor held, and the workers that are held. With the lock."""
        used, workers = held(self._holders, self._closing)
        used |= self._pool.connections()
        return [connection for connection in self._open if connection not in used], workers

    def _busy(self) -> set[Worker]:
        """The workers that are held, or have a connection that is about to be closed. With the lock."""
        if not self._workers:
            return set()
        return held(self._holders, self._closing)[1] | self._blocked

    def _close_unused(self) -> None:
        """Close unused connections and retired workers; those of a worker that is held, later."""
        with self._closer:
            while (connection := self._next_unused()) is not None:
                self._close(connection)
            with self._lock:
                _, in_use = self._unused()
                workers = [worker for worker, retired in self._workers.items() if retired and worker not in in_use]
            for worker in workers:
                worker.close()
                with self._lock:
                    self._workers.pop(worker, None)

    def _next_unused(self) -> Connection | None:
        with self._lock:
            for holder in [each for each in self._holders if not each.holds(self._closing)]:
                holder.clear()
                self._holders.discard(holder)
            unused, in_use = self._unused()
            self._blocked = {worker for each in unused if (worker := self._open[each]) is not None}
            return next((each for each in unused if self._open[each] not in in_use), None)

    def _close(self, connection: Connection) -> None:
        """Close a connection; what it counted stays, and the ACKs that may be lost with it."""
        self._remember_acks(connection)
        connection.close()
        with self._lock:
            if connection not in self._open:
                return  # a call of a signal handler has closed it meanwhile
            del self._open[connection]
            self._recorder.add_reads(connection)
        error, connection.failure = connection.failure, None  # its frames may keep memory of payloads
        self._recorder.report(events.Discard(self._clock.now(), connection.endpoint, error, id(connection)))

    def forget(self, endpoint: str) -> None:
        """Close the idle connections to an endpoint, whose producer has ended."""
        with self._lock:
            self._pool.forget(endpoint)
        self._close_unused()

    def _close_idle(self) -> None:
        """Close what no thread uses, each connection after its ACKs are confirmed."""
        holder: ConnectionHolder = Holder()
        with holder.inside:
            with self._lock:
                self._holders.add(holder)
                holder.drained = self._drain()
            deadline = Deadline.after(_REPLAY_SECONDS, self._clock)
            for connection in holder.drained[0]:
                with contextlib.suppress(DrayError):
                    connection.confirm(deadline)
            with self._lock:
                holder.clear()
                self._holders.discard(holder)
        self._close_unused()

    # --- acknowledgements that may be lost --------------------------------------------------------------------

    def _remember_acks(self, connection: Connection) -> None:
        """Remember the ACKs that may be lost with a connection."""
        lost = connection.unconfirmed
        if lost:
            with self._lock:
                remembered = self._unconfirmed.setdefault(connection.identity.producer, {})
                remembered.update(dict.fromkeys(lost, connection.endpoint))
                while len(self._unconfirmed) > MAX_PRODUCERS:
                    del self._unconfirmed[next(iter(self._unconfirmed))]

    def _replay_acks(self, connection: Connection, deadline: Deadline) -> None:
        """Send the ACKs again, as CONSUME, that may be lost to the connection's producer."""
        producer = connection.identity.producer
        with self._lock:
            lost = sorted(self._unconfirmed.get(producer, ()))
        if not lost:
            return
        connection.consume(lost, deadline)
        # Forgotten only now: a client that is closed meanwhile sends them again.
        with self._lock:
            left = self._unconfirmed.get(producer, {})
            for sent in lost:
                left.pop(sent, None)
            if not left:
                self._unconfirmed.pop(producer, None)
        self._recorder.count("acks_replayed", len(lost))

    def _replay_at(self, endpoint: str, producer: bytes, deadline: Deadline) -> None:
        """Send a producer's ACKs again that may be lost, over this endpoint, if it can be reached."""
        with self._lock:
            if producer not in self._unconfirmed:
                return
        holder: ConnectionHolder = Holder()
        with holder.inside:
            try:
                self.checkout(holder, endpoint, producer, deadline, began=self._clock.now())
                self.checkin(holder)
            except DrayError as error:
                self.discard(holder, error)
            except BaseException:
                self.discard(holder)
                raise


class KeptLease:
    """A payload's lease whose connection is kept after its read.

    Attributes:
        request: the READ that holds it.
        inside: held by the thread that calls `end` or `drop`.
    """

    def __init__(self, connections: Connections, holder: ConnectionHolder, request: Request) -> None:
        self.request = request
        self.inside = holder.inside
        self._connections = connections
        self._holder = holder

    def hand_out(self) -> None:
        """From now on arrays in the slot keep the connection.

        Raises:
            BufferClosedError: the lease has ended, or closing the client has ended it.
        """
        self._connections.resume(self._holder, Keeper.ARRAYS)

    def end(self, consumed: bool) -> None:
        """End it, unless it has ended."""
        self._connections.end_lease(self._holder, self.request, consumed)

    def drop(self) -> None:
        """Close its connection, unless it has ended: the server releases the lease."""
        self._connections.discard(self._holder)
