"""Leases in shared memory alone: a consumer with lease words of its own, and the ring that reads them."""

import errno
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from direct_consumers import attach
from forked_child import run_in_child
from waiting import wait_until

from dray.errors import BufferClosedError, BufferFullError, ProtocolError, SlotError, StaleSlotError
from dray.resources import close_all
from dray.ring import SharedRingBuffer, SlotState, SlotWriter, membarrier, slots
from dray.ring.attachment import Attachment, DirectLease
from dray.ring.consumer_events import Bell, Descriptor, ProcessDescriptor
from dray.ring.direct import MAX_ATTACHMENTS_OF_PROCESS, DirectLeases, direct_problem
from dray.ring.mapping import fork_lock, map_shared, new_memfd
from dray.ring.membarrier import Barriers

pytestmark = pytest.mark.skipif(bool(direct_problem()), reason=direct_problem() or "-")


def put(ring: SharedRingBuffer, payload: bytes = b"payload") -> SlotWriter:
    with ring.claim(len(payload), timeout=0) as writer:
        writer.buffer[:] = payload
        writer.commit()
    return writer


def leased(consumer: Attachment, written: SlotWriter) -> DirectLease:
    lease = consumer.lease(written.slot, written.sequence, written.nbytes)
    assert lease is not None
    return lease


@pytest.fixture
def ring() -> Iterator[SharedRingBuffer]:
    with SharedRingBuffer(4, 64) as ring:
        yield ring


# --- leases and their ends ------------------------------------------------------------------------------------


def test_a_payload_is_leased_in_place_and_its_slot_is_free_after_the_end(ring: SharedRingBuffer) -> None:
    consumer, written = attach(ring), put(ring)
    lease = leased(consumer, written)
    assert lease.buffer == b"payload"
    assert lease.buffer.readonly
    assert ring.inspect()[written.slot].state is SlotState.READING
    assert lease.end(consumed=True)
    assert ring.inspect()[written.slot].state is SlotState.FREE
    found = ring.statistics()
    assert (found.consumed, found.leases, found.free, found.attachments) == (1, 0, 4, 1)


def test_a_released_payload_can_be_leased_again(ring: SharedRingBuffer) -> None:
    consumer, written = attach(ring), put(ring)
    for _ in range(3):
        assert leased(consumer, written).end(consumed=False)
    assert ring.get_ready_count() == 1
    assert ring.statistics().consumed == 0


def test_a_consumed_payload_is_stale(ring: SharedRingBuffer) -> None:
    consumer, written = attach(ring), put(ring)
    leased(consumer, written).end(consumed=True)
    with pytest.raises(StaleSlotError, match="consumed or overwritten") as caught:
        leased(consumer, written)
    assert (caught.value.slot, caught.value.sequence) == (written.slot, written.sequence)


@pytest.mark.parametrize(
    ("slot", "sequence"), [(-1, 0), (4, 0), (1 << 40, 0), (0, 1), (0, 1 << 62), (0, (1 << 64) - 1)]
)
def test_a_payload_that_the_ring_never_held_is_stale(ring: SharedRingBuffer, slot: int, sequence: int) -> None:
    consumer = attach(ring)
    put(ring)
    with pytest.raises(StaleSlotError):
        consumer.lease(slot, sequence, 7)
    assert ring.statistics().leases == 0


def test_a_reference_with_another_size_is_refused_and_keeps_no_lease(ring: SharedRingBuffer) -> None:
    consumer, written = attach(ring, leases=1), put(ring)
    for _ in range(2):
        with pytest.raises(SlotError, match="7 bytes, 8 according to its reference"):
            consumer.lease(written.slot, written.sequence, 8)
    leased(consumer, written).end(consumed=True)
    assert ring.statistics().consumed == 1


def test_a_consumer_with_all_its_leases_in_use_gets_no_more_until_one_ends(ring: SharedRingBuffer) -> None:
    consumer = attach(ring, leases=2)
    first, second, third = put(ring), put(ring), put(ring)
    held = [leased(consumer, first), leased(consumer, second)]
    assert consumer.lease(third.slot, third.sequence, third.nbytes) is None
    held[0].end(consumed=True)
    assert leased(consumer, third).buffer == b"payload"


