"""A signal handler may raise in the middle of an operation of a ring: no slot is lost, and no count is wrong."""

import functools
import itertools
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import interruptions
import pytest
from direct_consumers import attach

import dray.ring
from dray.ring import SharedRingBuffer, SlotState, layout, slots
from dray.ring.attachment import DirectLease
from dray.ring.consumer_events import Descriptor
from dray.ring.direct import direct_problem

FOLDER = str(Path(dray.ring.__file__).parent)
interrupted = functools.partial(interruptions.interrupted, folder=FOLDER)


def put(ring: SharedRingBuffer) -> None:
    with ring.claim(3, timeout=0) as writer:
        writer.buffer[:] = b"abc"
        writer.commit()


def abort(ring: SharedRingBuffer) -> None:
    ring.claim(3, timeout=0).abort()


def withdraw(ring: SharedRingBuffer) -> None:
    writer = ring.claim(3, timeout=0)
    try:
        writer.commit()
    finally:
        writer.withdraw()


def consume(ring: SharedRingBuffer) -> None:
    for each in ring.ready():
        ring.consume(each.slot, each.sequence)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("operation", [put, abort, withdraw, consume])
@pytest.mark.parametrize(
    ("on_full", "retain", "payloads"),
    [("block", "unread", 1), ("overwrite", "unread", 2), ("block", "newest", 1)],
    ids=["block", "overwrite a full ring", "newest"],
)
def test_exception_of_a_signal_handler_at_any_moment_leaves_every_slot_usable(
    operation: Callable[[SharedRingBuffer], None], on_full: Any, retain: Any, payloads: int
) -> None:
    moment, more = 1, True
    while more:
        with SharedRingBuffer(2, 10, on_full=on_full, retain=retain) as ring:
            for _ in range(payloads):
                put(ring)
            more = interrupted(lambda ring=ring: operation(ring), moment)
            found, counted = ring.statistics(), Counter(info.state for info in ring.inspect())
            assert (found.writing, found.reading, found.leases) == (0, 0, 0), moment
            assert (found.free, found.ready) == (counted[SlotState.FREE], counted[SlotState.READY]), moment
            assert found.free + found.ready == 2, moment
            assert found.claimed == found.committed + found.aborted, moment
            gone = found.consumed + found.dropped_unread + found.dropped_delivered + found.retired
            assert found.committed == gone + found.ready, moment
            if retain == "unread":
                consume(ring)
                writers = [ring.claim(3, timeout=0) for _ in range(2)]
                assert {writer.slot for writer in writers} == {0, 1}, moment
            else:
                put(ring), put(ring)
                assert ring.get_ready_count() == 1, moment
        moment += 1
    assert moment > 10


# --- direct leases --------------------------------------------------------------------------------------------

direct = pytest.mark.skipif(bool(direct_problem()), reason=direct_problem() or "-")


@direct
@pytest.mark.timeout(30)
def test_exception_of_a_signal_handler_while_a_direct_lease_begins_leaves_no_lease_word() -> None:
    moment, more = 1, True
    with SharedRingBuffer(2, 10) as ring:
        consumer = attach(ring, leases=1)
        put(ring)
        while more:
            granted: list[DirectLease | None] = []
            more = interrupted(lambda to=granted: to.append(consumer.lease(0, 0, 3)), moment)
            for lease in granted:
                assert lease is not None
                lease.end(consumed=False)
            assert (ring.statistics().leases, ring.get_ready_count()) == (0, 1), moment
            moment += 1
        last = consumer.lease(0, 0, 3)
        assert last is not None
        last.end(consumed=True)
        assert ring.statistics().consumed == 1
    assert moment > 3


@direct
@pytest.mark.timeout(30)
@pytest.mark.parametrize("consumed", [True, False])
def test_exception_of_a_signal_handler_while_a_direct_lease_ends_leaves_no_lease_word(consumed: bool) -> None:
    moment, more = 1, True
    while more:
        with SharedRingBuffer(2, 10) as ring:
            consumer = attach(ring, leases=1)
            put(ring)
            lease = consumer.lease(0, 0, 3)
            assert lease is not None
            more = interrupted(lambda lease=lease: lease.end(consumed), moment)
            lease.end(consumed=False)  # what a program does after an exception
            found = ring.statistics()
            assert found.leases == 0, moment
            assert found.consumed in ((0, 1) if more and consumed else (consumed,)), moment
            put(ring)
            again = consumer.lease(1, 1, 3)
            assert again is not None, moment
            again.end(consumed=True)
        moment += 1
    assert moment > 3


@direct
@pytest.mark.timeout(60)
@pytest.mark.parametrize("operation", ["claim", "statistics", "drop", "attach", "close"])
def test_exception_of_a_signal_handler_while_the_owner_looks_leaves_every_slot_usable(operation: str) -> None:
    moment, more = 1, True
    while more:
        with SharedRingBuffer(4, 10, on_full="overwrite" if operation == "drop" else "block") as ring:
            consumer = attach(ring)
            for sequence in range(4):
                put(ring)
                if operation != "drop":
                    lease = consumer.lease(sequence, sequence, 3)
                    assert lease is not None
                    if sequence != 3:
                        lease.end(consumed=True)
            process = Descriptor(os.pidfd_open, os.getpid())
            operations: dict[str, Callable[[], object]] = {
                "claim": lambda ring=ring: put(ring),
                "drop": lambda ring=ring: put(ring),
                "statistics": lambda ring=ring: ring.statistics(),
                "attach": lambda ring=ring, process=process: ring.attach(
                    process, pid=os.getpid(), reader=0, leases=4
                ),
                "close": lambda ring=ring: ring.close(),
            }
            more = interrupted(operations[operation], moment)
            if operation != "close":
                found = ring.statistics()
                assert found.writing == 0, moment
                assert found.free + found.ready + found.reading == 4, moment
                gone = found.consumed + found.dropped_unread + found.dropped_delivered
                assert found.committed == gone + found.ready + found.reading, moment
                if operation != "drop":
                    lease.end(consumed=True)
                for _ in range(8):
                    put(ring)
                    newest = ring.ready()[-1]
                    taken = consumer.lease(newest.slot, newest.sequence, 3)
                    assert taken is not None, moment
                    taken.end(consumed=True)
        moment += 1
    assert moment > 10


@direct
def test_a_payload_can_be_leased_while_an_interrupted_change_is_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    mending = False
    written = slots.write_slot_header

    def write_from_zeros(memory: memoryview, offset: int, *fields: Any) -> None:
        """What `Struct.pack_into` does, with a consumer that comes in the middle."""
        memory[offset : offset + layout.SLOT_HEADER.size] = bytes(layout.SLOT_HEADER.size)
        if mending:
            lease()
        written(memory, offset, *fields)

    with SharedRingBuffer(8, 64) as ring, attach(ring) as attachment, monkeypatch.context() as patched:
        patched.setattr(slots, "write_slot_header", write_from_zeros)
        put(ring)
        (kept,) = ring.ready()

        def lease() -> None:
            leased = attachment.lease(kept.slot, kept.sequence, kept.nbytes)
            assert leased is not None
            leased.end(consumed=False)

        for moment in itertools.count(1):
            if not interrupted(lambda: put(ring), moment):
                break
            mending = True
            ready = ring.ready()
            mending = False
            lease()
            for each in ready:
                if each != kept:
                    ring.consume(each.slot, each.sequence)
        assert moment > 10
