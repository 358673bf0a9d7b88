import threading
import time

import pytest

from dray.errors import BufferClosedError, BufferFullError, ConfigError, SlotError, StaleSlotError
from dray.ring import SharedRingBuffer, SlotWriter
from dray.ring.records import Retain


class AskedClock:
    """Sets `asked` when the time is read: a claim that has to wait reads it while it holds the ring's lock."""

    def __init__(self) -> None:
        self.asked = threading.Event()

    def now(self) -> float:
        self.asked.set()
        return time.monotonic()


def put(ring: SharedRingBuffer, payload: bytes = b"payload") -> SlotWriter:
    with ring.claim(len(payload), timeout=0) as writer:
        writer.buffer[:] = payload
        writer.commit()
    return writer


class WaitingClaim:
    """A claim in a thread of its own, which waits when the constructor returns."""

    def __init__(self, ring: SharedRingBuffer, clock: AskedClock) -> None:
        self.result: SlotWriter | Exception | None = None
        clock.asked.clear()
        self._thread = threading.Thread(target=self._claim, args=(ring,), daemon=True)
        self._thread.start()
        assert clock.asked.wait(30)
        ring.get_ready_count()  # takes the lock, which the waiting thread has released

    def _claim(self, ring: SharedRingBuffer) -> None:
        try:
            self.result = ring.claim(1, timeout=300)  # a claim that is not woken must not end in time by itself
        except (BufferFullError, BufferClosedError) as error:
            self.result = error

    def join(self) -> SlotWriter | Exception | None:
        self._thread.join(40)
        assert not self._thread.is_alive()
        return self.result


@pytest.mark.parametrize("way", ["acknowledge", "consume", "abort"])
def test_waiting_claim_is_woken_by_the_slot_that_becomes_free(way: str) -> None:
    clock = AskedClock()
    with SharedRingBuffer(1, 10, clock=clock) as ring:
        writer = ring.claim(1)
        lease = None
        if way != "abort":
            writer.commit()
        if way == "acknowledge":
            lease = ring.read_raw(writer.slot, writer.sequence)
        waiting = WaitingClaim(ring, clock)
        if lease is not None:
            lease.acknowledge()
        elif way == "consume":
            ring.consume(writer.slot, writer.sequence)
        else:
            writer.abort()
        result = waiting.join()
        assert isinstance(result, SlotWriter)
        assert result.sequence == 1
        statistics = ring.statistics()
        assert (statistics.claim_waits, statistics.full_errors) == (1, 0)
        assert statistics.claim_wait_seconds > 0


@pytest.mark.parametrize("failed", range(4))
def test_waiting_claim_is_woken_however_many_failed_before_it(failed: int) -> None:
    clock = AskedClock()
    with SharedRingBuffer(1, 10, clock=clock) as ring:
        writer = put(ring)
        for _ in range(failed):
            with pytest.raises(BufferFullError):
                ring.claim(1, timeout=0)
        for _ in range(2):
            waiting = WaitingClaim(ring, clock)
            ring.consume(writer.slot, writer.sequence)
            result = waiting.join()
            assert isinstance(result, SlotWriter)
            result.commit()
            writer = result


def test_each_freed_slot_serves_one_of_several_waiting_claims() -> None:
    clock = AskedClock()
    with SharedRingBuffer(3, 10, clock=clock) as ring:
        writers = [put(ring) for _ in range(3)]
        waiting = [WaitingClaim(ring, clock) for _ in range(3)]
        for writer in writers:
            ring.consume(writer.slot, writer.sequence)
        results = [claim.join() for claim in waiting]
        assert sorted(r.sequence for r in results if isinstance(r, SlotWriter)) == [3, 4, 5]


def test_close_wakes_waiting_claims_and_waits_for_consumption() -> None:
    clock = AskedClock()
    ring = SharedRingBuffer(1, 10, clock=clock)
    writer = put(ring)
    claims = [WaitingClaim(ring, clock) for _ in range(2)]
    caught: list[Exception] = []

    def wait() -> None:
        try:
            ring.wait_consumed(writer.slot, writer.sequence, 30)
        except BufferClosedError as error:
            caught.append(error)

    clock.asked.clear()
    thread = threading.Thread(target=wait)
    thread.start()
    assert clock.asked.wait(30)
    ring.close()
    thread.join(30)
    assert len(caught) == 1
    assert all(isinstance(claim.join(), BufferClosedError) for claim in claims)


