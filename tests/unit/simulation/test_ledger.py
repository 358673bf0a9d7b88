"""The simulation's books of a ring detect violations."""

import dataclasses
import random

import pytest
from simulation import ManualClock
from simulation.ledger import Books, Ledger
from simulation.scheduler import Process, Scheduler, Violation

from dray.protocol import PayloadRef
from dray.ring import Lease, RingStatistics, SharedRingBuffer, SlotInfo, SlotState
from dray.transport.server_statistics import LeaseInfo


def report(lease: Lease) -> LeaseInfo:
    """The report of a server that holds the lease for a reader."""
    return LeaseInfo(None, lease.slot, lease.sequence, lease.reader, 0.0)


class FaultyRing(SharedRingBuffer):
    """Reports its slots as FREE."""

    def inspect(self) -> tuple[SlotInfo, ...]:
        return tuple(info._replace(state=SlotState.FREE) for info in super().inspect())


def committed(ring: SharedRingBuffer, books: Books, image: bytes) -> tuple[int, int]:
    with ring.claim(len(image)) as writer:
        books.claimed(writer.slot, writer.sequence)
        writer.buffer[:] = image
        books.committing(writer.slot, writer.sequence, image)
        writer.commit()
    books.committed(writer.sequence)
    return writer.slot, writer.sequence


def test_books_of_a_ring_in_order_agree_with_it() -> None:
    with SharedRingBuffer(2, 64) as ring:
        books = Books(ring, "ring", 1)
        where = committed(ring, books, b"payload")
        books.check([])
        lease = ring.read_raw(*where)
        books.check([report(lease)])
        lease.release()
        books.check([])
        books.check_end()


def test_a_lease_that_no_session_holds_is_a_violation() -> None:
    with SharedRingBuffer(2, 64) as ring:
        books = Books(ring, "ring", 1)
        ring.read_raw(*committed(ring, books, b"payload"))
        with pytest.raises(Violation, match="its readers hold 0"):
            books.check([])


def test_bytes_that_change_after_the_commit_are_a_violation() -> None:
    with SharedRingBuffer(2, 64) as ring:
        books = Books(ring, "ring", 1)
        slot, _ = committed(ring, books, b"payload")
        ring.segment.view[ring.segment.slot_offset(slot)] = 0
        with pytest.raises(Violation, match="changed while it was READY"):
            books.check([])


def test_a_slot_freed_under_a_lease_is_a_violation() -> None:
    with FaultyRing(2, 64) as ring:
        books = Books(ring, "ring", 1)
        slot, sequence = committed(ring, books, b"payload")
        lease = ring.read_raw(slot, sequence)
        with pytest.raises(Violation, match="is FREE with 1 leases"):
            books.check([report(lease)])


def test_a_payload_consumed_without_a_delivery_is_a_violation() -> None:
    with SharedRingBuffer(2, 64) as ring:
        books = Books(ring, "ring", 1)
        ring.consume(*committed(ring, books, b"payload"))
        books.check([])
        with pytest.raises(Violation, match="are gone, 0 were dropped by policy"):
            books.check_end()


def test_a_payload_that_its_reader_kept_and_that_is_still_there_is_a_violation() -> None:
    with SharedRingBuffer(2, 64) as ring:
        books = Books(ring, "ring", 1)
        _, sequence = committed(ring, books, b"payload")
        payload = books.payloads[sequence]
        payload.delivered[0] += 1
        payload.kept.add(0)
        with pytest.raises(Violation, match="still there"):
            books.check_end()


def test_a_payload_may_be_delivered_before_its_commit_has_ended() -> None:
    with SharedRingBuffer(2, 64) as ring:
        ledger = Ledger(Scheduler(random.Random(1), ManualClock()))
        books = ledger.open(ring, "ring", 1)
        with ring.claim(7) as writer:
            books.claimed(writer.slot, writer.sequence)
            writer.buffer[:] = b"payload"
            ref = PayloadRef(ring.producer_id, writer.slot, writer.sequence, 7, ("unix:/ring",))
            with pytest.raises(Violation, match="never committed"):
                ledger.deliver(ref, 0, b"payload", 1000.0)
            books.committing(writer.slot, writer.sequence, b"payload")
            writer.commit()
        ledger.deliver(ref, 0, b"payload", 1000.0)
        with pytest.raises(Violation, match="0 payloads were committed, the ring counts 1"):
            books.check_end()
        books.committed(writer.sequence, 1001.0)
        books.check_end()


def test_a_payload_whose_commit_was_refused_does_not_count_and_must_not_be_delivered() -> None:
    with SharedRingBuffer(2, 64) as ring:
        ledger = Ledger(Scheduler(random.Random(1), ManualClock()))
        books = ledger.open(ring, "ring", 1)
        with ring.claim(7) as writer:
            books.claimed(writer.slot, writer.sequence)
            books.committing(writer.slot, writer.sequence, b"payload")
            books.refused(writer.sequence)
        ref = PayloadRef(ring.producer_id, writer.slot, writer.sequence, 7, ("unix:/ring",))
        books.check_end()
        with pytest.raises(Violation, match="never committed"):
            ledger.deliver(ref, 0, b"payload", 1000.0)
        books.committing(writer.slot, writer.sequence, b"payload")
        ledger.deliver(ref, 0, b"payload", 1000.0)
        with pytest.raises(Violation, match="was delivered, and its commit was refused"):
            books.refused(writer.sequence)


def test_a_direct_lease_on_a_slot_that_was_freed_is_a_violation() -> None:
    with SharedRingBuffer(2, 64) as ring:
        books = Books(ring, "ring", 1)
        consumer = Process("consumer", 1)
        where = committed(ring, books, b"payload")
        books.direct[1] = (*where, consumer)
        books.check([])
        ring.consume(*where)
        with pytest.raises(Violation, match="is leased directly in slot 0, which is FREE"):
            books.check([])
        consumer.dead = True
        books.check([])


def test_a_payload_on_the_board_that_is_delivered_to_its_reader_later_is_a_violation() -> None:
    with SharedRingBuffer(2, 64) as ring:
        ledger = Ledger(Scheduler(random.Random(1), ManualClock()))
        books = ledger.open(ring, "ring", 2)
        slot, sequence = committed(ring, books, b"payload")
        ref = PayloadRef(ring.producer_id, slot, sequence, 7, ("unix:/ring",))
        books.stored(slot, 0, sequence + 1, 2000.0)
        ledger.deliver(ref, 0, b"payload", 1999.0)
        ledger.deliver(ref, 1, b"payload", 2001.0)
        with pytest.raises(Violation, match="had consumed it before"):
            ledger.deliver(ref, 0, b"payload", 2001.0)
        with pytest.raises(Violation, match="has written 9 on the board"):
            books.stored(slot, 0, 9, None)


def test_a_wait_that_only_a_late_look_has_ended_is_a_violation() -> None:
    class LateRing(SharedRingBuffer):
        def statistics(self) -> RingStatistics:
            return dataclasses.replace(super().statistics(), late_looks=late[0])

    late = [0]
    with LateRing(2, 64) as ring:
        books = Books(ring, "ring", 1)
        books.changed_at = 1000.0
        books.check_late_looks(1000.1, deaf=False)
        late[0] += 1
        books.check_late_looks(1000.1, deaf=True)
        late[0] += 1
        books.check_late_looks(1000.01, deaf=False)
        late[0] += 1
        with pytest.raises(Violation, match="after a consumer had changed a word"):
            books.check_late_looks(1000.1, deaf=False)
