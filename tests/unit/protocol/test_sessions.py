"""The sessions of both ends, without a ring: what the protocol demands."""

from typing import Any

import pytest

from dray.errors import ProtocolError, ReaderIdError, ServerBusy, SlotError, StaleSlotError
from dray.protocol.client_session import ClientSession, Request, refusal
from dray.protocol.frames import FRAME_BYTES, MIN_VERSION, VERSION, Flag, Frame, Kind, Payload, Status, parse
from dray.protocol.handshake import CHALLENGE, HELLO, MAGIC, ClientHandshake, ServerIdentity, Verdict
from dray.protocol.server_session import Acknowledgement, Established, Refused, ServerSession, Violation
from dray.transport.lanes import LANES, SHM, TCP, UCX
from dray.transport.lanes.base import Lane

IDENTITY = ServerIdentity(b"p" * 16, 4, 1000, 2, 2)


# --- the server's end -------------------------------------------------------------------------------------------


def established(lane: Lane = TCP, **options: Any) -> ServerSession:
    """A session after its handshake."""
    session = ServerSession(lane, IDENTITY, **options)
    client = ClientHandshake(lane, version=options.get("newest", VERSION))
    answer: bytes | None = client.hello()
    while answer is not None:
        events = session.receive(answer)
        (message,) = session.pop_outgoing()
        assert isinstance(message, bytes)
        answer = client.receive(message)
    assert events == [Established(options.get("newest", VERSION))]
    return session


def read(request: int, **fields: int) -> bytes:
    return Frame(Kind.READ, request=request, **{"slot": 1, "sequence": 5, "tag": 9, **fields}).pack()


def ack(request: int, **fields: int) -> bytes:
    return Frame(Kind.ACK, request=request, **{"slot": 1, "sequence": 5, **fields}).pack()


@pytest.mark.parametrize("version", range(MIN_VERSION, VERSION + 1))
def test_a_session_is_established_with_the_version_of_the_client(version: int) -> None:
    assert established(newest=version).established
    session = ServerSession(TCP, IDENTITY)
    session.receive(ClientHandshake(TCP, version=version).hello())
    assert CHALLENGE.unpack(session.pop_outgoing()[0])[1:3] == (version, Verdict.WELCOME)  # type: ignore[arg-type]


@pytest.mark.parametrize("version", [0, VERSION + 1, 65535])
def test_a_hello_of_a_version_out_of_range_is_refused_with_the_newest_one(version: int) -> None:
    session = ServerSession(TCP, IDENTITY)
    hello = HELLO.pack(MAGIC, version, TCP.number, 0, bytes(16), bytes(32))
    assert session.receive(hello) == [Refused(Verdict.VERSION)]
    assert CHALLENGE.unpack(session.pop_outgoing()[0])[1:3] == (VERSION, Verdict.VERSION)  # type: ignore[arg-type]
    assert session.closing
    assert session.receive(hello) == []


def test_requests_wait_in_their_order_and_each_answer_is_that_of_the_oldest() -> None:
    session = established(SHM)
    assert session.receive(read(1) + read(2) + Frame(Kind.STAT, request=3).pack()) == []
    assert [Frame._make(request).request for request in session.requests] == [1, 2, 3]
    assert session.refusal() is None
    session.grant(memoryview(b""), 7, 64, checksum=12)
    session.refuse(Status.STALE)
    session.answer("{}")
    granted, stale, stat, text = session.pop_outgoing()
    assert parse(granted) == Frame(  # type: ignore[arg-type]
        Kind.STATUS, slot=1, request=1, sequence=5, nbytes=7, checksum=12, tag=9, offset=64
    )
    assert parse(stale) == Frame(Kind.STATUS, Status.STALE, slot=1, request=2, sequence=5)  # type: ignore[arg-type]
    assert parse(stat) == Frame(Kind.STATUS, flags=Flag.TEXT, request=3, nbytes=2)  # type: ignore[arg-type]
    assert text == b"{}"
    assert (session.pop_outgoing(), session.sending) == ([], set())


def test_a_granted_payload_is_being_sent_until_it_is_flushed() -> None:
    session = established(UCX)
    session.receive(read(1))
    session.grant(memoryview(b"payload"), 7, 0)
    _, payload = session.pop_outgoing()
    assert payload == Payload(memoryview(b"payload"), 9)
    assert session.sending == {1}
    session.flushed()
    assert session.sending == set()


