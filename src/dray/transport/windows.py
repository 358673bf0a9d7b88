"""A batch from one producer over one connection: windows of requests, two of them on their way."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dray.clock import Deadline
from dray.errors import BufferClosedError, ConnectionClosed, DrayError, TransportError
from dray.transport.connection import Connection, Held
from dray.transport.receive_buffers import Bytes
from dray.wire import PayloadRef
from dray.wire.client_session import Request

_INLINE_WINDOW = 32
"""Small payloads that are asked for and acknowledged together: the more, the fewer system calls for each."""

_MOST_ASKED = 2
"""Windows on their way: while one is handed out, the server is at work on the next."""


class _Window(NamedTuple):
    refs: Sequence[PayloadRef]
    targets: Sequence[Bytes | None]
    inline: bool


def windows(
    connection: Connection,
    waiting: deque[PayloadRef],
    reader: int,
    consume: bool,
    status_by: Deadline,
    deadline: Deadline,
) -> Iterator[tuple[PayloadRef, Bytes | DrayError]]:
    """Yield what the connection brings, taking each reference off `waiting` as its result is handed out.

    The leases of a window end with the requests of the next, after its payloads were handed out. `status_by`
    bounds the first answer: once it has come the endpoint is known to answer.

    Raises:
        TransportError: the connection failed, or a deadline passed; what it has not brought is still `waiting`.
    """
    asked: deque[_Window] = deque()
    unasked = iter(tuple(waiting))
    due = next(unasked, None)
    ended: list[tuple[Request, bool]] = []
    try:
        while waiting:
            while due is not None:
                inline = due.nbytes <= connection.inline_bytes
                most, together = _limits(connection, inline)
                if asked and (asked[-1].inline is not inline or len(asked) == together):
                    break
                refs: list[PayloadRef] = []
                while due is not None and len(refs) < most and (due.nbytes <= connection.inline_bytes) is inline:
                    refs.append(due)
                    due = next(unasked, None)
                told, ended = ended, []
                asked.append(_Window(refs, connection.ask(refs, reader, status_by, told, copy=True), inline))
            window = asked.popleft()
            results = []
            for ref, target in zip(window.refs, window.targets, strict=True):
                results.append(connection.answer(ref, target, status_by, deadline))
                status_by = deadline
            outcomes = [result.data() if isinstance(result, Held) else result for result in results]
            if any(isinstance(each, Held) and each.from_slot for each in results) and not connection.usable():
                raise ConnectionClosed("the leases may have ended while the payloads were copied")
            given = 0
            try:
                for ref, outcome in zip(window.refs, outcomes, strict=True):
                    given += 1
                    waiting.popleft()
                    yield ref, outcome
            finally:
                handed = zip(window.refs[:given], results[:given], strict=True)
                sizes = [ref.nbytes for ref, result in handed if isinstance(result, Held)]
                connection.reads += len(sizes)
                connection.read_bytes += sum(sizes)
                ended += _ended(results, consume, given)
    except BaseException:
        # Those that do not get through are repeated over another connection.
        with contextlib.suppress(TransportError, BufferClosedError):
            connection.acknowledge(ended, deadline)
        raise
    connection.acknowledge(ended, deadline)


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


def _ended(results: Sequence[Held | DrayError], consume: bool, given: int) -> list[tuple[Request, bool]]:
    """How the leases of a window end: those of the first `given`, which were handed out, and the others."""
    return [
        (result.request, consume and index < given)
        for index, result in enumerate(results)
        if isinstance(result, Held)
    ]
