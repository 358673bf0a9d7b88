"""The exact texts of a ring's errors, warnings and representations, and the attributes of a new ring."""

import logging
import os
from collections.abc import Callable

import pytest

from dray.errors import (
    BufferClosedError,
    ConfigError,
    DrayError,
    PayloadTooLargeError,
    SlotError,
    StaleSlotError,
)
from dray.ring import SharedRingBuffer, SlotWriter

SLOTS, SLOT_BYTES, READERS = 3, 10, 2
MOVED_ON = "the payload is gone, the slot has moved on to sequence {}"
GONE = "the payload is gone: consumed, overwritten, retired or aborted"


def put(ring: SharedRingBuffer, payload: bytes = b"payload") -> SlotWriter:
    with ring.claim(len(payload), timeout=0) as writer:
        writer.buffer[:] = payload
        writer.commit()
    return writer


def error_of(call: Callable[[], object]) -> tuple[type[DrayError], str, int | None, int | None]:
    with pytest.raises(DrayError) as caught:
        call()
    return type(caught.value), caught.value.message, caught.value.slot, caught.value.sequence


def test_error_of_a_stale_reference_gives_the_reason() -> None:
    with SharedRingBuffer(SLOTS, SLOT_BYTES, readers=READERS) as ring:
        for _ in range(SLOTS):
            assert ring.consume(*(lambda w: (w.slot, w.sequence))(put(ring)), 0)
        ring.consume(0, 0, 1)
        assert error_of(lambda: ring.read_raw(0, 0)) == (StaleSlotError, GONE, 0, 0)
        ring.claim(1)
        assert error_of(lambda: ring.read_raw(0, 0)) == (StaleSlotError, MOVED_ON.format(3), 0, 0)
        assert error_of(lambda: ring.read_raw(0, 3)) == (StaleSlotError, "the payload is not committed", 0, 3)
        never = "the slot never held that payload"
        assert error_of(lambda: ring.read_raw(1, 4)) == (StaleSlotError, never, 1, 4)
        assert error_of(lambda: ring.wait_consumed(1, 4, 0)) == (StaleSlotError, never, 1, 4)
        assert error_of(lambda: ring.checksum(1, 4, len)) == (StaleSlotError, never, 1, 4)
        had = "reader 0 has consumed the payload"
        assert error_of(lambda: ring.read_raw(1, 1)) == (StaleSlotError, had, 1, 1)
        lease = ring.read_raw(1, 1, 1)
        lease.release()
        assert error_of(lambda: lease.buffer) == (StaleSlotError, "the lease has ended", 1, 1)


def test_errors_of_slots_and_readers_out_of_range_give_the_range() -> None:
    with SharedRingBuffer(SLOTS, SLOT_BYTES, readers=READERS) as ring:
        no_slot = (SlotError, "the ring has slots 0 to 2", SLOTS, None)
        for call in (ring.read_raw, ring.consume, ring.wait_consumed):
            assert error_of(lambda call=call: call(SLOTS, 0)) == no_slot
        assert error_of(lambda: ring.checksum(SLOTS, 0, len)) == no_slot
        no_reader = (SlotError, "reader 2 is not one of 0 to 1", 1, None)
        for call in (ring.read_raw, ring.consume):
            assert error_of(lambda call=call: call(1, 0, READERS)) == no_reader


def test_errors_of_a_writer_give_its_sizes_and_its_state() -> None:
    with SharedRingBuffer(SLOTS, SLOT_BYTES) as ring:
        too_large = "a payload of 11 bytes does not fit into 10-byte slots"
        assert error_of(lambda: ring.claim(11)) == (PayloadTooLargeError, too_large, None, None)
        put(ring)
        writer = ring.claim(4)
        too_large = "a payload of 5 bytes does not fit into the 4 bytes claimed"
        assert error_of(lambda: writer.commit(5)) == (PayloadTooLargeError, too_large, 1, 1)
        for call, most in ((ring.claim, 10), (writer.commit, 4)):
            with pytest.raises(ConfigError) as caught:
                call(-1)
            refused = caught.value
            assert (refused.key, refused.value, refused.allowed) == ("nbytes", -1, f"an integer from 0 to {most}")
        writer.commit()
        finished = (SlotError, "the slot is committed or aborted already", 1, 1)
        assert error_of(writer.commit) == finished
        assert error_of(lambda: writer.buffer) == finished