def test_block_raises_at_its_timeout_and_counts_the_slots_in_each_state() -> None:
    with SharedRingBuffer(3, 10) as ring:
        put(ring)
        lease = ring.read_raw(0, 0)
        put(ring)
        writer = ring.claim(1)
        with pytest.raises(BufferFullError, match="0 FREE, 1 WRITING, 1 READY, 1 READING of 3 slots") as caught:
            ring.claim(1, timeout=0.05)
        assert caught.value.retryable
        assert caught.value.elapsed is not None
        assert caught.value.elapsed >= 0.05
        assert ring.statistics().full_errors == 1
        lease.acknowledge()
        assert ring.claim(1, timeout=0).slot == lease.slot
        writer.abort()


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_block_without_time_left_raises_at_once(timeout: float) -> None:
    with SharedRingBuffer(1, 10) as ring:
        put(ring)
        with pytest.raises(BufferFullError):
            ring.claim(1, timeout=timeout)


def test_error_raises_at_once_whatever_the_timeout() -> None:
    with SharedRingBuffer(1, 10, on_full="error") as ring:
        put(ring)
        with pytest.raises(BufferFullError):
            ring.claim(1, timeout=None)
        assert ring.statistics().claim_waits == 0


def test_overwrite_drops_the_oldest_and_counts_read_and_unread_apart() -> None:
    with SharedRingBuffer(3, 10, on_full="overwrite") as ring:
        first, second, third = (put(ring) for _ in range(3))
        ring.read_raw(first.slot, first.sequence).release()
        assert put(ring).slot == first.slot
        assert put(ring).slot == second.slot
        statistics = ring.statistics()
        assert (statistics.dropped_delivered, statistics.dropped_unread, statistics.consumed) == (1, 1, 0)
        for gone in (first, second):
            with pytest.raises(StaleSlotError):
                ring.read_raw(gone.slot, gone.sequence)
        assert ring.read_raw(third.slot, third.sequence).buffer == b"payload"


def test_overwrite_takes_free_slots_first() -> None:
    with SharedRingBuffer(2, 10, on_full="overwrite") as ring:
        kept, consumed = put(ring), put(ring)
        ring.consume(consumed.slot, consumed.sequence)
        assert put(ring).slot == consumed.slot
        assert [payload.slot for payload in ring.ready()] == [kept.slot, consumed.slot]


def test_overwrite_never_takes_leased_or_unfinished_slots() -> None:
    with SharedRingBuffer(3, 10, on_full="overwrite") as ring:
        leased, plain = put(ring, b"leased"), put(ring)
        lease = ring.read_raw(leased.slot, leased.sequence)
        unfinished = ring.claim(3)
        assert put(ring).slot == plain.slot
        ring.read_raw(1, 3)
        with pytest.raises(BufferFullError, match="1 WRITING, 0 READY, 2 READING"):
            ring.claim(1, timeout=0)
        assert lease.buffer == b"leased"
        unfinished.commit()


def test_returned_payload_keeps_its_age_for_overwrite() -> None:
    with SharedRingBuffer(3, 10, on_full="overwrite") as ring:
        first = put(ring)
        put(ring), put(ring)
        ring.read_raw(first.slot, first.sequence).release()
        assert put(ring).slot == first.slot


@pytest.mark.parametrize("way", ["release", "commit"])
def test_overwrite_that_waits_is_woken_by_a_slot_it_may_take(way: str) -> None:
    clock = AskedClock()
    with SharedRingBuffer(1, 10, on_full="overwrite", clock=clock) as ring:
        writer = ring.claim(1)
        lease = None
        if way == "release":
            writer.commit()
            lease = ring.read_raw(writer.slot, writer.sequence)
        waiting = WaitingClaim(ring, clock)
        if lease is not None:
            lease.release()
        else:
            writer.commit()
        assert isinstance(waiting.join(), SlotWriter)


def test_payload_is_consumed_when_all_readers_have_consumed_it() -> None:
    with SharedRingBuffer(1, 10, readers=3) as ring:
        writer = put(ring)
        for reader in (2, 0):
            ring.read_raw(writer.slot, writer.sequence, reader).acknowledge()
            assert ring.get_ready_count() == 1
        assert ring.statistics().consumed == 0
        assert ring.consume(writer.slot, writer.sequence, 1)
        assert (ring.statistics().consumed, ring.statistics().free) == (1, 1)


def test_reader_that_has_consumed_gets_stale_and_counts_once() -> None:
    with SharedRingBuffer(1, 10, readers=2) as ring:
        writer = put(ring)
        leases = [ring.read_raw(writer.slot, writer.sequence, 0) for _ in range(2)]
        assert all(lease.acknowledge() for lease in leases)
        with pytest.raises(StaleSlotError, match="reader 0 has consumed"):
            ring.read_raw(writer.slot, writer.sequence, 0)
        assert ring.consume(writer.slot, writer.sequence, 0) is False
        assert ring.get_ready_count() == 1
        ring.read_raw(writer.slot, writer.sequence, 1).acknowledge()
        assert ring.statistics().free == 1


