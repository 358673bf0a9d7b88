import inspect
import logging
import threading
import time

import numpy as np
import pytest

from dray.errors import (
    BufferClosedError,
    ConfigError,
    PayloadTooLargeError,
    SlotError,
    StaleSlotError,
)
from dray.ring import Segment, SharedRingBuffer, SlotInfo, SlotState, SlotWriter
from dray.ring.layout import CHECKSUM_OFFSET, FLAGS_OFFSET, SLOT_HEADER, U64


class ManualClock:
    def __init__(self) -> None:
        self.time = 100.0

    def now(self) -> float:
        return self.time


def put(ring: SharedRingBuffer, payload: bytes) -> SlotWriter:
    with ring.claim(len(payload), timeout=0) as writer:
        writer.buffer[:] = payload
        writer.commit()
    return writer


def test_committed_payload_is_read_back() -> None:
    with SharedRingBuffer(2, 100) as ring:
        writer = put(ring, b"payload")
        lease = ring.read_raw(writer.slot, writer.sequence)
        assert lease.buffer == b"payload"
        assert lease.buffer.readonly
        assert (lease.slot, lease.sequence, lease.reader, lease.nbytes) == (0, 0, 0, 7)
        assert lease.acknowledge() is True
        assert ring.statistics().free == 2


def test_lease_offset_is_that_of_the_payload_in_an_attached_segment() -> None:
    with SharedRingBuffer(3, 5000) as ring, Segment.attach(ring.segment.fileno()) as attached:
        put(ring, b"first")
        writer = put(ring, b"second")
        lease = ring.read_raw(writer.slot, writer.sequence)
        assert attached.producer_id == ring.producer_id
        assert attached.view[lease.offset : lease.offset + lease.nbytes] == b"second"
        assert attached.slot_offset(writer.slot) == lease.offset


def test_sequence_starts_at_zero_and_grows_with_every_claim() -> None:
    with SharedRingBuffer(2, 8) as ring:
        sequences = []
        for _ in range(5):
            writer = ring.claim(1)
            sequences.append((writer.slot, writer.sequence))
            writer.abort()
        assert sequences == [(0, 0), (1, 1), (0, 2), (1, 3), (0, 4)]


def test_free_slots_are_taken_in_fifo_order() -> None:
    with SharedRingBuffer(3, 8) as ring:
        first, second, third = put(ring, b"a"), put(ring, b"b"), put(ring, b"c")
        for writer in (second, third, first):
            ring.consume(writer.slot, writer.sequence)
        assert [put(ring, b"x").slot for _ in range(3)] == [second.slot, third.slot, first.slot]


def test_payload_may_be_empty_and_may_fill_the_slot() -> None:
    with SharedRingBuffer(2, 10) as ring:
        for payload in (b"", b"0123456789"):
            writer = put(ring, payload)
            lease = ring.read_raw(writer.slot, writer.sequence)
            assert lease.buffer == payload
            lease.acknowledge()


def test_commit_of_fewer_bytes_shortens_the_payload() -> None:
    with SharedRingBuffer(1, 10) as ring, ring.claim(10) as writer:
        writer.buffer[:3] = b"abc"
        writer.commit(3)
        lease = ring.read_raw(writer.slot, writer.sequence)
        assert lease.buffer == b"abc"


@pytest.mark.parametrize("nbytes", [-1, 1.5, "3", None, True])
def test_claim_of_something_that_is_no_size_is_refused(nbytes: int) -> None:
    with SharedRingBuffer(1, 10) as ring:
        with pytest.raises(ConfigError, match="an integer from 0 to 10"):
            ring.claim(nbytes)
        assert ring.statistics().claimed == 0


