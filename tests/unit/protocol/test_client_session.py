"""The client's session, driven by hand: requests become bytes, bytes become events."""

import pytest

from dray.errors import DrayError, ProtocolError, ReaderIdError, ServerBusy, SlotError, StaleSlotError
from dray.protocol.client_session import PAYLOAD, STATUS, TEXT, Answer, ClientSession, Refusal, Request
from dray.protocol.frames import FRAME_BYTES, MAX_TEXT_BYTES, Flag, Frame, Kind, Status, parse


def status(to: bytes, /, **changed: int) -> bytes:
    """The STATUS(ok) that answers a request, changed."""
    asked = parse(to)
    named = Frame(
        Kind.STATUS, slot=asked.slot, request=asked.request, sequence=asked.sequence, nbytes=asked.nbytes
    )
    return named._replace(**changed).pack()


def read(session: ClientSession, slot: int = 0, sequence: int = 0) -> Request:
    """A READ that was answered."""
    event = session.receive(status(session.request(Kind.READ, slot, sequence)))
    assert isinstance(event, Answer)
    return event.request


def refused(session: ClientSession, to: bytes, text: str = "", **changed: int) -> DrayError:
    """The error for a request that is refused, with a text if there is one."""
    if text:
        changed |= {"flags": Flag.TEXT, "nbytes": len(text)}
    event = session.receive(status(to, **changed))
    if event is None:
        event = session.receive(text.encode())
    assert isinstance(event, Refusal)
    return event.error


def test_requests_are_numbered_and_answers_matched_in_order() -> None:
    session = ClientSession()
    one, two = session.request(Kind.READ, 1, 5, 0), session.request(Kind.CONSUME, 2, 6, 1)
    assert (parse(one).request, parse(two).request, session.pending) == (0, 1, 2)
    assert parse(two)[:7] == (Kind.CONSUME, 0, 1, 0, 2, 1, 6)
    first, second = session.receive(status(one)), session.receive(status(two))
    assert isinstance(first, Answer)
    assert isinstance(second, Answer)
    assert first.request == Request(Kind.READ, 0, 1, 5)
    assert second.request == Request(Kind.CONSUME, 1, 2, 6, 1)
    assert session.pending == 0
    three = session.request(Kind.READ, 1, 5, 0, nbytes=9, tag=4)
    assert parse(three) == Frame(Kind.READ, slot=1, request=2, sequence=5, nbytes=9, tag=4)
    assert parse(session.request(Kind.STAT)) == Frame(Kind.STAT, request=3)


@pytest.mark.parametrize("changed", [{"request": 1}, {"slot": 9}, {"sequence": 9}])
def test_an_answer_to_something_else_is_refused(changed: dict[str, int]) -> None:
    session = ClientSession()
    request = session.request(Kind.READ, 1, 5)
    with pytest.raises(ProtocolError, match="expected was request 0"):
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


@pytest.mark.parametrize("nbytes", [0, FRAME_BYTES - 1, FRAME_BYTES + 1])
def test_a_message_of_another_size_than_expected_is_refused(nbytes: int) -> None:
    session = ClientSession()
    session.request(Kind.READ)
    with pytest.raises(ProtocolError, match=f"STATUS has {FRAME_BYTES} bytes, got {nbytes}"):
        session.receive(bytes(nbytes))


@pytest.mark.parametrize("nbytes", [0, 4, 6])
@pytest.mark.parametrize("flags", [Flag.NONE, Flag.INLINE])
def test_a_payload_of_another_size_than_its_reference_is_refused(nbytes: int, flags: int) -> None:
    session = ClientSession("tcp:h:1")
    request = session.request(Kind.READ, nbytes=5, flags=flags)
    with pytest.raises(
        ProtocolError, match=f"the payload has {nbytes} bytes, 5 according to its reference"
    ) as caught:
        session.receive(status(request, nbytes=nbytes))
    assert caught.value.endpoint == "tcp:h:1"


def test_an_inline_payload_follows_its_status() -> None:
    session = ClientSession()
    small, empty = (session.request(Kind.READ, nbytes=nbytes, flags=Flag.INLINE) for nbytes in (5, 0))
    assert (session.expects, session.awaits) == (FRAME_BYTES, STATUS)
    assert session.receive(status(small, checksum=9, flags=Flag.CHECKSUM)) is None
    assert (session.expects, session.awaits, session.pending) == (5, PAYLOAD, 2)
    answer = session.receive(b"hello")
    assert isinstance(answer, Answer)
    assert (answer.request.request, answer.frame.checksum, answer.body) == (0, 9, b"hello")
    assert (session.expects, session.awaits, session.pending) == (FRAME_BYTES, STATUS, 1)
    answer = session.receive(status(empty))
    assert isinstance(answer, Answer)
    assert answer.body == b""


