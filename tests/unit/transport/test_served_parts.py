"""Parts of payloads on the server's side: one at a time, in steps, from the slot itself."""

import gc
from collections.abc import Iterator

import numpy as np
import pytest
import xxhash
from scripted_streams import ScriptedStream
from simulation import ManualClock

from dray import pack, unpack
from dray.errors import SelectionError
from dray.protocol.frames import FRAME, FRAME_BYTES, MAX_BODY_BYTES, Flag, Frame, Kind, Payload, Status
from dray.protocol.handshake import ServerIdentity
from dray.ring import SharedRingBuffer
from dray.transport.lanes import TCP, UCX
from dray.transport.lanes.base import Lane
from dray.transport.served_connections import TURN_SECONDS, ServedConnections
from dray.transport.served_parts import CHECKSUM_BYTES, PreparedPart
from dray.transport.service import Service
from dray.transport.trace import Status as StatusEvent
from dray.transport.trace import TraceEvent

LARGE = {"big": np.arange(3 * CHECKSUM_BYTES, dtype=np.uint8), "small": np.arange(8)}
TEXT = b'{"fields":["big"]}'


@pytest.fixture(scope="module")
def image() -> bytes:
    return bytes(pack(LARGE))


@pytest.fixture
def ring(image: bytes) -> Iterator[SharedRingBuffer]:
    with SharedRingBuffer(2, len(image)) as ring:
        yield ring
        gc.collect()


def serving(ring: SharedRingBuffer, clock: ManualClock, **options: object) -> ServedConnections:
    identity = ServerIdentity(ring.producer_id, ring.slots, ring.slot_bytes, 8, 1)
    return ServedConnections(Service(ring=ring, identity=identity, clock=clock, **options))  # type: ignore[arg-type]


class SlowClock(ManualClock):
    """A clock of which each reading takes `step` seconds."""

    step = 0.0

    def now(self) -> float:
        self.advance(self.step)
        return super().now()


def put(ring: SharedRingBuffer, image: bytes) -> tuple[int, int]:
    with ring.claim(len(image), 0) as writer:
        writer.buffer[:] = image
        writer.commit()
    return writer.slot, writer.sequence


def read(payload: tuple[int, int], number: int, text: bytes = TEXT) -> list[Frame]:
    """A READ with a body, as frames."""
    body = text + b" " * (-len(text) % FRAME_BYTES)
    slot, sequence = payload
    head = Frame(
        Kind.READ, flags=Flag.BODY, slot=slot, sequence=sequence, request=number, tag=number, offset=len(body)
    )
    pieces = range(0, len(body), FRAME_BYTES)
    return [head, *(Frame._make(FRAME.unpack_from(body, begin)) for begin in pieces)]


def payload_of(stream: ScriptedStream, tag: int) -> bytes:
    return b"".join(item.view for item in stream.sent if isinstance(item, Payload) and item.tag == tag)


def test_a_checksum_is_computed_in_steps(image: bytes) -> None:
    part = PreparedPart(memoryview(image), TEXT, checksum=True)
    steps = 1
    while not part.advance():
        steps += 1
    assert steps == 4
    whole = b"".join(part.views)
    assert part.checksum == xxhash.xxh3_64_intdigest(whole)
    assert len(whole) == part.nbytes
    assert part.advance()


def test_without_a_checksum_nothing_is_read(image: bytes) -> None:
    part = PreparedPart(memoryview(image), TEXT, checksum=False)
    assert part.advance()
    assert part.checksum is None
    with pytest.raises(SelectionError):
        PreparedPart(memoryview(image), b'{"fields":["other"]}', checksum=False)


@pytest.mark.parametrize("lane", [TCP, UCX])
def test_one_part_is_prepared_and_sent_at_a_time(lane: Lane, ring: SharedRingBuffer, image: bytes) -> None:
    with ring:
        served = serving(ring, ManualClock())
        stream = ScriptedStream(lane)
        connection = served.add(stream)
        stream.full = True
        payload = put(ring, image)
        stream.request(*read(payload, 1), *read(payload, 2))
        served.serve(connection)
        assert [status.request for status in stream.statuses()] == [1]
        assert payload_of(stream, 2) == b""
        stream.full = False
        served.serve(connection)
        assert [status.request for status in stream.statuses()] == [1, 2]
        for number in (1, 2):
            assert np.array_equal(unpack(payload_of(stream, number))["big"], LARGE["big"])
        assert connection.counts["reads"] == 2
        assert connection.counts["bytes"] == 2 * len(payload_of(stream, 1))
        stream.sent.clear()
        served.close()


