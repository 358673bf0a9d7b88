"""One connection of a server against a real ring, driven by hand."""

import json
from collections.abc import Iterator

import pytest
from scripted_streams import SilentStream

from dray.errors import BufferFullError, ProtocolError
from dray.protocol.frames import FRAME_BYTES, VERSION, Flag, Frame, Kind, Payload, Status, parse
from dray.protocol.handshake import HELLO, MAGIC, ClientHandshake, ServerIdentity
from dray.protocol.server_session import MAX_INLINE_BYTES, MAX_PENDING
from dray.ring import SharedRingBuffer, SlotWriter
from dray.transport import trace as traced
from dray.transport.lanes import LANES, SHM, TCP, UCX
from dray.transport.lanes.base import Lane
from dray.transport.served_connection import BATCH_BYTES, REQUEST_WEIGHT, ServedConnection
from dray.transport.service import Service

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


def connect(
    ring: SharedRingBuffer, lane: Lane = TCP, promised_slots: int | None = None, **options: object
) -> ServedConnection:
    """A connection before its handshake."""
    slots = promised_slots or ring.slots
    identity = ServerIdentity(ring.producer_id, slots, ring.slot_bytes, MAX_LEASES, ring.readers)
    service = Service(ring=ring, identity=identity, **options)  # type: ignore[arg-type]
    return ServedConnection(SilentStream(lane), "somewhere", service)


def counted(connection: ServedConnection) -> dict[str, int]:
    """The counters that are not zero."""
    return {name: count for name, count in connection.counts.items() if count}


class Server:
    """A connection after its handshake."""

    def __init__(
        self, ring: SharedRingBuffer, lane: Lane = TCP, promised_slots: int | None = None, **options: object
    ) -> None:
        self.lane = lane
        self.ring = ring
        self.connection = connect(ring, lane, promised_slots, **options)
        self.session = self.connection.session
        client = ClientHandshake(lane, ring.producer_id)
        answer: bytes | None = client.hello()
        while answer is not None:
            assert len(answer) == self.session.expects
            self.connection.receive(answer)
            (message,) = self.connection.answer()
            self.connection.flushed()
            assert isinstance(message, bytes)
            answer = client.receive(message)
        assert self.session.established
        assert self.session.expects == FRAME_BYTES

    def send(self, kind: Kind, writer: SlotWriter | None = None, request: int = 0, **fields: int) -> None:
        if writer is not None:
            fields = {"slot": writer.slot, "sequence": writer.sequence, **fields}
        if kind == Kind.READ and self.lane is UCX:
            fields.setdefault("tag", 1000 + request)
        self.connection.receive(Frame(kind, request=request, **fields).pack())

    def collect(self) -> list[Frame | bytes]:
        """What is sent: STATUS frames parsed, texts and payloads as bytes; all of it flushed."""
        items: list[Frame | bytes] = []
        text = 0
        for item in self.connection.answer():
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
        self.connection.flushed()
        return items

    def statuses(self) -> list[Status]:
        return [Status(item.status) for item in self.collect() if isinstance(item, Frame)]

    def counted(self) -> dict[str, int]:
        return counted(self.connection)


def answers_of(server: Server) -> list[Frame]:
    """The next STATUS frames of a server that also sends inline payloads, of other sizes than a frame."""
    answers = statuses(server.connection.answer())
    server.connection.flushed()
    return answers


def granted(server: Server, count: int) -> None:
    """The server has answered so many READs that wait for their ACKs, of requests from 500 on."""
    writer = put(server.ring, b"1")
    for number in range(count):
        server.send(Kind.READ, writer, 500 + number, flags=Flag.INLINE)
    assert [answer.status for answer in answers_of(server)] == [Status.OK] * count
    for reader in range(server.ring.readers):
        server.ring.consume(writer.slot, writer.sequence, reader)


@pytest.mark.parametrize("lane", list(LANES.values()))
def test_read_is_answered_with_status_and_payload_and_consumed_by_ack(ring: SharedRingBuffer, lane: Lane) -> None:
    server, writer = Server(ring, lane), put(ring)
    server.send(Kind.READ, writer, 7, reader=1, tag=9)
    assert server.session.busy
    outgoing = server.connection.answer()
    status = parse(outgoing[0])  # type: ignore[arg-type]
    assert (status.kind, status.status, status.request, status.nbytes) == (Kind.STATUS, Status.OK, 7, 7)
    assert (status.slot, status.sequence, status.reader, status.acked) == (writer.slot, writer.sequence, 1, 0)
    assert status.offset == ring.segment.slot_offset(writer.slot)
    if lane is SHM:
        assert len(outgoing) == 1
    else:
        assert isinstance(outgoing[1], Payload)
        assert (bytes(outgoing[1].view), outgoing[1].tag) == (b"payload", 9)
    server.connection.flushed()
    assert server.connection.leased == ring.statistics().leases == 1
    assert not server.session.busy
    server.send(Kind.ACK, writer, 7, reader=1, flags=Flag.CONSUMED)
    assert server.connection.leased == ring.statistics().leases == 0
    assert not ring.consume(writer.slot, writer.sequence, 1)
    assert ring.consume(writer.slot, writer.sequence, 0)
    assert server.counted() == {"reads": 1, "bytes": 7, "acks_consumed": 1}