def test_a_lease_ends_once(ring: SharedRingBuffer) -> None:
    consumer, written = attach(ring, leases=1), put(ring)
    lease = leased(consumer, written)
    assert lease.end(consumed=False)
    again = leased(consumer, written)  # with the lease word of the first
    assert not lease.end(consumed=True)
    del lease
    assert ring.statistics().leases == 1
    assert again.end(consumed=True)


def test_an_end_that_was_interrupted_after_its_lease_word_was_cleared_leaves_the_next_payload_consumed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with SharedRingBuffer(1, 64) as ring, attach(ring) as first, attach(ring) as second:
        lease = leased(first, put(ring))
        ring.direct().begin_wait()
        written: list[SlotWriter] = []

        def interrupted(_: Bell) -> None:
            if not written:
                written.append(put(ring))
                leased(second, written[0]).end(consumed=True)
                raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(Bell, "ring", interrupted)
            with pytest.raises(KeyboardInterrupt):
                lease.end(consumed=True)
        assert written[0].slot == lease.slot
        assert ring.statistics().consumed == 2


def test_a_lease_word_that_names_a_free_slot_is_no_lease(ring: SharedRingBuffer) -> None:
    with attach(ring):
        (attached,) = ring.direct().attached.values()
        attached.page.words[0] = 1
        assert ring.statistics().leases == 0
        assert ring.inspect()[0].leases == 0


