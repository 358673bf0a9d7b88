"""`PayloadClient`: redeems references, from any thread, over whichever lane reaches the producer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import numpy as np

from dray.clock import MONOTONIC, Clock, Deadline
from dray.errors import (
    BufferClosedError,
    ConfigError,
    DrayError,
    PayloadError,
    TransportError,
    Unreachable,
)
from dray.payload.codec import unpack
from dray.telemetry import Counters
from dray.transport.connection import Bytes, Connection, Held
from dray.transport.health import MOST_ATTEMPTS, QUARANTINE_SECONDS, Quarantine, ReadAttempts
from dray.transport.in_place import Graveyard, InPlaceLease
from dray.transport.pool import IDLE_SECONDS, MOST_IDLE, ConnectionPool
from dray.transport.stream import LANE_NAMES, Endpoint
from dray.transport.ucx_worker import UCXX_AVAILABLE, UcxWorker, is_loopback, require
from dray.wire import PayloadRef
from dray.wire.frames import Status
from dray.wire.handshake import Lane

logger = logging.getLogger("dray.client")

Arrays = dict[str, "np.ndarray[Any, np.dtype[Any]]"]
T = TypeVar("T")


class PayloadClient:
    """Reads payloads by reference. Thread-safe; every call has one deadline for all it does.

    Args:
        lanes: ``"auto"`` takes the best lane that reaches the producer: ``shm`` on the same host, else ``ucx``,
            else ``tcp``. A lane's name requires that lane: a reference without it is an error.
        secret: the job's secret, where servers have one.
        reader: this reader's id, 0 … readers - 1, where payloads are meant for several.
        verify: compare payloads with the checksums that servers send.
        most_idle: idle connections kept for each endpoint.
        idle_seconds: an idle connection older than this is replaced before use.
        quarantine_seconds: how long a failed endpoint is skipped.
        attempts: transport failures one read survives, less one.
        clock: where time comes from.

    Raises:
        ConfigError: an argument is not allowed, or the required lane cannot be had on this machine.
    """

    def __init__(
        self,
        *,
        lanes: Literal["auto", "shm", "tcp", "ucx"] = "auto",
        secret: bytes | None = None,
        reader: int = 0,
        verify: bool = True,
        most_idle: int = MOST_IDLE,
        idle_seconds: float = IDLE_SECONDS,
        quarantine_seconds: float = QUARANTINE_SECONDS,
        attempts: int = MOST_ATTEMPTS,
        clock: Clock = MONOTONIC,
    ) -> None:
        self._lanes = _usable(lanes)
        if not 0 <= reader < 64:
            raise ConfigError("reader", reader, "0 to 63")
        if attempts < 1:
            raise ConfigError("attempts", attempts, "1 or more")
        self._secret = secret
        self._reader = reader
        self._verify = verify
        self._attempts = attempts
        self._clock = clock
        self._lock = threading.Lock()
        self._pool: ConnectionPool[Connection, UcxWorker] = ConnectionPool(most_idle, idle_seconds)
        self._quarantine = Quarantine(quarantine_seconds)
        self._rotation = 0
        self._unconfirmed: dict[bytes, set[tuple[int, int, int]]] = {}
        self._graveyard = Graveyard()
        self._counters = Counters("reads", "bytes", "retries", "connects", "consumed")
        self._pid = os.getpid()
        self._closed = False

    # --- reading ----------------------------------------------------------------------------------------------

    def read(self, ref: PayloadRef, *, timeout: float | None = 30.0, consume: bool = True) -> Arrays:
        """The payload's arrays, in memory of their own.

        Args:
            ref: what to read.
            timeout: seconds for everything: connecting, reading, and trying again.
            consume: the payload's slot may be used again; otherwise it can be read again until `consume`.

        Raises:
            StaleSlotError: the payload was consumed or overwritten.
            ProducerLostError: its producer is gone.
            TransportError: it could not be read in time; it is still there.
            AuthenticationError: this client does not have the job's secret.
            PayloadFormatError: the bytes are not arrays; see `read_bytes`.
        """
        return unpack(self.read_bytes(ref, timeout=timeout, consume=consume))

    def read_bytes(self, ref: PayloadRef, *, timeout: float | None = 30.0, consume: bool = True) -> Bytes:
        """The payload as uint8 of shape (nbytes,), in memory of its own; otherwise like `read`."""

        def exchange(connection: Connection, status_by: Deadline, deadline: Deadline) -> Bytes:
            held = _one(connection, ref, self._reader, status_by, deadline)
            data = held.data()
            connection.acknowledge([(held.request, consume)], deadline)
            return data

        data = self._attempt(ref, Deadline.after(timeout, self._clock), exchange)
        self._counters.add_all({"reads": 1, "bytes": ref.nbytes})
        return data

    async def read_async(self, ref: PayloadRef, *, timeout: float | None = 30.0, consume: bool = True) -> Arrays:
        """`read` for asyncio: it runs in a worker thread of the event loop."""
        return await asyncio.to_thread(self.read, ref, timeout=timeout, consume=consume)

    def lease(self, ref: PayloadRef, *, timeout: float | None = 30.0) -> InPlaceLease:
        """The payload's arrays for the length of a ``with`` block; in place, without a copy, on the shm lane.

        A clean exit consumes the payload; an exception returns it. The mapping is emptied at the end, and every
        array taken from it must be gone by then, else `LeaseInUseError` is raised and the slot stays leased until
        it is.

        Raises:
            As `read`, when the block is entered.
        """
        deadline = Deadline.after(timeout, self._clock)
        kept: list[tuple[Connection, UcxWorker | None]] = []

        def exchange(connection: Connection, status_by: Deadline, limit: Deadline) -> Held:
            return _one(connection, ref, self._reader, status_by, limit)

        held = self._attempt(ref, deadline, exchange, keep=kept.append)
        connection, group = kept[0]
        self._counters.add_all({"reads": 1, "bytes": ref.nbytes})

        def end(request: Any, consumed: bool) -> None:
            try:
                connection.acknowledge([(request, consumed)], Deadline.after(1.0, self._clock))
            except TransportError as error:
                # The server has returned the lease with the connection; its producer may be gone altogether.
                logger.debug("end of a lease on %s: %s", connection.endpoint, error)
                self._counters.add("leases_ended_late")
                self._discard(connection, group)
            else:
                self._checkin(connection, group)

        return InPlaceLease(held, end, self._graveyard)

    def read_many(
        self,
        refs: Iterable[PayloadRef],
        *,
        timeout: float | None = 30.0,
        consume: bool = True,
        return_errors: bool = False,
    ) -> Iterator[tuple[PayloadRef, Any]]:
        """Read a batch, requests pipelined for each producer; yields (reference, arrays).

        Each payload is consumed when it is yielded, so leaving early loses nothing.

        Args:
            refs: what to read; the order of results is that of producers, then of the references.
            timeout: seconds for the whole batch.
            consume: as in `read`.
            return_errors: yield the error in place of the arrays of a payload that could not be read, and go on;
                otherwise the first error is raised.

        Raises:
            As `read`.
        """
        deadline = Deadline.after(timeout, self._clock)
        by_producer: dict[bytes, list[PayloadRef]] = {}
        for ref in refs:
            by_producer.setdefault(ref.producer, []).append(ref)
        for waiting in by_producer.values():
            for ref, result in self._read_producer(waiting, consume, deadline):
                outcome = _unpacked(result)
                if not isinstance(outcome, DrayError):
                    self._counters.add_all({"reads": 1, "bytes": ref.nbytes})
                elif not return_errors:
                    raise outcome
                else:
                    self._counters.add("failed_reads")
                yield ref, outcome

    # --- other requests ---------------------------------------------------------------------------------------

    def consume(self, refs: Iterable[PayloadRef], *, timeout: float | None = 30.0) -> int:
        """Free payloads that were read with ``consume=False``, or that will never be read.

        Returns how many were still there; those already gone are not an error.

        Raises:
            ProducerLostError: a producer is gone, and its payloads with it.
            TransportError: a producer could not be reached in time; call again.
        """
        deadline = Deadline.after(timeout, self._clock)
        by_producer: dict[bytes, list[PayloadRef]] = {}
        for ref in refs:
            by_producer.setdefault(ref.producer, []).append(ref)
        freed = 0
        for group in by_producer.values():
            freed += self._consume(group, deadline)
        self._counters.add("consumed", freed)
        return freed

    def _consume(self, refs: Sequence[PayloadRef], deadline: Deadline) -> int:
        wanted = [(ref.slot, ref.sequence, self._reader) for ref in refs]
        return self._attempt(refs[0], deadline, lambda c, _, limit: c.consume(wanted, limit)).count(Status.OK)

    def stat(self, ref: PayloadRef, *, timeout: float | None = 30.0) -> dict[str, Any]:
        """The statistics of the server that a reference names; see `PayloadServer.statistics`."""
        text = self._attempt(ref, Deadline.after(timeout, self._clock), lambda c, _, d: c.stat(d))
        found: dict[str, Any] = json.loads(text)
        return found

    # --- life -------------------------------------------------------------------------------------------------

    def statistics(self) -> dict[str, Any]:
        """Counters, and the endpoints in quarantine."""
        with self._lock:
            quarantined = self._quarantine.listed(self._clock.now())
        return {**self._counters.snapshot(), "quarantined": quarantined}

    def close(self) -> None:
        """Make sure that acknowledged payloads are known to be, then close all connections. Twice is fine."""
        with self._lock:
            if self._closed or os.getpid() != self._pid:
                return
            self._closed = True
        self._graveyard.close()
        with self._lock:
            connections, groups = self._pool.drain()
        deadline = Deadline.after(1.0, self._clock)
        for connection in connections:
            with contextlib.suppress(DrayError):
                if connection.unconfirmed:
                    connection.consume(connection.unconfirmed[-1:], deadline)
            connection.close()
        for group in groups:
            group.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"<PayloadClient {'closed' if self._closed else '/'.join(Lane(lane).label for lane in self._lanes)}>"
        )

    # --- layer 1 ----------------------------------------------------------------------------------------------

    def _attempt(
        self,
        ref: PayloadRef,
        deadline: Deadline,
        exchange: Callable[[Connection, Deadline, Deadline], T],
        keep: Callable[[tuple[Connection, UcxWorker | None]], None] | None = None,
    ) -> T:
        """Run one exchange with the producer, over another endpoint if the first fails.

        `exchange` gets the connection, the deadline for connecting and STATUS, and that of the whole. With `keep`
        the connection is the caller's after a success, and not put back.
        """
        attempts = self._plan(ref)
        while True:
            endpoint = attempts.choose(self._clock.now())
            status_by = deadline if attempts.last else deadline.share(0.5)
            try:
                connection, group = self._checkout(endpoint, ref.producer, status_by)
                try:
                    result = exchange(connection, status_by, deadline)
                except _Refused as refused:
                    self._checkin(connection, group)
                    raise refused.error from None
                except BaseException:
                    self._discard(connection, group)
                    raise
            except TransportError as error:
                self._failed(attempts, endpoint, error)
                continue
            if keep is not None:
                keep((connection, group))
            else:
                self._checkin(connection, group)
            return result

    def _failed(self, attempts: ReadAttempts, endpoint: str, error: TransportError) -> None:
        """Note a failed attempt; returns if another one is due."""
        with self._lock:
            final = attempts.give_up(endpoint, error, self._clock.now())
        if final is not None:
            raise final from error
        self._counters.add("retries")
        logger.debug("%s; trying another endpoint", error)

    def _plan(self, ref: PayloadRef) -> ReadAttempts:
        with self._lock:
            if self._closed or os.getpid() != self._pid:
                raise BufferClosedError("the client is closed, or belongs to the process this one was forked from")
            self._rotation += 1
            usable = [e for e in ref.endpoints if Endpoint.parse(e).lane in self._lanes]
            if not usable:
                names = ", ".join(Lane(lane).label for lane in self._lanes)
                raise Unreachable(
                    f"none of the reference's endpoints {list(ref.endpoints)} is on a lane of {names}"
                )
            return ReadAttempts(usable, self._lanes, self._quarantine, self._rotation, self._attempts)

    # --- batches ----------------------------------------------------------------------------------------------

    def _read_producer(
        self, refs: Sequence[PayloadRef], consume: bool, deadline: Deadline
    ) -> Iterator[tuple[PayloadRef, Bytes | DrayError]]:
        """Read one producer's payloads over one connection at a time, a window of requests in flight."""
        waiting = list(refs)
        attempts = self._plan(waiting[0])
        while waiting:
            endpoint = attempts.choose(self._clock.now())
            status_by = deadline if attempts.last else deadline.share(0.5)
            try:
                try:
                    connection, group = self._checkout(endpoint, waiting[0].producer, status_by)
                    try:
                        yield from self._windows(connection, waiting, consume, status_by, deadline)
                    except BaseException:
                        self._discard(connection, group)
                        raise
                    self._checkin(connection, group)
                except TransportError as error:
                    self._failed(attempts, endpoint, error)
            except DrayError as final:
                for ref in waiting:
                    yield ref, final
                return

    def _windows(
        self,
        connection: Connection,
        waiting: list[PayloadRef],
        consume: bool,
        status_by: Deadline,
        deadline: Deadline,
    ) -> Iterator[tuple[PayloadRef, Bytes | DrayError]]:
        """Yield what one connection brings, taking each reference off `waiting` as its result is handed out.

        `status_by` bounds the first window: once it has come the endpoint is known to answer.
        """
        while waiting:
            window = waiting[: connection.identity.max_leases]
            targets = connection.ask(window, self._reader, status_by)
            results = [
                connection.answer(ref, target, status_by, deadline)
                for ref, target in zip(window, targets, strict=True)
            ]
            status_by = deadline
            given = 0
            try:
                for ref, result in zip(window, results, strict=True):
                    given += 1
                    del waiting[0]
                    yield ref, result.data() if isinstance(result, Held) else result
            except GeneratorExit:
                with contextlib.suppress(TransportError):  # the server returns what it does not hear of
                    _acknowledge(connection, results, consume, given, deadline)
                raise
            _acknowledge(connection, results, consume, given, deadline)

    # --- connections ------------------------------------------------------------------------------------------

    def _checkout(self, endpoint: str, producer: bytes, deadline: Deadline) -> tuple[Connection, UcxWorker | None]:
        """An open connection to the endpoint, and the UCX worker that it keeps busy."""
        address = Endpoint.parse(endpoint)
        while True:
            with self._lock:
                decision = self._pool.checkout(endpoint, self._clock.now(), grouped=address.lane is Lane.UCX)
            for expired, group in decision.expired:
                self._discard(expired, group)
            connection, group = decision.connection, decision.group
            if connection is None:
                break
            if connection.identity.producer == producer and connection.usable():
                return connection, group
            self._discard(connection, group)
        try:
            if group is None and address.lane is Lane.UCX:
                group = UcxWorker(is_loopback(address.host))
                with self._lock:
                    self._pool.add_group(group)
            connection = Connection.open(endpoint, producer, self._secret, deadline, group, self._verify)
        except BaseException:
            with self._lock:
                self._pool.discard(group)
            raise
        self._counters.add("connects")
        self._settle(connection, deadline)
        return connection, group

    def _checkin(self, connection: Connection, group: UcxWorker | None) -> None:
        with self._lock:
            surplus = None if self._closed else self._pool.checkin(
                connection.endpoint, connection, group, self._clock.now()
            )  # fmt: skip
            closed = self._closed
        if closed:
            connection.close()
            if group is not None:
                group.close()
        elif surplus is not None:
            self._discard(surplus, group)

    def _discard(self, connection: Connection, group: UcxWorker | None) -> None:
        """Close a connection; ACKs that may be lost with it are remembered."""
        with self._lock:
            if connection.unconfirmed:
                lost = self._unconfirmed.setdefault(connection.identity.producer, set())
                lost.update(connection.unconfirmed)
        connection.close()
        with self._lock:
            self._pool.discard(group)

    def _settle(self, connection: Connection, deadline: Deadline) -> None:
        """Tell the producer again what ACKs that may have been lost said."""
        producer = connection.identity.producer
        with self._lock:
            lost = self._unconfirmed.pop(producer, None)
        if not lost:
            return
        try:
            connection.consume(sorted(lost), deadline)
        except BaseException:
            connection.close()
            with self._lock:
                self._unconfirmed.setdefault(producer, set()).update(lost)
            raise
        self._counters.add("acks_repeated", len(lost))