def test_commit_of_more_than_was_claimed_is_refused_and_the_slot_stays_claimed() -> None:
    with SharedRingBuffer(1, 10) as ring, ring.claim(4) as writer:
        with pytest.raises(PayloadTooLargeError, match="5 bytes does not fit into the 4 bytes"):
            writer.commit(5)
        with pytest.raises(ConfigError):
            writer.commit(-1)
        assert ring.statistics().writing == 1
        writer.commit()
        assert ring.get_ready_count() == 1


def test_ended_writer_can_neither_write_nor_commit_again() -> None:
    with SharedRingBuffer(2, 10) as ring:
        committed, aborted = put(ring, b"a"), ring.claim(1)
        aborted.abort()
        for writer in (committed, aborted):
            with pytest.raises(SlotError, match="committed or aborted already"):
                writer.commit()
            with pytest.raises(SlotError):
                _ = writer.buffer
        assert ring.get_ready_count() == 1


def test_writer_memory_is_writable_and_exactly_as_long_as_claimed() -> None:
    with SharedRingBuffer(1, 100) as ring, ring.claim(24) as writer:
        array = np.frombuffer(writer.buffer, np.float64)
        assert array.shape == (3,)
        array[:] = 1.5
        writer.commit()
        lease = ring.read_raw(writer.slot, writer.sequence)
        np.testing.assert_array_equal(np.frombuffer(lease.buffer), [1.5, 1.5, 1.5])


def test_memory_of_writers_has_a_row_for_each_in_their_order() -> None:
    with SharedRingBuffer(8, 100) as ring:
        claimed = [ring.claim(40 + number, timeout=0) for number in range(8)]
        writers = [claimed[number] for number in (5, 6, 7, 2, 0, 1)]
        found = list(ring.memory_of(writers))
        assert [rows.shape for rows in found] == [(3, 45), (1, 42), (2, 40)]
        for number, row in enumerate([row for rows in found for row in rows]):
            row[:] = number + 1
        for number, writer in enumerate(writers):
            assert set(bytes(writer.buffer)[:40]) == {number + 1}
            writer.commit()
        assert set(bytes(claimed[3].buffer)) == {0}
        with pytest.raises(SlotError, match="committed or aborted already"):
            list(ring.memory_of([claimed[3], claimed[5]]))
        assert list(ring.memory_of([])) == []


def test_several_leases_of_one_reader_may_be_alive_together() -> None:
    with SharedRingBuffer(1, 10) as ring:
        writer = put(ring, b"abc")
        first, second = (ring.read_raw(writer.slot, writer.sequence) for _ in range(2))
        assert ring.statistics().leases == 2
        assert first.release()
        assert (ring.statistics().reading, ring.get_ready_count()) == (1, 0)
        assert second.release()
        assert (ring.statistics().reading, ring.get_ready_count()) == (0, 1)


def test_new_reads_are_stale_once_consumed_while_another_lease_is_live() -> None:
    with SharedRingBuffer(1, 10) as ring:
        writer = put(ring, b"abc")
        first, second = (ring.read_raw(writer.slot, writer.sequence) for _ in range(2))
        first.acknowledge()
        with pytest.raises(StaleSlotError, match="gone"):
            ring.read_raw(writer.slot, writer.sequence)
        assert second.buffer == b"abc"
        assert ring.inspect()[writer.slot].state is SlotState.READING
        assert second.release()
        assert ring.statistics().free == 1
        assert ring.inspect()[writer.slot].state is SlotState.FREE


def test_consume_frees_an_unleased_payload_and_is_idempotent() -> None:
    with SharedRingBuffer(1, 10) as ring:
        writer = put(ring, b"abc")
        assert ring.consume(writer.slot, writer.sequence) is True
        assert ring.consume(writer.slot, writer.sequence) is False
        put(ring, b"next")
        assert ring.consume(writer.slot, writer.sequence) is False
        statistics = ring.statistics()
        assert (statistics.consumed, statistics.stale_consumes, statistics.ready) == (1, 2, 1)


