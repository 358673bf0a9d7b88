"""The sessions of both ends, without a ring: what the protocol demands."""

from typing import Any

import pytest

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
    assert str(violation.error) == "a client that has not subscribed sent STATUS"


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
