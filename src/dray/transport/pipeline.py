"""`read_many`: results in the order of the references, requests pipelined for each producer.

Payloads of producers on this host are leased directly, one after the other. For the others, a `Pipeline` reads
from one producer over one connection at a time, in windows of requests; up to two windows are on their way. A
`Batch` has one pipeline for each producer; at most `MAX_OPEN` of them have a connection.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, Generic, NamedTuple, Protocol, TypeAlias, TypeVar

from dray.clock import Clock, Deadline
from dray.errors import (
    BufferClosedError,
    ConfigError,
    ConnectionClosed,
    DrayError,
    SelectionError,
    SlotError,
    TransportError,
)
from dray.payload import Selection
from dray.protocol import PayloadRef
from dray.protocol.client_session import Request
from dray.ring.attachment import DirectLease
from dray.transport.attempts import Attempts
from dray.transport.connection import Connection, ReceivedPayload
from dray.transport.connections import ConnectionHolder, Connections
from dray.transport.direct_reads import DirectReads
from dray.transport.pool import Holder, Keeper
from dray.transport.receive_buffers import MIN_POOLED_BYTES, Bytes

MAX_OPEN: Final = 16
"""Pipelines of one batch that have a connection at a time. On the ucx lane each has a UCX worker."""

_INLINE_WINDOW = 32
"""Small payloads that are asked for and acknowledged together: the more, the fewer system calls for each."""

_MAX_WINDOWS = 2
"""Windows on their way: while the caller works on one, the server works on the next."""

T = TypeVar("T")


class ReadResult(Generic[T]):
    """The result for one reference of a batch. Read-only.

    Args:
        ref: the reference.
        outcome: the payload, or the error that stands for it.
    """

    __slots__ = ("_outcome", "_ref")

    def __init__(self, ref: PayloadRef, outcome: T | DrayError) -> None:
        self._ref = ref
        self._outcome = outcome

    @property
    def ref(self) -> PayloadRef:
        """The reference."""
        return self._ref

    @property
    def outcome(self) -> T | DrayError:
        """The payload, or the error that stands for it."""
        return self._outcome

    @property
    def error(self) -> DrayError | None:
        """Why the payload could not be read; None if it was."""
        return self._outcome if isinstance(self._outcome, DrayError) else None

    @property
    def payload(self) -> T:
        """The arrays (`read_many`), or uint8 of shape (nbytes,) (`read_many_bytes`).

        Raises:
            DrayError: the payload could not be read; this is `error`.
        """
        if isinstance(self._outcome, DrayError):
            raise self._outcome
        return self._outcome

    def __repr__(self) -> str:
        state = repr(self.error) if self.error is not None else "read"
        return f"<ReadResult of slot {self._ref.slot} sequence {self._ref.sequence}: {state}>"


Received: TypeAlias = tuple[tuple[Request, bool] | None, Bytes | DrayError]
"""One result of a pipeline: what `Connection.handed_out` is set to, and the payload's bytes or its error."""


class HandedOut(Protocol):
    """Where the lease of the payload goes that is handed out next; see `Batch`."""

    handed_out: Any


class _RequestGroup(NamedTuple):
    targets: Sequence[Bytes | None]
    inline: bool