def test_consume_during_a_lease_frees_with_the_end_of_the_lease() -> None:
    with SharedRingBuffer(1, 10) as ring:
        writer = put(ring, b"abc")
        lease = ring.read_raw(writer.slot, writer.sequence)
        assert ring.consume(writer.slot, writer.sequence)
        assert ring.statistics().free == 0
        assert lease.buffer == b"abc"
        lease.release()
        assert ring.statistics().free == 1


def test_a_slot_that_is_being_written_can_be_neither_read_nor_consumed() -> None:
    with SharedRingBuffer(1, 10) as ring, ring.claim(1) as writer:
        with pytest.raises(StaleSlotError, match="not committed"):
            ring.read_raw(writer.slot, writer.sequence)
        with pytest.raises(StaleSlotError):
            ring.checksum(writer.slot, writer.sequence, len)
        assert ring.consume(writer.slot, writer.sequence) is False
        assert ring.inspect()[writer.slot].state is SlotState.WRITING
        assert ring.ready() == []


def test_checksum_is_computed_once_and_kept_in_the_header() -> None:
    with SharedRingBuffer(2, 10) as ring:
        writer = put(ring, b"abc")
        seen: list[bytes] = []

        def compute(view: memoryview) -> int:
            seen.append(bytes(view))
            return 2**64 - 1

        assert [ring.checksum(writer.slot, writer.sequence, compute) for _ in range(3)] == [2**64 - 1] * 3
        assert seen == [b"abc"]
        header = ring.segment.layout.header_offset(writer.slot)
        assert ring.segment.view[header + FLAGS_OFFSET] == 1
        assert U64.unpack_from(ring.segment.view, header + CHECKSUM_OFFSET) == (2**64 - 1,)


def test_checksum_belongs_to_one_payload_only() -> None:
    with SharedRingBuffer(1, 10) as ring:
        writer = put(ring, b"abc")
        assert ring.checksum(writer.slot, writer.sequence, len) == 3
        ring.consume(writer.slot, writer.sequence)
        with pytest.raises(StaleSlotError):
            ring.checksum(writer.slot, writer.sequence, len)
        writer = put(ring, b"fresh")
        assert ring.checksum(writer.slot, writer.sequence, len) == 5


def test_checksum_of_a_payload_that_moves_on_meanwhile_is_stale() -> None:
    with SharedRingBuffer(1, 10) as ring:
        old = put(ring, b"abc")

        def compute(view: memoryview) -> int:
            ring.consume(old.slot, old.sequence)
            put(ring, b"other")
            return 7

        with pytest.raises(StaleSlotError):
            ring.checksum(old.slot, old.sequence, compute)
        assert ring.checksum(old.slot, old.sequence + 1, len) == 5