def test_of_many_threads_that_end_a_lease_one_does(ring: SharedRingBuffer) -> None:
    consumer, written = attach(ring), put(ring)
    for _ in range(50):
        lease = leased(consumer, written)
        begin, ended = threading.Barrier(4), []

        def end(lease: DirectLease = lease, begin: threading.Barrier = begin, ended: list[bool] = ended) -> None:
            begin.wait(10)
            ended.append(lease.end(consumed=False))

        threads = [threading.Thread(target=end) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert sorted(ended) == [False, False, False, True]
    assert ring.statistics().leases == 0


def test_a_lease_that_is_garbage_is_released(ring: SharedRingBuffer) -> None:
    consumer, written = attach(ring), put(ring)
    leased(consumer, written)
    assert ring.get_ready_count() == 1


def test_payloads_committed_before_the_first_consumer_came_can_be_leased(ring: SharedRingBuffer) -> None:
    first, second, third = put(ring, b"one"), put(ring, b"two"), ring.claim(1)
    ring.consume(first.slot, first.sequence)
    consumer = attach(ring)
    with pytest.raises(StaleSlotError):
        leased(consumer, first)
    assert leased(consumer, second).buffer == b"two"
    with pytest.raises(StaleSlotError):
        leased(consumer, third)
    third.abort()


# --- several readers, and readers over connections ------------------------------------------------------------


def test_every_reader_consumes_a_payload_once() -> None:
    with SharedRingBuffer(2, 64, readers=2) as ring:
        one, two, written = attach(ring, reader=0), attach(ring, reader=1), put(ring)
        leased(one, written).end(consumed=True)
        assert ring.inspect()[written.slot].consumed_by == 0b01
        with pytest.raises(StaleSlotError):
            leased(one, written)
        leased(two, written).end(consumed=True)
        assert ring.statistics().consumed == 1
        assert ring.statistics().free == 2


def test_two_consumers_with_one_reader_id_count_as_one(ring: SharedRingBuffer) -> None:
    one, two, written = attach(ring), attach(ring), put(ring)
    first, second = leased(one, written), leased(two, written)
    first.end(consumed=True)
    with pytest.raises(StaleSlotError):
        leased(one, written)
    assert ring.inspect()[written.slot].state is SlotState.READING
    second.end(consumed=True)
    found = ring.statistics()
    assert (found.consumed, found.free) == (1, 4)


def test_what_was_consumed_directly_is_stale_over_a_connection_and_the_other_way_round(
    ring: SharedRingBuffer,
) -> None:
    consumer, first, second = attach(ring), put(ring), put(ring)
    leased(consumer, first).end(consumed=True)
    with pytest.raises(StaleSlotError):
        ring.read_raw(first.slot, first.sequence)
    assert not ring.consume(first.slot, first.sequence)
    ring.read_raw(second.slot, second.sequence).acknowledge()
    with pytest.raises(StaleSlotError):
        leased(consumer, second)
    assert ring.statistics().consumed == 2


def test_a_payload_with_leases_of_both_kinds_keeps_its_slot_until_both_have_ended(ring: SharedRingBuffer) -> None:
    consumer, written = attach(ring), put(ring)
    over_connection, direct = ring.read_raw(written.slot, written.sequence), leased(consumer, written)
    direct.end(consumed=True)
    assert ring.inspect()[written.slot].state is SlotState.READING
    over_connection.acknowledge()
    assert ring.inspect()[written.slot].state is SlotState.FREE
    assert ring.statistics().consumed == 1


# --- the owner waits, drops and replaces ----------------------------------------------------------------------


def test_a_full_ring_gets_its_slots_back_from_what_was_consumed(ring: SharedRingBuffer) -> None:
    consumer = attach(ring)
    for _ in range(10):
        for written in [put(ring) for _ in range(4)]:
            leased(consumer, written).end(consumed=True)
    found = ring.statistics()
    assert (found.consumed, found.full_errors) == (40, 0)
    assert found.barriers < 40  # slots are freed together


def test_a_leased_slot_is_not_claimed(ring: SharedRingBuffer) -> None:
    consumer = attach(ring)
    held = [leased(consumer, written) for written in [put(ring) for _ in range(4)]]
    for lease in held[1:]:
        lease.end(consumed=True)
    put(ring, b"others"), put(ring, b"others"), put(ring, b"others")
    with pytest.raises(BufferFullError):
        ring.claim(1, timeout=0)
    assert held[0].buffer == b"payload"


def test_a_ring_that_overwrites_drops_only_what_no_consumer_has_leased() -> None:
    with SharedRingBuffer(3, 64, on_full="overwrite") as ring:
        consumer = attach(ring)
        first, second, _ = put(ring, b"first"), put(ring, b"second"), put(ring, b"third")
        lease = leased(consumer, first)
        put(ring, b"fourth")
        assert lease.buffer == b"first"
        with pytest.raises(StaleSlotError):
            leased(consumer, second)
        lease.end(consumed=True)
        assert ring.statistics().dropped_unread == 1


def test_a_ring_that_overwrites_waits_while_everything_is_leased() -> None:
    with SharedRingBuffer(2, 64, on_full="overwrite") as ring:
        consumer = attach(ring)
        held = [leased(consumer, put(ring)) for _ in range(2)]
        with pytest.raises(BufferFullError):
            ring.claim(1, timeout=0)
        held[1].end(consumed=False)
        assert put(ring).slot == held[1].slot


def test_a_ring_that_keeps_the_newest_leaves_a_leased_payload_until_its_end() -> None:
    with SharedRingBuffer(2, 64, retain="newest") as ring:
        consumer, first = attach(ring), put(ring, b"first")
        lease = leased(consumer, first)
        second = put(ring, b"second")
        assert lease.buffer == b"first"
        with pytest.raises(StaleSlotError):
            leased(consumer, first)
        lease.end(consumed=True)
        for _ in range(2):  # nothing is consumed there
            newest = leased(consumer, second)
            assert newest.buffer == b"second"
            newest.end(consumed=True)
        put(ring, b"third")
        assert ring.statistics().retired == 2


def test_the_end_of_a_lease_wakes_a_claim_that_waits(ring: SharedRingBuffer) -> None:
    consumer = attach(ring)
    held = [leased(consumer, written) for written in [put(ring) for _ in range(4)]]
    claimed: list[SlotWriter] = []
    thread = threading.Thread(target=lambda: claimed.append(ring.claim(1, timeout=20)))
    thread.start()
    wait_until(lambda: ring.direct().waiting, "the claim to wait")
    held[2].end(consumed=True)
    thread.join(20)
    assert [writer.slot for writer in claimed] == [held[2].slot]
    claimed[0].abort()


def test_a_claim_in_a_ring_that_overwrites_is_woken_when_the_server_learns_of_the_end_of_a_lease(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slots, "RESCAN_SECONDS", 1000.0)
    with SharedRingBuffer(1, 64, on_full="overwrite") as ring:
        consumer = attach(ring)
        lease = leased(consumer, put(ring))
        claimed: list[SlotWriter] = []
        thread = threading.Thread(target=lambda: claimed.append(ring.claim(1, timeout=None)), daemon=True)
        thread.start()
        wait_until(lambda: ring.direct().waiting, "the claim to set the doorbell")
        lease.end(consumed=False)
        ring.observe()  # as the server does when the doorbell rings
        thread.join(20)
        assert [writer.sequence for writer in claimed] == [1]
        claimed[0].abort()


def test_a_claim_is_woken_when_the_last_consumer_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "RESCAN_SECONDS", 1000.0)
    with SharedRingBuffer(1, 64) as ring, subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1) as other:
        consumer = attach(ring, pid=other.pid)
        lease = leased(consumer, put(ring))
        claimed: list[SlotWriter] = []
        thread = threading.Thread(target=lambda: claimed.append(ring.claim(1, timeout=None)), daemon=True)
        thread.start()
        wait_until(lambda: ring.direct().waiting, "the claim to set the doorbell")
        lease.end(consumed=True)
        other.kill()
        other.wait()
        wait_until(lambda: (ring.observe(), not ring.direct().attached)[1], "the end of the attachment")
        thread.join(20)
        assert [writer.sequence for writer in claimed] == [1]
        claimed[0].abort()


