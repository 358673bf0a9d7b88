"""A ring with a capacity in bytes: claims wait for bytes, and memory is used again by size."""

import threading

import pytest

from dray.errors import BufferFullError, ConfigError
from dray.ring import SharedRingBuffer, SlotWriter


def put(ring: SharedRingBuffer, nbytes: int, timeout: float = 0) -> SlotWriter:
    with ring.claim(nbytes, timeout=timeout) as writer:
        writer.commit()
    return writer


def test_payloads_never_have_more_bytes_than_the_capacity() -> None:
    with SharedRingBuffer(10, 100, capacity_bytes=250) as ring:
        first = put(ring, 100)
        put(ring, 100)
        assert ring.used_bytes == 200
        with pytest.raises(BufferFullError, match="200 of 250 bytes"):
            put(ring, 51)
        put(ring, 50)
        ring.consume(first.slot, first.sequence)
        assert ring.used_bytes == 150
        put(ring, 100)


def test_a_claim_waits_for_bytes() -> None:
    with SharedRingBuffer(10, 100, capacity_bytes=100) as ring:
        first = put(ring, 60)
        threading.Timer(0.1, ring.consume, (first.slot, first.sequence)).start()
        put(ring, 60, timeout=20)
        assert ring.statistics().claim_waits == 1


def test_an_aborted_claim_and_a_shorter_commit_give_bytes_back() -> None:
    with SharedRingBuffer(10, 100, capacity_bytes=100) as ring:
        with ring.claim(100, timeout=0):
            pass
        assert ring.used_bytes == 0
        with ring.claim(100, timeout=0) as writer:
            writer.commit(30)
        assert ring.used_bytes == 30
        put(ring, 70)


def test_the_slot_that_was_freed_last_is_used_first() -> None:
    with SharedRingBuffer(100, 1000, capacity_bytes=5000) as ring:
        for _ in range(10):
            writers = [put(ring, 900) for _ in range(3)]
            assert {writer.slot for writer in writers} == {0, 1, 2}
            for writer in writers:
                ring.consume(writer.slot, writer.sequence)
        assert ring.memory_bytes == 2700


def test_a_small_payload_does_not_take_the_memory_of_a_large_one() -> None:
    with SharedRingBuffer(100, 1000, capacity_bytes=5000) as ring:
        large = put(ring, 1000)
        ring.consume(large.slot, large.sequence)
        assert put(ring, 10).slot != large.slot
        assert put(ring, 1000).slot == large.slot
        assert ring.memory_bytes == 1010


def test_every_slot_is_used_before_a_claim_waits() -> None:
    with SharedRingBuffer(3, 1000, capacity_bytes=3000) as ring:
        for sizes in ((1000, 1000, 10), (10, 10, 1000), (500, 0, 500)):
            writers = [put(ring, size) for size in sizes]
            assert {writer.slot for writer in writers} == {0, 1, 2}
            for writer in writers:
                ring.consume(writer.slot, writer.sequence)
        assert ring.used_bytes == 0


@pytest.mark.parametrize(
    "options",
    [
        {"capacity_bytes": 99},
        {"capacity_bytes": 1001},
        {"capacity_bytes": 500, "on_full": "overwrite"},
        {"capacity_bytes": 500, "retain": "newest"},
    ],
)
def test_what_does_not_go_with_a_capacity_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="capacity_bytes"):
        SharedRingBuffer(10, 100, **options)  # type: ignore[arg-type]
