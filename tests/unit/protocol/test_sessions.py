"""The server's session, driven by hand against a real ring."""

import json
from collections.abc import Iterator

import pytest

from dray.counters import Counters
from dray.errors import BufferFullError, ProtocolError
from dray.protocol.frames import FRAME_BYTES, Flag, Frame, Kind, Payload, Status, parse
from dray.protocol.handshake import ClientHandshake, ServerIdentity
from dray.protocol.server_session import BATCH_BYTES, MAX_INLINE_BYTES, MAX_PENDING, REQUEST_WEIGHT, ServerSession
from dray.ring import SharedRingBuffer, SlotWriter
from dray.transport.lanes import LANES, SHM, TCP, UCX
from dray.transport.lanes.base import Lane

SLOTS, SLOT_BYTES, MAX_LEASES = 4, 200_000, 3


@pytest.fixture
def ring() -> Iterator[SharedRingBuffer]:
    with SharedRingBuffer(SLOTS, SLOT_BYTES, readers=2) as ring:
        yield ring


def put(ring: SharedRingBuffer, payload: bytes = b"payload") -> SlotWriter:
    with ring.claim(len(payload), 0) as writer:
        writer.buffer[:] = payload
        writer.commit()
    return writer


class Server:
    """A session after its handshake, with its counters."""

    def __init__(
        self, ring: SharedRingBuffer, lane: Lane = TCP, promised_slots: int | None = None, **options: object
    ) -> None:
        self.counters = Counters()
        self.lane = lane
        self.ring = ring
        slots = promised_slots or ring.slots
        self.identity = ServerIdentity(ring.producer_id, slots, ring.slot_bytes, MAX_LEASES, ring.readers)
        self.session = ServerSession(lane, ring, self.identity, counters=self.counters, **options)  # type: ignore[arg-type]
        client = ClientHandshake(lane, ring.producer_id)
        answer: bytes | None = client.hello()
        while answer is not None:
            assert len(answer) == self.session.expects
            self.session.receive(answer)
            (message,) = self.session.take()
            self.session.flushed()
            assert isinstance(message, bytes)
            answer = client.receive(message)
        assert self.session.established
        assert self.session.expects == FRAME_BYTES

    def say(self, kind: Kind, writer: SlotWriter | None = None, request: int = 0, **fields: int) -> None:
        if writer is not None:
            fields = {"slot": writer.slot, "sequence": writer.sequence, **fields}
        if kind == Kind.READ and self.lane is UCX:
            fields.setdefault("tag", 1000 + request)
        self.session.receive(Frame(kind, request=request, **fields).pack())

    def take(self) -> list[Frame | bytes]:
        """What goes out: STATUS frames parsed, texts and payloads as bytes; all of it flushed."""
        items: list[Frame | bytes] = []
        text = 0
        for item in self.session.take():
            if isinstance(item, Payload):
                items.append(bytes(item.view))
            elif text:
                assert len(item) == text
                items.append(item)
                text = 0
            else:
                frame = parse(item)
                text = frame.nbytes if frame.flags & Flag.TEXT else 0
                items.append(frame)
        self.session.flushed()
        return items

    def statuses(self) -> list[Status]:
        return [Status(item.status) for item in self.take() if isinstance(item, Frame)]


def answers_of(server: Server) -> list[Frame]:
    """The next STATUS frames of a server that also sends inline payloads, of other sizes than a frame."""
    answers = statuses(server.session.take())
    server.session.flushed()
    return answers


def granted(server: Server, count: int) -> None:
    """The server has answered so many READs that wait for their ACKs, of requests from 500 on."""
    writer = put(server.ring, b"1")
    for number in range(count):
        server.say(Kind.READ, writer, 500 + number, flags=Flag.INLINE)
    assert [answer.status for answer in answers_of(server)] == [Status.OK] * count
    for reader in range(server.ring.readers):
        server.ring.consume(writer.slot, writer.sequence, reader)


# --- the server's end -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lane", list(LANES.values()))
def test_read_is_answered_with_status_and_payload_and_consumed_by_ack(ring: SharedRingBuffer, lane: Lane) -> None:
    server, writer = Server(ring, lane), put(ring)
    server.say(Kind.READ, writer, 7, reader=1, tag=9)
    assert server.session.busy
    taken = server.session.take()
    status = parse(taken[0])  # type: ignore[arg-type]
    assert (status.kind, status.status, status.request, status.nbytes) == (Kind.STATUS, Status.OK, 7, 7)
    assert (status.slot, status.sequence, status.reader, status.acked) == (writer.slot, writer.sequence, 1, 0)
    assert status.offset == ring.segment.slot_offset(writer.slot)
    if lane is SHM:
        assert len(taken) == 1
    else:
        assert isinstance(taken[1], Payload)
        assert (bytes(taken[1].view), taken[1].tag) == (b"payload", 9)
    server.session.flushed()
    assert server.session.leases == ring.statistics().leases == 1
    assert not server.session.busy
    server.say(Kind.ACK, writer, 7, reader=1, flags=Flag.CONSUMED)
    assert server.session.leases == ring.statistics().leases == 0
    assert not ring.consume(writer.slot, writer.sequence, 1)
    assert ring.consume(writer.slot, writer.sequence, 0)
    assert server.counters.snapshot() == {"reads": 1, "bytes": 7, "acks_consumed": 1}


