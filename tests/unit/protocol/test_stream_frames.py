"""The frames of a stream, and the server's session of a consumer that has subscribed."""

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dray.errors import ProtocolError
from dray.protocol import streams
from dray.protocol.frames import FRAME_BYTES, Flag, Frame, Kind, Status, parse
from dray.protocol.handshake import ClientHandshake, ServerIdentity
from dray.protocol.server_session import Event, ServerSession, Violation
from dray.protocol.streams import (
    Begun,
    Credit,
    Ended,
    Given,
    Returned,
    TakenBack,
    consumer_events,
    producer_events,
)
from dray.transport.lanes import SHM, TCP
from dray.transport.lanes.base import Lane

u64 = st.integers(0, 2**64 - 1)
u32 = st.integers(0, 2**32 - 1)
counts = st.integers(1, 2**64 - 1)
given_payloads = st.builds(Given, u32, u64, u64, counts, counts, u64)
consumer_frames = st.one_of(
    st.builds(Credit, u64), st.builds(Begun, u32, u64, u64), st.builds(Returned, u32, u64, u64, st.booleans())
)
FROM_PRODUCER, FROM_CONSUMER = {Kind.GIVE, Kind.END, Kind.RETURN}, {Kind.CREDIT, Kind.BEGIN, Kind.RETURN}


def frame_of(event: Credit | Begun | Returned) -> bytes:
    """The frame that a consumer sends for an event."""
    if isinstance(event, Credit):
        return streams.credit(event.total)
    hand_out = Given(event.slot, event.sequence, 0, event.number, 1)
    return streams.give_back(hand_out, event.begun) if isinstance(event, Returned) else streams.begin(hand_out)


# --- frames -----------------------------------------------------------------------------------------------------


@given(
    st.lists(given_payloads | st.builds(Ended, u64) | st.builds(TakenBack, u64), max_size=5), st.integers(0, 255)
)
def test_what_a_producer_sends_arrives_as_it_was(sent: list[Given | Ended | TakenBack], reader: int) -> None:
    frames = [
        streams.give(each, reader)
        if isinstance(each, Given)
        else (streams.end(each.lost) if isinstance(each, Ended) else streams.take_back(3, 7, each.number))
        for each in sent
    ]
    assert all(len(frame) == FRAME_BYTES for frame in frames)
    assert list(producer_events(b"".join(frames))) == sent


@given(st.lists(consumer_frames, max_size=5))
def test_what_a_consumer_sends_arrives_as_it_was(sent: list[Credit | Begun | Returned]) -> None:
    message = b"".join(map(frame_of, sent))
    for form in (message, bytearray(message), memoryview(message)):
        assert list(consumer_events(form)) == sent


def test_a_frame_names_the_group_to_which_the_payload_is_given() -> None:
    frame = parse(streams.give(Given(3, 7, 100, 5, 2), reader=1))
    assert (frame.kind, frame.reader, frame.slot, frame.sequence) == (Kind.GIVE, 1, 3, 7)
    assert (frame.nbytes, frame.request, frame.acked) == (100, 5, 2)


@pytest.mark.parametrize("kind", sorted(set(Kind) - FROM_PRODUCER))
def test_a_producer_that_sends_another_kind_is_refused(kind: Kind) -> None:
    with pytest.raises(ProtocolError, match=f"^a producer sent {kind.name} to a consumer that has subscribed$"):
        list(producer_events(Frame(kind, request=1, acked=1).pack()))


def test_a_producer_does_not_know_whether_what_it_takes_back_was_begun() -> None:
    with pytest.raises(ProtocolError, match=r"^a producer sent RETURN to a consumer that has subscribed$"):
        list(producer_events(Frame(Kind.RETURN, flags=Flag.BEGUN, request=1).pack()))


@pytest.mark.parametrize("kind", sorted(set(Kind) - FROM_CONSUMER))
def test_a_consumer_that_sends_another_kind_is_refused(kind: Kind) -> None:
    with pytest.raises(ProtocolError, match=f"^a consumer that has subscribed sent {kind.name}$"):
        list(consumer_events(Frame(kind).pack()))


@pytest.mark.parametrize("fields", [{"request": 0, "acked": 1}, {"request": 1, "acked": 0}])
def test_hand_outs_and_deliveries_are_counted_from_1(fields: dict[str, int]) -> None:
    with pytest.raises(ProtocolError, match=r"^GIVE names hand-out 0, or delivery 0$"):
        list(producer_events(Frame(Kind.GIVE, **fields).pack()))


@pytest.mark.parametrize("parse_events", [producer_events, consumer_events])
@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"kind": 0}, "unknown frame kind 0"),
        ({"kind": 13}, "unknown frame kind 13"),
        ({"kind": Kind.CREDIT, "flags": Flag.BEGUN}, "unknown flags 0x20 in a CREDIT frame"),
        ({"kind": Kind.BEGIN, "flags": 1}, "unknown flags 0x1 in a BEGIN frame"),
        ({"kind": Kind.RETURN, "flags": 16}, "unknown flags 0x10 in a RETURN frame"),
        ({"kind": Kind.GIVE, "flags": 4}, "unknown flags 0x4 in a GIVE frame"),
        ({"kind": Kind.END, "flags": 2}, "unknown flags 0x2 in a END frame"),
        ({"kind": Kind.END, "status": 6}, "unknown status 6"),
    ],
)
def test_frames_with_unknown_parts_are_refused(
    parse_events: Callable[[bytes], object], wrong: dict[str, int], why: str
) -> None:
    with pytest.raises(ProtocolError, match=f"^{why}$"):
        list(parse_events(Frame(**wrong).pack()))  # type: ignore[call-overload, arg-type]