def test_acknowledgements_name_what_they_end() -> None:
    session = established(SHM)
    session.receive(read(1) + read(2, flags=Flag.INLINE) + read(3))
    session.grant(memoryview(b""), 7, 0)
    session.copy(b"payload", None)
    session.grant(memoryview(b""), 7, 0)
    assert session.receive(ack(1, flags=Flag.CONSUMED) + ack(2) + ack(77, flags=Flag.CONSUMED)) == [
        Acknowledgement("lease", 1, (1, 5, 0), True),
        Acknowledgement("copy", 2, (1, 5, 0), False),
        Acknowledgement("late", 77, (1, 5, 0), True),
    ]


def test_what_comes_before_a_violation_counts_and_what_follows_does_not() -> None:
    session = established(SHM)
    session.receive(read(1) + read(2))
    session.grant(memoryview(b""), 7, 0)
    session.grant(memoryview(b""), 7, 0)
    first, violation = session.receive(ack(1) + Frame(Kind.STATUS).pack() + ack(2))
    assert first == Acknowledgement("lease", 1, (1, 5, 0), False)
    assert isinstance(violation, Violation)
    assert str(violation.error) == "a client sent STATUS"


def test_part_of_a_frame_is_a_violation() -> None:
    (violation,) = established().receive(bytes(FRAME_BYTES - 1))
    assert isinstance(violation, Violation)
    assert str(violation.error) == "a frame has 64 bytes, got 63"


@pytest.mark.parametrize(
    ("fields", "refused"),
    [
        ({"reader": 2}, Status.DENIED),
        ({"reader": 2, "slot": 4}, Status.DENIED),
        ({"slot": 4}, Status.STALE),
        ({"slot": 4, "flags": Flag.INLINE}, Status.STALE),
        ({"flags": Flag.INLINE}, None),
        ({}, Status.BUSY),
    ],
)
def test_refusals_that_do_not_depend_on_the_ring(fields: dict[str, int], refused: Status | None) -> None:
    session = established(SHM)
    session.receive(read(1) + read(2) + read(3, **fields))
    session.grant(memoryview(b""), 7, 0)
    session.grant(memoryview(b""), 7, 0)
    assert session.refusal() is refused


def test_an_error_that_ends_the_connection_is_the_only_answer() -> None:
    session = established()
    session.receive(read(1) + read(2))
    session.fail_all("the ring is closed")
    status, text = session.pop_outgoing()
    assert parse(status).status == Status.ERROR  # type: ignore[arg-type]
    assert text == b"the ring is closed"
    assert (session.closing, len(session.requests), session.receive(read(3))) == (True, 0, [])


@pytest.mark.parametrize("lane", list(LANES.values()))
def test_a_text_has_at_most_its_size_limit(lane: Lane) -> None:
    session = established(lane)
    session.receive(Frame(Kind.STAT).pack())
    session.answer("x" * 70_000)
    status, text = session.pop_outgoing()
    assert parse(status).nbytes == len(text) == 65_536  # type: ignore[arg-type]


# --- the client's end -------------------------------------------------------------------------------------------


def status(to: Request, /, **changed: int) -> bytes:
    named = Frame(Kind.STATUS, slot=to.slot, request=to.request, sequence=to.sequence)
    return named._replace(**changed).pack()


def test_client_numbers_requests_and_matches_answers_in_order() -> None:
    session = ClientSession()
    one, two = session.request(Kind.READ, 1, 5, 0), session.request(Kind.CONSUME, 2, 6, 1)
    assert (one.request, two.request, session.pending) == (0, 1, 2)
    assert parse(two.pack())[:7] == (Kind.CONSUME, 0, 1, 0, 2, 1, 6)
    assert session.receive(status(one))[0] is one
    assert session.receive(status(two))[0] is two
    assert session.pending == 0
    three = session.request(Kind.READ, 1, 5, 0, nbytes=9, tag=4)
    assert parse(three.pack()) == Frame(Kind.READ, slot=1, request=2, sequence=5, nbytes=9, tag=4)
    assert parse(session.request(Kind.STAT).pack()) == Frame(Kind.STAT, request=3)


@pytest.mark.parametrize("changed", [{"request": 1}, {"slot": 9}, {"sequence": 9}])
def test_an_answer_to_something_else_is_refused(changed: dict[str, int]) -> None:
    session = ClientSession()
    request = session.request(Kind.READ, 1, 5)
    with pytest.raises(ProtocolError, match="awaited was request 0"):
        session.receive(status(request, **changed))