def test_ack_returned_makes_the_payload_ready_again(ring: SharedRingBuffer) -> None:
    server, writer = Server(ring), put(ring)
    server.say(Kind.READ, writer, 1)
    server.take()
    server.say(Kind.ACK, writer, 1)
    assert ring.get_ready_count() == 1
    assert server.counters["acks_returned"] == 1
    server.say(Kind.READ, writer, 2)
    assert server.statuses() == [Status.OK]


def test_answers_count_the_acks_before_them(ring: SharedRingBuffer) -> None:
    server = Server(ring)
    for index in range(3):
        writer = put(ring)
        server.say(Kind.READ, writer, index)
        (status, _) = server.take()
        assert isinstance(status, Frame)
        assert status.acked == index
        server.say(Kind.ACK, writer, index, flags=Flag.CONSUMED)
    server.say(Kind.STAT)
    assert server.take()[0].acked == 3  # type: ignore[union-attr]


def test_an_empty_payload_has_a_status_and_no_message_but_on_ucx(ring: SharedRingBuffer) -> None:
    for lane, expected in ((SHM, []), (TCP, []), (UCX, [b""])):
        server, writer = Server(ring, lane, checksum=lambda view: 5), put(ring, b"")
        server.say(Kind.READ, writer)
        status, *rest = server.take()
        assert isinstance(status, Frame)
        assert (status.status, status.nbytes, status.flags, rest) == (Status.OK, 0, 0, expected)
        server.say(Kind.ACK, writer, flags=Flag.CONSUMED)


@pytest.mark.parametrize("refused", ["stale", "slot", "reader", "busy"])
def test_on_ucx_every_read_gets_one_tagged_message(ring: SharedRingBuffer, refused: str) -> None:
    server, writer = Server(ring, UCX), put(ring)
    request = {"slot": writer.slot, "sequence": writer.sequence, "tag": 3}
    if refused == "busy":
        for index in range(MAX_LEASES):
            server.say(Kind.READ, writer, 10 + index)
        server.take()
    changed = {"stale": {"sequence": 99}, "slot": {"slot": 99}, "reader": {"reader": 2}, "busy": {}}[refused]
    server.say(Kind.READ, request=1, **{**request, **changed})
    status, payload = server.session.take()
    assert isinstance(payload, Payload)
    assert (payload.tag, payload.view.nbytes) == (3, 0)
    assert parse(status).status != Status.OK  # type: ignore[arg-type]


@pytest.mark.parametrize("lane", list(LANES.values()))
def test_an_inline_read_gets_its_payload_with_its_status_and_holds_no_lease(
    ring: SharedRingBuffer, lane: Lane
) -> None:
    server, writer = Server(ring, lane), put(ring)
    server.say(Kind.READ, writer, 3, tag=0, flags=Flag.INLINE)
    status, payload = server.session.take()
    assert isinstance(status, bytes)
    assert (parse(status).status, parse(status).request, parse(status).nbytes) == (Status.OK, 3, 7)
    assert payload == b"payload"
    server.session.flushed()
    assert server.session.leases == ring.statistics().leases == 0
    assert (ring.statistics().copied, ring.get_ready_count()) == (1, 1)
    assert server.session.busy, "the client has still to acknowledge it"


@pytest.mark.parametrize("consumed", [True, False])
def test_an_inline_read_ends_as_its_ack_says(consumed: bool) -> None:
    with SharedRingBuffer(2, 10) as ring:
        server, writer = Server(ring, TCP), put(ring)
        server.say(Kind.READ, writer, 3, flags=Flag.INLINE)
        server.session.take()
        server.say(Kind.ACK, writer, 3, flags=Flag.CONSUMED if consumed else Flag.NONE)
        assert ring.get_ready_count() == (0 if consumed else 1)
        assert not server.session.busy
        server.say(Kind.STAT, None, 4)
        (status, _) = server.take()
        assert isinstance(status, Frame)
        assert status.acked == 1
        assert server.counters["acks_consumed" if consumed else "acks_returned"] == 1


def test_an_inline_payload_nobody_acknowledged_can_be_read_again(ring: SharedRingBuffer) -> None:
    server, writer = Server(ring), put(ring)
    server.say(Kind.READ, writer, flags=Flag.INLINE)
    server.session.take()
    server.session.close()
    again = Server(ring)
    again.say(Kind.READ, writer, flags=Flag.INLINE)
    assert again.session.take()[1] == b"payload"


@pytest.mark.parametrize("lane", list(LANES.values()))
@pytest.mark.parametrize("refused", ["stale", "slot", "reader"])
def test_a_refused_inline_read_gets_nothing_but_its_status(
    ring: SharedRingBuffer, refused: str, lane: Lane
) -> None:
    server, writer = Server(ring, lane), put(ring)
    changed = {"stale": {"sequence": 99}, "slot": {"slot": 99}, "reader": {"reader": 2}}[refused]
    named = {"slot": writer.slot, "sequence": writer.sequence, "tag": 0, "flags": Flag.INLINE, **changed}
    server.say(Kind.READ, **named)
    (status,) = server.session.take()
    assert isinstance(status, bytes)
    assert parse(status).status == (Status.DENIED if refused == "reader" else Status.STALE)
    assert not server.session.busy