def test_ack_returned_makes_the_payload_ready_again(ring: SharedRingBuffer) -> None:
    server, writer = Server(ring), put(ring)
    server.send(Kind.READ, writer, 1)
    server.collect()
    server.send(Kind.ACK, writer, 1)
    assert ring.get_ready_count() == 1
    assert server.connection.counts["acks_returned"] == 1
    server.send(Kind.READ, writer, 2)
    assert server.statuses() == [Status.OK]


def test_answers_count_the_acks_before_them(ring: SharedRingBuffer) -> None:
    server = Server(ring)
    for index in range(3):
        writer = put(ring)
        server.send(Kind.READ, writer, index)
        (status, _) = server.collect()
        assert isinstance(status, Frame)
        assert status.acked == index
        server.send(Kind.ACK, writer, index, flags=Flag.CONSUMED)
    server.send(Kind.STAT)
    assert server.collect()[0].acked == 3  # type: ignore[union-attr]


def test_an_empty_payload_has_a_status_and_no_message_but_on_ucx(ring: SharedRingBuffer) -> None:
    for lane, expected in ((SHM, []), (TCP, []), (UCX, [b""])):
        server, writer = Server(ring, lane, checksum=lambda view: 5), put(ring, b"")
        server.send(Kind.READ, writer)
        status, *rest = server.collect()
        assert isinstance(status, Frame)
        assert (status.status, status.nbytes, status.flags, rest) == (Status.OK, 0, 0, expected)
        server.send(Kind.ACK, writer, flags=Flag.CONSUMED)


@pytest.mark.parametrize("refused", ["stale", "slot", "reader", "busy"])
def test_on_ucx_every_read_gets_one_tagged_message(ring: SharedRingBuffer, refused: str) -> None:
    server, writer = Server(ring, UCX), put(ring)
    request = {"slot": writer.slot, "sequence": writer.sequence, "tag": 3}
    if refused == "busy":
        for index in range(MAX_LEASES):
            server.send(Kind.READ, writer, 10 + index)
        server.collect()
    changed = {"stale": {"sequence": 99}, "slot": {"slot": 99}, "reader": {"reader": 2}, "busy": {}}[refused]
    server.send(Kind.READ, request=1, **{**request, **changed})
    status, payload = server.connection.answer()
    assert isinstance(payload, Payload)
    assert (payload.tag, payload.view.nbytes) == (3, 0)
    assert parse(status).status != Status.OK  # type: ignore[arg-type]


@pytest.mark.parametrize("lane", list(LANES.values()))
def test_an_inline_read_gets_its_payload_with_its_status_and_holds_no_lease(
    ring: SharedRingBuffer, lane: Lane
) -> None:
    server, writer = Server(ring, lane), put(ring)
    server.send(Kind.READ, writer, 3, tag=0, flags=Flag.INLINE)
    status, payload = server.connection.answer()
    assert isinstance(status, bytes)
    assert (parse(status).status, parse(status).request, parse(status).nbytes) == (Status.OK, 3, 7)
    assert payload == b"payload"
    server.connection.flushed()
    assert server.connection.leased == ring.statistics().leases == 0
    assert (ring.statistics().copied, ring.get_ready_count()) == (1, 1)
    assert server.session.busy, "the client has still to acknowledge it"


@pytest.mark.parametrize("consumed", [True, False])
def test_the_ack_of_an_inline_read_consumes_or_releases_the_payload(consumed: bool) -> None:
    with SharedRingBuffer(2, 10) as ring:
        server, writer = Server(ring, TCP), put(ring)
        server.send(Kind.READ, writer, 3, flags=Flag.INLINE)
        server.connection.answer()
        server.send(Kind.ACK, writer, 3, flags=Flag.CONSUMED if consumed else Flag.NONE)
        assert ring.get_ready_count() == (0 if consumed else 1)
        assert not server.session.busy
        server.send(Kind.STAT, None, 4)
        (status, _) = server.collect()
        assert isinstance(status, Frame)
        assert status.acked == 1
        assert server.connection.counts["acks_consumed" if consumed else "acks_returned"] == 1


def test_an_inline_payload_without_an_ack_can_be_read_again(ring: SharedRingBuffer) -> None:
    server, writer = Server(ring), put(ring)
    server.send(Kind.READ, writer, flags=Flag.INLINE)
    server.connection.answer()
    server.connection.close()
    again = Server(ring)
    again.send(Kind.READ, writer, flags=Flag.INLINE)
    assert again.connection.answer()[1] == b"payload"


@pytest.mark.parametrize("lane", list(LANES.values()))
@pytest.mark.parametrize("refused", ["stale", "slot", "reader"])
def test_a_refused_inline_read_gets_nothing_but_its_status(
    ring: SharedRingBuffer, refused: str, lane: Lane
) -> None:
    server, writer = Server(ring, lane), put(ring)
    changed = {"stale": {"sequence": 99}, "slot": {"slot": 99}, "reader": {"reader": 2}}[refused]
    named = {"slot": writer.slot, "sequence": writer.sequence, "tag": 0, "flags": Flag.INLINE, **changed}
    server.send(Kind.READ, **named)
    (status,) = server.connection.answer()
    assert isinstance(status, bytes)
    assert parse(status).status == (Status.DENIED if refused == "reader" else Status.STALE)
    assert not server.session.busy