class Batch:
    """One call of `read_many`. Time counts only while `next` or `leave` runs.

    The caller gets `next` for each of `refs` in turn, unpacks it, and sets `handed_out` of `source` to the lease
    directly before the ``yield`` that hands the payload out. No exception of a signal handler can come between
    these two, so a payload is consumed if and only if it was handed out. A direct lease ends with the call of
    `next` after it, that of a connection with the next requests to its producer; all of them end in `leave`.

    Args:
        connections: the client's connections.
        direct: the client's direct leases.
        refs: what to read.
        reader: the client's reader id.
        consume: payloads that are handed out end as consumed.
        in_place: large payloads that are leased directly are handed out in their slots.
        selection: the part of each payload that is wanted; what is handed out in a slot is whole.
        timeout: seconds for the whole batch; None for no limit.

    Attributes:
        refs: what to read, as a list.
        source: where the last result came from: a connection, or this batch.
        handed_out: the direct lease of the payload that was handed out last.
    """

    def __init__(
        self,
        connections: Connections,
        direct: DirectReads,
        refs: Iterable[PayloadRef],
        *,
        reader: int,
        consume: bool,
        in_place: bool,
        selection: Selection | None,
        timeout: float | None,
        clock: Clock,
    ) -> None:
        self.refs = list(refs)
        self.source: HandedOut = self
        self.handed_out: DirectLease | None = None
        self._direct = direct
        self._consume = consume
        self._in_place = in_place
        self._selection = selection
        self._clock = clock
        self._spent = 0.0
        self._timeout = math.inf if timeout is None else timeout
        self._connections = connections
        self._reader = reader
        self._taken = 0  # results
        self._pipelines: dict[bytes, Pipeline] = {}  # by producer; none before one is needed
        self._open: dict[Pipeline, None] = {}  # the least recently used one first
        self._last: Pipeline | None = None

    def next(self, ref: PayloadRef) -> tuple[Any, Bytes | DrayError, bool]:
        """The result for the reference that is due: its lease, the payload's bytes or its error.

        The last of the three is true for a payload in its slot, which is whole.

        Raises:
            BufferClosedError: the client was closed; leases have ended with their connections.
        """
        direct, ended = self._direct, self.handed_out
        if ended is not None:
            direct.end(ended, self._consume)
            self.handed_out = None
        taken = self._taken
        self._taken = taken + 1
        pipeline = self._pipelines[ref.producer] if self._pipelines else None
        if pipeline is None or not pipeline.results:
            if (
                pipeline is not None
                and pipeline.connection is not None
                and pipeline.connection.attachment is not None
            ):
                self._give_up(pipeline)
            if pipeline is None or pipeline.connection is None:
                self.source = self
                try:
                    lease = direct.lease(ref)
                except SlotError as error:
                    if pipeline is not None:
                        pipeline.waiting.popleft()
                    return None, error, False
                if lease is not None:
                    if pipeline is not None:
                        pipeline.waiting.popleft()
                    if self._in_place and lease.nbytes >= MIN_POOLED_BYTES:
                        return None, direct.in_place(lease), True
                    try:
                        return lease, direct.copy(lease, self._selection), False
                    except SelectionError as error:
                        return None, error, False
        if pipeline is None:
            self._group(self.refs[taken:])
            pipeline = self._pipelines[ref.producer]
        if pipeline is not self._last or not pipeline.results:
            self._prepare(pipeline)
        return *self._next_of(pipeline), False

    def _group(self, refs: Iterable[PayloadRef]) -> None:
        """Make the pipelines of all producers, for what is left."""
        grouped: dict[bytes, list[PayloadRef]] = {}
        for ref in refs:
            grouped.setdefault(ref.producer, []).append(ref)
        self._pipelines = {
            producer: Pipeline(
                self._connections, each, reader=self._reader, consume=self._consume, selection=self._selection
            )
            for producer, each in grouped.items()
        }

    def _next_of(self, pipeline: Pipeline) -> Received:
        _, found = pipeline.results[0]
        connection = pipeline.connection
        self.source = self if connection is None else connection
        if connection is not None:
            if pipeline.holder.connection is None:
                raise BufferClosedError("the client was closed between two results")
            if connection.handed_out is not None:
                connection.note_handed_out()
            if not isinstance(found, DrayError):
                connection.reads += 1
                connection.read_bytes += found.nbytes
        pipeline.waiting.popleft()
        return pipeline.results.popleft()

    def _give_up(self, pipeline: Pipeline) -> None:
        """End the use of a connection: what follows may be leased directly."""
        deadline = self._deadline()
        try:
            pipeline.leave(deadline, orderly=True)
            self._open.pop(pipeline, None)
        finally:
            self._spent = deadline.elapsed

    def _end_direct(self) -> None:
        lease = self.handed_out
        if lease is not None:
            self._direct.end(lease, self._consume)
            self.handed_out = None

    def leave(self, orderly: bool) -> None:
        """End the batch: send the ACKs that are due, and release what was not handed out.

        Args:
            orderly: everything was handed out; the connections are kept for later calls.
        """
        self._end_direct()
        # Not those in `_open`: an exception of a signal handler may have come while it was changed.
        left = [pipeline for pipeline in self._pipelines.values() if pipeline.connection is not None]
        _leave_all(left, self._deadline(), orderly)

    def _prepare(self, pipeline: Pipeline) -> None:
        """Make the pipeline that is due the one used last, with at least one result."""
        deadline = self._deadline()
        used, last, self._last = self._open, self._last, pipeline
        try:
            if last is not None and not last.waiting:
                last.leave(deadline, orderly=True)
                used.pop(last, None)
            if not pipeline.results and pipeline.connection is None and len(used) >= MAX_OPEN:
                oldest = next(iter(used))
                oldest.leave(deadline, orderly=True)
                used.pop(oldest, None)
            used.pop(pipeline, None)
            used[pipeline] = None
            if not pipeline.results:
                pipeline.fill(deadline)
            if pipeline.connection is None:
                used.pop(pipeline, None)
        finally:
            self._spent = deadline.elapsed

    def _deadline(self) -> Deadline:
        """The batch's deadline, as if the caller had used no time."""
        began = self._clock.now() - self._spent
        return Deadline(began + self._timeout, self._clock, began)