@pytest.mark.parametrize("more", [0, 1])
def test_a_payload_above_the_inline_size_needs_a_lease(more: int) -> None:
    with SharedRingBuffer(1, MAX_INLINE_BYTES + 1, readers=2) as ring:
        server, writer = Server(ring, UCX), put(ring, bytes(MAX_INLINE_BYTES + more))
        server.say(Kind.READ, writer, tag=0, flags=Flag.INLINE)
        status, rest = server.session.take()
        assert parse(status).status == (Status.ERROR if more else Status.OK)  # type: ignore[arg-type]
        assert rest == (
            b"a payload of 16385 bytes needs a lease; at most 16384 are copied (slot 0, sequence 0)"
            if more
            else bytes(MAX_INLINE_BYTES)
        )
        assert server.counters["error"] == more


def test_inline_reads_beside_others_are_answered_in_order() -> None:
    with SharedRingBuffer(3, BATCH_BYTES) as ring:
        small, large = put(ring, b"small"), put(ring, bytes(BATCH_BYTES - 1))
        server = Server(ring, TCP)
        reads = ((small, Flag.INLINE), (large, 0), (small, Flag.INLINE), (small, Flag.INLINE))
        frames = [
            Frame(Kind.READ, flags=flags, slot=which.slot, request=number, sequence=which.sequence).pack()
            for number, (which, flags) in enumerate(reads)
        ]
        server.session.receive(b"".join(frames))
        sent = []
        while items := server.session.take():
            sent += items
            server.session.flushed()
        answered = [item for item in sent if isinstance(item, bytes) and len(item) == FRAME_BYTES]
        assert [parse(item).request for item in answered] == [0, 1, 2, 3]
        assert [sent[1], sent[5], sent[7]] == [b"small"] * 3
        assert isinstance(sent[3], Payload)


@pytest.mark.parametrize("checksum", ["none", "kept", "computed"])
def test_an_inline_payload_has_the_checksum_of_its_bytes(checksum: str) -> None:
    with SharedRingBuffer(1, 10) as ring:
        writer = put(ring)
        if checksum == "kept":
            ring.checksum(writer.slot, writer.sequence, lambda _: 77)
        server = Server(ring, TCP, checksum=None if checksum == "none" else len)
        server.say(Kind.READ, writer, flags=Flag.INLINE)
        status = parse(server.session.take()[0])  # type: ignore[arg-type]
        expected = {"none": (0, 0), "kept": (Flag.CHECKSUM, 77), "computed": (Flag.CHECKSUM, 7)}[checksum]
        assert (status.flags, status.checksum) == expected


def test_an_ack_of_an_inline_read_must_name_what_was_read(ring: SharedRingBuffer) -> None:
    server, writer = Server(ring), put(ring)
    server.say(Kind.READ, writer, 3, flags=Flag.INLINE)
    server.session.take()
    with pytest.raises(ProtocolError, match="names another slot"):
        server.say(Kind.ACK, None, 3, slot=writer.slot, sequence=writer.sequence + 1, flags=Flag.CONSUMED)


def test_a_request_id_whose_inline_payload_is_not_acknowledged_must_not_be_used_again(
    ring: SharedRingBuffer,
) -> None:
    server, writer = Server(ring), put(ring)
    server.say(Kind.READ, writer, 3, flags=Flag.INLINE)
    server.session.take()
    for flags in (Flag.INLINE, Flag.NONE):
        server.say(Kind.READ, writer, 3, flags=flags)
        with pytest.raises(ProtocolError, match="used twice"):
            server.session.take()


def test_on_ucx_a_read_that_is_not_inline_needs_a_tag(ring: SharedRingBuffer) -> None:
    server, writer = Server(ring, UCX), put(ring)
    server.say(Kind.READ, writer, tag=0)
    with pytest.raises(ProtocolError, match=r"^a READ on the ucx lane has no tag, and is not inline$"):
        server.session.take()


def test_on_ucx_a_read_of_a_closed_ring_gets_its_tagged_message_too() -> None:
    ring = SharedRingBuffer(2, 10)
    server, writer = Server(ring, UCX), put(ring)
    ring.close()
    server.say(Kind.READ, writer, tag=3)
    _, _, payload = server.session.take()
    assert isinstance(payload, Payload)
    assert (payload.tag, payload.view.nbytes) == (3, 0)


@pytest.mark.parametrize("lane", list(LANES.values()))
def test_a_reference_that_says_another_size_is_answered_with_an_error(ring: SharedRingBuffer, lane: Lane) -> None:
    server, writer = Server(ring, lane), put(ring)
    server.say(Kind.READ, writer, 5, nbytes=8)
    status, text, *rest = server.take()
    assert isinstance(status, Frame)
    assert (status.status, status.request, status.nbytes) == (Status.ERROR, 5, len(text))  # type: ignore[arg-type]
    assert text == b"the payload has 7 bytes, the reference says 8"
    assert rest == ([b""] if lane is UCX else [])
    assert (server.session.leases, ring.statistics().leases, ring.get_ready_count()) == (0, 0, 1)
    assert server.counters.snapshot() == {"error": 1}
    server.say(Kind.READ, writer, 6, nbytes=7)
    assert server.statuses() == [Status.OK]