@pytest.mark.parametrize("size", [1, FRAME_BYTES - 1, FRAME_BYTES + 1])
@pytest.mark.parametrize("parse_events", [producer_events, consumer_events])
def test_part_of_a_frame_is_refused(parse_events: Callable[[bytes], object], size: int) -> None:
    with pytest.raises(ProtocolError, match=f"^a frame has 64 bytes, got {size}$"):
        list(parse_events(bytes(size)))  # type: ignore[call-overload]


def test_what_comes_before_a_wrong_frame_is_there_before_the_error() -> None:
    events = consumer_events(streams.credit(4) + Frame(Kind.ACK).pack() + streams.credit(5))
    assert next(events) == Credit(4)
    with pytest.raises(ProtocolError):
        next(events)


# --- the session of the server ----------------------------------------------------------------------------------

IDENTITY = ServerIdentity(b"p" * 16, 4, 1000, 2, 2)


def established(lane: Lane = TCP) -> ServerSession:
    """A session after its handshake."""
    session = ServerSession(lane, IDENTITY)
    client = ClientHandshake(lane)
    answer: bytes | None = client.hello()
    while answer is not None:
        session.receive(answer)
        (message,) = session.pop_outgoing()
        assert isinstance(message, bytes)
        answer = client.receive(message)
    return session


def subscribed(*, words: bool = False) -> ServerSession:
    """A session after SUBSCRIBE, whose answer has left."""
    session = established(SHM if words else TCP)
    session.receive(Frame(Kind.SUBSCRIBE, request=9, reader=1).pack())
    session.subscribe(words)
    (answer,) = session.pop_outgoing()
    assert isinstance(answer, bytes)
    frame = parse(answer)
    assert (frame.kind, frame.status, frame.request, frame.reader) == (Kind.STATUS, Status.OK, 9, 1)
    assert frame.flags == (Flag.WORDS if words else Flag.NONE)
    session.flushed()
    return session


@pytest.mark.parametrize("words", [False, True])
def test_after_subscribe_frames_are_those_of_a_consumer(words: bool) -> None:
    session = subscribed(words=words)
    assert session.subscribed
    assert not session.busy
    begun = Given(1, 5, 10, 3, 1)
    events = session.receive(streams.credit(2) + streams.begin(begun) + streams.give_back(begun, begun=True))
    assert events == [Credit(2), Begun(1, 5, 3), Returned(1, 5, 3, True)]


@pytest.mark.parametrize("kind", [Kind.READ, Kind.ACK, Kind.CONSUME, Kind.STAT, Kind.SUBSCRIBE, Kind.DESCRIBE])
def test_a_consumer_that_has_subscribed_sends_no_request(kind: Kind) -> None:
    (violation,) = subscribed().receive(Frame(kind).pack())
    assert isinstance(violation, Violation)
    assert str(violation.error) == f"a consumer that has subscribed sent {kind.name}"


@pytest.mark.parametrize("kind", sorted(FROM_CONSUMER | FROM_PRODUCER))
def test_before_subscribe_frames_of_a_stream_are_refused(kind: Kind) -> None:
    (violation,) = established().receive(Frame(kind).pack())
    assert isinstance(violation, Violation)
    assert str(violation.error) == f"a client that has not subscribed sent {kind.name}"


def test_a_request_behind_subscribe_is_refused() -> None:
    session = established()
    session.receive(Frame(Kind.SUBSCRIBE).pack() + Frame(Kind.READ).pack())
    with pytest.raises(ProtocolError, match=r"^requests follow SUBSCRIBE$"):
        session.subscribe(words=False)


def test_what_is_pushed_leaves_in_its_order() -> None:
    session = subscribed()
    frames = [streams.give(Given(slot, slot, 10, slot + 1, 1), 1) for slot in range(3)] + [streams.end(0)]
    for frame in frames:
        session.push(frame)
    assert session.pop_outgoing() == frames
    assert session.pop_outgoing() == []


@given(st.lists(consumer_frames, min_size=1, max_size=6), st.data())
def test_frames_mean_the_same_however_they_are_put_together(
    sent: list[Credit | Begun | Returned], data: st.DataObject
) -> None:
    session = subscribed()
    cuts = data.draw(st.sets(st.integers(0, len(sent))))
    arrived: list[Event] = []
    for begin, end in pairwise(sorted({0, len(sent), *cuts})):
        arrived += session.receive(b"".join(map(frame_of, sent[begin:end])))
    assert arrived == sent


def test_a_session_that_is_closed_takes_nothing_more() -> None:
    session = subscribed()
    session.push(streams.end(0))
    session.close()
    assert session.pop_outgoing() == []
    assert session.receive(streams.credit(1)) == []
