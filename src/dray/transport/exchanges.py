"""Layer 1: one exchange with a producer, over whichever connection and endpoint work.

Decisions are made by the state machines in `health` and `pool`; this module carries them out.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from dray.clock import Clock, Deadline
from dray.errors import (
    BufferClosedError,
    ConnectionClosed,
    ConnectionReset,
    DrayError,
    MessageTruncated,
    ProducerLostError,
    ServerBusy,
    TransportError,
    TransportTimeout,
    Unreachable,
)
from dray.telemetry import Counters
from dray.transport.connection import Connection
from dray.transport.health import OtherProducerError, Quarantine, ReadAttempts, by_lane, is_elsewhere
from dray.transport.network import Group, KernelNetwork, Network
from dray.transport.pool import ConnectionPool
from dray.transport.receive_buffers import ReceiveBuffers
from dray.transport.stream import Endpoint
from dray.transport.waiting import Wake
from dray.wire import PayloadRef
from dray.wire.handshake import Lane

logger = logging.getLogger("dray.client")

_SETTLE_SECONDS = 1.0
"""What `close` spends on making sure that ACKs have arrived."""

_SURELY_OPEN_SECONDS = 0.05
"""A connection used this lately is not asked whether the server has closed it; its exchange would tell."""

RETRIES_BY_CAUSE: dict[type[TransportError], str] = {
    TransportTimeout: "retries_timeout",
    ConnectionReset: "retries_reset",
    ConnectionClosed: "retries_closed",
    MessageTruncated: "retries_truncated",
    Unreachable: "retries_unreachable",
    ServerBusy: "retries_busy",
    OtherProducerError: "retries_other_producer",
}
"""What retries are counted as, by the error before them."""

_MAX_NAMED = 1024
"""Endpoints whose first failure is remembered, so that it alone is a warning."""

_MOST_PRODUCERS = 256
"""Producers whose ACKs may be lost that a client remembers; most that it does not reach again are dead."""

T = TypeVar("T")
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
        pool: ConnectionPool[Connection, Group],
        quarantine: Quarantine,
        attempts: int,
        counters: Counters,
        clock: Clock,
        network: Network | None = None,
    ) -> None:
        self._lanes = tuple(map(int, lanes))  # hashed with each read, which an enum does slowly
        self._secret = secret
        self._verify = verify
        self._inline_bytes = inline_bytes
        self._pool = pool
        self._quarantine = quarantine
        self._attempts = attempts
        self._buffers = ReceiveBuffers()
        self._network = network or KernelNetwork(Wake())
        self._counters = counters
        self._clock = clock
        self._lock = threading.Lock()
        self._rotation = itertools.count()
        self._connections: set[Connection] = set()
        self._in_use: dict[Connection, None] = {}
        self._unconfirmed: dict[bytes, dict[tuple[int, int, int], str]] = {}
        self._named: dict[str, None] = {}  # endpoints that a warning has named
        self._closed = False

    def run(self, ref: PayloadRef, deadline: Deadline, exchange: Exchange[T]) -> T:
        """Run one exchange with the producer of `ref`, over another endpoint if the first fails."""
        result, connection, group = self.run_and_keep(ref, deadline, exchange)
        self.checkin(connection, group)
        return result

    def run_and_keep(
        self, ref: PayloadRef, deadline: Deadline, exchange: Exchange[T]
    ) -> tuple[T, Connection, Group | None]:
        """Like `run`; the connection is the caller's afterwards, to `checkin` or `discard`."""
        attempts = self.plan(ref)
        while True:
            endpoint, status_by = self.choose(attempts, deadline)
            try:
                connection, group = self.checkout(endpoint, ref.producer, status_by)
                try:
                    return exchange(connection, status_by, deadline), connection, group
                except Refused as refused:
                    self.checkin(connection, group)
                    raise refused.error from None
                except BaseException:
                    self.discard(connection, group)
                    raise
            except TransportError as error:
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
            lanes = "/".join(Lane(lane).label for lane in self._lanes)
            raise Unreachable(f"no endpoint of {list(ref.endpoints)} is on a lane of {lanes}")
        if self._closed:
            raise BufferClosedError("the client is closed")
        return ReadAttempts(reachable, self._quarantine, next(self._rotation), self._attempts)

    def choose(self, attempts: ReadAttempts, deadline: Deadline) -> tuple[str, Deadline]:
        """The endpoint of the next attempt, and until when it must have connected and answered.

        That is half of what is left, so that a wedged endpoint leaves time for another; the last attempt gets all.

        Raises:
            TransportTimeout: the deadline is over.
        """
        now = self._clock.now()
        endpoint = attempts.choose(now)
        if now >= deadline.at:
            raise TransportTimeout("no time is left to ask", endpoint=endpoint, elapsed=deadline.elapsed)
        return endpoint, deadline if attempts.last else deadline.share(0.5, now)

    def failed(
        self, attempts: ReadAttempts, endpoint: str, producer: bytes, error: TransportError, deadline: Deadline
    ) -> None:
        """Note a failed attempt; returns if another one is due and has time, else raises what it comes to."""
        if isinstance(error, Unreachable) and error.lane_unusable and attempts.leave_lane(endpoint):
            self._give_up_lane(Endpoint.parse(endpoint).lane, error)
            return
        now = self._clock.now()
        with self._lock:
            final = attempts.give_up(endpoint, error, now)
            if isinstance(final, ProducerLostError) and isinstance(error, OtherProducerError):
                # Not where nobody listens: the producer may only be about to listen again.
                self._unconfirmed.pop(producer, None)
        if final is None and now >= deadline.at:
            final = error
        following = None if final is not None else attempts.choose(now)
        if is_elsewhere(error):
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
            logger.warning("this client goes on without the %s lane: %s", lane.label, error.message)

    def _note(self, endpoint: str, error: TransportError, following: str | None) -> None:
        """Count the retry that follows a failed attempt, and log both: the first at an endpoint is a warning."""
        if following is not None:
            self._counters.add_all({"retries": 1, RETRIES_BY_CAUSE[type(error)]: 1})
        with self._lock:
            level = logging.DEBUG if endpoint in self._named else logging.WARNING
            self._named[endpoint] = None
            while len(self._named) > _MAX_NAMED:
                del self._named[next(iter(self._named))]
        skipped = "no" if isinstance(error, ServerBusy) else f"{self._quarantine.seconds:g} s of"
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

    def checkout(self, endpoint: str, producer: bytes, deadline: Deadline) -> tuple[Connection, Group | None]:
        """An open connection to the endpoint, and the group that it keeps busy."""
        pool = self._pool
        while True:
            now = self._clock.now()
            with self._lock:
                at_hand = pool.at_hand(endpoint, now)
                if at_hand is None:
                    decision = pool.checkout(endpoint, now, self._network.fits(Endpoint.parse(endpoint)))
            if at_hand is None:
                for expired, group in decision.expired:
                    self.discard(expired, group)
                connection, group, idle = decision.connection, decision.group, decision.idle
                if connection is None:
                    return self._open(endpoint, producer, deadline, group)
            else:
                (connection, idle), group = at_hand, None
            surely_open = idle < _SURELY_OPEN_SECONDS
            if connection.identity.producer == producer and (surely_open or connection.usable()):
                if self._unconfirmed:
                    self._settle(connection, group, deadline)
                self._in_use[connection] = None
                return connection, group
            self.discard(connection, group)

    def checkin(self, connection: Connection, group: Group | None) -> None:
        """Keep a connection after a clean exchange."""
        if connection.broken:
            self.discard(connection, group)
            return
        self._in_use.pop(connection, None)
        with self._lock:
            surplus = self._pool.checkin(connection.endpoint, connection, group, self._clock.now())
        if surplus is not None:
            self.discard(surplus, group)
        elif self._closed:
            self._close_idle()

    def discard(self, connection: Connection, group: Group | None) -> None:
        """Close a connection; ACKs that may be lost with it are remembered."""
        self._in_use.pop(connection, None)
        self._end(connection)
        with self._lock:
            self._pool.discard(group)
        if self._closed:
            self._close_idle()

    def leave(self, connection: Connection, group: Group | None, deadline: Deadline) -> None:
        """`discard` a connection on which something is still on its way.

        The server may see its end before it reads the last ACKs, so the producer is told again at once what they
        said, if it can be reached before the deadline and soon.
        """
        self.discard(connection, group)
        self._settle_at(connection.endpoint, connection.identity.producer, deadline.sooner(_SETTLE_SECONDS))

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
        """End waits and close every idle connection; one in use is closed by who uses it. Twice is fine."""
        if not self._closed:
            self._close_idle()
            # Nobody repeats the ACKs of those that are in use once their threads have been told to end.
            with self._lock:
                withheld = self._pool.withheld()
            for connection in (*list(self._in_use), *withheld):
                self._remember(connection)
            self._settle_all()
        self._closed = True
        self._network.close()
        self._close_idle()

    def _open(
        self, endpoint: str, producer: bytes, deadline: Deadline, group: Group | None
    ) -> tuple[Connection, Group | None]:
        address = Endpoint.parse(endpoint)
        try:
            if group is None and (group := self._network.make_group(address)) is not None:
                with self._lock:
                    self._pool.add_group(group)
            connection = Connection.open(
                endpoint,
                producer,
                self._secret,
                deadline,
                group,
                self._verify,
                self._buffers,
                self._network,
                self._inline_bytes,
            )
        except BaseException:
            with self._lock:
                self._pool.discard(group)
            if self._closed:
                self._close_idle()
            raise
        self._counters.add("connects")
        with self._lock:
            self._connections.add(connection)
        self._settle(connection, group, deadline)
        self._in_use[connection] = None
        return connection, group

    def _settle(self, connection: Connection, group: Group | None, deadline: Deadline) -> None:
        """Tell the producer again what ACKs that may have been lost said; on failure the connection is closed."""
        producer = connection.identity.producer
        with self._lock:
            lost = sorted(self._unconfirmed.get(producer, ()))
        if not lost:
            return
        try:
            connection.consume(lost, deadline)
        except BaseException:
            self.discard(connection, group)
            raise
        # Only now: a client that is closed meanwhile must know of them.
        with self._lock:
            left = self._unconfirmed.get(producer, {})
            for told in lost:
                left.pop(told, None)
            if not left:
                self._unconfirmed.pop(producer, None)
        self._counters.add("acks_repeated", len(lost))

    def _end(self, connection: Connection) -> None:
        """Close a connection; what it counted stays, and the ACKs that may be lost with it."""
        self._remember(connection)
        connection.close()
        with self._lock:
            if connection in self._connections:
                self._connections.discard(connection)
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
        if producer in self._unconfirmed:
            with contextlib.suppress(DrayError):
                self.checkin(*self.checkout(endpoint, producer, deadline))

    def _close_idle(self) -> None:
        """Close what no thread uses, each after making sure that its ACKs have arrived."""
        with self._lock:
            connections, groups = self._pool.drain()
        deadline = Deadline.after(_SETTLE_SECONDS, self._clock)
        for connection in connections:
            with contextlib.suppress(DrayError):
                connection.confirm(deadline)
            self._end(connection)
        for group in groups:
            group.close()


def _handed_out(connection: Connection) -> dict[str, float]:
    """Payloads that were handed out over a connection, as they are counted."""
    if not connection.reads:
        return {}
    reads = f"reads_{connection.lane.label}"
    return {"reads": connection.reads, reads: connection.reads, "bytes": connection.read_bytes}