@pytest.mark.parametrize("lane", list(LANES.values()))
def test_a_ring_that_refuses_what_the_handshake_promised_is_answered_with_its_error(lane: Lane) -> None:
    with SharedRingBuffer(1, 10) as ring:
        server = Server(ring, lane, promised_slots=2)
        server.say(Kind.READ, request=5, slot=1)
        status, text, *rest = server.take()
    assert isinstance(status, Frame)
    assert (status.status, status.request) == (Status.ERROR, 5)
    assert text == b"the ring has slots 0 to 0 (slot 1)"
    assert rest == ([b""] if lane is UCX else [])
    assert server.counters.snapshot() == {"error": 1}


@pytest.mark.parametrize("lane", [TCP, UCX])
def test_a_payload_of_one_byte_is_sent(ring: SharedRingBuffer, lane: Lane) -> None:
    server, writer = Server(ring, lane), put(ring, b"x")
    server.say(Kind.READ, writer)
    assert server.take()[1:] == [b"x"]


@pytest.mark.parametrize(("sizes", "together"), [((0, 0, 1), 2), ((1, 0, 1), 3)])
def test_payloads_go_out_together_until_a_batch_is_full(sizes: tuple[int, ...], together: int) -> None:
    half = BATCH_BYTES // 2
    with SharedRingBuffer(3, half) as ring:
        server = Server(ring)
        for index, less in enumerate(sizes):
            server.say(Kind.READ, put(ring, bytes(half - less)), index)
        assert sum(isinstance(item, Payload) for item in server.session.take()) == together


def test_checksum_comes_with_the_status_where_it_is_computed(ring: SharedRingBuffer) -> None:
    writer = put(ring)
    for checksum, flags, value in ((None, 0, 0), (lambda view: len(view) + 1, Flag.CHECKSUM, 8)):
        server = Server(ring, checksum=checksum)
        server.say(Kind.READ, writer)
        status = server.take()[0]
        assert isinstance(status, Frame)
        assert (status.flags, status.checksum) == (flags, value)
        server.session.close()


def test_stale_is_a_clean_answer(ring: SharedRingBuffer) -> None:
    server, writer = Server(ring), put(ring)
    server.say(Kind.READ, request=1, slot=writer.slot, sequence=writer.sequence + 1)
    server.say(Kind.READ, writer, 2)
    assert server.statuses() == [Status.STALE, Status.OK]
    assert server.session.leases == 1
    assert server.counters.snapshot() == {"stale": 1, "reads": 1, "bytes": 7}


def test_an_answer_without_a_payload_says_so(ring: SharedRingBuffer) -> None:
    server = Server(ring, checksum=lambda view: 5)
    server.say(Kind.READ, request=1, slot=2, sequence=99, reader=1)
    assert server.take() == [Frame(Kind.STATUS, Status.STALE, reader=1, slot=2, request=1, sequence=99)]


@pytest.mark.parametrize("slot", [SLOTS, 2**32 - 1])
def test_a_slot_out_of_range_is_stale(ring: SharedRingBuffer, slot: int) -> None:
    server = Server(ring)
    server.say(Kind.READ, slot=slot)
    server.say(Kind.CONSUME, slot=slot)
    assert server.statuses() == [Status.STALE, Status.STALE]
    assert not server.session.closing


@pytest.mark.parametrize("reader", [2, 64, 255])
def test_a_reader_out_of_range_is_denied(ring: SharedRingBuffer, reader: int) -> None:
    server, writer = Server(ring), put(ring)
    server.say(Kind.READ, writer, reader=reader)
    server.say(Kind.CONSUME, writer, reader=reader)
    assert server.statuses() == [Status.DENIED, Status.DENIED]
    assert ring.get_ready_count() == 1
    assert not server.session.closing


def test_more_leases_than_allowed_are_refused_as_busy_until_one_ends(ring: SharedRingBuffer) -> None:
    server, writer = Server(ring), put(ring)
    for index in range(MAX_LEASES + 1):
        server.say(Kind.READ, writer, index)
    assert server.statuses() == [Status.OK] * MAX_LEASES + [Status.BUSY]
    assert server.counters["busy"] == 1
    server.say(Kind.ACK, writer, 0)
    server.say(Kind.READ, writer, 9)
    assert server.statuses() == [Status.OK]


def test_replies_keep_the_order_of_requests(ring: SharedRingBuffer) -> None:
    server = Server(ring, describe=lambda: '{"a": 1}')
    one, two = put(ring, b"one"), put(ring, b"two")
    server.say(Kind.READ, one, 10)
    server.say(Kind.READ, request=11, slot=one.slot, sequence=99)
    server.say(Kind.STAT, request=12)
    server.say(Kind.CONSUME, two, 13)
    server.say(Kind.READ, two, 14, reader=1)
    items = [*server.take(), *server.take()]
    assert [item.request if isinstance(item, Frame) else item for item in items] == [
        10, b"one", 11, 12, b'{"a": 1}', 13, 14, b"two",
    ]  # fmt: skip


