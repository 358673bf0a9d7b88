"""`PayloadClient`: reads payloads by their references, from any thread, over the best lane to the producer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Protocol, TypeVar

from dray.clock import MONOTONIC, Clock, Deadline
from dray.counters import Counters
from dray.errors import (
    BufferClosedError,
    ConfigError,
    ConnectionClosed,
    DrayError,
    PayloadError,
    SelectionError,
    SlotError,
    StaleSlotError,
)
from dray.forking import here
from dray.identifiers import MAX_READERS
from dray.payload import Selection, Values, unpack
from dray.payload.selection import Fields, Rows
from dray.protocol import PayloadRef
from dray.protocol.frames import Status
from dray.protocol.handshake import check_secret
from dray.protocol.server_session import MAX_INLINE_BYTES
from dray.resources import Closing
from dray.ring.attachment import DirectLease
from dray.transport.async_reads import AsyncReads, HeldRead
from dray.transport.attempts import MAX_ATTEMPTS, QUARANTINE_SECONDS
from dray.transport.client_statistics import ClientStatistics
from dray.transport.connection import Connection, ReceivedPayload
from dray.transport.connections import ConnectionHolder, Connections, KeptLease, Refused, RequestFunction
from dray.transport.direct_reads import DirectReads
from dray.transport.lanes import LANES, LaneChoice, chosen_lanes
from dray.transport.lanes.base import Lane, Network
from dray.transport.leases import (
    DirectInPlaceLease,
    InPlaceLease,
    KeptInPlaceLease,
    LeasedArrays,
    LeasedBytes,
    MakeContent,
)
from dray.transport.pipeline import Batch, ReadResult
from dray.transport.polling import CloseEvent
from dray.transport.pool import IDLE_SECONDS, MAX_IDLE, Holder, Keeper
from dray.transport.receive_buffers import Bytes
from dray.transport.server_statistics import ServerStatistics
from dray.transport.trace import Trace

T = TypeVar("T")
Unpacked = TypeVar("Unpacked", covariant=True)


class UnpackAs(Protocol[Unpacked]):
    """Makes what a read returns of a payload's bytes, of which a part may still be to select."""

    def __call__(self, payload: Bytes, selection: Selection | None = None) -> Unpacked | DrayError: ...