class _Refused(Exception):
    """Carries a refusal through the code that closes failed connections: this one is still good."""

    def __init__(self, error: DrayError) -> None:
        super().__init__(str(error))
        self.error = error


def _one(connection: Connection, ref: PayloadRef, reader: int, status_by: Deadline, deadline: Deadline) -> Held:
    (target,) = connection.ask([ref], reader, status_by)
    answer = connection.answer(ref, target, status_by, deadline)
    if isinstance(answer, DrayError):
        raise _Refused(answer)
    return answer


def _acknowledge(
    connection: Connection, results: Sequence[Held | DrayError], consume: bool, given: int, deadline: Deadline
) -> None:
    """End the leases of a window: the first `given` were handed out, the others go back."""
    ended = [
        (result.request, consume and index < given)
        for index, result in enumerate(results)
        if isinstance(result, Held)
    ]
    connection.acknowledge(ended, deadline)


def _unpacked(result: Bytes | DrayError) -> Arrays | DrayError:
    if isinstance(result, DrayError):
        return result
    try:
        return unpack(result)
    except PayloadError as error:
        return error


def _names(lanes: Sequence[Lane]) -> str:
    return "/".join(lane.label for lane in lanes)


def _usable(lanes: str) -> tuple[Lane, ...]:
    """The lanes this client may use, best first."""
    if lanes == "auto":
        return (Lane.SHM, Lane.UCX, Lane.TCP) if UCXX_AVAILABLE else (Lane.SHM, Lane.TCP)
    if lanes not in LANE_NAMES:
        raise ConfigError("lanes", lanes, f'"auto" or one of {", ".join(LANE_NAMES)}')
    if lanes == "ucx":
        require()
    return (Lane[lanes.upper()],)