@pytest.mark.parametrize("more", [0, 1])
def test_a_payload_above_the_inline_size_needs_a_lease(more: int) -> None:
    with SharedRingBuffer(1, MAX_INLINE_BYTES + 1, readers=2) as ring:
        server, writer = Server(ring, UCX), put(ring, bytes(MAX_INLINE_BYTES + more))
        server.send(Kind.READ, writer, tag=0, flags=Flag.INLINE)
        status, rest = server.connection.answer()
        assert parse(status).status == (Status.ERROR if more else Status.OK)  # type: ignore[arg-type]
        assert rest == (
            b"a payload of 16385 bytes needs a lease; at most 16384 are copied (slot 0, sequence 0)"
            if more
            else bytes(MAX_INLINE_BYTES)
        )
        assert server.connection.counts["error"] == more


def test_inline_reads_beside_others_are_answered_in_order() -> None:
    with SharedRingBuffer(3, BATCH_BYTES) as ring:
        small, large = put(ring, b"small"), put(ring, bytes(BATCH_BYTES - 1))
        server = Server(ring, TCP)
        reads = ((small, Flag.INLINE), (large, 0), (small, Flag.INLINE), (small, Flag.INLINE))
        frames = [
            Frame(Kind.READ, flags=flags, slot=which.slot, request=number, sequence=which.sequence).pack()
            for number, (which, flags) in enumerate(reads)
        ]
        server.connection.receive(b"".join(frames))
        sent = []
        while items := server.connection.answer():
            sent += items
            server.connection.flushed()
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
        server.send(Kind.READ, writer, flags=Flag.INLINE)
        status = parse(server.connection.answer()[0])  # type: ignore[arg-type]
        expected = {"none": (0, 0), "kept": (Flag.CHECKSUM, 77), "computed": (Flag.CHECKSUM, 7)}[checksum]
        assert (status.flags, status.checksum) == expected


def test_an_ack_of_an_inline_read_must_name_what_was_read(ring: SharedRingBuffer) -> None:
    server, writer = Server(ring), put(ring)
    server.send(Kind.READ, writer, 3, flags=Flag.INLINE)
    server.connection.answer()
    with pytest.raises(ProtocolError, match="names another slot"):
        server.send(Kind.ACK, None, 3, slot=writer.slot, sequence=writer.sequence + 1, flags=Flag.CONSUMED)


def test_a_request_id_whose_inline_payload_is_not_acknowledged_must_not_be_used_again(
    ring: SharedRingBuffer,
) -> None:
    server, writer = Server(ring), put(ring)
    server.send(Kind.READ, writer, 3, flags=Flag.INLINE)
    server.connection.answer()
    for flags in (Flag.INLINE, Flag.NONE):
        server.send(Kind.READ, writer, 3, flags=flags)
        with pytest.raises(ProtocolError, match="used twice"):
            server.connection.answer()


def test_on_ucx_a_read_that_is_not_inline_needs_a_tag(ring: SharedRingBuffer) -> None:
    server, writer = Server(ring, UCX), put(ring)
    server.send(Kind.READ, writer, tag=0)
    with pytest.raises(ProtocolError, match=r"^a READ on the ucx lane has no tag, and is not inline$"):
        server.connection.answer()


def test_on_ucx_a_read_of_a_closed_ring_gets_its_tagged_message_too() -> None:
    ring = SharedRingBuffer(2, 10)
    server, writer = Server(ring, UCX), put(ring)
    ring.close()
    server.send(Kind.READ, writer, tag=3)
    _, _, payload = server.connection.answer()
    assert isinstance(payload, Payload)
    assert (payload.tag, payload.view.nbytes) == (3, 0)


@pytest.mark.parametrize("lane", list(LANES.values()))
def test_a_read_of_another_size_is_answered_with_an_error(ring: SharedRingBuffer, lane: Lane) -> None:
    server, writer = Server(ring, lane), put(ring)
    server.send(Kind.READ, writer, 5, nbytes=8)
    status, text, *rest = server.collect()
    assert isinstance(status, Frame)
    assert (status.status, status.request, status.nbytes) == (Status.ERROR, 5, len(text))  # type: ignore[arg-type]
    assert text == b"the payload has 7 bytes, 8 were requested"
    assert rest == ([b""] if lane is UCX else [])
    assert (server.connection.leased, ring.statistics().leases, ring.get_ready_count()) == (0, 0, 1)
    assert server.counted() == {"error": 1}
    server.send(Kind.READ, writer, 6, nbytes=7)
    assert server.statuses() == [Status.OK]


@pytest.mark.parametrize("lane", list(LANES.values()))
def test_a_ring_that_refuses_what_the_handshake_promised_is_answered_with_its_error(lane: Lane) -> None:
    with SharedRingBuffer(1, 10) as ring:
        server = Server(ring, lane, promised_slots=2)
        server.send(Kind.READ, request=5, slot=1)
        status, text, *rest = server.collect()
    assert isinstance(status, Frame)
    assert (status.status, status.request) == (Status.ERROR, 5)
    assert text == b"the ring has slots 0 to 0 (slot 1)"
    assert rest == ([b""] if lane is UCX else [])
    assert server.counted() == {"error": 1}


