"""A batch from one producer over one connection: windows of requests, each as many as there may be leases."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from dray.clock import Deadline
from dray.errors import ConnectionClosed, DrayError, TransportError
from dray.transport.connection import Connection, Held
from dray.transport.receive_buffers import Bytes
from dray.wire import PayloadRef
from dray.wire.handshake import Lane
from dray.wire.session import Request


def windows(
    connection: Connection,
    waiting: deque[PayloadRef],
    reader: int,
    consume: bool,
    status_by: Deadline,
    deadline: Deadline,
    count: Callable[[Connection, Sequence[PayloadRef]], None],
) -> Iterator[tuple[PayloadRef, Bytes | DrayError]]:
    """Yield what the connection brings, taking each reference off `waiting` as its result is handed out.

    A window's leases end with the requests of the next. `status_by` bounds the first window: once it has come the
    endpoint is known to answer. `count` is told of payloads that were handed out.

    Raises:
        TransportError: the connection failed, or a deadline passed; what it has not brought is still `waiting`.
    """
    ended: list[tuple[Request, bool]] = []
    while waiting:
        window = list(itertools.islice(waiting, connection.identity.max_leases))
        targets = connection.ask(window, reader, status_by, ended)
        results = [
            connection.answer(ref, target, status_by, deadline)
            for ref, target in zip(window, targets, strict=True)
        ]
        status_by = deadline
        outcomes = [result.data() if isinstance(result, Held) else result for result in results]
        if connection.lane is Lane.SHM and not connection.usable():
            raise ConnectionClosed("the leases may have ended while the payloads were copied")
        given = 0
        try:
            for ref, outcome in zip(window, outcomes, strict=True):
                given += 1
                waiting.popleft()
                yield ref, outcome
        except BaseException:
            with contextlib.suppress(TransportError):  # the server returns what it does not hear of
                connection.acknowledge(_ended(results, consume, given), deadline)
            raise
        finally:
            handed = zip(window[:given], results[:given], strict=True)
            count(connection, [ref for ref, result in handed if isinstance(result, Held)])
        ended = _ended(results, consume, given)
    connection.acknowledge(ended, deadline)


def _ended(results: Sequence[Held | DrayError], consume: bool, given: int) -> list[tuple[Request, bool]]:
    """How the leases of a window end: those of the first `given`, which were handed out, and the others."""
    return [
        (result.request, consume and index < given)
        for index, result in enumerate(results)
        if isinstance(result, Held)
    ]