class Pipeline:
    """Reads payloads of one producer, window by window. The leases of a window end with the requests of the next.

    Attributes:
        connection: where the results came from; None if there is none.
        holder: keeps the connection between two results; it is empty once closing the client has ended it.
        waiting: what is not handed out, in order.
        results: the first of it that was received.
    """

    def __init__(
        self,
        connections: Connections,
        refs: Sequence[PayloadRef],
        *,
        reader: int,
        consume: bool,
        selection: Selection | None,
    ) -> None:
        self._selection = selection
        self.connection: Connection | None = None
        self.results: deque[Received] = deque()
        self.waiting = deque(refs)
        self.holder: ConnectionHolder = Holder()
        self._connections = connections
        self._attempts: Attempts | None = None
        self._reader = reader
        self._consume = consume
        self._asked: deque[_RequestGroup] = deque()
        self._unasked: Iterator[PayloadRef] = iter(())
        self._due: PayloadRef | None = None

    def fill(self, deadline: Deadline) -> None:
        """Receive the next window. An error that ends the pipeline becomes the result of everything that is left.

        Raises:
            BufferClosedError: the client is closed.
        """
        try:
            if self._attempts is None:
                self._attempts = self._connections.attempts(self.waiting[0], deadline)
        except (TransportError, ConfigError) as unusable:
            self.results.extend((None, unusable) for _ in self.waiting)
            return
        self._attempts.deadline = deadline
        try:
            self._connections.run(self._attempts, self._receive_window, self.holder)
        except DrayError as final:
            self._forget()
            self.results.extend((None, final) for _ in self.waiting)
        except BaseException:
            self._forget()
            raise

    def leave(self, deadline: Deadline, *, orderly: bool) -> None:
        """Give up the connection, if any: send the ACKs that are due, and release what was not handed out.

        Args:
            orderly: no result was taken without being handed out. Then the connection is kept for later calls, if
                nothing is on its way, and the pipeline can be filled again.
        """
        holder = self.holder
        if self.connection is None:
            return
        with holder.inside:
            try:
                connection = self._connections.resume(holder)
                usable = orderly and not self._asked
                connection.note_handed_out()
                if usable:
                    connection.ended += [(lease[0], False) for lease, _ in self.results if lease is not None]
                try:
                    connection.end_leases(deadline)
                except (TransportError, BufferClosedError):
                    usable = False
                if usable:
                    self._connections.checkin(holder)
                else:
                    self._connections.abandon(holder, deadline)
                self._forget()
            except BufferClosedError:  # closing the client has ended it
                self._drop()
            except BaseException:
                self._drop()
                raise

    # --- inside -----------------------------------------------------------------------------------------------

    def _receive_window(self, connection: Connection, status_deadline: Deadline, deadline: Deadline) -> None:
        """Ask for as many windows as may be on their way, and receive the oldest."""
        if connection is self.connection:
            status_deadline = deadline  # the endpoint is known to answer
        else:
            self.connection = connection
            self._asked.clear()
            self._unasked = iter(tuple(self.waiting))
            self._due = next(self._unasked, None)
        self._ask(connection, status_deadline)
        self.results.extend(self._receive(connection, status_deadline, deadline))
        self.holder.keeper = Keeper.CALLER

    def _forget(self) -> None:
        self.connection = None
        self.results.clear()
        self._asked.clear()
        if self._attempts is not None:
            self._attempts.under_way = False

    def _drop(self) -> None:
        self._forget()
        self._connections.discard(self.holder)

    def _receive(self, connection: Connection, status_deadline: Deadline, deadline: Deadline) -> list[Received]:
        """The results of the oldest window."""
        found: list[Received] = []
        from_slot = False
        for target in self._asked.popleft().targets:
            received = connection.answer(target, status_deadline, deadline, selection=self._selection)
            status_deadline = deadline  # the endpoint is known to answer
            if isinstance(received, ReceivedPayload):
                from_slot = from_slot or received.from_slot
                found.append(((received.request, self._consume), received.root))
            else:
                found.append((None, received))
        if from_slot and not connection.usable():
            raise ConnectionClosed("the leases may have ended while the payloads were copied")
        return found

    def _ask(self, connection: Connection, deadline: Deadline) -> None:
        """Ask for as many windows as may be on their way."""
        while self._due is not None:
            inline = self._due.nbytes <= connection.inline_bytes
            size, windows = _limits(connection, inline)
            if self._asked and (self._asked[-1].inline is not inline or len(self._asked) == windows):
                break
            refs: list[PayloadRef] = []
            while (
                self._due is not None
                and len(refs) < size
                and (self._due.nbytes <= connection.inline_bytes) is inline
            ):
                refs.append(self._due)
                self._due = next(self._unasked, None)
            targets = connection.ask(refs, self._reader, deadline, copy=True, selection=self._selection)
            self._asked.append(_RequestGroup(targets, inline))


def _limits(connection: Connection, inline: bool) -> tuple[int, int]:
    """The payloads of a window, and the windows that may be on their way.

    After copies from slots the connection is tested for its end, so nothing else may be on its way then.
    """
    leases = connection.identity.max_leases
    if connection.attachment is not None:  # what follows is leased directly, if that is possible again
        return 1, 1
    if inline:
        return _INLINE_WINDOW, _MAX_WINDOWS
    if connection.in_band and leases >= _MAX_WINDOWS:
        return leases // _MAX_WINDOWS, _MAX_WINDOWS
    return leases, 1


def _leave_all(pipelines: Sequence[Pipeline], deadline: Deadline, orderly: bool) -> None:
    """Leave every pipeline, also after an exception in one of them."""
    if pipelines:
        try:
            pipelines[0].leave(deadline, orderly=orderly)
        finally:
            _leave_all(pipelines[1:], deadline, orderly)