def test_a_part_is_sent_from_its_slot_without_a_copy(ring: SharedRingBuffer, image: bytes) -> None:
    served = serving(ring, ManualClock(), checksum=xxhash.xxh3_64_intdigest)
    stream = ScriptedStream(TCP)
    connection = served.add(stream)
    stream.request(*read(put(ring, image), 1))
    served.serve(connection)
    header, big = (item.view for item in stream.sent if isinstance(item, Payload))
    assert header.nbytes < 1000
    memory = np.frombuffer(ring.segment.view, np.uint8)
    assert np.shares_memory(np.frombuffer(big, np.uint8), memory)
    del header, big, memory
    stream.sent.clear()
    served.close()


def test_a_turn_ends_between_two_steps_of_a_checksum(ring: SharedRingBuffer, image: bytes) -> None:
    clock = SlowClock()
    served = serving(ring, clock, checksum=xxhash.xxh3_64_intdigest)
    stream = ScriptedStream(TCP)
    connection = served.add(stream)
    clock.step = TURN_SECONDS / 2
    stream.request(*read(put(ring, image), 1))
    turns = 1
    while served.serve(connection):
        turns += 1
        assert connection.leased == 1
    assert turns >= 2
    (status,) = stream.statuses()
    assert status.flags == Flag.CHECKSUM
    assert status.checksum == xxhash.xxh3_64_intdigest(payload_of(stream, 1))
    stream.sent.clear()
    served.close()


def test_a_lease_ends_with_a_connection_whose_part_is_being_prepared(ring: SharedRingBuffer, image: bytes) -> None:
    clock = SlowClock()
    served = serving(ring, clock, checksum=xxhash.xxh3_64_intdigest)
    stream = ScriptedStream(TCP)
    connection = served.add(stream)
    clock.step = TURN_SECONDS
    stream.request(*read(put(ring, image), 1))
    assert served.serve(connection)
    assert connection.preparing
    assert ring.statistics().leases == 1
    stream.end()
    served.serve(connection)
    assert ring.statistics().leases == 0
    assert (ring.statistics().ready, len(served)) == (1, 0)


def test_g1_what_cannot_be_selected_is_answered_and_keeps_neither_lease_nor_connection_busy(
    ring: SharedRingBuffer, image: bytes
) -> None:
    events: list[TraceEvent] = []
    served = serving(ring, ManualClock(), trace=events.append)
    stream = ScriptedStream(UCX)
    connection = served.add(stream)
    payload = put(ring, image)
    wrong = (b'{"fields":["other"]}', b"nonsense", b'{"rows":{"big":[[0,%d]]}}' % (1 << 40))
    for number, text in enumerate(wrong, 1):
        stream.request(*read(payload, number, text))
    stream.request(*read(payload, 7, b'{"fields":["small"]}'))
    served.serve(connection)
    expected = [Status.UNSELECTABLE] * 3 + [Status.OK]
    assert [status.status for status in stream.statuses()] == expected
    assert [event.status for event in events if isinstance(event, StatusEvent)] == expected
    assert np.array_equal(unpack(payload_of(stream, 7))["small"], LARGE["small"])
    assert connection.counts["error"] == 3
    assert connection.leased == 1
    stream.sent.clear()
    served.close()


def test_a_body_for_a_payload_that_is_gone_or_of_another_size_is_answered_as_any_read(
    ring: SharedRingBuffer, image: bytes
) -> None:
    served = serving(ring, ManualClock())
    stream = ScriptedStream(TCP)
    connection = served.add(stream)
    slot, sequence = put(ring, image)
    (head, *body) = read((slot, sequence), 1)
    stream.request(head._replace(nbytes=5), *body, *read((slot, sequence + 1), 2), *read((99, 0), 3))
    stream.request(*[frame._replace(reader=9) if frame.kind == Kind.READ else frame for frame in read((0, 0), 4)])
    served.serve(connection)
    assert [status.status for status in stream.statuses()] == [
        Status.ERROR, Status.STALE, Status.STALE, Status.DENIED
    ]  # fmt: skip
    assert not connection.leased
    served.close()


def test_bodies_that_wait_are_bounded(ring: SharedRingBuffer, image: bytes) -> None:
    served = serving(ring, ManualClock())
    stream = ScriptedStream(TCP)
    connection = served.add(stream)
    payload = put(ring, image)
    stream.full = True
    text = TEXT + b" " * (MAX_BODY_BYTES // 2 - len(TEXT))
    for number in range(10):
        stream.request(*read(payload, number, text))
    served.serve(connection)
    assert len(stream.statuses()) == 1
    assert connection.session.body_bytes < 2 * MAX_BODY_BYTES
    stream.full = False
    served.serve(connection)
    assert [status.status for status in stream.statuses()] == [Status.OK] * 8 + [Status.BUSY] * 2
    stream.sent.clear()
    served.close()