def test_sixty_four_readers_fit_the_mask() -> None:
    with SharedRingBuffer(1, 10, readers=64) as ring:
        writer = put(ring)
        assert all(ring.consume(writer.slot, writer.sequence, reader) for reader in range(64))
        assert ring.statistics().consumed == 1


@pytest.mark.parametrize("reader", [-1, 2, 64])
def test_reader_ids_out_of_range_are_refused(reader: int) -> None:
    with SharedRingBuffer(1, 10, readers=2) as ring:
        writer = put(ring)
        for call in (ring.read_raw, ring.consume):
            with pytest.raises(SlotError, match="not one of 0 to 1"):
                call(writer.slot, writer.sequence, reader)
        assert ring.get_ready_count() == 1


def test_newest_keeps_only_the_payload_committed_last() -> None:
    with SharedRingBuffer(2, 10, retain="newest") as ring:
        old = put(ring, b"old")
        assert ring.get_ready_count() == 1
        new = put(ring, b"new")
        assert [r.sequence for r in ring.ready()] == [new.sequence]
        assert ring.statistics().retired == 1
        with pytest.raises(StaleSlotError):
            ring.read_raw(old.slot, old.sequence)


def test_newest_is_not_consumed_by_its_readers() -> None:
    with SharedRingBuffer(2, 10, retain="newest", readers=2) as ring:
        writer = put(ring, b"weights")
        for _ in range(3):
            lease = ring.read_raw(writer.slot, writer.sequence)
            assert lease.buffer == b"weights"
            assert lease.acknowledge()
        assert ring.consume(writer.slot, writer.sequence)
        assert (ring.get_ready_count(), ring.statistics().consumed) == (1, 0)


def test_leased_payload_retires_with_its_last_lease() -> None:
    clock = AskedClock()
    with SharedRingBuffer(3, 10, retain="newest", clock=clock) as ring:
        old = put(ring, b"old")
        leases = [ring.read_raw(old.slot, old.sequence) for _ in range(2)]
        put(ring, b"new")
        with pytest.raises(StaleSlotError):
            ring.read_raw(old.slot, old.sequence)
        leases[0].release()
        assert leases[1].buffer == b"old"
        writer = ring.claim(1)
        waiting = WaitingClaim(ring, clock)
        leases[1].acknowledge()
        result = waiting.join()
        assert isinstance(result, SlotWriter)
        assert result.slot == old.slot
        writer.abort()


def test_each_part_has_a_newest_payload_and_slots_of_its_own() -> None:
    with SharedRingBuffer(4, 10, retain="newest", parts=2) as ring:

        def put_part(part: int) -> SlotWriter:
            writer = ring.claim(4, part=part)
            writer.commit()
            return writer

        values = [put_part(0) for _ in range(3)]
        changes = [put_part(1) for _ in range(3)]
        assert {writer.slot % 2 for writer in values} == {0}
        assert {writer.slot % 2 for writer in changes} == {1}
        assert [info.sequence for info in ring.ready()] == [values[-1].sequence, changes[-1].sequence]
        lease = ring.read_raw(values[-1].slot, values[-1].sequence)
        newest = put_part(0)
        with pytest.raises(BufferFullError):
            ring.claim(4, timeout=0.01)
        ring.claim(4, timeout=0.01, part=1).abort()
        lease.release()
        ring.claim(4, timeout=0.01).abort()
        newest.withdraw()
        assert [info.sequence for info in ring.ready()] == [changes[-1].sequence]
        for part in (-1, 2, True):
            with pytest.raises(ConfigError, match="part"):
                ring.claim(4, part=part)


@pytest.mark.parametrize(("slots", "retain", "parts"), [(3, "newest", 2), (4, "unread", 2), (4, "newest", 0)])
def test_parts_need_slots_and_the_newest_payload_only(slots: int, retain: Retain, parts: int) -> None:
    with pytest.raises(ConfigError, match=r"parts|slots"):
        SharedRingBuffer(slots, 10, retain=retain, parts=parts)


def test_aborted_write_does_not_retire_the_newest() -> None:
    with SharedRingBuffer(2, 10, retain="newest") as ring:
        writer = put(ring, b"weights")
        ring.claim(3).abort()
        assert ring.read_raw(writer.slot, writer.sequence).buffer == b"weights"


def test_newest_with_all_older_slots_pinned_waits_with_its_deadline() -> None:
    with SharedRingBuffer(2, 10, retain="newest") as ring:
        old = put(ring)
        ring.read_raw(old.slot, old.sequence)
        put(ring)
        with pytest.raises(BufferFullError):
            ring.claim(1, timeout=0.01)


def test_waiting_for_the_end_of_the_newest_ends_when_it_retires() -> None:
    with SharedRingBuffer(2, 10, retain="newest") as ring:
        old = put(ring)
        assert not ring.wait_consumed(old.slot, old.sequence, 0)
        put(ring)
        assert ring.wait_consumed(old.slot, old.sequence, 0)