class PayloadClient(Closing):
    """Reads payloads by reference. Thread-safe. The timeout of a call covers everything that the call does.

    Args:
        lane: ``"auto"`` uses the best lane that reaches the producer: ``shm`` on the same host, else ``ucx``,
            else ``tcp``. The name of a lane, or several names, restrict the choice to these: reading a reference
            without an endpoint on one of them is an error.
        secret: the job's secret, at least 16 random bytes, where servers have one.
        reader: this reader's id, 0 … readers - 1, where payloads are meant for several.
        verify: compare payloads with the checksums that servers send.
        inline_bytes: the server sends payloads of up to this size, at most 16 KiB, with the answer itself, as a
            copy: small ones are read faster, and no slot is held. With 0 only empty ones come that way.
        max_idle: idle connections kept for each endpoint.
        idle_seconds: an idle connection older than this is replaced before use.
        quarantine_seconds: how long a failed endpoint is skipped; twice as long each time it fails again without
            an answer in between, up to 16 times.
        attempts: transport failures one read survives, less one.
        clock: where time comes from.
        direct: lease payloads of producers on this host in shared memory, without asking their servers, where
            both sides can.
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
        direct: bool = True,
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
        buffers = network.receive_buffers()
        self._direct = DirectReads(reader, direct, buffers, lock=network.lock(), clock=clock, trace=trace)
        self._connections = Connections(
            self._lanes,
            network,
            clock,
            max_idle=max_idle,
            idle_seconds=idle_seconds,
            quarantine_seconds=quarantine_seconds,
            attempts=attempts,
            direct=self._direct,
            trace=trace,
            secret=secret,
            verify=verify,
            inline_bytes=inline_bytes,
            buffers=buffers,
        )
        self._reaper = network.lease_reaper()
        self._async_reads = AsyncReads()
        self._mark = here[0]

    # --- reading ----------------------------------------------------------------------------------------------

    def read(
        self,
        ref: PayloadRef,
        *,
        timeout: float | None = 30.0,
        consume: bool = True,
        fields: Fields | None = None,
        rows: Rows | None = None,
    ) -> Values:
        """The payload's arrays, in memory of their own.

        With `fields` or `rows`, only that part of the payload is copied, and over a network only that part
        travels, unless the whole is no larger than `inline_bytes` or the server is older than selections.

        Args:
            ref: what to read.
            timeout: seconds for connecting, reading and further attempts together; None for no limit.
            consume: acknowledge the payload, so that its slot can be used again. Otherwise it can be read again
                until `consume`.
            fields: the fields that are wanted, in any order; None for all. A nested value is named by the path of
                its keys, with dots between them, such as ``"info.reward"``. A dot or a backslash in a key has a
                backslash before it there, but not in the name of a field of the first level.
            rows: which rows of these are wanted: the name of an array of the first level → a slice, a pair
                ``(start, stop)``, or several of these, ascending and without overlap. Several come as one array.

        Raises:
            StaleSlotError: the payload was consumed or overwritten.
            ProducerLostError: its producer is gone.
            TransportError: it could not be read in time; it is still with its producer.
            AuthenticationError: this client does not have the job's secret.
            ReaderIdError: this client's reader id is not one of the ring's.
            PayloadFormatError: the bytes are not arrays; see `read_bytes`.
            SelectionError: the payload has no such fields or rows. It is not consumed.
        """
        return self._read(ref, timeout, consume, _unpack, selection=Selection.of(fields, rows))

    def read_bytes(self, ref: PayloadRef, *, timeout: float | None = 30.0, consume: bool = True) -> Bytes:
        """The payload as uint8 of shape (nbytes,), in memory of its own; otherwise like `read`."""
        return self._read(ref, timeout, consume, _as_bytes)

    async def read_async(
        self,
        ref: PayloadRef,
        *,
        timeout: float | None = 30.0,
        consume: bool = True,
        fields: Fields | None = None,
        rows: Rows | None = None,
    ) -> Values:
        """`read` for asyncio, in up to 32 threads of the client's own; further reads wait for a free thread.

        The payload is consumed when the awaiting task receives it; that of a cancelled read is released.
        """
        self._check_process()
        deadline, selection = Deadline.after(timeout, self._clock), Selection.of(fields, rows)
        found = await self._async_reads.run(lambda: self._hold_read(ref, deadline, selection), deadline)
        arrays = found.arrays
        found.end(consume)
        if isinstance(arrays, DrayError):
            raise arrays
        return arrays

    def lease(
        self,
        ref: PayloadRef,
        *,
        timeout: float | None = 30.0,
        fields: Fields | None = None,
        rows: Rows | None = None,
    ) -> InPlaceLease[Values]:
        """A context manager that yields the payload's arrays; on the shm lane in place, without a copy.

        A clean exit of the ``with`` block consumes the payload, an exception releases it. At the end the mapping
        is emptied. If the program still holds an array of it then, `LeaseInUseError` is raised, and the slot stays
        leased until the array is gone.

        Args:
            ref: what to lease.
            timeout: seconds until the payload is leased; None for no limit.
            fields: those that are wanted, as for `read`.
            rows: the rows of them, likewise. Several ranges of rows of one array are a copy.

        Raises:
            DrayError: the payload cannot be leased, with the types of `read`; by this call or when the block is
                entered.
        """
        selection = Selection.of(fields, rows)
        return self._lease(
            ref, timeout, lambda root, whole: LeasedArrays(root, selection if whole else None), selection
        )

    def lease_bytes(self, ref: PayloadRef, *, timeout: float | None = 30.0) -> InPlaceLease[LeasedBytes]:
        """`lease` without unpacking: the block gets an object whose `data` is uint8 of shape (nbytes,)."""
        return self._lease(ref, timeout, lambda root, _: LeasedBytes(root))

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
    ) -> Generator[ReadResult[Values], None, None]:
        """Read a batch, pipelined for each producer; yields a `ReadResult` per reference, in their order.

        Each payload is consumed when it is yielded, so that leaving the loop early loses none.

        Args:
            refs: what to read, of any producers.
            timeout: seconds that dray may use for the whole batch; None for no limit. Time in the body of the
                caller's loop does not count.
            consume: as in `read`.
            return_errors: yield the error of a payload that cannot be read as a result, and continue. Otherwise
                the first error is raised.
            in_place: only with ``consume=False``. Payloads of 64 KiB or more whose producers are on this host
                come without a copy where that is possible, as read-only arrays in their slots. The slot of one
                stays leased until its last array is gone.
            fields: those of each payload that are wanted, as for `read`.
            rows: the rows of them, likewise.

        Raises:
            DrayError: a payload cannot be read; the types are those of `read`.
        """
        if in_place and consume:
            raise ConfigError("in_place", in_place, "False unless consume is False")
        return self._read_many(
            _unpack, refs, timeout,
            consume=consume, return_errors=return_errors, in_place=in_place, selection=Selection.of(fields, rows),
        )  # fmt: skip

    def read_many_bytes(
        self,
        refs: Iterable[PayloadRef],
        *,
        timeout: float | None = 30.0,
        consume: bool = True,
        return_errors: bool = False,
    ) -> Generator[ReadResult[Bytes], None, None]:
        """`read_many` without unpacking: each payload is uint8 of shape (nbytes,)."""
        return self._read_many(_as_bytes, refs, timeout, consume=consume, return_errors=return_errors)

    # --- other requests ---------------------------------------------------------------------------------------

    def consume(self, refs: Iterable[PayloadRef], *, timeout: float | None = 30.0) -> int:
        """Free payloads that were read with ``consume=False``, or that will never be read.

        Returns how many were still there; those already gone are not an error.

        Args:
            refs: what to free, of any producers.
            timeout: seconds for all of them together; None for no limit.

        Raises:
            ProducerLostError: a producer is gone, and its payloads with it.
            TransportError: a producer could not be reached in time; call again.
        """
        self._check_process()
        deadline = Deadline.after(timeout, self._clock)
        grouped: dict[bytes, list[PayloadRef]] = {}
        for ref in refs:
            grouped.setdefault(ref.producer, []).append(ref)
        freed = sum(self._consume(group, deadline) for group in grouped.values())
        self._counters.add("consumed", freed)
        return freed

    def _consume(self, refs: Sequence[PayloadRef], deadline: Deadline) -> int:
        freed = 0
        others = []
        for ref in refs:
            try:
                lease = self._direct.lease(ref)
            except StaleSlotError:
                continue
            except SlotError:  # a wrong size, which CONSUME does not compare
                lease = None
            if lease is None:
                others.append(ref)
            else:
                freed += lease.end(consumed=True)
        return freed + (self._consume_over_connection(others, deadline) if others else 0)

    def _consume_over_connection(self, refs: Sequence[PayloadRef], deadline: Deadline) -> int:
        wanted = [(ref.slot, ref.sequence, self._reader) for ref in refs]
        found = self._connections.run(
            self._connections.attempts(refs[0], deadline),
            lambda connection, status_deadline, deadline: connection.consume(wanted, deadline, status_deadline),
        )
        return found.count(Status.OK)

    def stat(self, ref: PayloadRef, *, timeout: float | None = 30.0) -> ServerStatistics:
        """The statistics of the server that a reference names; see `PayloadServer.statistics`.

        Args:
            ref: a reference of any payload of the server.
            timeout: seconds; None for no limit.

        Raises:
            TransportError: the server could not be reached in time.
            ProtocolError: the answer is not that of a server.
        """
        self._check_process()
        attempts = self._connections.attempts(ref, Deadline.after(timeout, self._clock))
        return ServerStatistics.from_json(
            self._connections.run(
                attempts, lambda connection, status_deadline, _: connection.stat(status_deadline)
            )
        )

    # --- state ------------------------------------------------------------------------------------------------

    def statistics(self) -> ClientStatistics:
        """Counters of this client, and its state now."""
        counts = self._counters
        return self._connections.statistics(
            consumed=int(counts["consumed"]), failed_reads=int(counts["failed_reads"])
        )

    def forget(self, endpoint: str) -> None:
        """Close the idle connections to an endpoint whose producer has ended, instead of after 100 s."""
        self._connections.forget(endpoint)

    def close(self) -> None:
        """Make sure that all ACKs have arrived, then close all connections. Twice is fine.

        Calls that wait in other threads end at once with `BufferClosedError`; their payloads are not consumed.
        """
        if here[0] == self._mark:
            self._direct.close()
            self._reaper.close()
            self._connections.close()
            self._async_reads.close()

    def __repr__(self) -> str:
        return f"<PayloadClient {'/'.join(lane.name for lane in self._lanes)}>"

    # --- inside -----------------------------------------------------------------------------------------------

    def _read(
        self,
        ref: PayloadRef,
        timeout: float | None,
        consume: bool,
        unpack_as: UnpackAs[T],
        *,
        selection: Selection | None = None,
    ) -> T:
        self._check_process()
        lease = self._direct.lease(ref)
        if lease is not None:
            return self._copy_and_end(lease, consume, unpack_as, selection)
        attempts = self._connections.attempts(ref, Deadline.after(timeout, self._clock))
        return self._connections.run(attempts, self._read_request(ref, consume, unpack_as, selection))

    def _copy_and_end(
        self, lease: DirectLease, consume: bool, unpack_as: UnpackAs[T], selection: Selection | None
    ) -> T:
        """Copy a payload. Its lease ends last: an exception before that leaves the payload where it is."""
        payload = unpack_as(self._direct.copy(lease, selection))
        self._direct.end(lease, consume)
        if isinstance(payload, DrayError):
            raise payload
        return payload

    def _newly_direct(self, connection: Connection, ref: PayloadRef) -> DirectLease | None:
        """A direct lease, if the means for it have come with the connection."""
        if connection.attachment is None:
            return None
        try:
            return self._direct.lease(ref)
        except SlotError as error:
            raise Refused(error) from None

    def _read_request(
        self, ref: PayloadRef, consume: bool, unpack_as: UnpackAs[T], selection: Selection | None
    ) -> RequestFunction[T]:
        """The request of a read over a connection. The lease ends last here as well."""

        def request(connection: Connection, status_deadline: Deadline, deadline: Deadline) -> T:
            lease = self._newly_direct(connection, ref)
            if lease is not None:
                try:
                    return self._copy_and_end(lease, consume, unpack_as, selection)
                except PayloadError as error:
                    raise Refused(error) from None
            received = connection.read(
                ref, self._reader, status_deadline, deadline, copy=True, selection=selection
            )
            if not isinstance(received, ReceivedPayload):
                raise Refused(received)
            payload = unpack_as(received.data() if received.in_place else received.root)
            connection.finish(received, consume, deadline)
            if isinstance(payload, DrayError):
                raise Refused(payload)
            return payload

        return request

    def _lease(
        self, ref: PayloadRef, timeout: float | None, make: MakeContent[T], selection: Selection | None = None
    ) -> InPlaceLease[T]:
        self._check_process()
        lease = self._direct.lease(ref)
        if lease is not None:
            return DirectInPlaceLease(lease, make, self._direct)
        return self._hold(
            ref,
            Deadline.after(timeout, self._clock),
            copy=False,
            selection=selection,
            make=lambda received, kept: KeptInPlaceLease(received, kept, self._reaper, make),
            direct=lambda lease: DirectInPlaceLease(lease, make, self._direct),
        )

    def _hold_read(self, ref: PayloadRef, deadline: Deadline, selection: Selection | None) -> HeldRead:
        def direct(lease: DirectLease) -> HeldRead:
            arrays = _unpack(self._direct.copy(lease, selection))
            return HeldRead(arrays, lambda consumed: self._direct.end(lease, consumed))

        def kept(received: ReceivedPayload, kept: KeptLease) -> HeldRead:
            def end(consumed: bool) -> None:
                with kept.inside:
                    kept.end(consumed)

            return HeldRead(_unpack(received.data()), end)

        lease = self._direct.lease(ref)
        if lease is not None:
            return direct(lease)
        return self._hold(ref, deadline, copy=True, selection=selection, make=kept, direct=direct)

    def _hold(
        self,
        ref: PayloadRef,
        deadline: Deadline,
        *,
        copy: bool,
        selection: Selection | None,
        make: Callable[[ReceivedPayload, KeptLease], T],
        direct: Callable[[DirectLease], T],
    ) -> T:
        """Read a payload over a connection; its lease outlives this call, and belongs to what `make` returns.

        If the connection brings the means for direct leases, one is taken, for `direct`.
        """

        holder: ConnectionHolder = Holder()

        def request(connection: Connection, status_deadline: Deadline, deadline: Deadline) -> T:
            lease = self._newly_direct(connection, ref)
            if lease is not None:
                try:
                    return direct(lease)
                except SelectionError as error:
                    raise Refused(error) from None
            received = connection.read(
                ref, self._reader, status_deadline, deadline, copy=copy, selection=selection
            )
            if not isinstance(received, ReceivedPayload):
                raise Refused(received)
            if copy and received.from_slot and not connection.usable():
                raise ConnectionClosed("the lease may have ended while the payload was copied")
            connection.reads += 1
            connection.read_bytes += received.root.nbytes
            made = make(received, KeptLease(self._connections, holder, received.request))
            holder.keeper = Keeper.CALLER
            return made

        return self._connections.run(self._connections.attempts(ref, deadline), request, holder)

    def _read_many(
        self,
        unpack_as: UnpackAs[T],
        refs: Iterable[PayloadRef],
        timeout: float | None,
        *,
        consume: bool,
        return_errors: bool,
        in_place: bool = False,
        selection: Selection | None = None,
    ) -> Generator[ReadResult[T], None, None]:
        self._check_process()
        batch = Batch(
            self._connections,
            self._direct,
            refs,
            reader=self._reader,
            consume=consume,
            in_place=in_place,
            selection=selection,
            timeout=timeout,
            clock=self._clock,
        )
        orderly = False
        try:
            for ref in batch.refs:
                lease, found, whole = batch.next(ref)
                outcome = found if isinstance(found, DrayError) else unpack_as(found, selection if whole else None)
                if isinstance(outcome, DrayError):
                    self._counters.add("failed_reads")
                    if not return_errors:
                        batch.source.handed_out = lease
                        raise outcome
                result, source = ReadResult(ref, outcome), batch.source
                source.handed_out = lease  # no call between this and the `yield`
                yield result
            orderly = True
        finally:
            batch.leave(orderly)

    def _check_process(self) -> None:
        if here[0] != self._mark:
            raise BufferClosedError("the client belongs to the process that this one was forked from")


def _unpack(payload: Bytes, selection: Selection | None = None) -> Values | DrayError:
    try:
        return unpack(payload, selection=selection)
    except PayloadError as error:
        return error


def _as_bytes(payload: Bytes, selection: Selection | None = None) -> Bytes | DrayError:
    assert selection is None
    return payload


def _usable(choice: LaneChoice) -> tuple[Lane, ...]:
    """The lanes that this client may use, best first."""
    if not sys.platform.startswith("linux"):
        problem = f"{sys.platform} is not supported"
        raise ConfigError(
            "sys.platform", sys.platform, "must be linux; dray's lanes need epoll and memfd", problem
        )
    return chosen_lanes("lane", choice) or tuple(lane for lane in LANES.values() if lane.available)
