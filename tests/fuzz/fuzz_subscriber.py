"""A hostile consumer of a stream, over the network or with shared words: it harms its own share of the stream.

Input: operations of one byte each with their arguments. A connection of the server that has subscribed receives
frames; another consumer has shared words, into which anything is written. A third one is healthy and gets at the
end what the others have not consumed.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field

from fuzz.cursor import Cursor
from scripted_streams import KeepingStream
from stream_parts import SLOTS, ConsumerEnd, Stream

from dray.errors import ProtocolError
from dray.protocol import streams
from dray.protocol.frames import Frame, Kind
from dray.protocol.handshake import ClientHandshake, ServerIdentity
from dray.ring import SharedRingBuffer
from dray.ring.consumer_events import Descriptor
from dray.ring.stream_words import StreamWords
from dray.streams.delivery import BEGIN_SECONDS, Recipient
from dray.transport.lanes import TCP
from dray.transport.served_connection import ServedConnection
from dray.transport.service import ConsumerConnection, Service

PUT, FRAME_OP, BYTES_OP, WORD, TIME, RENEW = range(6)
_KINDS = (Kind.CREDIT, Kind.BEGIN, Kind.RETURN)


def frame(kind: int, slot: int = 0, number: int = 0, sequence: int = 0, flags: int = 0) -> bytes:
    """The operation that sends one frame; `kind` from 0 to 2 for CREDIT, BEGIN, RETURN."""
    return bytes([FRAME_OP, kind, flags, slot, number, sequence])


_ALL = frame(0, number=9) + bytes([PUT, PUT, PUT]) + frame(1, 0, 1, 0) + frame(2, 1, 2, 1, 32)
SEEDS = [
    _ALL,
    _ALL + bytes([TIME]) + frame(2, 2, 3, 2),
    bytes([PUT, WORD, 0, 252, TIME, WORD, 66, 1, WORD, 2, 0, TIME, RENEW, PUT]),
    bytes([WORD, 0, 5, PUT, PUT, WORD, 66, 1, TIME, RENEW]),
    frame(0, number=255) + bytes([PUT]) + frame(2, 0, 255, 0) + frame(0) + bytes([PUT]),
    frame(0, number=1) + bytes([PUT, PUT]) + frame(2, 0, 1, 0) * 3,
    frame(4) + bytes([PUT]),
    bytes([BYTES_OP, 64]) + streams.credit(3) + bytes([PUT, BYTES_OP, 3, 1, 2, 3]),
]


@dataclass
class _Served:
    """The stream of a ring, for one connection."""

    stream: Stream
    bell: Descriptor = field(default_factory=lambda: Descriptor(os.eventfd, 0))
    remaining: float = float("inf")

    def describe(self) -> str:
        return "{}"

    def subscribe(self, connection: ConsumerConnection, reader: int) -> Recipient:
        return self.stream.delivery.subscribe(reader, _Connection(connection))

    def serve(self) -> None:
        self.stream.delivery.serve()


@dataclass
class _Connection:
    """The connection to the consumer with frames."""

    connection: ConsumerConnection

    def announce(self, given: streams.Given) -> None:
        self.connection.push(streams.give(given, 0))

    def take_back(self, slot: int, sequence: int, number: int) -> None:
        self.connection.push(streams.take_back(slot, sequence, number))

    def end(self, lost: int) -> None:
        self.connection.push(streams.end(lost))

    def abort(self) -> None:
        self.connection.stream.abort()


def _subscribed(ring: SharedRingBuffer, stream: Stream) -> tuple[ServedConnection, KeepingStream]:
    """A connection after SUBSCRIBE; no payload is read over it."""
    identity = ServerIdentity(ring.producer_id, SLOTS, 100, 1, 1)
    sent = KeepingStream(TCP)
    service = Service(ring=ring, identity=identity, stream=_Served(stream))
    connection = ServedConnection(sent, "somewhere", service)  # type: ignore[arg-type]
    client = ClientHandshake(TCP)
    answer: bytes | None = client.hello()
    while answer is not None:
        connection.receive(answer)
        (message,) = connection.answer()
        connection.flushed()
        assert isinstance(message, bytes)
        answer = client.receive(message)
    connection.receive(Frame(Kind.SUBSCRIBE).pack())
    _turn(connection)
    assert connection.subscriber is not None
    return connection, sent


def _turn(connection: ServedConnection) -> None:
    while items := connection.answer():
        connection.send(items)
        connection.flushed()


def run(data: bytes) -> None:
    with SharedRingBuffer(1, 100) as ring:
        _run(Cursor(data), ring)


def _run(cursor: Cursor, ring: SharedRingBuffer) -> None:
    stream = Stream()
    connection, sent = _subscribed(ring, stream)
    faulty = stream.consumer(direct=True)
    open_, largest, put = True, 0, 0
    returned: set[int] = set()  # hand-outs that went back untouched give their credit back, once
    while cursor:
        operation = cursor.byte() % 6
        if operation == PUT and put < SLOTS:
            stream.add(put)
            put += 1
        elif operation in (FRAME_OP, BYTES_OP):
            messages = _frame(cursor) if operation == FRAME_OP else cursor.read(cursor.byte())
            if open_:
                with contextlib.suppress(ProtocolError):
                    for event in streams.consumer_events(messages):
                        if isinstance(event, streams.Credit):
                            largest = max(largest, event.total)
                        elif isinstance(event, streams.Returned) and not event.begun:
                            returned.add(event.number)
                try:
                    connection.receive(messages)
                except ProtocolError:
                    open_ = False
                    connection.close()
        elif operation == WORD:
            assert faulty.words is not None
            words = faulty.words.shared.words
            words[cursor.byte() % StreamWords.count(SLOTS)] = cursor.number(64)
            stream.delivery.serve()
        elif operation == TIME:
            stream.later(BEGIN_SECONDS)
        elif operation == RENEW:
            faulty.recipient.end()
            faulty = stream.consumer(direct=True)
        if open_:
            _turn(connection)
        given = [each for each in sent.sent if each.kind == Kind.GIVE]
        assert len(given) <= largest + len(returned)
        _check(stream, put)
    connection.close()
    faulty.recipient.end()
    healthy = ConsumerEnd(stream.delivery)
    healthy.raise_credit(SLOTS)
    healthy.recipient.start()
    assert healthy.sequences == list(range(put))


def _frame(cursor: Cursor) -> bytes:
    kind, flags, slot, number, sequence = (
        cursor.byte(), cursor.byte(), cursor.number(32), cursor.number(64), cursor.number(64),
    )  # fmt: skip
    return Frame(_KINDS[kind] if kind < 3 else kind, 0, 0, flags, slot, number, sequence).pack()


def _check(stream: Stream, put: int) -> None:
    """Each payload waits, or one consumer has it."""
    (group,) = stream.delivery.groups
    held = [sequence for each in group.recipients for sequence in each.items]
    assert sorted([*held, *(each.sequence for each in group.waiting)]) == list(range(put))
