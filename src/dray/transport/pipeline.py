"""A batch from one producer over one connection at a time: windows of requests, two of them on their way."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dray.clock import Deadline
from dray.errors import BufferClosedError, ConnectionClosed, DrayError, TransportError
from dray.protocol import PayloadRef
from dray.protocol.client_session import Request
from dray.transport.connection import Connection, Held
from dray.transport.connections import ConnectionHolder, Connections
from dray.transport.pool import Holder, Keeper
from dray.transport.receive_buffers import Bytes

_INLINE_WINDOW = 32
"""Small payloads that are asked for and acknowledged together: the more, the fewer system calls for each."""

_MOST_ASKED = 2
"""Windows on their way: while one is handed out, the server is at work on the next."""


class _Window(NamedTuple):
    refs: Sequence[PayloadRef]
    targets: Sequence[Bytes | None]
    inline: bool


class Result(NamedTuple):
    """What became of one payload.

    Attributes:
        ref: its reference.
        lease: how its lease ends once it is handed out, as `Connection.handed_out` has it; None without one.
        outcome: its bytes, or why it could not be read.
    """

    ref: PayloadRef
    lease: tuple[Request, bool] | None
    outcome: Bytes | DrayError


class Windows:
    """Reads a batch, window by window.

    Its user goes through the results of `next`, calls `hand_out` for each, and then sets `connection.handed_out`
    to its `lease` right before the ``yield`` that hands it out: no exception can come between these two. The
    leases of a window end with the requests of the next.

    Args:
        connections: the client's connections.
        refs: what to read, all of one producer; at least one.
        reader: the client's reader id.
        consume: leases of payloads that are handed out end as consumed.
        deadline: for the whole batch.

    Attributes:
        connection: where the results came from; None once there is none any more.

    Raises:
        As `Connections.attempts`.
    """

    def __init__(
        self, connections: Connections, refs: Sequence[PayloadRef], reader: int, consume: bool, deadline: Deadline
    ) -> None:
        self.connection: Connection | None = None
        self._connections = connections
        self._attempts = connections.attempts(refs[0], deadline)
        self._reader = reader
        self._consume = consume
        self._deadline = deadline
        self._waiting = deque(refs)
        self._holder: ConnectionHolder = Holder()
        self._asked: deque[_Window] = deque()
        self._unasked: Iterator[PayloadRef] = iter(())
        self._due: PayloadRef | None = None
        self._status_by = deadline

    def next(self) -> Sequence[Result]:
        """The results of the next window, which the caller hands out; none when the batch is over.

        What ends the batch is the outcome of all that is left of it.
        """
        if not self._waiting:
            if self.connection is None:
                return ()
            self._attempts.end()  # all that is left to do is to end leases, which another connection cannot do
        try:
            return self._connections.run(self._attempts, self._next, self._holder)
        except DrayError as final:
            self.connection = None
            return [Result(ref, None, final) for ref in self._waiting]
        except BaseException:
            self.connection = None
            raise

    def hand_out(self, result: Result) -> None:
        """Note that a result is about to be handed out.

        Raises:
            BufferClosedError: the client was closed meanwhile; the leases have ended with their connection.
        """
        self._waiting.popleft()
        connection = self.connection
        if connection is None:
            return
        if self._holder.connection is None:
            raise BufferClosedError("the client was closed meanwhile")
        connection.note_handed_out()
        if result.lease is not None:
            connection.reads += 1
            connection.read_bytes += result.ref.nbytes

    def leave(self) -> None:
        """End the batch early, unless it is over: what was not handed out is released."""
        holder = self._holder
        if self.connection is None:
            return
        with holder.inside:
            try:
                connection = self._connections.resume(holder)
                with contextlib.suppress(TransportError, BufferClosedError):
                    connection.end_leases(self._deadline)
                self._connections.abandon(holder, self._deadline)
            except BufferClosedError:  # closing the client has ended it
                self._connections.discard(holder)
            except BaseException:
                self._connections.discard(holder)
                raise
            finally:
                self.connection = None

    # --- inside -----------------------------------------------------------------------------------------------

    def _next(self, connection: Connection, status_by: Deadline, deadline: Deadline) -> Sequence[Result]:
        if not self._waiting:
            connection.end_leases(deadline)
            self.connection = None
            return ()
        if connection is not self.connection:  # what it has brought is known once its first window has come
            self.connection = connection
            self._status_by = status_by
            self._asked.clear()
            self._unasked = iter(tuple(self._waiting))
            self._due = next(self._unasked, None)
        results = self._window(connection)
        self._holder.keeper = Keeper.CALLER
        return results

    def _window(self, connection: Connection) -> list[Result]:
        """Ask for as many windows as may be on their way, and take the first of them."""
        self._ask(connection)
        window = self._asked.popleft()
        results = []
        for ref, target in zip(window.refs, window.targets, strict=True):
            results.append(connection.answer(ref, target, self._status_by, self._deadline))
            self._status_by = self._deadline  # the endpoint is known to answer
        outcomes = [result.data() if isinstance(result, Held) else result for result in results]
        if any(isinstance(each, Held) and each.from_slot for each in results) and not connection.usable():
            raise ConnectionClosed("the leases may have ended while the payloads were copied")
        leases = [(result.request, self._consume) if isinstance(result, Held) else None for result in results]
        return [Result(*each) for each in zip(window.refs, leases, outcomes, strict=True)]

    def _ask(self, connection: Connection) -> None:
        while self._due is not None:
            inline = self._due.nbytes <= connection.inline_bytes
            most, together = _limits(connection, inline)
            if self._asked and (self._asked[-1].inline is not inline or len(self._asked) == together):
                break
            refs: list[PayloadRef] = []
            while (
                self._due is not None
                and len(refs) < most
                and (self._due.nbytes <= connection.inline_bytes) is inline
            ):
                refs.append(self._due)
                self._due = next(self._unasked, None)
            targets = connection.ask(refs, self._reader, self._status_by, copy=True)
            self._asked.append(_Window(refs, targets, inline))


def _limits(connection: Connection, inline: bool) -> tuple[int, int]:
    """How many payloads to ask for together, and how many such windows may be on their way.

    After copies from slots the connection is looked at, so nothing else may be on its way then.
    """
    leases = connection.identity.max_leases
    if inline:
        return _INLINE_WINDOW, _MOST_ASKED
    if connection.in_band and leases >= _MOST_ASKED:
        return leases // _MOST_ASKED, _MOST_ASKED
    return leases, 1