def test_a_payload_that_is_not_inline_does_not_pass_through_the_session() -> None:
    session = ClientSession()
    answer = session.receive(status(session.request(Kind.READ, nbytes=1 << 40, tag=3), offset=7))
    assert isinstance(answer, Answer)
    assert (answer.request.nbytes, answer.frame.offset, answer.body) == (1 << 40, 7, b"")
    assert session.expects == FRAME_BYTES


def test_a_text_follows_the_status_of_stat() -> None:
    session = ClientSession()
    assert session.receive(status(session.request(Kind.STAT), flags=Flag.TEXT, nbytes=2)) is None
    assert (session.expects, session.awaits) == (2, TEXT)
    answer = session.receive(b"{}")
    assert isinstance(answer, Answer)
    assert answer.body == b"{}"


def test_a_text_that_is_too_long_is_refused_before_it_comes() -> None:
    session = ClientSession()
    request = session.request(Kind.STAT)
    with pytest.raises(ProtocolError, match="a text has at most"):
        session.receive(status(request, flags=Flag.TEXT, nbytes=MAX_TEXT_BYTES + 1))


def test_acks_stay_unconfirmed_until_an_answer_counts_them() -> None:
    session = ClientSession()
    reads = [read(session, slot, slot + 10) for slot in range(3)]
    for each, consumed in zip(reads, (True, False, True), strict=True):
        flags = Flag.CONSUMED if consumed else 0
        assert parse(session.ack(each, consumed)) == Frame(
            Kind.ACK, reader=0, flags=flags, slot=each.slot, request=each.request, sequence=each.sequence
        )
    assert session.unconfirmed == [reads[0], reads[2]]
    session.receive(status(session.request(Kind.STAT), acked=2))
    assert session.unconfirmed == [reads[2]]
    session.receive(status(session.request(Kind.STAT), acked=3))
    assert session.unconfirmed == []


def test_a_payload_that_will_be_read_again_is_not_unconfirmed() -> None:
    session = ClientSession()
    reads = [read(session, slot, slot) for slot in range(3)]
    for each in reads:
        session.ack(each, True)
    session.forget(reads[1])
    assert session.unconfirmed == [reads[0], reads[2]]
    session.receive(status(session.request(Kind.STAT), acked=1))
    assert session.unconfirmed == [reads[2]]


def test_a_status_that_confirms_acks_which_were_not_sent_is_an_error() -> None:
    session = ClientSession()
    session.ack(read(session), True)
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
    session = ClientSession("tcp:h:1", 3)
    made = refused(session, session.request(Kind.READ, 3, 8, 63), text, status=answer)
    assert type(made) is error
    assert (made.endpoint, made.slot, made.sequence) == ("tcp:h:1", 3, 8)
    assert str(made).startswith(f"{message} (")
    assert "tcp:h:1" in str(made)
    read(session)  # the connection stays usable


def test_stale_answers_consume_and_refuses_everything_else() -> None:
    session = ClientSession()
    answer = session.receive(status(session.request(Kind.CONSUME), status=Status.STALE))
    assert isinstance(answer, Answer)
    assert answer.frame.status == Status.STALE
    for kind in (Kind.READ, Kind.STAT):
        assert isinstance(refused(session, session.request(kind), status=Status.STALE), StaleSlotError)


def test_text_of_an_error_is_one_short_line() -> None:
    text = "no room\n\x1b[2Jforged " + "x" * 60_000
    session = ClientSession("tcp:h:1", 3)
    made = refused(session, session.request(Kind.READ, 3, 8), text, status=Status.ERROR)
    assert "no room" in str(made)
    assert str(made).isprintable()
    assert len(str(made)) < 1000


@pytest.mark.parametrize("code", [Status.OK, Status.STALE, Status.BUSY, Status.DENIED])
@pytest.mark.parametrize("kind", [Kind.READ, Kind.CONSUME])
def test_a_text_where_none_is_due_is_refused(kind: Kind, code: Status) -> None:
    session = ClientSession()
    request = session.request(kind)
    with pytest.raises(ProtocolError, match="text"):
        session.receive(status(request, status=code, flags=Flag.TEXT, nbytes=3))