def test_error_of_a_closed_ring_gives_the_reason() -> None:
    ring = SharedRingBuffer(SLOTS, SLOT_BYTES)
    ring.close()
    assert error_of(ring.get_ready_count) == (BufferClosedError, "the ring is closed", None, None)


def test_checksums_are_64_bits_without_a_sign() -> None:
    with SharedRingBuffer(SLOTS, SLOT_BYTES) as ring:
        put(ring)
        for value in (-1, 1 << 64):
            with pytest.raises(ConfigError) as caught:
                ring.checksum(0, 0, lambda _, value=value: value)
            assert (caught.value.key, caught.value.value) == ("checksum", value)
        assert ring.checksum(0, 0, lambda _: (1 << 64) - 1) == (1 << 64) - 1


def test_log_lines_of_a_second_end_name_the_lease_or_writer(caplog: pytest.LogCaptureFixture) -> None:
    with SharedRingBuffer(SLOTS, SLOT_BYTES) as ring:
        writer = put(ring)
        lease = ring.read_raw(0, 0)
        with caplog.at_level(logging.WARNING, logger="dray.ring"):
            lease.release()
            assert not lease.release()
            writer.abort()
    assert [record.message for record in caplog.records] == [
        f"end of {lease!r} ignored: it has ended already",
        f"abort of {writer!r} ignored: it has been committed or aborted already",
    ]


def test_representations_are_these() -> None:
    ring = SharedRingBuffer(SLOTS, SLOT_BYTES)
    who = f"SharedRingBuffer {ring.producer_id.hex()[:8]} 3 x 10 bytes"
    assert repr(ring) == f"<{who}, 0 ready, 3 free>"
    assert repr(ring.claim(4)) == "<SlotWriter slot 0 sequence 0, 4 bytes, open>"
    ring.close()
    assert repr(ring) == f"<{who}, closed>"


def test_a_new_ring_has_its_arguments_as_attributes_and_reserves_no_pages() -> None:
    with (
        SharedRingBuffer(2, 1 << 20, on_full="error", readers=5, retain="newest") as ring,
        SharedRingBuffer(2, 1 << 20, prefault=True) as reserved,
    ):
        assert (ring.slots, ring.slot_bytes, ring.on_full, ring.readers, ring.retain) == (
            2, 1 << 20, "error", 5, "newest",
        )  # fmt: skip
        assert ring.closed is False
        blocks = [os.fstat(each.segment.fileno()).st_blocks * 512 for each in (ring, reserved)]
        assert blocks[0] < 1 << 20 < blocks[1]


def test_a_slot_that_never_held_anything_is_stale_under_every_sequence() -> None:
    with SharedRingBuffer(SLOTS, SLOT_BYTES) as ring:
        for sequence in (-1, 0):
            with pytest.raises(StaleSlotError):
                ring.read_raw(0, sequence)
            assert not ring.consume(0, sequence)
        assert ring.inspect()[0].sequence == -1


def test_flags_of_writers_and_leases_are_booleans() -> None:
    with SharedRingBuffer(SLOTS, SLOT_BYTES) as ring:
        committed, aborted = put(ring), ring.claim(1)
        aborted.abort()
        lease = ring.read_raw(0, 0)
        assert (committed.open, aborted.open, lease.live) == (False, False, True)
        lease.release()
        assert lease.live is False


def test_a_writer_left_without_commit_aborts_unless_the_ring_is_closed() -> None:
    ring = SharedRingBuffer(SLOTS, SLOT_BYTES)
    with ring.claim(1):
        pass
    assert (ring.statistics().aborted, ring.statistics().free) == (1, SLOTS)
    with ring.claim(1) as writer:
        ring.close()
    assert writer.open


def test_every_delivered_payload_that_is_dropped_counts() -> None:
    with SharedRingBuffer(1, SLOT_BYTES, on_full="overwrite") as ring:
        for sequence in range(3):
            put(ring)
            ring.read_raw(0, sequence).release()
        assert ring.statistics().dropped_delivered == 2
