"""A batch from one producer over one connection: windows of requests, those with leases one at a time."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dray.clock import Deadline
from dray.errors import ConnectionClosed, DrayError, TransportError
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
    bounds the first window: once it has come the endpoint is known to answer.

    Raises:
        TransportError: the connection failed, or a deadline passed; what it has not brought is still `waiting`.
    """
    asked: deque[_Window] = deque()
    unasked = iter(tuple(waiting))
    due = next(unasked, None)
    ended: list[tuple[Request, bool]] = []
    while waiting:
        while due is not None and _ahead(asked, inline := due.nbytes <= connection.inline_bytes):
            most = _INLINE_WINDOW if inline else connection.identity.max_leases
            refs: list[PayloadRef] = []
            while due is not None and len(refs) < most and (due.nbytes <= connection.inline_bytes) is inline:
                refs.append(due)
                due = next(unasked, None)
            asked.append(_Window(refs, connection.ask(refs, reader, status_by, ended, copy=True), inline))
            ended = []
        window = asked.popleft()
        results = [
            connection.answer(ref, target, status_by, deadline)
            for ref, target in zip(window.refs, window.targets, strict=True)
        ]
        status_by = deadline
        outcomes = [result.data() if isinstance(result, Held) else result for result in results]
        if any(isinstance(result, Held) and result.from_slot for result in results) and not connection.usable():
            raise ConnectionClosed("the leases may have ended while the payloads were copied")
        given = 0
        try:
            for ref, outcome in zip(window.refs, outcomes, strict=True):
                given += 1
                waiting.popleft()
                yield ref, outcome
        except BaseException:
            with contextlib.suppress(TransportError):  # the server returns what it does not hear of
                connection.acknowledge(_ended(results, consume, given), deadline)
            raise
        finally:
            handed = zip(window.refs[:given], results[:given], strict=True)
            sizes = [ref.nbytes for ref, result in handed if isinstance(result, Held)]
            connection.reads += len(sizes)
            connection.read_bytes += sum(sizes)
        ended += _ended(results, consume, given)
    connection.acknowledge(ended, deadline)


def _ahead(asked: Sequence[_Window], inline: bool) -> bool:
    """Whether to ask for a window although others are on their way.

    What comes inline keeps no slot from the writer while the program is busy with the window before. After copies
    from slots the connection is looked at, so nothing else may be on its way then.
    """
    return not asked or (inline and len(asked) < _MOST_ASKED and asked[-1].inline)


def _ended(results: Sequence[Held | DrayError], consume: bool, given: int) -> list[tuple[Request, bool]]:
    """How the leases of a window end: those of the first `given`, which were handed out, and the others."""
    return [
        (result.request, consume and index < given)
        for index, result in enumerate(results)
        if isinstance(result, Held)
    ]