def test_a_pipelined_read_is_leased_when_its_reply_begins(
    ring: SharedRingBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dray.protocol.server_session.BATCH_BYTES", SLOT_BYTES + 1)
    server = Server(ring)
    writers = [put(ring, bytes(SLOT_BYTES)) for _ in range(SLOTS)]
    for index, writer in enumerate(writers[:MAX_LEASES]):
        server.say(Kind.READ, writer, index)
    assert ring.statistics().leases == 0
    first = server.session.take()
    assert sum(isinstance(item, Payload) for item in first) == 2
    assert ring.statistics().leases == 2
    assert server.session.take() == []
    server.session.flushed()
    assert len(server.session.take()) == 2
    assert ring.statistics().leases == 3


def test_consume_frees_and_says_so_and_a_second_one_is_stale(ring: SharedRingBuffer) -> None:
    server, writer = Server(ring), put(ring)
    for index, reader in enumerate((0, 0, 1, 1)):
        server.say(Kind.CONSUME, writer, index, reader=reader)
    assert server.statuses() == [Status.OK, Status.STALE, Status.OK, Status.STALE]
    assert ring.statistics().free == SLOTS
    assert (server.counters["consumed"], server.counters["consumed_stale"]) == (2, 2)


def test_a_late_ack_consumes_while_the_sequence_stands(ring: SharedRingBuffer) -> None:
    first, writer = Server(ring), put(ring)
    first.say(Kind.READ, writer, 1)
    first.take()
    first.session.close()
    second = Server(ring)
    granted(second, 2)
    second.say(Kind.ACK, writer, 1, flags=Flag.CONSUMED)
    second.say(Kind.ACK, writer, 1, reader=1, flags=Flag.CONSUMED)
    assert ring.statistics().free == SLOTS
    assert second.counters["late_acks"] == 2


@pytest.mark.parametrize("changed", [{"slot": SLOTS}, {"reader": 2}, {"sequence": 99}])
def test_a_late_ack_of_nothing_changes_nothing_and_is_counted(
    ring: SharedRingBuffer, changed: dict[str, int]
) -> None:
    server, writer = Server(ring), put(ring)
    granted(server, 2)
    server.say(Kind.ACK, **{"slot": writer.slot, "sequence": writer.sequence, "flags": Flag.CONSUMED, **changed})
    assert ring.get_ready_count() == 1
    assert server.counters["late_acks"] == 1
    server.say(Kind.ACK, writer)
    assert server.counters["late_acks"] == 2
    assert ring.get_ready_count() == 1


@pytest.mark.parametrize("flags", [Flag.NONE, Flag.CONSUMED])
@pytest.mark.parametrize("inline", [Flag.NONE, Flag.INLINE])
def test_more_acks_than_reads_that_were_answered_ok_are_refused(
    ring: SharedRingBuffer, flags: int, inline: int
) -> None:
    server, writer, other = Server(ring), put(ring), put(ring)
    server.say(Kind.READ, writer, 1, flags=inline)
    server.say(Kind.READ, request=2, slot=writer.slot, sequence=99, flags=inline)
    assert [answer.status for answer in answers_of(server)] == [Status.OK, Status.STALE]
    server.say(Kind.ACK, writer, 1)
    with pytest.raises(ProtocolError, match="2 ACKs came for 1 READs that were answered OK"):
        server.say(Kind.ACK, other, 2, flags=flags)
    server.session.close()
    assert ring.get_ready_count() == 2


@pytest.mark.parametrize("changed", [{"slot": 1}, {"reader": 1}, {"sequence": 99}])
def test_an_ack_that_names_another_payload_than_its_request_is_refused(
    ring: SharedRingBuffer, changed: dict[str, int]
) -> None:
    server, writer = Server(ring), put(ring)
    server.say(Kind.READ, writer, 1)
    server.take()
    with pytest.raises(ProtocolError, match="ACK of request 1 names another"):
        server.say(Kind.ACK, writer, 1, **changed)
    server.session.close()
    assert ring.get_ready_count() == 1


def test_an_ack_before_its_payload_was_sent_is_refused(ring: SharedRingBuffer) -> None:
    server, writer = Server(ring), put(ring)
    server.say(Kind.READ, writer, 1)
    server.session.take()
    with pytest.raises(ProtocolError, match="before its payload was sent"):
        server.say(Kind.ACK, writer, 1, flags=Flag.CONSUMED)
    assert ring.statistics().leases == 1


def test_an_ack_before_its_read_was_answered_ends_no_lease(ring: SharedRingBuffer) -> None:
    server, writer = Server(ring), put(ring)
    server.say(Kind.READ, writer, 1)
    with pytest.raises(ProtocolError, match="1 ACKs came for 0 READs"):
        server.say(Kind.ACK, writer, 1, flags=Flag.CONSUMED)
    server.session.close()
    assert ring.get_ready_count() == 1


def test_a_request_id_used_twice_is_refused(ring: SharedRingBuffer) -> None:
    server, writer = Server(ring), put(ring)
    server.say(Kind.READ, writer, 1)
    server.say(Kind.READ, writer, 1)
    with pytest.raises(ProtocolError, match="used twice"):
        server.take()
    server.session.close()
    assert ring.statistics().leases == 0


def test_more_unanswered_requests_than_allowed_are_refused(ring: SharedRingBuffer) -> None:
    server, writer = Server(ring), put(ring)
    server.say(Kind.READ, writer, 0)
    server.session.take()
    for index in range(MAX_PENDING):
        server.say(Kind.STAT, request=index + 1)
    with pytest.raises(ProtocolError, match=str(MAX_PENDING)):
        server.say(Kind.STAT)


def test_a_status_from_a_client_is_refused(ring: SharedRingBuffer) -> None:
    with pytest.raises(ProtocolError, match=r"^a client sent STATUS$"):
        Server(ring).say(Kind.STATUS)


def test_closing_returns_every_lease_and_may_happen_twice(ring: SharedRingBuffer) -> None:
    server = Server(ring)
    for index in range(MAX_LEASES):
        server.say(Kind.READ, put(ring), index)
    server.session.take()
    assert ring.statistics().leases == MAX_LEASES
    server.session.close()
    server.session.close()
    assert (ring.statistics().leases, ring.get_ready_count()) == (0, MAX_LEASES)
    assert server.session.take() == []
    assert ring.statistics().late_finalises == 0


def test_a_leased_slot_is_not_reused_after_another_connection_consumed_it() -> None:
    with SharedRingBuffer(1, 10) as ring:
        reading, consuming, writer = Server(ring), Server(ring), put(ring)
        reading.say(Kind.READ, writer, 1)
        reading.take()
        consuming.say(Kind.CONSUME, writer, 1)
        consuming.say(Kind.READ, writer, 2)
        assert consuming.statuses() == [Status.OK, Status.STALE]
        with pytest.raises(BufferFullError):
            ring.claim(1, 0)
        reading.say(Kind.ACK, writer, 1, flags=Flag.CONSUMED)
        assert ring.claim(1, 0).slot == writer.slot


@pytest.mark.parametrize("kind", [Kind.READ, Kind.CONSUME, Kind.STAT])
def test_a_closed_ring_is_answered_with_an_error_and_ends_the_connection(kind: Kind) -> None:
    ring = SharedRingBuffer(2, 10)
    server = Server(ring, describe=lambda: json.dumps({"ready": ring.get_ready_count()}))
    writer = put(ring)
    ring.close()
    server.say(kind, writer)
    server.say(Kind.CONSUME, writer, 1)
    status, text = server.take()
    assert isinstance(status, Frame)
    assert (status.status, b"closed" in text) == (Status.ERROR, True)  # type: ignore[operator]
    assert server.session.closing
    assert (server.session.unanswered, server.take()) == (0, [])
    server.session.close()


def test_an_ack_after_the_ring_was_closed_is_ignored() -> None:
    ring = SharedRingBuffer(2, 10)
    server, writer = Server(ring), put(ring)
    for request in (1, 3):
        server.say(Kind.READ, writer, request)
    server.take()
    ring.close()
    assert server.session.leases == 2
    server.say(Kind.ACK, writer, 1, flags=Flag.CONSUMED)
    server.say(Kind.ACK, writer, 2, flags=Flag.CONSUMED)
    assert server.take() == []
    assert (server.session.leases, server.session.busy, server.session.closing) == (1, False, False)
    assert (server.counters["acks_consumed"], server.counters["late_acks"]) == (1, 1)
    server.session.close()


def test_a_payload_consumed_while_its_checksum_is_computed_is_still_sent(ring: SharedRingBuffer) -> None:
    """Its lease is there already, so its bytes stand."""
    writer = put(ring)

    def checksum(view: memoryview) -> int:
        ring.consume(writer.slot, writer.sequence, 0)
        ring.consume(writer.slot, writer.sequence, 1)
        return 1

    server = Server(ring, checksum=checksum)
    server.say(Kind.READ, writer)
    assert server.take()[1] == b"payload"
    server.say(Kind.ACK, writer, flags=Flag.CONSUMED)
    assert ring.statistics().free == SLOTS


def test_refused_hello_is_answered_counted_and_closes(ring: SharedRingBuffer) -> None:
    counters = Counters()
    identity = ServerIdentity(ring.producer_id, SLOTS, SLOT_BYTES, MAX_LEASES, 2)
    session = ServerSession(TCP, ring, identity, secret=b"secret", counters=counters)
    client = ClientHandshake(TCP, ring.producer_id)
    session.receive(client.hello())
    assert len(session.take()) == 1
    assert (session.closing, session.established) == (False, False)
    session.receive(bytes(32))
    assert len(session.take()) == 1
    assert session.closing
    assert not session.established
    assert counters.snapshot() == {"auth_failures": 1}


def test_a_hello_for_another_lane_is_answered_counted_and_closes(ring: SharedRingBuffer) -> None:
    counters = Counters()
    identity = ServerIdentity(ring.producer_id, SLOTS, SLOT_BYTES, MAX_LEASES, 2)
    session = ServerSession(TCP, ring, identity, counters=counters)
    assert (session.established, session.closing) == (False, False)
    session.receive(ClientHandshake(SHM, ring.producer_id).hello())
    assert len(session.take()) == 1
    assert session.closing
    assert counters.snapshot() == {"malformed": 1}


@pytest.mark.parametrize("mine", [b"secret", None])
def test_a_client_that_leaves_instead_of_proving_the_secret_is_counted_once(
    ring: SharedRingBuffer, mine: bytes | None
) -> None:
    identity = ServerIdentity(ring.producer_id, SLOTS, SLOT_BYTES, MAX_LEASES, 2)
    other_producer = bytes(15) + b"x"
    for producer, secret, counted in (
        (ring.producer_id, b"other", 1),
        (ring.producer_id, None, 0 if mine is None else 1),
        (other_producer, b"other", 0),
    ):
        counters = Counters()
        session = ServerSession(TCP, ring, identity, secret=mine, counters=counters)
        session.receive(ClientHandshake(TCP, producer, secret).hello())
        session.take()
        for _ in range(2):
            session.close()
            assert counters["auth_failures"] == counted


# --- several at once --------------------------------------------------------------------------------------------


def frame(kind: Kind, writer: SlotWriter, request: int, **fields: int) -> bytes:
    return Frame(kind, slot=writer.slot, sequence=writer.sequence, request=request, **fields).pack()


def statuses(items: list[object]) -> list[Frame]:
    """The STATUS frames among what goes out; payloads here have other sizes than a frame."""
    return [parse(item) for item in items if isinstance(item, bytes) and len(item) == FRAME_BYTES]


def test_everything_in_a_batch_is_counted() -> None:
    with SharedRingBuffer(8, 200) as ring:
        small, large = [put(ring, bytes(size)) for size in (1, 10, 100)], [put(ring, bytes(150)) for _ in range(2)]
        server = Server(ring)
        reads = [frame(Kind.READ, each, number, flags=Flag.INLINE) for number, each in enumerate(small)]
        gone = [frame(Kind.READ, put(ring), number, flags=Flag.INLINE) for number in (3, 4)]
        for slot in range(5, 7):
            ring.consume(slot, slot)
        reads += [*gone, *(frame(Kind.READ, each, 5 + number) for number, each in enumerate(large))]
        server.session.receive(b"".join(reads))
        answers = statuses(server.session.take())
        server.session.flushed()
        assert [answer.status for answer in answers] == [Status.OK] * 3 + [Status.STALE] * 2 + [Status.OK] * 2
        assert server.counters.snapshot() == {"reads": 5, "bytes": 411, "stale": 2}
        granted(server, 4)
        acks = [frame(Kind.ACK, each, number, flags=Flag.CONSUMED) for number, each in enumerate(small[:2])]
        acks += [frame(Kind.ACK, small[2], 2)]
        acks += [frame(Kind.ACK, each, 5 + number, flags=number) for number, each in enumerate(large)]
        acks += [frame(Kind.ACK, small[2], number) for number in (77, 78)]
        server.session.receive(b"".join(acks))
        counted = server.counters.snapshot()
        assert (counted["acks_consumed"], counted["acks_returned"], counted["late_acks"]) == (3, 2, 2)
        again = [frame(Kind.READ, small[2], 10 + number, flags=Flag.INLINE) for number in range(2)]
        ends = [frame(Kind.ACK, small[2], 10 + number) for number in range(2)]
        unfit = [frame(Kind.READ, small[2], 20 + number, nbytes=7, flags=Flag.INLINE) for number in range(2)]
        leases = [frame(Kind.READ, small[2], 30 + number) for number in range(2)]
        back = [frame(Kind.ACK, small[2], 30 + number) for number in range(2)]
        taken = [frame(Kind.ACK, small[2], 40 + number, flags=Flag.CONSUMED) for number in range(2)]
        for frames in (again, ends, unfit, leases, back, taken):
            server.session.receive(b"".join(frames))
            while server.session.take():
                server.session.flushed()
        counted = server.counters.snapshot()
        assert (counted["reads"], counted["bytes"], counted["error"]) == (13, 815, 2)
        assert (counted["acks_returned"], counted["late_acks"]) == (6, 4)


def test_inline_reads_behind_one_with_a_lease_are_counted_beside_it() -> None:
    with SharedRingBuffer(2, 10) as ring:
        leased, copied = put(ring), put(ring, b"abc")
        server = Server(ring)
        server.session.receive(frame(Kind.READ, leased, 0) + frame(Kind.READ, copied, 1, flags=Flag.INLINE))
        server.session.take()
        assert server.counters.snapshot() == {"reads": 2, "bytes": 10}


def test_consumes_of_leases_in_one_go_are_all_counted() -> None:
    with SharedRingBuffer(2, 10) as ring:
        writers = [put(ring) for _ in range(2)]
        server = Server(ring)
        server.session.receive(b"".join(frame(Kind.READ, each, n) for n, each in enumerate(writers)))
        while server.session.take():
            server.session.flushed()
        server.session.receive(
            b"".join(frame(Kind.ACK, each, n, flags=Flag.CONSUMED) for n, each in enumerate(writers))
        )
        assert server.counters["acks_consumed"] == 2
        assert ring.statistics().consumed == 2


def test_an_inline_read_of_another_size_is_answered_with_an_error(ring: SharedRingBuffer) -> None:
    server, writer = Server(ring), put(ring)
    server.session.receive(
        b"".join(frame(Kind.READ, writer, n, nbytes=size, flags=Flag.INLINE) for n, size in enumerate((8, 7, 0)))
    )
    taken = server.session.take()
    assert [answer.status for answer in statuses(taken)] == [Status.ERROR, Status.OK, Status.OK]
    assert [answer.request for answer in statuses(taken)] == [0, 1, 2]
    assert taken[1] == b"the payload has 7 bytes, the reference says 8"
    assert taken[3] == taken[5] == b"payload"


def test_an_inline_payload_lies_nowhere_in_the_segment(ring: SharedRingBuffer) -> None:
    server, writer = Server(ring, SHM), put(ring)
    server.say(Kind.READ, writer, flags=Flag.INLINE)
    (status,) = statuses(server.session.take())
    assert (status.offset, status.tag) == (0, 0)


def test_inline_payloads_leave_in_batches_of_a_bounded_size() -> None:
    size = MAX_INLINE_BYTES - FRAME_BYTES
    with SharedRingBuffer(1, size) as ring:
        server, writer = Server(ring), put(ring, bytes(size))
        server.session.receive(
            b"".join(frame(Kind.READ, writer, n, nbytes=size, flags=Flag.INLINE) for n in range(80))
        )
        answered = []
        while items := server.session.take():
            answered.append(len(statuses(items)))
            server.session.flushed()
        assert answered == [16] * 5


def test_inline_reads_of_any_size_leave_in_batches_of_a_bounded_size() -> None:
    with SharedRingBuffer(1, MAX_INLINE_BYTES) as ring:
        server, writer = Server(ring), put(ring, bytes(MAX_INLINE_BYTES))
        for number in range(80):
            server.say(Kind.READ, writer, number, nbytes=0, flags=Flag.INLINE)
        assert len(answers_of(server)) == 16


@pytest.mark.parametrize(
    ("kind", "flags"), [(Kind.READ, Flag.NONE), (Kind.READ, Flag.INLINE), (Kind.CONSUME, Flag.NONE)]
)
def test_each_answer_without_a_payload_takes_its_part_of_a_batch(kind: Kind, flags: int) -> None:
    with SharedRingBuffer(1, 10) as ring:
        server = Server(ring)
        for number in range(MAX_PENDING):
            server.say(kind, request=number, nbytes=1 if kind is Kind.READ else 0, flags=flags)
        assert 0 < len(answers_of(server)) <= 2 * BATCH_BYTES // REQUEST_WEIGHT


def test_statistics_take_a_batch_each() -> None:
    with SharedRingBuffer(1, 10) as ring:
        server = Server(ring)
        for number in range(100):
            server.say(Kind.STAT, request=number)
        assert [server.statuses() for _ in range(101)] == [[Status.OK]] * 100 + [[]]


def test_inline_payloads_that_nobody_acknowledges_are_bounded() -> None:
    with SharedRingBuffer(1, 10) as ring:
        server, writer = Server(ring), put(ring)
        server.session.receive(
            b"".join(frame(Kind.READ, writer, n, flags=Flag.INLINE) for n in range(MAX_PENDING))
        )
        while server.session.take():
            server.session.flushed()
        assert server.counters["reads"] == MAX_PENDING
        server.say(Kind.READ, writer, MAX_PENDING, flags=Flag.INLINE)
        with pytest.raises(ProtocolError, match="4096 payloads wait"):
            server.session.take()


def test_on_shm_status_says_when_the_payload_was_committed() -> None:
    class Clock:
        def now(self) -> float:
            return 12.5

    with SharedRingBuffer(1, 10, clock=Clock()) as ring:
        server, writer = Server(ring, SHM), put(ring)
        server.say(Kind.READ, writer)
        (status,) = statuses(server.session.take())
        assert (status.checksum, status.flags) == (12_500_000_000, Flag.NONE)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"kind": 9}, "unknown frame kind 9"),
        ({"status": 77}, "unknown status 77"),
        ({"flags": 16}, "unknown flags 0x10 in a READ frame"),
        ({"kind": Kind.CONSUME, "flags": Flag.INLINE}, "unknown flags 0x8 in a CONSUME frame"),
        ({"kind": Kind.STATUS, "flags": Flag.TEXT, "nbytes": 65_537}, "at most 65536 bytes, announced were 65537"),
    ],
)
def test_a_frame_in_a_batch_that_no_client_may_send_is_refused(
    ring: SharedRingBuffer, wrong: dict[str, int], why: str
) -> None:
    server, writer = Server(ring), put(ring)
    changed = Frame(**{"kind": Kind.READ, "slot": writer.slot, "sequence": writer.sequence, **wrong})
    with pytest.raises(ProtocolError, match=why):
        server.session.receive(frame(Kind.READ, writer, 1) + changed.pack())
