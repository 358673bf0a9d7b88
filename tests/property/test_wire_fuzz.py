"""Any bytes that arrive are answered by the protocol package, or raise `ProtocolError`."""

import contextlib
import json
from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_streams import SilentStream

from dray.errors import ProtocolError
from dray.protocol import PayloadRef
from dray.protocol.client_session import Answer, ClientSession
from dray.protocol.frames import FRAME, FRAME_BYTES, Frame, Kind, Payload, parse
from dray.protocol.handshake import (
    CHALLENGE,
    HELLO,
    PROOF,
    WELCOME,
    ClientHandshake,
    ServerHandshake,
    ServerIdentity,
    Verdict,
)
from dray.ring import SharedRingBuffer
from dray.transport.lanes import LANES, TCP
from dray.transport.lanes.base import Lane
from dray.transport.served_connection import ServedConnection
from dray.transport.service import Service

u8, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (8, 32, 64))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=8,
)
endpoints = st.lists(st.from_regex(r"(unix|tcp|ucx):[a-z0-9./\[\]:]{1,20}", fullmatch=True), max_size=4)
refs = st.builds(PayloadRef, st.binary(min_size=16, max_size=16), u32, u64, u64, endpoints.map(tuple))
frames = st.tuples(u8, u8, u8, u8, u32, *([u64] * 7)).map(Frame._make)
likely_frames = st.tuples(
    st.sampled_from([Kind.READ, Kind.ACK, Kind.CONSUME, Kind.STAT]),
    st.just(0),
    st.integers(0, 3),
    st.just(0) | st.sampled_from([1]),
    st.integers(0, 4),
    st.integers(0, 6),
    st.integers(0, 4),
).map(lambda values: Frame(*values))
secrets = st.none() | st.binary(min_size=1, max_size=8)


@given(refs)
def test_every_reference_survives_json(ref: PayloadRef) -> None:
    assert PayloadRef.from_json(ref.to_json()) == ref


@given(st.text(max_size=600) | st.binary(max_size=600) | json_values.map(json.dumps))
def test_any_text_is_a_reference_or_a_protocol_error(text: str | bytes) -> None:
    with contextlib.suppress(ProtocolError):
        PayloadRef.from_json(text)


@given(refs, st.sampled_from("psqne"), json_values)
def test_any_field_is_a_reference_or_a_protocol_error(ref: PayloadRef, field: str, value: object) -> None:
    text = json.dumps({**json.loads(ref.to_json()), field: value})
    try:
        found = PayloadRef.from_json(text)
    except ProtocolError:
        return
    assert json.loads(found.to_json()) == json.loads(text)


@given(frames)
def test_any_frame_parses_to_itself_or_is_a_protocol_error(frame: Frame) -> None:
    try:
        found = parse(frame.pack())
    except ProtocolError:
        return
    assert found == frame


@given(st.binary(max_size=130))
def test_any_bytes_are_a_frame_or_a_protocol_error(message: bytes) -> None:
    try:
        found = parse(message)
    except ProtocolError:
        return
    assert len(message) == FRAME_BYTES
    assert FRAME.pack(*found) == message


@given(
    st.binary(min_size=HELLO.size, max_size=HELLO.size),
    st.binary(min_size=PROOF.size, max_size=PROOF.size),
    st.booleans(),
    st.binary(min_size=1, max_size=8),
)
def test_no_bytes_get_past_a_server_with_a_secret(hello: bytes, proof: bytes, valid: bool, secret: bytes) -> None:
    server = ServerHandshake(TCP, ServerIdentity(bytes(16), 1, 1, 1, 1), secret)
    server.receive(ClientHandshake(TCP).hello() if valid else hello)
    server.receive(proof)
    assert not server.done
    assert server.verdict is not Verdict.WELCOME


@given(
    secrets,
    st.binary(min_size=CHALLENGE.size, max_size=CHALLENGE.size) | st.none(),
    st.integers(0, CHALLENGE.size - 1),
    u8,
    st.binary(min_size=WELCOME.size, max_size=WELCOME.size),
)
def test_any_server_is_taken_or_refused_by_a_typed_error(
    secret: bytes | None, challenge: bytes | None, at: int, value: int, welcome: bytes
) -> None:
    client = ClientHandshake(TCP, bytes(16), secret)
    if challenge is None:
        server = ServerHandshake(TCP, ServerIdentity(bytes(16), 1, 1, 1, 1), secret)
        changed = bytearray(server.receive(client.hello()))
        changed[at] = value
        challenge = bytes(changed)
    with contextlib.suppress(ProtocolError):
        if client.receive(challenge):
            client.receive(welcome)


def _send(connection: ServedConnection, flush: Callable[[], bool]) -> None:
    for item in connection.answer():
        if isinstance(item, Payload):
            bytes(item.view)
    if flush():
        connection.flushed()


@settings(deadline=None)
@given(st.sampled_from(list(LANES.values())), st.lists(likely_frames | frames, max_size=40), st.data())
def test_any_frames_leave_the_ring_whole(lane: Lane, history: list[Frame], data: st.DataObject) -> None:
    """Random requests and ACKs, flushed or not: every lease ends, none ends twice, all slots become free."""
    with SharedRingBuffer(4, 64, readers=2) as ring:
        for _ in range(3):
            with ring.claim(8) as writer:
                writer.commit()
        identity = ServerIdentity(ring.producer_id, ring.slots, ring.slot_bytes, 3, ring.readers)
        connection = ServedConnection(SilentStream(lane), "", Service(ring=ring, identity=identity))
        client = ClientHandshake(lane, ring.producer_id)
        answer: bytes | None = client.hello()
        while answer is not None:
            connection.receive(answer)
            (message,) = connection.answer()
            assert isinstance(message, bytes)
            answer = client.receive(message)
        try:
            for frame in history:
                connection.receive(frame.pack())
                _send(connection, lambda: data.draw(st.booleans()))
                assert connection.leased == ring.statistics().leases <= 3
        except ProtocolError:
            pass
        connection.close()
        found = ring.statistics()
        assert (found.leases, found.reading, found.double_releases) == (0, 0, 0)
        assert found.free + found.ready == 4


@given(st.lists(st.sampled_from(["ask", "ack", "answer", "junk"]), max_size=30), frames)
def test_any_answers_are_matched_or_a_protocol_error(steps: list[str], junk: Frame) -> None:
    session = ClientSession()
    asked = []
    answered = []
    for step in steps:
        if step == "ask":
            asked.append(parse(session.request(Kind.READ, len(asked), len(asked))))
        elif step == "answer" and asked:
            request = asked.pop(0)
            named = Frame(Kind.STATUS, slot=request.slot, request=request.request, sequence=request.sequence)
            event = session.receive(named.pack())
            assert isinstance(event, Answer)
            assert event.request[1:4] == (request.request, request.slot, request.sequence)
            answered.append(event.request)
        elif step == "ack" and answered:
            session.ack(answered.pop(0), True)
        elif step == "junk":
            with contextlib.suppress(ProtocolError):
                session.receive(junk.pack())
                return
            return
        assert session.pending == len(asked)