@pytest.mark.parametrize("lane", [TCP, UCX])
def test_a_payload_of_one_byte_is_sent(ring: SharedRingBuffer, lane: Lane) -> None:
    server, writer = Server(ring, lane), put(ring, b"x")
    server.send(Kind.READ, writer)
    assert server.collect()[1:] == [b"x"]


@pytest.mark.parametrize(("sizes", "together"), [((0, 0, 1), 2), ((1, 0, 1), 3)])
def test_payloads_go_out_together_until_a_batch_is_full(sizes: tuple[int, ...], together: int) -> None:
    half = BATCH_BYTES // 2
    with SharedRingBuffer(3, half) as ring:
        server = Server(ring)
        for index, less in enumerate(sizes):
            server.send(Kind.READ, put(ring, bytes(half - less)), index)
        assert sum(isinstance(item, Payload) for item in server.connection.answer()) == together


def test_checksum_comes_with_the_status_where_it_is_computed(ring: SharedRingBuffer) -> None:
    writer = put(ring)
    for checksum, flags, value in ((None, 0, 0), (lambda view: len(view) + 1, Flag.CHECKSUM, 8)):
        server = Server(ring, checksum=checksum)
        server.send(Kind.READ, writer)
        status = server.collect()[0]
        assert isinstance(status, Frame)
        assert (status.flags, status.checksum) == (flags, value)
        server.connection.close()


def test_stale_is_a_clean_answer(ring: SharedRingBuffer) -> None:
    server, writer = Server(ring), put(ring)
    server.send(Kind.READ, request=1, slot=writer.slot, sequence=writer.sequence + 1)
    server.send(Kind.READ, writer, 2)
    assert server.statuses() == [Status.STALE, Status.OK]
    assert server.connection.leased == 1
    assert server.counted() == {"stale": 1, "reads": 1, "bytes": 7}


def test_the_status_of_a_refused_read_repeats_the_request_and_announces_no_bytes(ring: SharedRingBuffer) -> None:
    server = Server(ring, checksum=lambda view: 5)
    server.send(Kind.READ, request=1, slot=2, sequence=99, reader=1)
    assert server.collect() == [Frame(Kind.STATUS, Status.STALE, reader=1, slot=2, request=1, sequence=99)]


@pytest.mark.parametrize("slot", [SLOTS, 2**32 - 1])
def test_a_slot_out_of_range_is_stale(ring: SharedRingBuffer, slot: int) -> None:
    server = Server(ring)
    server.send(Kind.READ, slot=slot)
    server.send(Kind.CONSUME, slot=slot)
    assert server.statuses() == [Status.STALE, Status.STALE]
    assert not server.session.closing


@pytest.mark.parametrize("reader", [2, 64, 255])
def test_a_reader_out_of_range_is_denied(ring: SharedRingBuffer, reader: int) -> None:
    server, writer = Server(ring), put(ring)
    server.send(Kind.READ, writer, reader=reader)
    server.send(Kind.CONSUME, writer, reader=reader)
    assert server.statuses() == [Status.DENIED, Status.DENIED]
    assert ring.get_ready_count() == 1
    assert not server.session.closing


def test_more_leases_than_allowed_are_refused_as_busy_until_one_ends(ring: SharedRingBuffer) -> None:
    server, writer = Server(ring), put(ring)
    for index in range(MAX_LEASES + 1):
        server.send(Kind.READ, writer, index)
    assert server.statuses() == [Status.OK] * MAX_LEASES + [Status.BUSY]
    assert server.connection.counts["busy"] == 1
    server.send(Kind.ACK, writer, 0)
    server.send(Kind.READ, writer, 9)
    assert server.statuses() == [Status.OK]


def test_replies_keep_the_order_of_requests(ring: SharedRingBuffer) -> None:
    server = Server(ring, describe=lambda: '{"a": 1}')
    one, two = put(ring, b"one"), put(ring, b"two")
    server.send(Kind.READ, one, 10)
    server.send(Kind.READ, request=11, slot=one.slot, sequence=99)
    server.send(Kind.STAT, request=12)
    server.send(Kind.CONSUME, two, 13)
    server.send(Kind.READ, two, 14, reader=1)
    items = [*server.collect(), *server.collect()]
    assert [item.request if isinstance(item, Frame) else item for item in items] == [
        10, b"one", 11, 12, b'{"a": 1}', 13, 14, b"two",
    ]  # fmt: skip