def test_a_payload_that_a_consumer_has_consumed_before_it_closed_is_not_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with SharedRingBuffer(1, 64, on_full="overwrite") as ring:
        consumer = attach(ring)
        lease = leased(consumer, put(ring))
        named = DirectLeases.named

        def end_before_the_words_are_read(direct: DirectLeases) -> dict[int, int]:
            lease.end(consumed=True)  # after the board was read
            consumer.close()
            return named(direct)

        with monkeypatch.context() as patched:
            patched.setattr(DirectLeases, "named", end_before_the_words_are_read)
            put(ring)
        found = ring.statistics()
        assert (found.consumed, found.dropped_unread, found.dropped_delivered) == (1, 0, 0)


# --- the end of attachments -----------------------------------------------------------------------------------


def test_leases_outlive_the_attachment_that_made_them(ring: SharedRingBuffer) -> None:
    consumer, written = attach(ring), put(ring)
    lease = leased(consumer, written)
    consumer.close()
    consumer.close()
    assert consumer.lease(written.slot, written.sequence, written.nbytes) is None
    assert lease.buffer == b"payload"
    assert ring.inspect()[written.slot].state is SlotState.READING
    lease.end(consumed=True)
    assert ring.statistics().consumed == 1
    assert ring.statistics().attachments == 0


def test_an_attachment_that_is_garbage_is_forgotten(ring: SharedRingBuffer) -> None:
    attach(ring)
    assert ring.statistics().attachments == 0


def test_the_leases_of_a_process_that_has_ended_end(ring: SharedRingBuffer) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        consumer, written, kept = attach(ring, pid=process.pid), put(ring), put(ring)
        lease, other = leased(consumer, written), leased(consumer, kept)
        other.end(consumed=True)
        assert [(each.pid, each.slot, each.sequence, each.reader) for each in ring.direct_leases()] == []
        assert ring.statistics().leases == 1
        assert [(each.pid, each.slot, each.sequence, each.reader) for each in ring.direct_leases()] == [
            (process.pid, written.slot, written.sequence, 0)
        ]
        process.kill()
        process.wait(10)
        found = ring.statistics()
        assert (found.attachments, found.leases, found.ready, found.consumed) == (0, 0, 1, 1)
        lease.end(consumed=False)


def test_views_outlive_the_ring(ring: SharedRingBuffer) -> None:
    consumer, written = attach(ring), put(ring)
    lease = leased(consumer, written)
    assert consumer.usable
    ring.close()
    assert not consumer.usable
    assert consumer.lease(written.slot, written.sequence, written.nbytes) is None
    assert lease.buffer == b"payload"
    assert lease.end(consumed=True)


def test_a_ring_without_a_server_sends_consumers_to_ask_for_one(ring: SharedRingBuffer) -> None:
    ring.count_servers(1)
    consumer, first = attach(ring), put(ring)
    leased(consumer, first).end(consumed=False)
    ring.count_servers(-1)
    second = put(ring)
    for written in (first, second):
        assert consumer.lease(written.slot, written.sequence, written.nbytes) is None
    ring.count_servers(1)
    for written in (first, second):
        leased(consumer, written).end(consumed=True)
    assert ring.statistics().consumed == 2


def test_an_owner_that_a_thread_asks_about_while_another_closes_the_attachment_counts_as_ended() -> None:
    owner = ProcessDescriptor(os.pidfd_open, os.getpid())
    assert not owner.has_ended()
    owner.close()
    assert owner.has_ended()


