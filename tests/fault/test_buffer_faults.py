"""Faults B1 to B8, B10 and B11 of docs/reference/failure-modes.md; tests/process has those that need processes."""

import logging
import queue
import threading
import time
from collections.abc import Callable

import pytest

from dray.errors import BufferFullError, PayloadTooLargeError, SlotError, StaleSlotError
from dray.ring import Lease, SharedRingBuffer, SlotWriter


def put(ring: SharedRingBuffer, payload: bytes = b"payload", timeout: float = 0) -> SlotWriter:
    with ring.claim(len(payload), timeout) as writer:
        writer.buffer[:] = payload
        writer.commit()
    return writer


def test_b1_stale_reference_never_returns_another_payload() -> None:
    with SharedRingBuffer(1, 10) as ring:
        old = put(ring, b"old")
        ring.consume(old.slot, old.sequence)
        new = put(ring, b"new")
        assert new.slot == old.slot
        with pytest.raises(StaleSlotError, match="moved on to sequence 1") as caught:
            ring.read_raw(old.slot, old.sequence)
        assert (caught.value.slot, caught.value.sequence) == (0, 0)
        assert ring.read_raw(new.slot, new.sequence).buffer == b"new"


def test_b1_readers_under_load_see_their_payload_or_stale() -> None:
    """Four readers chase a writer that overwrites: what they get is whole, and the one they asked for."""
    nbytes, laps = 4096, 3000
    errors: list[str] = []
    read = [0] * 4
    done = threading.Event()
    with SharedRingBuffer(3, nbytes, on_full="overwrite") as ring:
        references: list[tuple[int, int]] = [(0, 0)]

        def reader(index: int) -> None:
            while not done.is_set():
                slot, sequence = references[-1 - index % min(3, len(references))]
                try:
                    lease = ring.read_raw(slot, sequence)
                except StaleSlotError:
                    continue
                try:
                    if bytes(lease.buffer) != sequence.to_bytes(8, "little") * (nbytes // 8):
                        errors.append(f"slot {slot} sequence {sequence}")
                    read[index] += 1
                finally:
                    (lease.acknowledge if sequence % 2 else lease.release)()

        threads = [threading.Thread(target=reader, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        try:
            ended = time.monotonic() + 30
            count = 0
            while (count < laps or min(read) < 20) and time.monotonic() < ended:
                with ring.claim(nbytes, timeout=30) as writer:
                    writer.buffer[:] = writer.sequence.to_bytes(8, "little") * (nbytes // 8)
                    writer.commit()
                references.append((writer.slot, writer.sequence))
                count += 1
        finally:
            done.set()
            for thread in threads:
                thread.join(30)
        assert not errors
        assert min(read) > 0
        statistics = ring.statistics()
        assert (statistics.leases, statistics.double_releases, statistics.writing) == (0, 0, 0)
        assert (
            statistics.committed
            == count
            == (statistics.consumed + statistics.dropped_unread + statistics.dropped_delivered + statistics.ready)
        )


@pytest.mark.parametrize("error", [KeyError("missing"), ValueError("shape"), KeyboardInterrupt(), MemoryError()])
def test_b2_failed_write_frees_the_slot_and_the_next_write_works(error: BaseException) -> None:
    with SharedRingBuffer(1, 10) as ring:
        writer = ring.claim(7)

        def write() -> None:
            with writer:
                writer.buffer[:3] = b"abc"
                raise error

        with pytest.raises(type(error)):
            write()
        statistics = ring.statistics()
        assert (statistics.aborted, statistics.free) == (1, 1)
        with pytest.raises(StaleSlotError):
            ring.read_raw(writer.slot, writer.sequence)
        assert put(ring).sequence == 1


def test_b2_writer_left_without_commit_aborts() -> None:
    with SharedRingBuffer(1, 10) as ring:
        with ring.claim(1):
            pass
        assert ring.statistics().aborted == 1


def test_b3_one_stuck_reader_never_blocks_the_writer() -> None:
    with SharedRingBuffer(3, 10) as ring:
        stuck = put(ring, b"stuck")
        lease = ring.read_raw(stuck.slot, stuck.sequence)
        for _ in range(50):
            writer = put(ring)
            assert writer.slot != stuck.slot
            ring.read_raw(writer.slot, writer.sequence).acknowledge()
        assert lease.buffer == b"stuck"
        assert ring.statistics().claim_waits == 0


@pytest.mark.parametrize("end", [Lease.acknowledge, Lease.release])
def test_b4_late_end_of_a_lease_does_not_change_the_next_payload(
    end: Callable[[Lease], bool], caplog: pytest.LogCaptureFixture
) -> None:
    with SharedRingBuffer(1, 10, readers=2) as ring:
        old = put(ring, b"old")
        lease = ring.read_raw(old.slot, old.sequence, 0)
        lease.release()
        for reader in (0, 1):
            ring.consume(old.slot, old.sequence, reader)
        new = put(ring, b"new")
        current = ring.read_raw(new.slot, new.sequence, 0)
        with caplog.at_level(logging.WARNING, logger="dray.ring"):
            assert end(lease) is False
        assert "it has ended already" in caplog.text
        statistics = ring.statistics()
        assert (statistics.double_releases, statistics.leases, statistics.reading) == (1, 1, 1)
        assert current.buffer == b"new"
        assert current.acknowledge()
        assert ring.get_ready_count() == 1


@pytest.mark.parametrize("end", [Lease.acknowledge, Lease.release])
def test_b4_end_of_a_lease_changes_no_other_ring(end: Callable[[Lease], bool]) -> None:
    with SharedRingBuffer(1, 10) as ring, SharedRingBuffer(1, 10) as other:
        put(ring)
        put(other)
        lease, mine = other.read_raw(0, 0), ring.read_raw(0, 0)
        assert end(lease) is True
        assert mine.live
        assert (ring.statistics().leases, other.statistics().leases) == (1, 0)
        assert end(lease) is False
        assert (ring.statistics().double_releases, other.statistics().double_releases) == (0, 1)
        assert mine.acknowledge()


def test_b4_racing_threads_end_a_lease_once() -> None:
    with SharedRingBuffer(1, 10) as ring:
        for _ in range(50):
            writer = put(ring)
            lease = ring.read_raw(writer.slot, writer.sequence)
            barrier = threading.Barrier(4)
            results: list[bool] = []

            def end(lease: Lease = lease, barrier: threading.Barrier = barrier, results: list = results) -> None:
                barrier.wait(30)
                results.append(lease.acknowledge())

            threads = [threading.Thread(target=end) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
            assert sorted(results) == [False, False, False, True]
        assert (ring.statistics().consumed, ring.statistics().double_releases) == (50, 150)


@pytest.mark.parametrize("first", [Lease.acknowledge, Lease.release])
@pytest.mark.parametrize("second", [Lease.acknowledge, Lease.release])
def test_b5_slot_is_not_reused_until_both_leases_have_ended(
    first: Callable[[Lease], bool], second: Callable[[Lease], bool]
) -> None:
    with SharedRingBuffer(1, 10) as ring:
        writer = put(ring, b"shared")
        one, two = (ring.read_raw(writer.slot, writer.sequence) for _ in range(2))
        assert first(one)
        with pytest.raises(BufferFullError):
            ring.claim(1, timeout=0)
        assert two.buffer == b"shared"
        assert second(two)
        if Lease.acknowledge in (first, second):
            assert ring.claim(1, timeout=0).slot == writer.slot
        else:
            assert ring.get_ready_count() == 1


@pytest.mark.parametrize("slot", [-1, 3, 1 << 40])
def test_b6_slots_out_of_range_are_a_clean_error(slot: int) -> None:
    with SharedRingBuffer(3, 10) as ring:
        put(ring)
        for call in (
            lambda: ring.read_raw(slot, 0),
            lambda: ring.consume(slot, 0),
            lambda: ring.checksum(slot, 0, len),
            lambda: ring.wait_consumed(slot, 0, 0),
        ):
            with pytest.raises(SlotError, match="slots 0 to 2") as caught:
                call()
            assert not isinstance(caught.value, StaleSlotError)
        assert ring.read_raw(0, 0).buffer == b"payload"


@pytest.mark.parametrize("sequence", [-1, 1, (1 << 64) - 1])
def test_b6_wrong_sequences_are_stale(sequence: int) -> None:
    with SharedRingBuffer(3, 10) as ring:
        put(ring)
        with pytest.raises(StaleSlotError):
            ring.read_raw(0, sequence)
        assert ring.consume(0, sequence) is False
        assert ring.read_raw(0, 0).buffer == b"payload"


def test_b6_unused_slot_is_stale_for_every_sequence() -> None:
    with SharedRingBuffer(2, 10) as ring:
        for sequence in (-1, 0, 1):
            with pytest.raises(StaleSlotError):
                ring.read_raw(1, sequence)


@pytest.mark.parametrize("on_full", ["block", "error"])
def test_b7_full_ring_refuses_and_keeps_every_payload(on_full: str) -> None:
    with SharedRingBuffer(4, 10, on_full=on_full) as ring:
        writers = [put(ring, bytes([index])) for index in range(4)]
        for _ in range(3):
            with pytest.raises(BufferFullError):
                put(ring)
        assert ring.statistics().full_errors == 3
        assert [bytes(ring.read_raw(w.slot, w.sequence).buffer) for w in writers] == [b"\0", b"\1", b"\2", b"\3"]


def test_b7_blocked_writers_and_readers_lose_nothing() -> None:
    """Three writers block on two slots while three readers consume: every payload arrives, once."""
    each = 300
    references: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
    received: list[bytes] = []
    with SharedRingBuffer(2, 10) as ring:

        def write(name: int) -> None:
            for index in range(each):
                writer = put(ring, b"%d:%d" % (name, index), timeout=60)
                references.put((writer.slot, writer.sequence))

        def read() -> None:
            while (reference := references.get(timeout=60)) is not None:
                lease = ring.read_raw(*reference)
                received.append(bytes(lease.buffer))
                lease.acknowledge()

        writers = [threading.Thread(target=write, args=(name,)) for name in range(3)]
        readers = [threading.Thread(target=read) for _ in range(3)]
        for thread in writers + readers:
            thread.start()
        for thread in writers:
            thread.join(60)
        for _ in readers:
            references.put(None)
        for thread in readers:
            thread.join(60)
        assert sorted(received) == sorted(b"%d:%d" % (name, i) for name in range(3) for i in range(each))
        assert (ring.statistics().consumed, ring.statistics().free) == (3 * each, 2)


def test_b7_overwritten_payloads_are_all_counted() -> None:
    with SharedRingBuffer(4, 10, on_full="overwrite") as ring:
        for _ in range(100):
            put(ring)
        assert (ring.statistics().dropped_unread, ring.get_ready_count()) == (96, 4)


def test_b8_payload_larger_than_a_slot_claims_nothing() -> None:
    with SharedRingBuffer(1, 10) as ring:
        with pytest.raises(PayloadTooLargeError, match=r"11 bytes .* 10-byte"):
            ring.claim(11)
        assert (ring.statistics().claimed, ring.statistics().free) == (0, 1)
        assert put(ring, b"0123456789").sequence == 0


def test_b10_ready_count_is_right_after_many_laps() -> None:
    with SharedRingBuffer(3, 10) as ring:
        for lap in range(200):
            writers = [put(ring) for _ in range(3)]
            assert ring.get_ready_count() == 3
            for left, writer in enumerate(writers):
                lease = ring.read_raw(writer.slot, writer.sequence)
                assert ring.get_ready_count() == 2 - left
                if lap % 2:
                    lease.release()
                    ring.consume(writer.slot, writer.sequence)
                else:
                    lease.acknowledge()
        assert (ring.get_ready_count(), ring.statistics().consumed) == (0, 600)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_b11_payload_of_a_writer_thread_that_dies_is_never_seen() -> None:
    with SharedRingBuffer(2, 10) as ring:
        writers: list[SlotWriter] = []

        def write() -> None:
            with ring.claim(4) as writer:
                writers.append(writer)
                writer.buffer[:2] = b"ab"
                raise SystemExit

        thread = threading.Thread(target=write)
        thread.start()
        thread.join(30)
        assert ring.ready() == []
        with pytest.raises(StaleSlotError):
            ring.read_raw(writers[0].slot, writers[0].sequence)
        assert ring.statistics().free == 2


def test_b11_writer_that_never_commits_is_never_readable_and_blocks_no_other() -> None:
    with SharedRingBuffer(2, 10) as ring:
        forgotten = ring.claim(4)
        for _ in range(10):
            writer = put(ring)
            assert writer.slot != forgotten.slot
            ring.consume(writer.slot, writer.sequence)
            with pytest.raises(StaleSlotError):
                ring.read_raw(forgotten.slot, forgotten.sequence)
        assert ring.statistics().writing == 1