def test_a_pipelined_read_is_leased_when_its_reply_begins(
    ring: SharedRingBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dray.transport.served_connection.BATCH_BYTES", SLOT_BYTES + 1)
    server = Server(ring)
    writers = [put(ring, bytes(SLOT_BYTES)) for _ in range(SLOTS)]
    for index, writer in enumerate(writers[:MAX_LEASES]):
        server.send(Kind.READ, writer, index)
    assert ring.statistics().leases == 0
    first = server.connection.answer()
    assert sum(isinstance(item, Payload) for item in first) == 2
    assert ring.statistics().leases == 2
    assert server.connection.answer() == []
    server.connection.flushed()
    assert len(server.connection.answer()) == 2
    assert ring.statistics().leases == 3


def test_consume_frees_the_slot_and_a_second_one_is_stale(ring: SharedRingBuffer) -> None:
    server, writer = Server(ring), put(ring)
    for index, reader in enumerate((0, 0, 1, 1)):
        server.send(Kind.CONSUME, writer, index, reader=reader)
    assert server.statuses() == [Status.OK, Status.STALE, Status.OK, Status.STALE]
    assert ring.statistics().free == SLOTS
    assert (server.connection.counts["consumed"], server.connection.counts["consumed_stale"]) == (2, 2)


def test_a_late_ack_consumes_while_the_sequence_stands(ring: SharedRingBuffer) -> None:
    first, writer = Server(ring), put(ring)
    first.send(Kind.READ, writer, 1)
    first.collect()
    first.connection.close()
    second = Server(ring)
    granted(second, 2)
    second.send(Kind.ACK, writer, 1, flags=Flag.CONSUMED)
    second.send(Kind.ACK, writer, 1, reader=1, flags=Flag.CONSUMED)
    assert ring.statistics().free == SLOTS
    assert second.connection.counts["late_acks"] == 2


@pytest.mark.parametrize("changed", [{"slot": SLOTS}, {"reader": 2}, {"sequence": 99}])
def test_a_late_ack_of_nothing_changes_nothing_and_is_counted(
    ring: SharedRingBuffer, changed: dict[str, int]
) -> None:
    server, writer = Server(ring), put(ring)
    granted(server, 2)
    server.send(Kind.ACK, **{"slot": writer.slot, "sequence": writer.sequence, "flags": Flag.CONSUMED, **changed})
    assert ring.get_ready_count() == 1
    assert server.connection.counts["late_acks"] == 1
    server.send(Kind.ACK, writer)
    assert server.connection.counts["late_acks"] == 2
    assert ring.get_ready_count() == 1


@pytest.mark.parametrize("flags", [Flag.NONE, Flag.CONSUMED])
@pytest.mark.parametrize("inline", [Flag.NONE, Flag.INLINE])
def test_more_acks_than_reads_that_were_answered_ok_are_refused(
    ring: SharedRingBuffer, flags: int, inline: int
) -> None:
    server, writer, other = Server(ring), put(ring), put(ring)
    server.send(Kind.READ, writer, 1, flags=inline)
    server.send(Kind.READ, request=2, slot=writer.slot, sequence=99, flags=inline)
    assert [answer.status for answer in answers_of(server)] == [Status.OK, Status.STALE]
    server.send(Kind.ACK, writer, 1)
    with pytest.raises(ProtocolError, match="2 ACKs came for 1 READs that were answered OK"):
        server.send(Kind.ACK, other, 2, flags=flags)
    server.connection.close()
    assert ring.get_ready_count() == 2


@pytest.mark.parametrize("changed", [{"slot": 1}, {"reader": 1}, {"sequence": 99}])
def test_an_ack_that_names_another_payload_than_its_request_is_refused(
    ring: SharedRingBuffer, changed: dict[str, int]
) -> None:
    server, writer = Server(ring), put(ring)
    server.send(Kind.READ, writer, 1)
    server.collect()
    with pytest.raises(ProtocolError, match="ACK of request 1 names another"):
        server.send(Kind.ACK, writer, 1, **changed)
    server.connection.close()
    assert ring.get_ready_count() == 1


def test_an_ack_before_its_payload_was_sent_is_refused(ring: SharedRingBuffer) -> None:
    server, writer = Server(ring), put(ring)
    server.send(Kind.READ, writer, 1)
    server.connection.answer()
    with pytest.raises(ProtocolError, match="before its payload was sent"):
        server.send(Kind.ACK, writer, 1, flags=Flag.CONSUMED)
    assert ring.statistics().leases == 1


def test_an_ack_before_its_read_was_answered_ends_no_lease(ring: SharedRingBuffer) -> None:
    server, writer = Server(ring), put(ring)
    server.send(Kind.READ, writer, 1)
    with pytest.raises(ProtocolError, match="1 ACKs came for 0 READs"):
        server.send(Kind.ACK, writer, 1, flags=Flag.CONSUMED)
    server.connection.close()
    assert ring.get_ready_count() == 1


def test_a_request_id_used_twice_is_refused(ring: SharedRingBuffer) -> None:
    server, writer = Server(ring), put(ring)
    server.send(Kind.READ, writer, 1)
    server.send(Kind.READ, writer, 1)
    with pytest.raises(ProtocolError, match="used twice"):
        server.collect()
    server.connection.close()
    assert ring.statistics().leases == 0


def test_more_unanswered_requests_than_allowed_are_refused(ring: SharedRingBuffer) -> None:
    server, writer = Server(ring), put(ring)
    server.send(Kind.READ, writer, 0)
    server.connection.answer()
    for index in range(MAX_PENDING):
        server.send(Kind.STAT, request=index + 1)
    with pytest.raises(ProtocolError, match=str(MAX_PENDING)):
        server.send(Kind.STAT)


def test_a_status_from_a_client_is_refused(ring: SharedRingBuffer) -> None:
    with pytest.raises(ProtocolError, match=r"^a client that has not subscribed sent STATUS$"):
        Server(ring).send(Kind.STATUS)


def test_closing_releases_every_lease_and_may_happen_twice(ring: SharedRingBuffer) -> None:
    server = Server(ring)
    for index in range(MAX_LEASES):
        server.send(Kind.READ, put(ring), index)
    server.connection.answer()
    assert ring.statistics().leases == MAX_LEASES
    server.connection.close()
    server.connection.close()
    assert (ring.statistics().leases, ring.get_ready_count()) == (0, MAX_LEASES)
    assert server.connection.answer() == []
    assert ring.statistics().double_releases == 0


def test_a_leased_slot_is_not_reused_after_another_connection_consumed_it() -> None:
    with SharedRingBuffer(1, 10) as ring:
        reading, consuming, writer = Server(ring), Server(ring), put(ring)
        reading.send(Kind.READ, writer, 1)
        reading.collect()
        consuming.send(Kind.CONSUME, writer, 1)
        consuming.send(Kind.READ, writer, 2)
        assert consuming.statuses() == [Status.OK, Status.STALE]
        with pytest.raises(BufferFullError):
            ring.claim(1, 0)
        reading.send(Kind.ACK, writer, 1, flags=Flag.CONSUMED)
        assert ring.claim(1, 0).slot == writer.slot


@pytest.mark.parametrize("kind", [Kind.READ, Kind.CONSUME, Kind.STAT])
def test_a_closed_ring_is_answered_with_an_error_and_ends_the_connection(kind: Kind) -> None:
    ring = SharedRingBuffer(2, 10)
    server = Server(ring, describe=lambda: json.dumps({"ready": ring.get_ready_count()}))
    writer = put(ring)
    ring.close()
    server.send(kind, writer)
    server.send(Kind.CONSUME, writer, 1)
    status, text = server.collect()
    assert isinstance(status, Frame)
    assert (status.status, b"closed" in text) == (Status.ERROR, True)  # type: ignore[operator]
    assert server.session.closing
    assert (len(server.session.requests), server.collect()) == (0, [])
    server.connection.close()


def test_an_ack_after_the_ring_was_closed_is_ignored() -> None:
    ring = SharedRingBuffer(2, 10)
    server, writer = Server(ring), put(ring)
    for request in (1, 3):
        server.send(Kind.READ, writer, request)
    server.collect()
    ring.close()
    assert server.connection.leased == 2
    server.send(Kind.ACK, writer, 1, flags=Flag.CONSUMED)
    server.send(Kind.ACK, writer, 2, flags=Flag.CONSUMED)
    assert server.collect() == []
    assert (server.connection.leased, server.session.busy, server.session.closing) == (1, False, False)
    assert (server.connection.counts["acks_consumed"], server.connection.counts["late_acks"]) == (1, 1)
    server.connection.close()


def test_a_payload_consumed_while_its_checksum_is_computed_is_still_sent(ring: SharedRingBuffer) -> None:
    """Its lease is there already, so its bytes stand."""
    writer = put(ring)

    def checksum(view: memoryview) -> int:
        ring.consume(writer.slot, writer.sequence, 0)
        ring.consume(writer.slot, writer.sequence, 1)
        return 1

    server = Server(ring, checksum=checksum)
    server.send(Kind.READ, writer)
    assert server.collect()[1] == b"payload"
    server.send(Kind.ACK, writer, flags=Flag.CONSUMED)
    assert ring.statistics().free == SLOTS


# --- the handshake ----------------------------------------------------------------------------------------------


def test_a_wrong_proof_is_answered_counted_and_ends_the_connection(ring: SharedRingBuffer) -> None:
    connection = connect(ring, secret=b"secret")
    session = connection.session
    connection.receive(ClientHandshake(TCP, ring.producer_id).hello())
    assert len(connection.answer()) == 1
    assert (session.closing, session.established) == (False, False)
    connection.receive(bytes(32))
    assert len(connection.answer()) == 1
    assert session.closing
    assert not session.established
    assert counted(connection) == {"auth_failures": 1}


def test_a_hello_for_another_lane_is_answered_counted_and_ends_the_connection(ring: SharedRingBuffer) -> None:
    connection = connect(ring)
    assert (connection.session.established, connection.session.closing) == (False, False)
    connection.receive(ClientHandshake(SHM, ring.producer_id).hello())
    assert len(connection.answer()) == 1
    assert connection.session.closing
    assert counted(connection) == {"malformed": 1}


def test_a_hello_of_another_version_is_answered_counted_and_ends_the_connection(ring: SharedRingBuffer) -> None:
    connection = connect(ring)
    connection.receive(HELLO.pack(MAGIC, VERSION + 1, TCP.number, 0, ring.producer_id, bytes(32)))
    assert len(connection.answer()) == 1
    assert connection.session.closing
    connection.close()
    assert counted(connection) == {"other_versions": 1}


@pytest.mark.parametrize("mine", [b"secret", None])
def test_a_client_that_disconnects_instead_of_proving_the_secret_is_counted_once(
    ring: SharedRingBuffer, mine: bytes | None
) -> None:
    other_producer = bytes(15) + b"x"
    for producer, secret, count in (
        (ring.producer_id, b"other", 1),
        (ring.producer_id, None, 0 if mine is None else 1),
        (other_producer, b"other", 0),
    ):
        connection = connect(ring, secret=mine)
        connection.receive(ClientHandshake(TCP, producer, secret).hello())
        connection.answer()
        for _ in range(2):
            connection.close()
            assert connection.counts["auth_failures"] == count


# --- the trace --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lane", [SHM, TCP, UCX])
def test_the_trace_reports_every_step_of_an_exchange(ring: SharedRingBuffer, lane: Lane) -> None:
    events: list[traced.TraceEvent] = []
    server = Server(ring, lane, trace=events.append)
    one, two = put(ring), put(ring, b"second")
    server.connection.receive(
        b"".join(
            (
                frame(Kind.READ, one, 1, reader=1, tag=1),
                frame(Kind.READ, two, 2, flags=Flag.INLINE),
                Frame(Kind.READ, slot=3, sequence=99, request=3, tag=3).pack(),
                frame(Kind.CONSUME, two, 4, reader=1),
                Frame(Kind.STAT, request=5).pack(),
            )
        )
    )
    server.connection.answer()
    server.connection.flushed()
    server.send(Kind.ACK, two, 2, flags=Flag.CONSUMED)
    server.connection.close()
    steps = [(type(event).__name__, *event[2:-1]) for event in events]
    assert [event.endpoint for event in events] == ["somewhere"] * len(events)
    assert steps.pop(0)[::2] == ("Connect", VERSION)
    sent = [("Payload", 0, 0, 7), ("Payload", 1, 1, 6)]
    assert steps == [
        ("Request", Kind.READ, 0, 0, 1),
        ("Request", Kind.READ, 1, 1, 0),
        ("Request", Kind.READ, 3, 99, 0),
        ("Request", Kind.CONSUME, 1, 1, 1),
        ("Request", Kind.STAT, 0, 0, 0),
        ("Status", Kind.READ, 0, 0, Status.OK),
        ("Status", Kind.READ, 1, 1, Status.OK),
        ("Status", Kind.READ, 3, 99, Status.STALE),
        ("Status", Kind.CONSUME, 1, 1, Status.OK),
        ("Status", Kind.STAT, 0, 0, Status.OK),
        *(sent if lane.in_band else sent[1:]),
        ("Acknowledgement", 1, 1, 0, True),
        ("Acknowledgement", 0, 0, 1, False),
    ]


def test_leases_of_a_connection_are_reported_each(ring: SharedRingBuffer) -> None:
    server, writer = Server(ring, TCP), put(ring)
    server.send(Kind.READ, writer, 1)
    server.send(Kind.READ, writer, 2, reader=1)
    server.collect()
    now = server.connection.active + 3
    found = server.connection.leases(now)
    assert [(each.pid, each.slot, each.sequence, each.reader) for each in found] == [
        (None, writer.slot, writer.sequence, 0),
        (None, writer.slot, writer.sequence, 1),
    ]
    assert {each.age for each in found} == {3}


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
        server.connection.receive(b"".join(reads))
        answers = statuses(server.connection.answer())
        server.connection.flushed()
        assert [answer.status for answer in answers] == [Status.OK] * 3 + [Status.STALE] * 2 + [Status.OK] * 2
        assert server.counted() == {"reads": 5, "bytes": 411, "stale": 2}
        granted(server, 4)
        acks = [frame(Kind.ACK, each, number, flags=Flag.CONSUMED) for number, each in enumerate(small[:2])]
        acks += [frame(Kind.ACK, small[2], 2)]
        acks += [frame(Kind.ACK, each, 5 + number, flags=number) for number, each in enumerate(large)]
        acks += [frame(Kind.ACK, small[2], number) for number in (77, 78)]
        server.connection.receive(b"".join(acks))
        counted = server.counted()
        assert (counted["acks_consumed"], counted["acks_returned"], counted["late_acks"]) == (3, 2, 2)
        again = [frame(Kind.READ, small[2], 10 + number, flags=Flag.INLINE) for number in range(2)]
        ends = [frame(Kind.ACK, small[2], 10 + number) for number in range(2)]
        unfit = [frame(Kind.READ, small[2], 20 + number, nbytes=7, flags=Flag.INLINE) for number in range(2)]
        leases = [frame(Kind.READ, small[2], 30 + number) for number in range(2)]
        back = [frame(Kind.ACK, small[2], 30 + number) for number in range(2)]
        outgoing = [frame(Kind.ACK, small[2], 40 + number, flags=Flag.CONSUMED) for number in range(2)]
        for frames in (again, ends, unfit, leases, back, outgoing):
            server.connection.receive(b"".join(frames))
            while server.connection.answer():
                server.connection.flushed()
        counted = server.counted()
        assert (counted["reads"], counted["bytes"], counted["error"]) == (13, 815, 2)
        assert (counted["acks_returned"], counted["late_acks"]) == (6, 4)


def test_inline_reads_behind_one_with_a_lease_are_counted_beside_it() -> None:
    with SharedRingBuffer(2, 10) as ring:
        leased, copied = put(ring), put(ring, b"abc")
        server = Server(ring)
        server.connection.receive(frame(Kind.READ, leased, 0) + frame(Kind.READ, copied, 1, flags=Flag.INLINE))
        server.connection.answer()
        assert server.counted() == {"reads": 2, "bytes": 10}


def test_consumes_of_leases_in_one_go_are_all_counted() -> None:
    with SharedRingBuffer(2, 10) as ring:
        writers = [put(ring) for _ in range(2)]
        server = Server(ring)
        server.connection.receive(b"".join(frame(Kind.READ, each, n) for n, each in enumerate(writers)))
        while server.connection.answer():
            server.connection.flushed()
        server.connection.receive(
            b"".join(frame(Kind.ACK, each, n, flags=Flag.CONSUMED) for n, each in enumerate(writers))
        )
        assert server.connection.counts["acks_consumed"] == 2
        assert ring.statistics().consumed == 2


def test_an_inline_read_of_another_size_is_answered_with_an_error(ring: SharedRingBuffer) -> None:
    server, writer = Server(ring), put(ring)
    server.connection.receive(
        b"".join(frame(Kind.READ, writer, n, nbytes=size, flags=Flag.INLINE) for n, size in enumerate((8, 7, 0)))
    )
    outgoing = server.connection.answer()
    assert [answer.status for answer in statuses(outgoing)] == [Status.ERROR, Status.OK, Status.OK]
    assert [answer.request for answer in statuses(outgoing)] == [0, 1, 2]
    assert outgoing[1] == b"the payload has 7 bytes, 8 were requested"
    assert outgoing[3] == outgoing[5] == b"payload"


def test_an_inline_payload_lies_nowhere_in_the_segment(ring: SharedRingBuffer) -> None:
    server, writer = Server(ring, SHM), put(ring)
    server.send(Kind.READ, writer, flags=Flag.INLINE)
    (status,) = statuses(server.connection.answer())
    assert (status.offset, status.tag) == (0, 0)


def test_inline_payloads_leave_in_batches_of_a_bounded_size() -> None:
    size = MAX_INLINE_BYTES - FRAME_BYTES
    with SharedRingBuffer(1, size) as ring:
        server, writer = Server(ring), put(ring, bytes(size))
        server.connection.receive(
            b"".join(frame(Kind.READ, writer, n, nbytes=size, flags=Flag.INLINE) for n in range(80))
        )
        answered = []
        while items := server.connection.answer():
            answered.append(len(statuses(items)))
            server.connection.flushed()
        assert answered == [16] * 5


def test_inline_reads_of_any_size_leave_in_batches_of_a_bounded_size() -> None:
    with SharedRingBuffer(1, MAX_INLINE_BYTES) as ring:
        server, writer = Server(ring), put(ring, bytes(MAX_INLINE_BYTES))
        for number in range(80):
            server.send(Kind.READ, writer, number, nbytes=0, flags=Flag.INLINE)
        assert len(answers_of(server)) == 16


@pytest.mark.parametrize(
    ("kind", "flags"), [(Kind.READ, Flag.NONE), (Kind.READ, Flag.INLINE), (Kind.CONSUME, Flag.NONE)]
)
def test_each_answer_without_a_payload_takes_its_part_of_a_batch(kind: Kind, flags: int) -> None:
    with SharedRingBuffer(1, 10) as ring:
        server = Server(ring)
        for number in range(MAX_PENDING):
            server.send(kind, request=number, nbytes=1 if kind is Kind.READ else 0, flags=flags)
        assert 0 < len(answers_of(server)) <= 2 * BATCH_BYTES // REQUEST_WEIGHT


def test_statistics_take_a_batch_each() -> None:
    with SharedRingBuffer(1, 10) as ring:
        server = Server(ring)
        for number in range(100):
            server.send(Kind.STAT, request=number)
        assert [server.statuses() for _ in range(101)] == [[Status.OK]] * 100 + [[]]


def test_inline_payloads_without_acks_are_bounded() -> None:
    with SharedRingBuffer(1, 10) as ring:
        server, writer = Server(ring), put(ring)
        server.connection.receive(
            b"".join(frame(Kind.READ, writer, n, flags=Flag.INLINE) for n in range(MAX_PENDING))
        )
        while server.connection.answer():
            server.connection.flushed()
        assert server.connection.counts["reads"] == MAX_PENDING
        server.send(Kind.READ, writer, MAX_PENDING, flags=Flag.INLINE)
        with pytest.raises(ProtocolError, match="4096 inline payloads wait"):
            server.connection.answer()


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"kind": 13}, "unknown frame kind 13"),
        ({"kind": Kind.END}, "a client that has not subscribed sent END"),
        ({"status": 77}, "unknown status 77"),
        ({"flags": 16}, "unknown flags 0x10 in a READ frame"),
        ({"kind": Kind.CONSUME, "flags": Flag.INLINE}, "unknown flags 0x8 in a CONSUME frame"),
        ({"kind": Kind.STATUS, "flags": Flag.TEXT, "nbytes": 65_537}, "at most 65536 bytes, 65537 were announced"),
    ],
)
def test_a_frame_in_a_batch_that_no_client_may_send_is_refused(
    ring: SharedRingBuffer, wrong: dict[str, int], why: str
) -> None:
    server, writer = Server(ring), put(ring)
    changed = Frame(**{"kind": Kind.READ, "slot": writer.slot, "sequence": writer.sequence, **wrong})
    with pytest.raises(ProtocolError, match=why):
        server.connection.receive(frame(Kind.READ, writer, 1) + changed.pack())
