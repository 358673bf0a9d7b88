"""A server's connection to a consumer of its stream: what is pushed, in which order, and the end."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from scripted_streams import KeepingStream

from dray.errors import ConnectionReset, ProtocolError
from dray.protocol.frames import Frame, Kind, Status, parse
from dray.protocol.handshake import ClientHandshake, ServerIdentity
from dray.protocol.streams import Begun, Given, Returned, begin, credit, end, give, give_back
from dray.ring import SharedRingBuffer
from dray.ring.consumer_events import Descriptor
from dray.transport.lanes import SHM, TCP
from dray.transport.lanes.base import Lane
from dray.transport.served_connection import ServedConnection
from dray.transport.service import ConsumerConnection, Service
from dray.transport.subscription import parse_description


class Consumer:
    """What the stream of the ring knows of a consumer."""

    words = None

    def __init__(self) -> None:
        self.events: list[object] = []

    def start(self) -> None:
        self.events.append("start")

    def set_credit(self, total: int) -> None:
        self.events.append(total)

    def begin(self, slot: int, sequence: int, number: int) -> None:
        self.events.append(Begun(slot, sequence, number))

    def take_back(self, returned: Returned) -> None:
        self.events.append(returned)

    def end(self) -> None:
        self.events.append("end")


class OneConsumer:
    """The stream of a ring."""

    remaining = float("inf")

    def __init__(self) -> None:
        self.bell = Descriptor(os.eventfd, 0)
        self.consumer = Consumer()

    def describe(self) -> str:
        return '{"groups": ["default"]}'

    def subscribe(self, connection: ConsumerConnection, reader: int) -> Consumer:
        return self.consumer

    def serve(self) -> None:
        raise AssertionError


class Served:
    """A connection after SUBSCRIBE, driven by hand."""

    def __init__(self, ring: SharedRingBuffer, lane: Lane, *, stream: bool = True) -> None:
        self.service = OneConsumer()
        self.pushed = 0
        identity = ServerIdentity(ring.producer_id, ring.slots, ring.slot_bytes, 3, ring.readers)
        self.stream = KeepingStream(lane)
        self.connection = ServedConnection(
            self.stream,  # type: ignore[arg-type]
            "somewhere",
            Service(ring=ring, identity=identity, stream=self.service if stream else None),
            self._note,
        )
        client = ClientHandshake(lane, ring.producer_id)
        answer: bytes | None = client.hello()
        while answer is not None:
            self.connection.receive(answer)
            (message,) = self.connection.answer()
            self.connection.flushed()
            assert isinstance(message, bytes)
            answer = client.receive(message)

    def _note(self, connection: ServedConnection) -> None:
        assert connection is self.connection
        self.pushed += 1

    def subscribe(self, reader: int = 0) -> None:
        self.connection.receive(Frame(Kind.SUBSCRIBE, reader=reader).pack())
        self.serve()

    def serve(self) -> None:
        """A turn of the loop, without receiving."""
        if self.connection.unsent:
            self.connection.unsent = not self.connection.flush()
            return
        items = self.connection.answer()
        if items:
            self.connection.unsent = not self.connection.send(items)
            if not self.connection.unsent:
                self.connection.flushed()

    @property
    def numbers(self) -> list[int]:
        """The hand-outs whose GIVE has left."""
        return [each.request for each in self.stream.sent if each.kind == Kind.GIVE]


def frame(number: int) -> bytes:
    return give(Given(0, number, 10, number, 1), 0)


@pytest.fixture
def ring() -> Iterator[SharedRingBuffer]:
    with SharedRingBuffer(4, 100, readers=2) as ring:
        yield ring


def test_a_consumer_starts_when_the_answer_to_subscribe_has_left(ring: SharedRingBuffer) -> None:
    served = Served(ring, SHM)
    served.stream.room = False
    served.subscribe()
    assert served.service.consumer.events == []
    served.stream.room = True
    served.serve()
    served.connection.flushed()
    assert served.service.consumer.events == ["start"]
    assert [(each.kind, each.status) for each in served.stream.sent] == [(Kind.STATUS, Status.OK)]


def test_frames_of_a_consumer_reach_the_stream_of_the_ring(ring: SharedRingBuffer) -> None:
    served = Served(ring, TCP)
    served.subscribe()
    given = Given(1, 5, 10, 3, 1)
    served.connection.receive(credit(4) + begin(given) + give_back(given, begun=False))
    assert served.service.consumer.events == ["start", 4, Begun(1, 5, 3), Returned(1, 5, 3, False)]


def test_what_is_pushed_on_the_shm_lane_leaves_at_once(ring: SharedRingBuffer) -> None:
    served = Served(ring, SHM)
    served.subscribe()
    for number in (1, 2):
        served.connection.push(frame(number))
    assert served.numbers == [1, 2]
    assert served.pushed == 0


def test_what_is_pushed_on_a_network_lane_leaves_with_the_loop(ring: SharedRingBuffer) -> None:
    served = Served(ring, TCP)
    served.subscribe()
    for number in (1, 2):
        served.connection.push(frame(number))
    assert served.numbers == []
    assert served.pushed == 2
    served.serve()
    assert served.numbers == [1, 2]


def test_what_is_pushed_while_there_is_no_room_leaves_in_its_order(ring: SharedRingBuffer) -> None:
    served = Served(ring, SHM)
    served.subscribe()
    served.stream.room = False
    for number in (1, 2, 3):
        served.connection.push(frame(number))
    assert served.connection.unsent
    assert served.connection.busy
    served.stream.room = True
    served.connection.push(frame(4))
    while served.connection.busy:
        served.serve()
    assert served.numbers == [1, 2, 3, 4]


def test_a_push_does_not_overtake_what_the_loop_is_about_to_send(ring: SharedRingBuffer) -> None:
    served = Served(ring, SHM)
    served.subscribe()
    served.stream.room = False
    for number in (1, 2):
        served.connection.push(frame(number))
    served.stream.room = True
    served.serve()
    items = served.connection.answer()  # of the loop, which has not sent them yet
    served.connection.push(frame(3))  # in another thread
    assert served.connection.send(items)
    served.connection.flushed()
    served.serve()
    assert served.numbers == [1, 2, 3]


def test_a_push_to_a_connection_that_has_failed_is_left_to_its_loop(ring: SharedRingBuffer) -> None:
    served = Served(ring, SHM)
    served.subscribe()
    served.stream.fails = ConnectionReset("the peer has reset the connection")
    served.connection.push(frame(1))
    assert served.pushed == 1
    assert not served.connection.busy


def test_a_push_that_an_exception_ends_aborts_the_connection(ring: SharedRingBuffer) -> None:
    served = Served(ring, SHM)
    served.subscribe()
    served.stream.fails = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        served.connection.push(frame(1))
    assert served.stream.aborted
    served.stream.fails = None
    served.connection.push(end(0))  # the lock is free
    assert served.stream.sent[-1].kind == Kind.END


def test_the_end_of_a_connection_is_the_end_of_its_consumer_once(ring: SharedRingBuffer) -> None:
    served = Served(ring, SHM)
    served.subscribe()
    served.connection.end_subscription()
    served.connection.push(frame(1))
    served.connection.close()
    assert served.service.consumer.events == ["start", "end"]
    assert served.numbers == []


def test_a_reader_id_that_does_not_exist_is_refused(ring: SharedRingBuffer) -> None:
    served = Served(ring, TCP)
    served.subscribe(reader=2)
    assert served.stream.sent[-1].status == Status.DENIED
    assert served.service.consumer.events == []


@pytest.mark.parametrize("kind", [Kind.SUBSCRIBE, Kind.DESCRIBE])
def test_a_server_without_a_stream_refuses_consumers(ring: SharedRingBuffer, kind: Kind) -> None:
    served = Served(ring, TCP, stream=False)
    served.connection.receive(Frame(kind).pack())
    status, text = served.connection.answer()
    assert isinstance(status, bytes)
    assert parse(status).status == Status.ERROR
    assert isinstance(text, bytes)
    assert text == b"this server has no stream: its payloads are read by reference"


def test_a_request_of_a_consumer_that_has_subscribed_ends_the_connection(ring: SharedRingBuffer) -> None:
    served = Served(ring, TCP)
    served.subscribe()
    with pytest.raises(ProtocolError, match=r"^a consumer that has subscribed sent READ$"):
        served.connection.receive(Frame(Kind.READ).pack())


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "a description of a stream must be JSON"),
        (b"\xff", "a description of a stream must be JSON"),
        (b"[" * 100_000, "a description of a stream must be JSON"),
        (b"1" * 5000, "a description of a stream must be JSON"),
        (b"[]", "a description of a stream must have a list of groups"),
        (b"{}", "a description of a stream must have a list of groups"),
        (b'{"groups": "ab"}', "a description of a stream must have a list of groups"),
        (b'{"groups": ["a", 1]}', "a description of a stream must have a list of groups"),
    ],
)
def test_a_description_that_is_none_is_refused(text: bytes, why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        parse_description(text, "tcp:127.0.0.1:1")


def test_a_description_is_what_a_producer_states() -> None:
    assert parse_description(b'{"groups": ["a", "b"], "schema": null, "more": 1}', "tcp:127.0.0.1:1") == {
        "groups": ["a", "b"],
        "schema": None,
        "more": 1,
    }
