"""`PayloadClient`: redeems references, from any thread, over whichever lane reaches the producer."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from dray.clock import MONOTONIC, Clock, Deadline
from dray.counters import Counters
from dray.errors import (
    BufferClosedError,
    ConfigError,
    ConnectionClosed,
    DrayError,
    PayloadError,
    ProtocolError,
    TransportError,
)
from dray.identifiers import MAX_READERS
from dray.payload import Arrays, unpack
from dray.protocol import PayloadRef
from dray.protocol.frames import Status
from dray.protocol.handshake import check_secret
from dray.protocol.server_session import MAX_INLINE_BYTES
from dray.transport.async_reads import AsyncReads, HeldRead
from dray.transport.attempts import MAX_ATTEMPTS, QUARANTINE_SECONDS
from dray.transport.client_statistics import ClientStatistics
from dray.transport.connection import Connection, Held
from dray.transport.connections import (
    ConnectionHolder,
    Connections,
    KeptLease,
    Refused,
    RequestFunction,
)
from dray.transport.lanes import LANES, LaneChoice, chosen_lanes
from dray.transport.lanes.base import Lane, Network
from dray.transport.leases import InPlaceLease
from dray.transport.pipeline import Windows
from dray.transport.polling import CloseEvent
from dray.transport.pool import IDLE_SECONDS, MAX_IDLE, Holder, Keeper
from dray.transport.receive_buffers import Bytes
from dray.transport.trace import Trace

T = TypeVar("T")


class PayloadClient:
    """Reads payloads by reference. Thread-safe; every call has one deadline for all it does.

    Args:
        lane: ``"auto"`` takes the best lane that reaches the producer: ``shm`` on the same host, else ``ucx``,
            else ``tcp``. The name of a lane, or several names, restrict the choice to these: a reference without
            one of them is an error.
        secret: the job's secret, at least 16 random bytes, where servers have one.
        reader: this reader's id, 0 … readers - 1, where payloads are meant for several.
        verify: compare payloads with the checksums that servers send.
        inline_bytes: reads of payloads of up to this size, at most 16 KiB, get them with the answer itself, copied
            by the server: faster for small ones, and no slot is held. 0 leaves that to empty ones.
        max_idle: idle connections kept for each endpoint.
        idle_seconds: an idle connection older than this is replaced before use.
        quarantine_seconds: how long a failed endpoint is skipped; twice as long each time it fails again without
            an answer in between, up to 16 times.
        attempts: transport failures one read survives, less one.
        clock: where time comes from.
        network: where connections come from, by default the machine's; it is closed with the client.
        trace: receives the events of `dray.transport.trace`.

    Raises:
        ConfigError: an argument is not allowed, or this machine is not supported.
        MissingDependencyError: the required lane needs a package that is not installed.
        OutOfResources: no descriptor is left for the client.
    """

    def __init__(
        self,
        *,
        lane: LaneChoice = "auto",
        secret: bytes | None = None,
        reader: int = 0,
        verify: bool = True,
        inline_bytes: int = MAX_INLINE_BYTES,
        max_idle: int = MAX_IDLE,
        idle_seconds: float = IDLE_SECONDS,
        quarantine_seconds: float = QUARANTINE_SECONDS,
        attempts: int = MAX_ATTEMPTS,
        clock: Clock = MONOTONIC,
        network: Network | None = None,
        trace: Trace | None = None,
    ) -> None:
        self._lanes = _usable(lane)
        check_secret(secret)
        if not 0 <= reader < MAX_READERS:
            raise ConfigError("reader", reader, f"0 to {MAX_READERS - 1}")
        if not 0 <= inline_bytes <= MAX_INLINE_BYTES:
            raise ConfigError("inline_bytes", inline_bytes, f"0 to {MAX_INLINE_BYTES}")
        if attempts < 1:
            raise ConfigError("attempts", attempts, "1 or more")
        network = network or Network(CloseEvent())
        self._reader = reader
        self._clock = clock
        self._counters = Counters()
        self._connections = Connections(
            self._lanes,
            network,
            clock,
            max_idle=max_idle,
            idle_seconds=idle_seconds,
            quarantine_seconds=quarantine_seconds,
            attempts=attempts,
            trace=trace,
            secret=secret,
            verify=verify,
            inline_bytes=inline_bytes,
            buffers=network.receive_buffers(),
        )
        self._reaper = network.lease_reaper()
        self._async_reads = AsyncReads()
        self._pid = os.getpid()

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
            ReaderIdError: this client's reader id is not one of the ring's.
            PayloadFormatError: the bytes are not arrays; see `read_bytes`.
        """
        return self._read(ref, timeout, consume, _unpacked)

    def read_bytes(self, ref: PayloadRef, *, timeout: float | None = 30.0, consume: bool = True) -> Bytes:
        """The payload as uint8 of shape (nbytes,), in memory of its own; otherwise like `read`."""

        return self._read(ref, timeout, consume, _as_it_is)

    async def read_async(self, ref: PayloadRef, *, timeout: float | None = 30.0, consume: bool = True) -> Arrays:
        """`read` for asyncio, in up to 32 threads of the client's own; more reads than that wait for their turn.

        The payload is consumed when the awaiting task receives it: what a cancelled read brings is released.
        """
        self._check_process()
        deadline = Deadline.after(timeout, self._clock)
        reading = await self._async_reads.run(lambda: self._hold(ref, deadline), deadline)
        arrays = reading.arrays
        reading.end(consume)
        if isinstance(arrays, DrayError):
            raise arrays
        return arrays

    def lease(self, ref: PayloadRef, *, timeout: float | None = 30.0) -> InPlaceLease:
        """The payload's arrays for the length of a ``with`` block; in place, without a copy, on the shm lane.

        A clean exit consumes the payload; an exception returns it. The mapping is emptied at the end, and every
        array taken from it must be gone by then, else `LeaseInUseError` is raised and the slot stays leased until
        it is.

        Raises:
            As `read`, when the block is entered.
        """
        self._check_process()
        holder: ConnectionHolder = Holder()

        def request(connection: Connection, status_by: Deadline, deadline: Deadline) -> InPlaceLease:
            held = _accepted(connection.read(ref, self._reader, status_by, deadline, copy=False))
            connection.reads += 1
            connection.read_bytes += ref.nbytes
            lease = InPlaceLease(held, KeptLease(self._connections, holder, held.request), self._reaper)
            holder.keeper = Keeper.CALLER
            return lease

        attempts = self._connections.attempts(ref, Deadline.after(timeout, self._clock))
        return self._connections.run(attempts, request, holder)

    def read_many(
        self,
        refs: Iterable[PayloadRef],
        *,
        timeout: float | None = 30.0,
        consume: bool = True,
        return_errors: bool = False,
    ) -> Generator[tuple[PayloadRef, Any], None, None]:
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
        return self._read_many(refs, Deadline.after(timeout, self._clock), consume, return_errors, _unpacked)

    def read_many_bytes(
        self,
        refs: Iterable[PayloadRef],
        *,
        timeout: float | None = 30.0,
        consume: bool = True,
        return_errors: bool = False,
    ) -> Generator[tuple[PayloadRef, Any], None, None]:
        """`read_many` of payloads as they are: yields (reference, uint8 of shape (nbytes,))."""
        return self._read_many(refs, Deadline.after(timeout, self._clock), consume, return_errors, _as_it_is)

    # --- other requests ---------------------------------------------------------------------------------------

    def consume(self, refs: Iterable[PayloadRef], *, timeout: float | None = 30.0) -> int:
        """Free payloads that were read with ``consume=False``, or that will never be read.

        Returns how many were still there; those already gone are not an error.

        Raises:
            ProducerLostError: a producer is gone, and its payloads with it.
            TransportError: a producer could not be reached in time; call again.
        """
        deadline = Deadline.after(timeout, self._clock)
        freed = sum(self._consume(group, deadline) for group in _by_producer(refs))
        self._counters.add("consumed", freed)
        return freed

    def _consume(self, refs: Sequence[PayloadRef], deadline: Deadline) -> int:
        wanted = [(ref.slot, ref.sequence, self._reader) for ref in refs]
        return self._run(refs[0], deadline, lambda c, first, whole: c.consume(wanted, whole, first)).count(
            Status.OK
        )

    def stat(self, ref: PayloadRef, *, timeout: float | None = 30.0) -> dict[str, Any]:
        """The statistics of the server that a reference names; see `PayloadServer.statistics`.

        Raises:
            TransportError: it could not be reached in time.
            ProtocolError: what it says is not what a server says.
        """
        text = self._run(ref, Deadline.after(timeout, self._clock), lambda c, first, _: c.stat(first))
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"the answer to STAT is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise ProtocolError("the answer to STAT is not a JSON object")
        return found

    # --- life -------------------------------------------------------------------------------------------------

    def statistics(self) -> ClientStatistics:
        """Counters of this client, and its state now."""
        counts = self._counters
        return self._connections.statistics(
            consumed=int(counts["consumed"]), failed_reads=int(counts["failed_reads"])
        )

    def close(self) -> None:
        """Make sure that acknowledged payloads are known to be, then close all connections. Twice is fine.

        Calls that wait in other threads end at once with `BufferClosedError`; their payloads are not consumed.
        """
        if os.getpid() == self._pid:
            self._reaper.close()
            self._connections.close()
            self._async_reads.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<PayloadClient {'/'.join(lane.name for lane in self._lanes)}>"

    def _read(
        self,
        ref: PayloadRef,
        timeout: float | None,
        consume: bool,
        unpacked: Callable[[Bytes | DrayError], T | DrayError],
    ) -> T:
        """Read a payload; it is consumed last, as nothing that is raised before has taken it from its producer."""

        def exchange(connection: Connection, status_by: Deadline, deadline: Deadline) -> T | DrayError:
            held = _accepted(connection.read(ref, self._reader, status_by, deadline, copy=True))
            data = unpacked(held.data())
            connection.finish(held, consume, deadline)
            connection.reads += 1
            connection.read_bytes += ref.nbytes
            return data

        data = self._run(ref, Deadline.after(timeout, self._clock), exchange)
        if isinstance(data, DrayError):
            raise data
        return data

    def _hold(self, ref: PayloadRef, deadline: Deadline) -> HeldRead:
        """Read a payload, and leave it to the caller whether it is consumed."""

        def exchange(connection: Connection, status_by: Deadline, deadline: Deadline) -> HeldRead:
            held = _accepted(connection.read(ref, self._reader, status_by, deadline, copy=True))
            arrays = _unpacked(held.data())
            if held.from_slot and not connection.usable():
                raise ConnectionClosed("the lease may have ended while the payload was copied")
            connection.reads += 1
            connection.read_bytes += ref.nbytes
            holder.keeper = Keeper.CALLER
            return HeldRead(arrays, KeptLease(self._connections, holder, held.request))

        holder: ConnectionHolder = Holder()
        return self._connections.run(self._connections.attempts(ref, deadline), exchange, holder)

    def _run(self, ref: PayloadRef, deadline: Deadline, request: RequestFunction[T]) -> T:
        self._check_process()
        return self._connections.run(self._connections.attempts(ref, deadline), request)

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise BufferClosedError("the client belongs to the process that this one was forked from")

    # --- batches ----------------------------------------------------------------------------------------------

    def _read_many(
        self,
        refs: Iterable[PayloadRef],
        deadline: Deadline,
        consume: bool,
        return_errors: bool,
        unpacked: Callable[[Bytes | DrayError], Any],
    ) -> Generator[tuple[PayloadRef, Any], None, None]:
        for each in _by_producer(refs):
            self._check_process()
            try:
                batch = Windows(self._connections, each, self._reader, consume, deadline)
            except (TransportError, ConfigError) as unusable:
                self._counters.add("failed_reads", len(each))
                if not return_errors:
                    raise
                yield from ((ref, unusable) for ref in each)
                continue
            try:
                while window := batch.next():
                    for result in window:
                        outcome = unpacked(result.outcome)
                        failed = isinstance(outcome, DrayError)
                        if failed:
                            self._counters.add("failed_reads")
                        batch.hand_out(result)
                        item, lease, connection = (result.ref, outcome), result.lease, batch.connection
                        if connection is not None:
                            connection.handed_out = lease  # no call between this and the `yield`
                        if failed and not return_errors:
                            raise outcome
                        yield item
            finally:
                batch.leave()


def _by_producer(refs: Iterable[PayloadRef]) -> Iterable[list[PayloadRef]]:
    grouped: dict[bytes, list[PayloadRef]] = {}
    for ref in refs:
        grouped.setdefault(ref.producer, []).append(ref)
    return grouped.values()


def _accepted(held: Held | DrayError) -> Held:
    if isinstance(held, Held):
        return held
    raise Refused(held)


def _unpacked(result: Bytes | DrayError) -> Arrays | DrayError:
    if isinstance(result, DrayError):
        return result
    try:
        return unpack(result)
    except PayloadError as error:
        return error


def _as_it_is(result: Bytes | DrayError) -> Bytes | DrayError:
    return result


def _usable(choice: LaneChoice) -> tuple[Lane, ...]:
    """The lanes that this client may use, best first."""
    if not sys.platform.startswith("linux"):
        problem = f"{sys.platform} is not supported"
        raise ConfigError(
            "sys.platform", sys.platform, "must be linux; dray's lanes need epoll and memfd", problem
        )
    return chosen_lanes("lane", choice) or tuple(lane for lane in LANES.values() if lane.available)
