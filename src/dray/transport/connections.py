"""Layer 1: one exchange with a producer, over whichever connection and endpoint work.

Decisions are made by the state machines in `health` and `pool`; this module carries them out.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from dray.clock import Clock, Deadline
from dray.counters import Counters
from dray.errors import (
    BufferClosedError,
    ConnectionClosed,
    ConnectionReset,
    DrayError,
    MessageTruncated,
    OutOfResources,
    ProducerLostError,
    ServerBusy,
    TransportError,
    TransportTimeout,
    Unreachable,
)
from dray.protocol import PayloadRef
from dray.protocol.client_session import Request
from dray.transport.attempts import (
    Latencies,
    OtherProducerError,
    Quarantine,
    ReadAttempts,
    by_lane,
    is_elsewhere,
    is_unusable,
)
from dray.transport.connection import Connection
from dray.transport.holding import Holder, Keeper, held
from dray.transport.lanes import parse_endpoint
from dray.transport.lanes.base import Endpoint, Lane, MachineNetwork, Network, Worker
from dray.transport.polling import CloseEvent
from dray.transport.pool import ConnectionPool
from dray.transport.receive_buffers import ReceiveBuffers

logger = logging.getLogger("dray.client")

_SETTLE_SECONDS = 1.0
"""What `close` spends on making sure that ACKs have arrived."""

_END_SECONDS = 1.0
"""What the end of a lease may take before its connection is closed instead."""

_SURELY_OPEN_SECONDS = 0.05
"""A connection used this lately is not asked whether the server has closed it; its exchange would tell."""

RETRIES_BY_CAUSE: dict[type[TransportError], str] = {
    TransportTimeout: "retries_timeout",
    ConnectionReset: "retries_reset",
    ConnectionClosed: "retries_closed",
    MessageTruncated: "retries_truncated",
    Unreachable: "retries_unreachable",
    OutOfResources: "retries_out_of_resources",
    ServerBusy: "retries_busy",
    OtherProducerError: "retries_other_producer",
}
"""What retries are counted as, by the error before them."""

_MAX_NAMED = 1024
"""Endpoints whose first failure is remembered, so that it alone is a warning."""

_MOST_PRODUCERS = 256
"""Producers whose ACKs may be lost that a client remembers; most that it does not reach again are dead."""

T = TypeVar("T")
ConnectionHolder = Holder[Connection, Worker]
Exchange = Callable[[Connection, Deadline, Deadline], T]
"""Gets the connection, the deadline for connecting and STATUS, and that of the whole."""


class Refused(Exception):
    """Carries a refusal through the code that closes failed connections: this one is still good."""

    def __init__(self, error: DrayError) -> None:
        super().__init__(str(error))
        self.error = error


class Exchanges:
    """A client's connections, and the rules by which they are used, retried and replaced. Thread-safe.

    Args:
        lanes: the lanes that may be used, best first.
        secret: the job's secret, where servers have one.
        verify: compare payloads with the checksums that servers send.
        inline_bytes: payloads of up to this size are read inline.
        pool: idle connections.
        quarantine: endpoints to skip.
        attempts: transport failures that end an exchange.
        counters: where retries and connects are counted.
        clock: where time comes from.
        network: where connections come from; by default the machine's.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        secret: bytes | None,
        verify: bool,
        inline_bytes: int,
        pool: ConnectionPool[Connection, Worker],
        quarantine: Quarantine,
        attempts: int,
        counters: Counters,
        clock: Clock,
        network: Network | None = None,
    ) -> None:
        self._lanes = tuple(lanes)
        self._secret = secret
        self._verify = verify
        self._inline_bytes = inline_bytes
        self._pool = pool
        self._quarantine = quarantine
        self._latencies = Latencies()
        self._attempts = attempts
        self._buffers = ReceiveBuffers()
        self._network = network or MachineNetwork(CloseEvent())
        self._counters = counters
        self._clock = clock
        self._lock = threading.Lock()
        self._rotation = itertools.count()
        self._closing_one = threading.RLock()  # held by the thread that closes what is left over
        self._connections: dict[Connection, Worker | None] = {}  # all that are open, each with its group
        self._groups: set[Worker] = set()
        self._holders: set[ConnectionHolder] = set()
        self._unconfirmed: dict[bytes, dict[tuple[int, int, int], str]] = {}
        self._named: dict[str, None] = {}  # endpoints that a warning has named
        self._closing = False
        self._closed = False

    def run(self, ref: PayloadRef, deadline: Deadline, exchange: Exchange[T]) -> T:
        """Run one exchange with the producer of `ref`, over another endpoint if the first fails."""
        holder: ConnectionHolder = Holder()
        with holder.inside:
            try:
                result = self.run_holding(holder, ref, deadline, exchange)
                self.checkin(holder)
            except BaseException:
                self.discard(holder)
                raise
            return result

    def run_holding(
        self, holder: ConnectionHolder, ref: PayloadRef, deadline: Deadline, exchange: Exchange[T]
    ) -> T:
        """Like `run`, by a thread inside `holder`; what that has afterwards, after an exception as well, is to be
        given to `checkin` or `discard`."""
        attempts = self.plan(ref)
        while True:
            endpoint, status_by = self.choose(attempts, deadline)
            try:
                connection = self.checkout(holder, endpoint, ref.producer, status_by)
                result = exchange(connection, status_by, deadline)
                self.answered(connection)
                return result
            except Refused as refused:
                self.answered(connection)
                self.checkin(holder)
                raise refused.error from None
            except TransportError as error:
                self.discard(holder)
                self.failed(attempts, endpoint, ref.producer, error, deadline)

    # --- attempts ---------------------------------------------------------------------------------------------

    def plan(self, ref: PayloadRef) -> ReadAttempts:
        """The attempts of one exchange, none of them made yet.

        Raises:
            Unreachable: the reference has no endpoint on an allowed lane.
            BufferClosedError: the client is closed.
        """
        reachable = by_lane(ref.endpoints, self._lanes)
        if not reachable:
            lanes = "/".join(lane.name for lane in self._lanes)
            raise Unreachable(f"no endpoint of {list(ref.endpoints)} is on a lane of {lanes}")
        if self._closed:
            raise BufferClosedError("the client is closed")
        return ReadAttempts(reachable, self._quarantine, next(self._rotation), self._attempts)

    def choose(self, attempts: ReadAttempts, deadline: Deadline) -> tuple[str, Deadline]:
        """The endpoint of the next attempt, and until when it must have connected and answered.

        The last attempt gets all the time that is left, any other half of it. Where another endpoint is healthy
        and not tried so far, the latencies of the lane bound that further: a wedged endpoint costs little.

        Raises:
            TransportTimeout: the deadline is over.
        """
        now = self._clock.now()
        endpoint = attempts.choose(now)
        if now >= deadline.at:
            raise TransportTimeout("no time is left to ask", endpoint=endpoint, elapsed=deadline.elapsed)
        if attempts.last:
            return endpoint, deadline
        most = math.inf
        if attempts.has_other(endpoint, now):
            most = self._latencies.bound(parse_endpoint(endpoint).lane)
        return endpoint, deadline.fraction(0.5, now, most)

    def answered(self, connection: Connection) -> None:
        """Note that an exchange went well, and how long its first answer took."""
        latency = connection.latency
        if latency is not None:
            self._latencies.answered(connection.lane, latency)
        self._quarantine.answered(connection.endpoint)

    def failed(
        self, attempts: ReadAttempts, endpoint: str, producer: bytes, error: TransportError, deadline: Deadline
    ) -> None:
        """Note a failed attempt; returns if another one is due and has time, else raises what it comes to."""
        now = self._clock.now()
        with self._lock:
            final = attempts.give_up(endpoint, error, now)
            if isinstance(final, ProducerLostError) and isinstance(error, OtherProducerError):
                # Not where nobody listens: the producer may only be about to listen again.
                self._unconfirmed.pop(producer, None)
        left_lane = is_unusable(error) and final is not error
        if final is None and now >= deadline.at and not left_lane:
            final = error
        following = None if final is not None else attempts.choose(now)
        if left_lane:
            self._give_up_lane(parse_endpoint(endpoint).lane, error)
        elif is_elsewhere(error):
            self._counters.add("elsewhere")
            logger.debug("%s is not on this host; next: %s", endpoint, following or "none is left")
        else:
            self._note(endpoint, error, following)
        if final is error:
            raise error
        if final is not None:
            raise final from error

    def _give_up_lane(self, lane: Lane, error: TransportError) -> None:
        """Use a lane no more that this machine cannot use, and log that once."""
        with self._lock:
            known = lane not in self._lanes
            self._lanes = tuple(each for each in self._lanes if each != lane)
        if not known:
            logger.warning("this client goes on without the %s lane: %s", lane.name, error.message)

    def _note(self, endpoint: str, error: TransportError, following: str | None) -> None:
        """Count the retry that follows a failed attempt, and log both: the first at an endpoint is a warning."""
        if following is not None:
            self._counters.add_all({"retries": 1, RETRIES_BY_CAUSE[type(error)]: 1})
        with self._lock:
            level = logging.DEBUG if endpoint in self._named else logging.WARNING
            self._named[endpoint] = None
            while len(self._named) > _MAX_NAMED:
                del self._named[next(iter(self._named))]
        if isinstance(error, ServerBusy | OutOfResources):
            skipped = "no"
        else:
            skipped = f"{self._quarantine.term(endpoint):g} s of"
        logger.log(
            level,
            "attempt at %s failed: %s: %s; %s quarantine; next: %s",
            endpoint,
            type(error).__name__,
            str(error),  # not the error, whose frames a kept record would keep
            skipped,
            following or "none is left",
        )

    # --- connections ------------------------------------------------------------------------------------------

    def checkout(self, holder: ConnectionHolder, endpoint: str, producer: bytes, deadline: Deadline) -> Connection:
        """Give `holder`, which the thread is inside, an open connection to the endpoint."""
        pool = self._pool
        began = self._clock.now()
        now = began
        while True:
            expired = False
            with self._lock:
                self._holders.add(holder)
                at_hand = pool.at_hand(endpoint, now)
                if at_hand is None:
                    address = parse_endpoint(endpoint)
                    decision = pool.checkout(endpoint, now, functools.partial(self._fits, address))
                    holder.connection, holder.group, idle = decision.connection, decision.group, decision.idle
                    expired = bool(decision.expired)
                else:
                    holder.connection, idle = at_hand
            if expired:
                self._close_left(holder)
            connection = holder.connection
            if connection is None:
                connection = self._open(holder, endpoint, producer, deadline)
            elif connection.identity.producer != producer or not (
                idle < _SURELY_OPEN_SECONDS or connection.usable()
            ):
                self.discard(holder)
                now = self._clock.now()
                continue
            if self._unconfirmed:
                self._settle(connection, deadline)
            connection.asked_since(began)
            return connection

    def _fits(self, address: Endpoint, worker: Worker) -> bool:
        return self._network.fits(worker, address)

    def checkin(self, holder: ConnectionHolder) -> None:
        """Keep the holder's connection after a clean exchange."""
        connection = holder.connection
        if connection is None or connection.broken:
            self.discard(holder)
            return
        with self._lock:
            surplus = self._pool.checkin(connection.endpoint, connection, holder.group, self._clock.now())
            holder.clear()
            self._holders.discard(holder)
        if surplus is not None:
            self._close_left()
        if self._closed:
            self._close_idle()

    def discard(self, holder: ConnectionHolder) -> None:
        """Close the holder's connection, if any; ACKs that may be lost with it are remembered."""
        with self._lock:
            empty = holder.connection is None and holder.group is None
            holder.clear()
            self._holders.discard(holder)
        if not empty:
            self._close_left()
        if self._closed:
            self._close_idle()

    def leave(self, holder: ConnectionHolder, deadline: Deadline) -> None:
        """`discard` a connection on which something is still on its way.

        The server may see its end before it reads the last ACKs, so the producer is told again at once what they
        said, if it can be reached before the deadline and soon.
        """
        connection = holder.connection
        self.discard(holder)
        if connection is not None:
            self._settle_at(connection.endpoint, connection.identity.producer, deadline.capped_at(_SETTLE_SECONDS))

    # --- connections that are kept between two calls ----------------------------------------------------------

    def resume(self, holder: ConnectionHolder) -> Connection:
        """The connection that was kept for this thread, which is inside `holder` again.

        Raises:
            BufferClosedError: closing the client has ended it.
        """
        with self._lock:
            if holder.connection is None:
                raise BufferClosedError("the client was closed meanwhile")
            holder.keeper = Keeper.NOBODY
            return holder.connection

    def hand_out(self, holder: ConnectionHolder) -> None:
        """From now on arrays in the slot keep the connection.

        Raises:
            BufferClosedError: the lease has ended, or closing the client has ended it.
        """
        with self._lock:
            if holder.connection is None:
                raise BufferClosedError("the lease has ended, or the client was closed meanwhile")
            holder.keeper = Keeper.ARRAYS

    def end_lease(self, holder: ConnectionHolder, request: Request, consumed: bool) -> None:
        """End a lease that was kept, by a thread inside `holder`, unless it has ended."""
        try:
            connection = self.resume(holder)
        except BufferClosedError:
            return
        try:
            connection.acknowledge([(request, consumed)], Deadline.after(_END_SECONDS, self._clock))
            self.checkin(holder)
        except (TransportError, BufferClosedError) as error:
            # The server has returned the lease with the connection; its producer may be gone altogether.
            logger.debug("end of a lease on %s: %s", connection.endpoint, error)
            self._counters.add("leases_ended_late")
            self.discard(holder)
        except BaseException:
            self.discard(holder)
            raise

    # --- figures and end --------------------------------------------------------------------------------------

    def counted(self) -> dict[str, float]:
        """All counters, the payloads among them that went over connections which are still open."""
        with self._lock:
            counted = Counters()
            counted.add_all(self._counters.snapshot())
            for connection in self._connections:
                counted.add_all(_handed_out(connection))
        return counted.snapshot()

    def quarantined(self) -> list[str]:
        """The endpoints that are skipped now."""
        return self._quarantine.listed(self._clock.now())

    def close(self) -> None:
        """End waits and close every connection that no thread is inside; the thread closes it. Twice is fine.

        Connections of leases whose arrays were handed out are closed with them.
        """
        if not self._closed:
            self._closing = True
            self._close_left()
            self._close_idle()
            # Nobody repeats the ACKs of those that are in use once their threads have been told to end.
            with self._lock:
                in_use = list(self._connections)
            for connection in in_use:
                self._remember(connection)
            self._settle_all()
        self._closed = True
        self._network.close()
        self._close_idle()

    def _open(self, holder: ConnectionHolder, endpoint: str, producer: bytes, deadline: Deadline) -> Connection:
        self._close_left(holder)
        while True:
            try:
                connection = self._connect(holder, endpoint, producer, deadline)
                break
            except OutOfResources:
                if not self._give_up_idle():
                    raise
        with self._lock:
            self._connections[connection] = holder.group
            holder.connection = connection
        self._counters.add("connects")
        return connection

    def _connect(self, holder: ConnectionHolder, endpoint: str, producer: bytes, deadline: Deadline) -> Connection:
        address = parse_endpoint(endpoint)
        if holder.group is None and (group := self._network.make_worker(address)) is not None:
            with self._lock:
                self._groups.add(group)
                holder.group = group
                self._pool.add_group(group)
        return Connection.open(
            endpoint,
            producer,
            self._secret,
            deadline,
            worker=holder.group,
            verify=self._verify,
            buffers=self._buffers,
            network=self._network,
            inline_bytes=self._inline_bytes,
            clock=self._clock,
        )

    def _give_up_idle(self) -> bool:
        """Close the idle connections, for the sake of one that is needed; whether there were any."""
        with self._lock:
            connections, groups = self._pool.drain()
        self._close_left()
        if connections or groups:
            self._counters.add("given_up", len(connections))
            logger.debug("%d idle connections are closed for the descriptors of another one", len(connections))
        return bool(connections or groups)

    def _settle(self, connection: Connection, deadline: Deadline) -> None:
        """Tell the producer again what ACKs that may have been lost said."""
        producer = connection.identity.producer
        with self._lock:
            lost = sorted(self._unconfirmed.get(producer, ()))
        if not lost:
            return
        connection.consume(lost, deadline)
        # Only now: a client that is closed meanwhile must know of them.
        with self._lock:
            left = self._unconfirmed.get(producer, {})
            for told in lost:
                left.pop(told, None)
            if not left:
                self._unconfirmed.pop(producer, None)
        self._counters.add("acks_repeated", len(lost))

    def _close_left(self, mine: ConnectionHolder | None = None) -> None:
        """Close what is open, not idle, and held by nobody.

        One of a group that is held is closed by the thread that is inside `mine`, if that holds the group, else
        later.
        """
        with self._closing_one:
            while (connection := self._next_left(mine)) is not None:
                self._end(connection)
            with self._lock:
                _, groups = held(self._holders, self._closing)
                left = [group for group in self._groups if group not in groups and not self._pool.has(group)]
            for group in left:
                group.close()
                self._groups.discard(group)

    def _next_left(self, mine: ConnectionHolder | None) -> Connection | None:
        """A connection to close; its group is busy until there is none."""
        with self._lock:
            self._forget_left_holders()
            connections, groups = held(self._holders, self._closing)
            connections.update(self._pool.withheld())
            for connection, group in self._connections.items():
                free = group is None or group not in groups or (mine is not None and group is mine.group)
                if connection not in connections and free:
                    self._pool.occupy(group)
                    return connection
            for group in self._groups:
                if group not in groups:
                    self._pool.discard(group)
            return None

    def _forget_left_holders(self) -> None:
        for holder in [each for each in self._holders if not each.holds(self._closing)]:
            holder.clear()
            self._holders.discard(holder)

    def _end(self, connection: Connection) -> None:
        """Close a connection; what it counted stays, and the ACKs that may be lost with it."""
        self._remember(connection)
        connection.close()
        with self._lock:
            del self._connections[connection]
            self._counters.add_all(_handed_out(connection))

    def _remember(self, connection: Connection) -> None:
        """Keep the ACKs that may be lost with a connection."""
        lost = connection.unconfirmed
        if lost:
            with self._lock:
                remembered = self._unconfirmed.setdefault(connection.identity.producer, {})
                remembered.update(dict.fromkeys(lost, connection.endpoint))
                while len(self._unconfirmed) > _MOST_PRODUCERS:
                    del self._unconfirmed[next(iter(self._unconfirmed))]

    def _settle_all(self) -> None:
        """Repeat every ACK that may have been lost, where its connection led to, if that can be reached."""
        deadline = Deadline.after(_SETTLE_SECONDS, self._clock)
        with self._lock:
            where = [
                (producer, endpoint) for producer, lost in self._unconfirmed.items() for endpoint in lost.values()
            ]
        for producer, endpoint in dict.fromkeys(where):
            self._settle_at(endpoint, producer, deadline)

    def _settle_at(self, endpoint: str, producer: bytes, deadline: Deadline) -> None:
        if producer not in self._unconfirmed:
            return
        holder: ConnectionHolder = Holder()
        with holder.inside:
            try:
                self.checkout(holder, endpoint, producer, deadline)
                self.checkin(holder)
            except DrayError:
                self.discard(holder)
            except BaseException:
                self.discard(holder)
                raise

    def _close_idle(self) -> None:
        """Close what no thread uses, each after making sure that its ACKs have arrived."""
        holder: ConnectionHolder = Holder()
        with holder.inside:
            with self._lock:
                self._holders.add(holder)
                holder.drained = self._pool.drain()
            deadline = Deadline.after(_SETTLE_SECONDS, self._clock)
            for connection in holder.drained[0]:
                with contextlib.suppress(DrayError):
                    connection.confirm(deadline)
            with self._lock:
                holder.clear()
                self._holders.discard(holder)
        self._close_left()


class KeptLease:
    """A payload's lease whose connection is kept after its exchange.

    Attributes:
        request: the READ that holds it.
        inside: held by the thread that calls `end` or `drop`.
    """

    def __init__(self, exchanges: Exchanges, holder: ConnectionHolder, request: Request) -> None:
        self.request = request
        self.inside = holder.inside
        self._exchanges = exchanges
        self._holder = holder

    def hand_out(self) -> None:
        """See `Exchanges.hand_out`."""
        self._exchanges.hand_out(self._holder)

    def end(self, consumed: bool) -> None:
        """End it, unless it has ended."""
        self._exchanges.end_lease(self._holder, self.request, consumed)

    def drop(self) -> None:
        """Close its connection, unless it has ended: the server returns the lease."""
        self._exchanges.discard(self._holder)


def _handed_out(connection: Connection) -> dict[str, float]:
    """Payloads that were handed out over a connection, as they are counted."""
    if not connection.reads:
        return {}
    reads = f"reads_{connection.lane.name}"
    return {"reads": connection.reads, reads: connection.reads, "bytes": connection.read_bytes}
