"""What a server's connection reports to a `dray.transport.trace.Trace`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from dray.clock import Clock
from dray.protocol.frames import Flag, Frame, Kind, Outgoing, Status, parse
from dray.protocol.server_session import Acknowledgement, Established, Event
from dray.transport import trace as traced
from dray.transport.lanes.base import Lane


class ServedTrace:
    """The events of one connection.

    Args:
        trace: receives them.
        clock: where time comes from.
        endpoint: the address at which it was accepted.
        lane: its lane.
        number: marks its events, so that they differ from those of other connections.
    """

    def __init__(self, trace: traced.Trace, clock: Clock, endpoint: str, lane: Lane, *, number: int) -> None:
        self._trace = trace
        self._clock = clock
        self._endpoint = endpoint
        self._lane = lane
        self._number = number
        self._accepted_at = clock.now()
        self._leaving: list[traced.Payload] = []

    def received(self, events: Sequence[Event], requests: Iterable[tuple[int, ...]]) -> None:
        """Messages of the client have brought events and new requests."""
        now, endpoint, number = self._clock.now(), self._endpoint, self._number
        for event in events:
            if isinstance(event, Established):
                self._trace(traced.Connect(now, endpoint, now - self._accepted_at, event.version, number))
            elif isinstance(event, Acknowledgement):
                self._trace(traced.Acknowledgement(now, endpoint, *event.payload, event.consumed, number))
        for kind, _, reader, _, slot, _, sequence, *_ in requests:
            self._trace(traced.Request(now, endpoint, Kind(kind), slot, sequence, reader, number))

    def answered(self, requests: Iterable[tuple[int, ...]], outgoing: Iterable[Outgoing]) -> None:
        """Requests have answers, which are about to be sent."""
        now, endpoint = self._clock.now(), self._endpoint
        messages = (item for item in outgoing if isinstance(item, bytes))
        for request in map(Frame._make, requests):
            message = next(messages, None)
            if message is None:  # the ring is closed: the others have no answer
                break
            status = parse(message)
            kind, slot, sequence = Kind(request.kind), request.slot, request.sequence
            self._trace(traced.Status(now, endpoint, kind, slot, sequence, Status(status.status), self._number))
            sent = kind is Kind.READ and status.status == Status.OK
            self._skip_text(messages, request, status, sent)
            if sent and (request.flags or self._lane.in_band):
                self._leaving.append(traced.Payload(now, endpoint, slot, sequence, status.nbytes, self._number))

    def _skip_text(self, messages: Iterator[bytes], request: Frame, status: Frame, sent: bool) -> None:
        """Skip the text, the inline payload, or the sizes of messages that follow a STATUS."""
        sized = request.flags & Flag.BODY and self._lane.tagged
        if status.flags & Flag.TEXT or (sent and (request.flags & Flag.INLINE or sized)):
            next(messages)

    def flushed(self) -> None:
        """All payloads have left."""
        if self._leaving:
            now = self._clock.now()
            for payload in self._leaving:
                self._trace(payload._replace(at=now))
            self._leaving.clear()

    def released(self, payload: tuple[int, int, int]) -> None:
        """A lease has ended with the connection."""
        self._trace(traced.Acknowledgement(self._clock.now(), self._endpoint, *payload, False, self._number))
