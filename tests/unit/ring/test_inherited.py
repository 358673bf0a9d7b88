"""Rings at their heirs: what is taken over from shared memory, in one process."""

import contextlib
import os
from collections.abc import Iterator

import pytest
from direct_consumers import attach

from dray.errors import BufferClosedError, ConfigError, ProtocolError, StaleSlotError
from dray.resources import Descriptors
from dray.ring import SharedRingBuffer, SlotState
from dray.ring.direct import LeftWords, direct_problem
from dray.ring.inherited import InheritedRing, check_inheritance, closed_by_owner
from dray.ring.layout import NBYTES_OFFSET, SegmentLayout

pytestmark = pytest.mark.skipif(bool(direct_problem()), reason=direct_problem() or "-")


@contextlib.contextmanager
def left_by(ring: SharedRingBuffer) -> Iterator[list[int]]:
    """Descriptors of a ring, as an heir has them."""
    with contextlib.closing(Descriptors(os.dup(each) for each in ring.for_heir())) as descriptors:
        yield descriptors


def inherit(descriptors: list[int], readers: int = 1) -> InheritedRing:
    return InheritedRing(descriptors[0], LeftWords(*descriptors[1:4]), readers)


def put(ring: SharedRingBuffer, data: bytes) -> int:
    with ring.claim(len(data)) as slot:
        slot.buffer[:] = data
        slot.commit()
    return slot.sequence


def test_an_heir_has_what_was_committed_and_not_consumed_by_all_readers() -> None:
    with SharedRingBuffer(6, 100, readers=2) as ring, left_by(ring) as left:
        for data in (b"zero", b"one", b"two", b"three"):
            put(ring, data)
        aborted, unfinished = ring.claim(3), ring.claim(5)
        aborted.abort()
        unfinished.buffer[:] = b"never"
        for sequence, reader in ((0, 0), (0, 1), (1, 1)):
            ring.consume(sequence, sequence, reader)
        with inherit(left, readers=2) as heir:
            assert (heir.inherited, heir.inherited_bytes, heir.ignored) == (3, 3 + 3 + 5, 0)
            assert [each.sequence for each in heir.ready()] == [1, 2, 3]
            with heir.read_raw(1, 1, 0) as lease:
                assert bytes(lease.buffer) == b"one"
            for slot, sequence, reader in ((0, 0, 0), (1, 1, 1), (4, 4, 0), (5, 5, 0), (2, 8, 0)):
                with pytest.raises(StaleSlotError):
                    heir.read_raw(slot, sequence, reader)


def test_an_undecided_drop_of_the_owner_is_undone() -> None:
    with SharedRingBuffer(2, 100) as ring, left_by(ring) as left:
        put(ring, b"kept")
        ring.direct().suspect(0, 0)  # the owner is killed before it has decided
        with inherit(left) as heir:
            attachment = attach(heir)
            lease = attachment.lease(0, 0, 4)
            assert lease is not None
            assert bytes(lease.buffer) == b"kept"
            lease.end(consumed=True)
            attachment.close()
            assert heir.wait_all_consumed(10)


def test_an_heir_takes_no_new_payload_and_never_uses_a_slot_again() -> None:
    with SharedRingBuffer(2, 100) as ring, left_by(ring) as left:
        put(ring, b"one")
        with inherit(left) as heir:
            with pytest.raises(BufferClosedError, match="heir"):
                heir.claim(1)
            heir.consume(0, 0)
            with pytest.raises(BufferClosedError):
                heir.claim(1, timeout=0)


def test_what_an_old_consumer_acknowledges_after_the_owners_death_reaches_the_heir() -> None:
    with SharedRingBuffer(2, 100) as ring, left_by(ring) as left:
        put(ring, b"one")
        attachment = attach(ring)
        lease = attachment.lease(0, 0, 3)
        assert lease is not None
        with inherit(left) as heir:
            assert heir.inherited == 1
            attachment.close()  # as a consumer does that finds the owner dead
            assert bytes(lease.buffer) == b"one"
            lease.end(consumed=True)
            assert heir.wait_all_consumed(10)


def test_a_header_that_contradicts_its_generation_is_not_inherited() -> None:
    with SharedRingBuffer(2, 100) as ring, left_by(ring) as left:
        put(ring, b"damaged")
        put(ring, b"sound")
        ring.segment.view[64 + NBYTES_OFFSET + 4] = 1  # more bytes than a slot has
        with inherit(left) as heir:
            assert (heir.inherited, heir.ignored) == (1, 1)
            assert [each.sequence for each in heir.ready()] == [1]


def test_what_an_heir_writes_stays_with_it() -> None:
    with SharedRingBuffer(2, 100) as ring, left_by(ring) as left:
        put(ring, b"one")
        before = bytes(ring.segment.view)
        with inherit(left) as heir:
            heir.consume(0, 0)
        assert bytes(ring.segment.view) == before


def test_what_is_given_up_is_stale() -> None:
    with SharedRingBuffer(4, 100, readers=2) as ring, left_by(ring) as left:
        for data in (b"one", b"two"):
            put(ring, data)
        ring.consume(0, 0, 1)
        with inherit(left, readers=2) as heir:
            assert not heir.wait_all_consumed(0)
            assert heir.drop_all() == 2
            assert heir.wait_all_consumed(0)
            with pytest.raises(StaleSlotError):
                heir.read_raw(1, 1)
            assert {each.state for each in heir.inspect()} == {SlotState.FREE}


def test_rings_that_cannot_be_inherited_are_refused_with_the_reason() -> None:
    with SharedRingBuffer(4, 100, retain="newest") as ring, pytest.raises(ConfigError, match="retain"):
        ring.for_heir()
    with SharedRingBuffer(2048, 64, readers=64) as ring, pytest.raises(ConfigError, match="65536"):
        ring.for_heir()


def test_descriptors_are_checked_before_anything_is_mapped() -> None:
    with SharedRingBuffer(4, 100) as ring, left_by(ring) as left:
        segment, control, board, bell, _ = left
        assert check_inheritance(segment, control, board, 1) == (SegmentLayout(4, 100), ring.producer_id)
        for wrong in ((control, control, board, 1), (segment, board, board, 1), (segment, control, board, 2)):
            with pytest.raises(ProtocolError):
                check_inheritance(*wrong)
        with pytest.raises(ProtocolError):
            check_inheritance(bell, control, board, 1)


def test_a_ring_that_was_closed_in_order_is_known() -> None:
    with SharedRingBuffer(4, 100) as ring, left_by(ring) as left:
        assert not closed_by_owner(left[1], 4)
        ring.close()
        assert closed_by_owner(left[1], 4)