@pytest.mark.parametrize("kind", [Kind.READ, Kind.ACK, Kind.STAT])
def test_only_status_may_come_from_a_server(kind: Kind) -> None:
    session = ClientSession()
    session.request(Kind.READ)
    with pytest.raises(ProtocolError, match=f"sent {kind.name}"):
        session.receive(Frame(kind).pack())


def test_an_answer_without_a_request_is_refused() -> None:
    with pytest.raises(ProtocolError, match="no STATUS was due"):
        ClientSession().receive(Frame(Kind.STATUS).pack())


def test_acks_stay_unconfirmed_until_an_answer_counts_them() -> None:
    session = ClientSession()
    reads = [session.request(Kind.READ, slot, slot + 10) for slot in range(3)]
    for read in reads:
        session.receive(status(read))
    for read, consumed in zip(reads, (True, False, True), strict=True):
        flags = Flag.CONSUMED if consumed else 0
        assert parse(session.ack(read, consumed)) == Frame(
            Kind.ACK, reader=0, flags=flags, slot=read.slot, request=read.request, sequence=read.sequence
        )
    assert session.unconfirmed == [reads[0], reads[2]]
    session.receive(status(session.request(Kind.STAT), acked=2))
    assert session.unconfirmed == [reads[2]]
    session.receive(status(session.request(Kind.STAT), acked=3))
    assert session.unconfirmed == []


def test_a_payload_that_will_be_read_again_is_not_unconfirmed() -> None:
    session = ClientSession()
    reads = [session.request(Kind.READ, slot, slot) for slot in range(3)]
    for read in reads:
        session.receive(status(read))
        session.ack(read, True)
    session.forget(reads[1])
    assert session.unconfirmed == [reads[0], reads[2]]
    session.receive(status(session.request(Kind.STAT), acked=1))
    assert session.unconfirmed == [reads[2]]


def test_a_status_that_confirms_acks_which_were_not_sent_is_an_error() -> None:
    session = ClientSession()
    read = session.request(Kind.READ)
    session.receive(status(read))
    session.ack(read, True)
    session.receive(status(session.request(Kind.STAT), acked=1))
    with pytest.raises(ProtocolError, match="confirms 2 ACKs, of which 1 were sent"):
        session.receive(status(session.request(Kind.STAT), acked=2))


@pytest.mark.parametrize(
    ("answer", "text", "error", "message"),
    [
        (Status.STALE, "", StaleSlotError, "the payload was consumed or overwritten"),
        (Status.BUSY, "", ServerBusy, "the lease limit of this connection is reached"),
        (Status.DENIED, "", ReaderIdError, "reader id 63 is denied: this ring's are 0 to 2"),
        (Status.ERROR, "why", SlotError, "the server answered with an error: why"),
        (Status.ERROR, "", SlotError, "the server answered with an error: no reason given"),
    ],
)
def test_each_refusal_is_an_error_that_names_its_payload(
    answer: Status, text: str, error: type[Exception], message: str
) -> None:
    made = refusal(Request(Kind.READ, 0, 3, 8, 63), Frame(Kind.STATUS, answer), text, "tcp:h:1", 3)
    assert type(made) is error
    assert (made.endpoint, made.slot, made.sequence) == ("tcp:h:1", 3, 8)
    assert str(made).startswith(f"{message} (")
    assert "tcp:h:1" in str(made)


def test_text_of_an_error_is_one_short_line() -> None:
    text = "no room\n\x1b[2Jforged " + "x" * 60_000
    made = refusal(Request(Kind.READ, 0, 3, 8, 63), Frame(Kind.STATUS, Status.ERROR), text, "tcp:h:1", 3)
    assert "no room" in str(made)
    assert str(made).isprintable()
    assert len(str(made)) < 1000


@pytest.mark.parametrize("status", [Status.OK, Status.STALE, Status.BUSY, Status.DENIED])
@pytest.mark.parametrize("kind", [Kind.READ, Kind.CONSUME])
def test_client_refuses_a_text_where_none_is_due(kind: Kind, status: Status) -> None:
    session = ClientSession()
    session.request(kind)
    with pytest.raises(ProtocolError, match="text"):
        session.receive(Frame(Kind.STATUS, status, flags=Flag.TEXT, nbytes=3).pack())