def test_error_in_the_checksum_function_leaves_the_payload_readable() -> None:
    with SharedRingBuffer(1, 10) as ring:
        writer = put(ring, b"abc")
        with pytest.raises(ZeroDivisionError):
            ring.checksum(writer.slot, writer.sequence, lambda view: 1 // 0)
        with pytest.raises(ConfigError, match="checksum"):
            ring.checksum(writer.slot, writer.sequence, lambda view: -1)
        assert ring.checksum(writer.slot, writer.sequence, len) == 3


def test_ready_lists_payloads_in_the_order_of_their_sequence() -> None:
    with SharedRingBuffer(3, 10) as ring:
        first, second = ring.claim(1), ring.claim(2)
        second.commit()
        first.commit()
        lease = ring.read_raw(second.slot, second.sequence)
        assert [(r.slot, r.sequence, r.nbytes) for r in ring.ready()] == [(0, 0, 1)]
        assert [r.sequence for r in ring.ready(leased=True)] == [0, 1]
        ring.consume(second.slot, second.sequence)
        assert [r.sequence for r in ring.ready(leased=True)] == [0]
        lease.release()


def test_headers_in_the_segment_mirror_the_slots() -> None:
    with SharedRingBuffer(2, 10, readers=3, clock=ManualClock()) as ring:

        def header(slot: int) -> tuple[int, ...]:
            return SLOT_HEADER.unpack_from(ring.segment.view, ring.segment.layout.header_offset(slot))

        assert header(0) == (SlotState.FREE, 0, 0, 0, 0, 0.0, 0)
        put(ring, b"x")
        writer = ring.claim(4)
        assert header(1) == (SlotState.WRITING, 0, 1, 4, 0, 0.0, 0)
        writer.commit(2)
        assert header(1) == (SlotState.READY, 0, 1, 2, 0, 100.0, 0)
        lease = ring.read_raw(1, 1, reader=2)
        assert header(1)[0] == SlotState.READING
        lease.acknowledge()
        assert header(1) == (SlotState.READY, 0, 1, 2, 0, 100.0, 0b100)
        ring.consume(1, 1, 0)
        ring.consume(1, 1, 1)
        assert header(1)[0] == SlotState.FREE


def test_inspect_shows_every_slot() -> None:
    clock = ManualClock()
    with SharedRingBuffer(3, 10, readers=3, clock=clock) as ring:
        put(ring, b"abc")
        ring.consume(0, 0, 1)
        clock.time += 2
        put(ring, b"de")
        first, second = ring.read_raw(1, 1, 2), ring.read_raw(1, 1)
        second.acknowledge()
        assert ring.inspect() == (
            SlotInfo(0, SlotState.READY, 0, 3, 0, 0b10, False, 100.0),
            SlotInfo(1, SlotState.READING, 1, 2, 1, 0b1, False, 102.0),
            SlotInfo(2, SlotState.FREE, -1, 0, 0, 0, True, 0.0),
        )
        for reader in (1, 2):
            ring.consume(1, 1, reader)
        assert ring.inspect()[1] == SlotInfo(1, SlotState.READING, 1, 2, 1, 0b111, True, 102.0)
        first.release()
        assert ring.inspect()[1].state is SlotState.FREE


def test_block_of_a_lease_acknowledges_and_an_exception_in_it_releases() -> None:
    with SharedRingBuffer(1, 10) as ring:
        writer = put(ring, b"abc")
        for error in (ValueError(), KeyboardInterrupt()):

            def fail(error: BaseException = error) -> None:
                with ring.read_raw(writer.slot, writer.sequence):
                    raise error

            with pytest.raises(type(error)):
                fail()
            assert ring.get_ready_count() == 1
        with ring.read_raw(writer.slot, writer.sequence) as lease:
            assert lease.buffer == b"abc"
        assert not lease.live
        assert (ring.statistics().consumed, ring.statistics().free) == (1, 1)


def test_lease_may_end_inside_its_block() -> None:
    with SharedRingBuffer(1, 10) as ring:
        writer = put(ring, b"abc")
        with ring.read_raw(writer.slot, writer.sequence) as lease:
            lease.release()
        assert (ring.get_ready_count(), ring.statistics().double_releases) == (1, 0)


def test_block_of_a_lease_may_end_after_its_ring() -> None:
    ring = SharedRingBuffer(1, 10)
    writer = put(ring, b"abc")
    with ring.read_raw(writer.slot, writer.sequence) as lease:
        ring.close()
    assert lease.live


def test_waits_have_a_limit_of_thirty_seconds_by_default() -> None:
    for wait in (SharedRingBuffer.claim, SharedRingBuffer.wait_consumed):
        assert inspect.signature(wait).parameters["timeout"].default == 30.0


def test_statistics_report_counts_and_ages() -> None:
    clock = ManualClock()
    with SharedRingBuffer(4, 10, clock=clock) as ring:
        assert (ring.statistics().oldest_ready_age, ring.statistics().oldest_lease_age) == (None, None)
        put(ring, b"abc")
        clock.time += 2
        put(ring, b"de")
        lease = ring.read_raw(0, 0)
        clock.time += 3
        writer = ring.claim(1)
        now = ring.statistics()
        assert (now.slots, now.slot_bytes, now.free, now.writing, now.ready, now.reading) == (4, 10, 1, 1, 1, 1)
        assert (now.claimed, now.committed, now.committed_bytes, now.leases, now.leased) == (3, 2, 5, 1, 1)
        assert (now.oldest_ready_age, now.oldest_lease_age) == (3.0, 3.0)
        writer.abort()
        lease.release()
        assert ring.statistics().oldest_ready_age == 5.0
        with pytest.raises(AttributeError):
            now.free = 3  # type: ignore[misc]


def test_slot_of_a_writer_that_is_gone_is_free_again() -> None:
    with SharedRingBuffer(1, 10) as ring:
        writer = ring.claim(4)
        assert ring.statistics().writing == 1
        del writer
        found = ring.statistics()
        assert (found.free, found.writing, found.aborted) == (1, 0, 1)
        with ring.claim(4, timeout=0) as again:
            again.commit()
        assert ring.get_ready_count() == 1


def test_withdrawn_payload_is_retired_whether_it_was_committed_or_not() -> None:
    with SharedRingBuffer(1, 10) as ring:
        for committed in (False, True):
            writer = ring.claim(4, timeout=0)
            if committed:
                writer.commit()
            writer.withdraw()
            assert ring.statistics().free == 1
            assert ring.wait_consumed(writer.slot, writer.sequence, timeout=0)


def test_wait_consumed_returns_when_the_last_reader_has_consumed() -> None:
    with SharedRingBuffer(2, 10, readers=2) as ring:
        writer = put(ring, b"abc")
        assert ring.wait_consumed(writer.slot, writer.sequence, timeout=0) is False
        result: list[bool] = []
        wait = ring.wait_consumed
        waiter = threading.Thread(target=lambda: result.append(wait(writer.slot, writer.sequence, 30)))
        waiter.start()
        ring.consume(writer.slot, writer.sequence, 0)
        assert ring.wait_consumed(writer.slot, writer.sequence, timeout=0.01) is False
        ring.consume(writer.slot, writer.sequence, 1)
        waiter.join(30)
        assert result == [True]
        put(ring, b"x"), put(ring, b"y")
        assert ring.wait_consumed(writer.slot, writer.sequence, timeout=0) is True


def test_wait_consumed_ends_at_its_timeout() -> None:
    with SharedRingBuffer(1, 10) as ring:
        writer = put(ring, b"abc")
        begun = time.monotonic()
        assert ring.wait_consumed(writer.slot, writer.sequence, timeout=0.05) is False
        assert time.monotonic() - begun >= 0.05


def test_waiting_for_a_payload_that_never_was_is_stale() -> None:
    with SharedRingBuffer(2, 10) as ring:
        put(ring, b"abc")
        for slot, sequence in ((0, 1), (1, 0)):
            with pytest.raises(StaleSlotError, match="never held"):
                ring.wait_consumed(slot, sequence, timeout=0)


def test_every_method_of_a_closed_ring_raises() -> None:
    ring = SharedRingBuffer(2, 10)
    writer = put(ring, b"abc")
    lease = ring.read_raw(writer.slot, writer.sequence)
    claimed = ring.claim(1)
    ring.close()
    ring.close()
    assert ring.closed
    for call in (
        lambda: ring.claim(1),
        lambda: ring.read_raw(0, 0),
        lambda: ring.consume(0, 0),
        lambda: ring.checksum(0, 0, len),
        ring.inspect,
        lambda: ring.wait_consumed(0, 0, 0),
        ring.get_ready_count,
        ring.ready,
        ring.statistics,
        ring.segment.fileno,
        claimed.commit,
        lambda: claimed.buffer,
        lambda: lease.buffer,
    ):
        with pytest.raises(BufferClosedError):
            call()


def test_ending_after_close_changes_nothing_and_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    ring = SharedRingBuffer(2, 10)
    writer = put(ring, b"abc")
    lease = ring.read_raw(writer.slot, writer.sequence)
    with ring.claim(1) as claimed:
        ring.close()
    claimed.abort()
    assert lease.acknowledge() is False
    assert lease.release() is False
    assert not caplog.records


def test_view_of_a_closed_ring_stays_valid() -> None:
    ring = SharedRingBuffer(1, 10)
    writer = put(ring, b"abc")
    view = ring.read_raw(writer.slot, writer.sequence).buffer
    ring.close()
    assert view == b"abc"


def test_ended_lease_gives_no_view() -> None:
    with SharedRingBuffer(1, 10) as ring:
        writer = put(ring, b"abc")
        lease = ring.read_raw(writer.slot, writer.sequence)
        lease.acknowledge()
        with pytest.raises(StaleSlotError, match="the lease has ended"):
            _ = lease.buffer


def test_representations_show_the_state() -> None:
    ring = SharedRingBuffer(2, 10)
    writer = put(ring, b"abc")
    lease = ring.read_raw(writer.slot, writer.sequence)
    assert "0 ready, 1 free" in repr(ring)
    assert "slot 0 sequence 0, 3 bytes, ended" in repr(writer)
    assert "slot 0 sequence 0 reader 0, 3 bytes, live" in repr(lease)
    lease.release()
    assert "ended" in repr(lease)
    ring.close()
    assert "closed" in repr(ring)


def test_rings_have_producer_ids_of_their_own() -> None:
    with SharedRingBuffer(1, 1) as one, SharedRingBuffer(1, 1) as other:
        assert len(one.producer_id) == 16
        assert one.producer_id != other.producer_id


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"slots": 0}, "slots"),
        ({"slot_bytes": 0}, "slot_bytes"),
        ({"readers": 0}, "readers"),
        ({"readers": 65}, "readers"),
        ({"readers": "2"}, "readers"),
        ({"on_full": "drop"}, "on_full"),
        ({"retain": "all"}, "retain"),
        ({"retain": "newest", "slots": 1}, "slots"),
        ({"retain": "newest", "on_full": "overwrite"}, "on_full"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SharedRingBuffer(**({"slots": 4, "slot_bytes": 8} | arguments))
    assert caught.value.key == key
    assert caught.value.value == arguments[key]


def test_ending_a_writer_twice_is_logged_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    with SharedRingBuffer(1, 10) as ring:
        writer = put(ring, b"abc")
        with caplog.at_level(logging.WARNING, logger="dray.ring"):
            writer.abort()
        assert "it has been committed or aborted already" in caplog.text
        assert ring.statistics().double_releases == 1


def test_copy_many_reports_why_a_payload_cannot_be_copied() -> None:
    with SharedRingBuffer(2, 10, readers=2) as ring:
        written = put(ring, b"payload")
        ring.consume(written.slot, written.sequence, 1)
        here = written.slot, written.sequence
        found = ring.copy_many([(*here, 0), (*here, 1), (2, 0, 0), (0, 0, 2), (1, 9, 0)], 7)
        assert found[0] == (b"payload", None)
        consumed, slot, reader, never = found[1:]
        assert isinstance(consumed, StaleSlotError)
        assert "reader 1 has consumed the payload" in str(consumed)
        for error, slot_number in ((slot, 2), (reader, 0)):
            assert type(error) is SlotError
            assert error.slot == slot_number
        assert "the ring has no slot 2, or no reader 0" in str(slot)
        assert "the ring has no slot 0, or no reader 2" in str(reader)
        assert isinstance(never, StaleSlotError)
        ((too_large),) = ring.copy_many([(*here, 0)], 6)
        assert isinstance(too_large, PayloadTooLargeError)
        assert "a payload of 7 bytes needs a lease; at most 6 are copied" in str(too_large)
        assert (too_large.slot, too_large.sequence) == here
