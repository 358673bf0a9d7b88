"""`Consumer`: takes the payloads of a stream."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, get_args

from dray.clock import MONOTONIC, Deadline
from dray.errors import BufferClosedError, ConfigError, StreamEnded
from dray.exclusive import Exclusive
from dray.forking import here
from dray.identifiers import PayloadId
from dray.payload import PayloadSchema, Selection
from dray.payload.selection import Fields, Rows
from dray.protocol.handshake import check_secret
from dray.resources import Closing
from dray.streams.addresses import find_stream
from dray.streams.event_loop import Readable
from dray.streams.inbox import Inbox
from dray.streams.payload import Payload
from dray.streams.producer import schema_text
from dray.streams.registry import checked_name
from dray.streams.source import Source
from dray.streams.wanted import Report, Wanted

Acknowledge = Literal["next", "manual"]

MAX_PREFETCH = 4096

FIND_SECONDS = 30.0
"""Time limit for finding the producer of a payload that is acknowledged by its id."""

_NEVER = Deadline.after(None)
_NOW = Deadline.after(0.0)


@dataclass(frozen=True, slots=True)
class ConsumerStatistics:
    """A consumer in this process. Counters start with its first use there."""

    producers: int  # that are attached now
    attached: int  # that have ever attached
    ended: int  # that have closed their stream
    lost: int  # that have died
    payloads: int  # that the program has got
    redelivered: int  # of those, that were handed out before
    copied: int  # of those, that were copied because arrays of others are kept
    gone: int  # that were dropped or taken back before the program got them
    returned: int  # that were given back because there were enough
    acknowledged: int  # that were acknowledged here


class Consumer(Closing):
    """Takes payloads of the stream `stream`. A context manager, and an iterator over the payloads.

    Iteration has no time limit. It ends when every producer that was attached has closed its stream and nothing is
    left; after the death of a producer it waits for another one. Every 30 s a line in the log names what it waits
    for.

    The consumer can be pickled. In each process, also in a forked one, it attaches at its first use there, as a
    consumer of its own.

    Args:
        stream: the name of a stream of this user on this host, or the addresses of producers on other hosts, such
            as ``["tcp://10.0.0.3:7777"]``.
        group: the name of the group: a payload goes to one of its consumers at a time.
        ack: ``"next"``: a payload is acknowledged when the next one is asked for, and at the end of the block; an
            exception that leaves the block gives it back. ``"manual"``: `acknowledge` does it.
        prefetch: payloads that may lie here and were not handed to the program yet, 0 … 4096. With 0, producers
            give a payload only while the program waits for it.
        schema: what payloads must match; a producer with another schema is an error.
        fields: those of each payload that are wanted, as for `PayloadClient.read`.
        rows: the rows of them, likewise. From another host, only this part travels. A payload without it is an
            error of the call that would get it, and is given back.
        secret: the secret of the producers at addresses.
        scope: where the name is known; see `dray.streams.registry.default_scope`.
        direct: use payloads in the memory of producers on this host where that is possible.

    Raises:
        ConfigError: an argument is not allowed.
        SelectionError: `fields` and `rows` cannot be selected from any payload.
    """

    def __init__(
        self,
        stream: str | Sequence[str],
        *,
        group: str = "default",
        ack: Acknowledge = "next",
        prefetch: int = 2,
        schema: PayloadSchema | None = None,
        fields: Fields | None = None,
        rows: Rows | None = None,
        secret: bytes | None = None,
        scope: str | None = None,
        direct: bool = True,
    ) -> None:
        if ack not in get_args(Acknowledge):
            raise ConfigError("ack", ack, " or ".join(map(repr, get_args(Acknowledge))))
        if prefetch.__class__ is not int or not 0 <= prefetch <= MAX_PREFETCH:
            raise ConfigError("prefetch", prefetch, f"an integer from 0 to {MAX_PREFETCH}")
        check_secret(secret)
        name, scope, endpoints = find_stream(stream, scope)
        self._wanted = Wanted(
            name=name,
            scope=scope,
            endpoints=endpoints,
            group=checked_name(group, "group"),
            prefetch=prefetch,
            schema=schema_text(schema),
            selection=Selection.of(fields, rows),
            secret=secret,
            direct=direct,
        )
        self._ack: Acknowledge = ack
        self._reset()

    def _reset(self) -> None:
        self._exclusive = Exclusive()
        self._inbox: Inbox | None = None
        self._waiting: Readable | None = None
        self._current: list[Payload] = []
        self._held: list[Payload] = []  # taken by a `batch` that did not get all of its payloads in time
        self._closed = False
        self._payloads = self._redelivered = self._acknowledged = 0
        self._mark = here[0]

    # --- payloads ---------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Payload]:
        return self

    def __next__(self) -> Payload:
        with self._exclusively():
            inbox = self._begin_call()
            payload = self._held.pop(0) if self._held else self._next(inbox, _NEVER)
            if payload is None:
                raise StopIteration
            self._current = [payload]
            inbox.in_hand = None
            return payload

    def get(self, timeout: float | None = 30.0) -> Payload:
        """The next payload.

        Args:
            timeout: seconds; None for no limit.

        Raises:
            StreamTimeout: none came in time; the message names what was waited for.
            StreamEnded: all producers have closed their streams, and nothing is left.
        """
        return self.batch(1, timeout=timeout)[0]

    def batch(self, n: int, *, timeout: float | None = 30.0) -> list[Payload]:
        """The next `n` payloads, fewer only when producers put no more. They are acknowledged together.

        Args:
            n: how many, at most as many as the slots of the producers.
            timeout: seconds for all of them; None for no limit.

        Raises:
            StreamTimeout: they did not come in time. The next call gets those that did.
            StreamEnded: all producers have closed their streams, and nothing is left.
        """
        if n.__class__ is not int or n < 1:
            raise ConfigError("n", n, "an integer of 1 or more")
        deadline = Deadline.after(timeout)
        with self._exclusively():
            inbox = self._begin_call()
            found, self._held = self._held, []
            try:
                while len(found) < n:
                    payload = self._next(inbox, deadline, more=bool(found))
                    if payload is None:
                        break
                    found.append(payload)
                    inbox.in_hand = None
            except BaseException:
                self._held = found
                raise
            found, self._held = found[:n], found[n:]
            if not found:
                raise StreamEnded(f"{self._wanted} has ended: all producers have closed, and nothing is left")
            self._current = list(found)
            return found

    def __aiter__(self) -> AsyncIterator[Payload]:
        return self

    async def __anext__(self) -> Payload:
        with self._exclusively():
            inbox = self._begin_call()
        report = Report(MONOTONIC)
        while True:
            with self._exclusively():
                self._check(inbox)
                inbox.take_in()
                payload = self._held.pop(0) if self._held else self._pop(inbox, _NOW)
                if payload is not None:
                    self._current = [payload]
                    inbox.in_hand = None
                    return payload
                if inbox.finished:
                    raise StopAsyncIteration
                report.log(inbox)
                timeout = min(inbox.prepare_to_wait(), report.remaining(bool(inbox.producers)))
                waiting = Readable(inbox.fileno()) if timeout else None
                self._waiting = waiting
            if waiting is not None:
                try:
                    await waiting.wait(timeout)
                finally:
                    waiting.close()

    @property
    def ready(self) -> int:
        """How many payloads are here. Up to `prefetch` of them come while the program asks for this number."""
        with self._exclusively():
            return self._opened().count_ready() + len(self._held)

    # --- their end --------------------------------------------------------------------------------------------

    def acknowledge(self, payload: Payload | PayloadId | Iterable[Payload | PayloadId]) -> None:
        """The group has consumed a payload, or several: they are handed out no more, and their slots become free.

        What is gone already is not an error. Another thread may wait for payloads meanwhile.

        Args:
            payload: payloads, or their ids. An id may have come from another process of this user.

        Raises:
            StreamTimeout: the producer of a payload cannot be found.
            TransportError: a producer on another host could not be reached.
        """
        each: Iterable[Payload | PayloadId] = (payload,) if isinstance(payload, Payload | PayloadId) else payload
        for one in each:
            if isinstance(one, Payload):
                one.acknowledge()
            else:
                source = self._source_of(one)
                if source is not None:
                    source.acknowledge(one, None)
            self._acknowledged += 1

    def _source_of(self, payload: PayloadId) -> Source | None:
        """The producer of a payload; None if it is gone. Another thread may wait in this consumer meanwhile."""
        inbox = self._inbox
        if (
            inbox is not None
            and here[0] == self._mark
            and (source := inbox.source_of(payload.producer)) is not None
        ):
            return source
        with self._exclusively():
            return self._opened().find(payload.producer, Deadline.after(FIND_SECONDS))

    # --- state ------------------------------------------------------------------------------------------------

    @property
    def producers(self) -> tuple[str, ...]:
        """The producers that are attached: process and command, or address."""
        with self._exclusively():
            return tuple(self._opened().producers)

    def statistics(self) -> ConsumerStatistics:
        """Counters of this consumer in this process."""
        with self._exclusively():
            inbox = self._opened()
            counts = inbox.counts()
            return ConsumerStatistics(
                producers=len(inbox.producers), attached=inbox.attached, ended=inbox.ended, lost=inbox.lost,
                payloads=self._payloads, redelivered=self._redelivered, copied=counts["copies"],
                gone=counts["gone"], returned=inbox.returned, acknowledged=self._acknowledged,
            )  # fmt: skip

    def __enter__(self) -> Self:
        with self._exclusively():
            self._opened()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(acknowledge=kind is None)

    def close(self, acknowledge: bool = True) -> None:
        """End the consumer in this process, also while another thread waits in it. Twice is fine.

        What it was given and has not acknowledged goes to other consumers. Values of its payloads stay valid.

        Args:
            acknowledge: with ``ack="next"``, acknowledge the payload that was handed out last.
        """
        if here[0] != self._mark:
            return
        self._closed = True
        inbox = self._inbox
        if inbox is not None:
            inbox.interrupt()
        with self._exclusively():
            inbox, self._inbox = self._inbox, None
            if inbox is None:
                return
            if self._waiting is not None:
                self._waiting.interrupt()
            with contextlib.closing(inbox):
                if acknowledge and self._ack == "next":
                    for payload in self._current:
                        payload.acknowledge()
                self._current, self._held = [], []

    def __reduce__(self) -> tuple[Any, ...]:
        return _remake, (self._wanted, self._ack)

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self._payloads} payloads"
        return f"<Consumer of {self._wanted}, group {self._wanted.group!r}, {state}>"

    # --- inside -----------------------------------------------------------------------------------------------

    def _begin_call(self) -> Inbox:
        """The inbox; what the calls before it have handed out is acknowledged."""
        inbox = self._opened()
        if inbox.in_hand is not None:
            inbox.give_back_lost()
        self._acknowledge_current()
        return inbox

    def _acknowledge_current(self) -> None:
        if self._ack == "next":
            while self._current:
                payload = self._current[-1]
                if not payload.ended:
                    payload.end(ring=False)
                    self._acknowledged += 1
                self._current.pop()
        else:
            self._current = []

    def _next(self, inbox: Inbox, deadline: Deadline, *, more: bool = False) -> Payload | None:
        """The next payload; None at the end of the stream.

        If the caller has some and wants `more`, also when producers wait for the acknowledgement of these.
        """
        payload = self._pop(inbox, deadline)
        if payload is None:
            report = Report(MONOTONIC)
            while payload is None:
                if inbox.finished or (more and inbox.drained):
                    return None
                inbox.wait(deadline, report)
                payload = self._pop(inbox, deadline)
        return payload

    def _pop(self, inbox: Inbox, deadline: Deadline) -> Payload | None:
        payload = inbox.pop(deadline)
        if payload is not None:
            self._payloads += 1
            self._redelivered += payload.redelivered
        return payload

    def _exclusively(self) -> AbstractContextManager[Any]:
        if here[0] != self._mark:  # a forked child attaches as a consumer of its own
            self._reset()
        return self._exclusive.call()

    def _opened(self) -> Inbox:
        if self._inbox is None and not self._closed:
            self._inbox = Inbox(self._wanted, exclusive=self._exclusive)
        if self._closed:  # tested last: `close` in another thread may not have seen the inbox
            raise BufferClosedError("the consumer is closed")
        assert self._inbox is not None
        return self._inbox

    def _check(self, inbox: Inbox) -> None:
        if inbox is not self._inbox:
            raise BufferClosedError("the consumer was closed while it waited")


def _remake(wanted: Wanted, ack: Acknowledge) -> Consumer:
    consumer = Consumer.__new__(Consumer)
    consumer._wanted = wanted  # noqa: SLF001
    consumer._ack = ack  # noqa: SLF001
    consumer._reset()  # noqa: SLF001
    return consumer
