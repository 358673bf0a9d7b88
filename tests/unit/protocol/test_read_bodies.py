"""READs with a body, in the sessions of both ends: what is negotiated, the pieces, and what follows STATUS."""

import struct

import pytest

from dray.errors import ProtocolError, SelectionError
from dray.protocol.client_session import MAX_PAYLOAD_MESSAGES, SIZES, STATUS, Answer, ClientSession, Refusal
from dray.protocol.frames import (
    FRAME_BYTES,
    MAX_ADDED_BYTES,
    MAX_BODY_BYTES,
    Flag,
    Frame,
    Kind,
    Payload,
    Status,
    parse,
)
from dray.protocol.handshake import ClientHandshake, ServerIdentity
from dray.protocol.server_session import ServerSession, Violation
from dray.transport.lanes import SHM, TCP, UCX
from dray.transport.lanes.base import Lane

IDENTITY = ServerIdentity(b"p" * 16, 4, 1000, 2, 2)
TEXT = b'{"fields":["observations","rewards","actions","values","advantages"]}'


def shake_hands(lane: Lane, offered: int = 2, newest: int = 2) -> tuple[ServerSession, ClientHandshake]:
    session = ServerSession(lane, IDENTITY, newest=newest)
    client = ClientHandshake(lane, version=offered)
    answer: bytes | None = client.hello()
    while answer is not None:
        session.receive(answer)
        (message,) = session.pop_outgoing()
        assert isinstance(message, bytes)
        answer = client.receive(message)
    assert session.established
    return session, client


def read(number: int = 1, body: bytes = TEXT, **fields: int) -> bytes:
    head = Frame(Kind.READ, flags=Flag.BODY, request=number, slot=1, sequence=5, tag=9, offset=len(body))
    return head._replace(**fields).pack() + body


def padded(text: bytes) -> bytes:
    return text + b" " * (-len(text) % FRAME_BYTES)


# --- the server's end -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lane", "version", "agreed"), [(TCP, 2, True), (UCX, 2, True), (SHM, 2, False), (TCP, 1, False)]
)
def test_bodies_are_agreed_on_where_payloads_travel_and_both_sides_know_them(
    lane: Lane, version: int, agreed: bool
) -> None:
    session, client = shake_hands(lane, version, version)
    assert client.bodies is agreed
    events = session.receive(read(body=padded(TEXT)))
    assert bool(events) is not agreed
    if not agreed:
        (violation,) = events
        assert isinstance(violation, Violation)
        assert "which the handshake has not agreed on" in str(violation.error)


@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_a_body_in_any_pieces_belongs_to_its_read(step: int) -> None:
    session, _ = shake_hands(TCP)
    other = Frame(Kind.CONSUME, slot=1, sequence=5, request=8).pack()
    stream = other + read(1, padded(TEXT)) + other + read(2, padded(b"{}")) + other
    for begin in range(0, len(stream), step * FRAME_BYTES):
        assert session.receive(stream[begin : begin + step * FRAME_BYTES]) == []
    assert [Frame._make(request).kind for request in session.requests] == [4, 1, 4, 1, 4]
    assert session.body_bytes == len(padded(TEXT)) + FRAME_BYTES
    session.answer()
    assert session.body == padded(TEXT)
    session.refuse(Status.STALE)
    session.answer()
    assert session.body == padded(b"{}")
    session.fail("no such field", Status.UNSELECTABLE)
    assert session.body_bytes == 0
    session.answer()


def test_a_read_is_a_request_once_its_body_is_complete() -> None:
    session, _ = shake_hands(TCP)
    body = padded(TEXT)
    session.receive(read(body=body)[:-FRAME_BYTES])
    assert not session.requests
    assert session.body_bytes == len(body) - FRAME_BYTES
    session.receive(body[-FRAME_BYTES:])
    assert len(session.requests) == 1


@pytest.mark.parametrize("size", [0, 1, FRAME_BYTES + 1, MAX_BODY_BYTES + FRAME_BYTES, 1 << 60])
def test_a_body_of_another_size_is_a_violation(size: int) -> None:
    session, _ = shake_hands(TCP)
    (violation,) = session.receive(read(body=b"", offset=size))
    assert isinstance(violation, Violation)
    assert f"the body of a READ has {size} bytes" in str(violation.error)


def test_an_inline_read_has_no_body() -> None:
    session, _ = shake_hands(TCP)
    (violation,) = session.receive(read(body=padded(TEXT), flags=Flag.BODY | Flag.INLINE))
    assert isinstance(violation, Violation)
    assert str(violation.error) == "a READ with a body cannot be inline"


def test_only_a_read_has_a_body() -> None:
    with pytest.raises(ProtocolError, match="unknown flags 0x80 in a CONSUME frame"):
        parse(Frame(Kind.CONSUME, flags=Flag.BODY).pack())