def test_a_process_gets_a_limited_number_of_attachments(ring: SharedRingBuffer) -> None:
    consumers = [attach(ring) for _ in range(MAX_ATTACHMENTS_OF_PROCESS)]
    with pytest.raises(AssertionError, match="offers no direct leases"):
        attach(ring)
    consumers.pop().close()
    attach(ring)


def test_no_attachment_for_a_reader_id_that_the_ring_does_not_have(ring: SharedRingBuffer) -> None:
    with pytest.raises(AssertionError, match="offers no direct leases"):
        attach(ring, reader=1)


def test_an_attachment_needs_all_descriptors() -> None:
    with pytest.raises(ProtocolError, match="0 descriptors came with the handshake instead of 6"):
        Attachment.open([], slots=1, readers=1, leases=1, reader=0, newest=False)


# --- a barrier that fails -------------------------------------------------------------------------------------


def test_a_barrier_that_fails_frees_nothing_and_ends_the_offer_of_direct_leases(
    ring: SharedRingBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer = attach(ring)
    for written in [put(ring) for _ in range(4)]:
        leased(consumer, written).end(consumed=True)

    def refuse() -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(membarrier, "barrier", refuse)
        with pytest.raises(BufferFullError, match="membarrier has failed: Operation not permitted"):
            ring.claim(1, timeout=0)
        found = ring.statistics()
        assert (found.free, found.consumed) == (0, 4)
        assert found.barrier_failures > 0
    put(ring)
    with pytest.raises(AssertionError, match="offers no direct leases"):
        attach(ring)


def test_slow_barriers_are_not_offered() -> None:
    class Clock:
        time = 0.0

        def now(self) -> float:
            self.time += 0.002
            return self.time

    barriers = Barriers(Clock())
    assert barriers.usable
    for _ in range(60):
        assert barriers.pass_one()
    assert barriers.p99 == pytest.approx(0.002)
    assert not barriers.usable


# --- faulty and forked consumers ------------------------------------------------------------------------------


def test_words_without_a_meaning_are_ignored_and_counted(ring: SharedRingBuffer) -> None:
    membarrier.register()
    written = put(ring)
    attached = ring.attach(ring_process(), pid=os.getpid(), reader=0, leases=4)
    assert attached is not None
    for index, word in enumerate((5, 1 << 63, (1 << 64) - 1, written.slot + 1)):
        attached.page.words[index] = word
    words = ring.direct().board.words
    for index in range(len(words)):
        words[index] = (1 << 64) - 1 - index
    found = ring.statistics()
    assert found.ignored_words >= 3
    assert (found.leases, found.consumed, found.reading) == (1, 0, 1)
    attached.page.words[3] = 0
    assert ring.get_ready_count() == 1


def ring_process() -> Descriptor:
    return Descriptor(os.pidfd_open, os.getpid())


def test_a_forked_child_leases_nothing_and_ends_nothing(ring: SharedRingBuffer) -> None:
    consumer, first, second = attach(ring), put(ring), put(ring)
    lease = leased(consumer, first)

    def check() -> None:
        assert consumer.lease(second.slot, second.sequence, second.nbytes) is None
        assert not lease.end(consumed=True)
        consumer.close()
        with pytest.raises(BufferClosedError):
            ring.get_ready_count()

    assert run_in_child(check) == ""
    assert ring.statistics().consumed == 0
    assert lease.buffer == b"payload"
    assert lease.end(consumed=True)
    leased(consumer, second).end(consumed=True)
    assert ring.statistics().consumed == 2


# --- memory ---------------------------------------------------------------------------------------------------


def test_a_del_method_in_a_reference_cycle_can_still_read_the_memory() -> None:
    read: list[bytes] = []

    class Holder:
        def __init__(self, view: memoryview) -> None:
            self.view = view
            self.myself = self

        def __del__(self) -> None:
            read.append(bytes(self.view[:4]))

    with fork_lock, new_memfd("a test") as made:
        os.ftruncate(made[0], 4096)
        view = map_shared(made[0], 4096, writable=True)
        close_all(made)
    view[:4] = b"last"
    Holder(view)
    del view
    gc.collect()
    assert read == [b"last"]


def test_arrays_on_a_leased_payload_keep_the_memory_mapped(ring: SharedRingBuffer) -> None:
    consumer, written = attach(ring), put(ring)
    lease = leased(consumer, written)
    array = np.frombuffer(lease.buffer, np.uint8)
    lease.end(consumed=True)
    del lease, consumer
    ring.close()
    gc.collect()
    assert array.tobytes() == b"payload"