def test_nothing_may_follow_subscribe_not_even_half_a_read() -> None:
    session, _ = shake_hands(TCP)
    session.receive(Frame(Kind.SUBSCRIBE).pack() + read(body=padded(TEXT))[:FRAME_BYTES])
    with pytest.raises(ProtocolError, match="requests follow SUBSCRIBE"):
        session.subscribe(words=False)


def test_a_part_is_a_lease_until_its_ack() -> None:
    session, _ = shake_hands(TCP)
    session.receive(read(body=padded(TEXT)))
    views = [memoryview(b"header"), memoryview(b"tensor")]
    session.grant_part(views, 12, flags=Flag.CHECKSUM, checksum=3)
    status, *sent = session.pop_outgoing()
    assert isinstance(status, bytes)
    expected = Frame(Kind.STATUS, flags=Flag.CHECKSUM, slot=1, request=1, sequence=5, nbytes=12, checksum=3, tag=9)
    assert parse(status) == expected
    assert sent == [Payload(view, 9) for view in views]
    assert session.sending == {1}
    session.flushed()
    (ended,) = session.receive(Frame(Kind.ACK, slot=1, sequence=5, request=1).pack())
    assert ended == ("lease", 1, (1, 5, 0), False)


def test_on_a_tagged_lane_the_sizes_of_the_messages_follow_status() -> None:
    session, _ = shake_hands(UCX)
    session.receive(read(body=padded(TEXT)))
    session.grant_part([memoryview(b"header"), memoryview(b"a")], 7)
    status, sizes, *sent = session.pop_outgoing()
    assert isinstance(status, bytes)
    assert parse(status).offset == 2
    assert sizes == struct.pack("<2Q", 6, 1)
    assert len(sent) == 2


@pytest.mark.parametrize("lane", [TCP, UCX])
def test_a_part_that_is_refused_has_no_empty_payload(lane: Lane) -> None:
    session, _ = shake_hands(lane)
    session.receive(read(1, padded(TEXT)) + read(2, padded(TEXT)))
    session.refuse(Status.BUSY)
    session.fail("no such field", Status.UNSELECTABLE)
    busy, status, text = session.pop_outgoing()
    assert isinstance(busy, bytes)
    assert isinstance(status, bytes)
    assert (parse(busy).status, parse(status).status) == (Status.BUSY, Status.UNSELECTABLE)
    assert text == b"no such field"


# --- the client's end -------------------------------------------------------------------------------------------


def ask(session: ClientSession, nbytes: int = 100) -> Frame:
    message = session.request(Kind.READ, 1, 5, nbytes=nbytes, tag=9, body=TEXT)
    assert message[FRAME_BYTES:] == padded(TEXT)
    frame = parse(message[:FRAME_BYTES])
    assert (frame.flags, frame.offset) == (Flag.BODY, len(padded(TEXT)))
    return frame


def answer(frame: Frame, **fields: int) -> bytes:
    return Frame(Kind.STATUS, slot=1, request=frame.request, sequence=5)._replace(**fields).pack()


def test_a_part_may_be_larger_than_the_whole_by_a_header_and_not_more() -> None:
    for nbytes in (1, 100, 100 + MAX_ADDED_BYTES):
        session = ClientSession()
        event = session.receive(answer(ask(session), nbytes=nbytes))
        assert isinstance(event, Answer)
        assert event.frame.nbytes == nbytes
    session = ClientSession()
    with pytest.raises(ProtocolError, match="the part of a payload has 4194413 bytes, the whole 100"):
        session.receive(answer(ask(session), nbytes=101 + MAX_ADDED_BYTES))


def test_sizes_come_before_the_messages_of_a_part() -> None:
    session = ClientSession(tagged=True)
    assert session.receive(answer(ask(session), nbytes=7, offset=2)) is None
    assert (session.expects, session.awaits) == (16, SIZES)
    event = session.receive(struct.pack("<2Q", 6, 1))
    assert isinstance(event, Answer)
    assert struct.unpack("<2Q", event.body) == (6, 1)
    assert session.awaits is STATUS


@pytest.mark.parametrize("count", [0, MAX_PAYLOAD_MESSAGES + 1])
def test_a_part_comes_in_a_bounded_number_of_messages(count: int) -> None:
    session = ClientSession(tagged=True)
    with pytest.raises(ProtocolError, match=f"a payload comes in {count} messages"):
        session.receive(answer(ask(session), nbytes=7, offset=count))


def test_g1_what_cannot_be_selected_is_an_error_that_leaves_the_session_usable() -> None:
    session = ClientSession("tcp:a:1")
    text = b"the payload has no field 'x'"
    refused = answer(ask(session), status=Status.UNSELECTABLE, flags=Flag.TEXT, nbytes=len(text))
    assert session.receive(refused) is None
    event = session.receive(text)
    assert isinstance(event, Refusal)
    assert isinstance(event.error, SelectionError)
    assert event.error.message == text.decode()
    assert (session.pending, session.awaits) == (0, STATUS)
