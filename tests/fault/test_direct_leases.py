"""Faults D1, D5 and D8 to D11 of docs/reference/failure-modes.md: payloads leased in shared memory alone."""

import mmap
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from direct_fixtures import NBYTES, as_json, attached_to, is_stale, producing, put
from stress.run import Plan, run
from transport_fixtures import Child, pattern
from waiting import wait_until

from dray import PayloadClient
from dray.errors import BufferFullError, ConfigError
from dray.ring import membarrier
from dray.transport.lanes.base import Network
from dray.transport.polling import CloseEvent

# --- D1 ----------------------------------------------------------------------------------------------------------


def test_d1_a_leased_payload_is_not_overwritten_and_an_overwritten_one_is_stale() -> None:
    with producing(slots=3, on_full="overwrite") as server, attached_to(server) as client:
        refs = [put(server, seed) for seed in range(3)]
        with client.lease_bytes(refs[0]) as leased:
            later = [put(server, seed) for seed in range(3, 12)]
            assert leased.data.tobytes() == pattern(0, NBYTES)
            assert all(is_stale(client, ref) for ref in (*refs[1:], *later[:-2]))
            assert client.read_bytes(later[-1]).tobytes() == pattern(11, NBYTES)
        assert is_stale(client, refs[0])
        assert client.statistics().direct_reads == 2


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "ring",
    [{}, {"on_full": "overwrite", "own_readers": False}, {"retain": "newest", "slots": 16}],
    ids=["block", "overwrite", "newest"],
)
def test_d1_consumers_that_lease_while_slots_are_reused_see_their_payload_or_stale(ring: dict[str, Any]) -> None:
    account = run(Plan("d1", leases=2_000, seconds=30.0, consumers=2, **ring))
    assert account.problems == []
    assert account.counts["DIRECT"] >= 2_000


# --- read_many in place ------------------------------------------------------------------------------------------


def test_large_payloads_that_are_read_in_place_keep_their_slots_until_their_last_array_is_gone() -> None:
    with producing(slots=3, slot_bytes=1 << 20) as server, attached_to(server) as client:
        large = [server.put({"x": np.full(100_000, number)}) for number in range(2)]
        small = server.put({"x": np.arange(3)})
        results = list(client.read_many([*large, small], consume=False, in_place=True))
        assert [int(each.payload["x"][-1]) for each in results] == [0, 1, 2]
        assert [each.payload["x"].flags.writeable for each in results] == [False, False, True]
        assert server.statistics().ring.leases == 2
        kept = results[0].payload["x"][5:6]
        assert client.consume([*large, small]) == 3
        del results
        wait_until(lambda: server.statistics().ring.leases == 1, "the end of the other lease")
        assert server.put({"x": np.zeros(100_000)}).slot != large[0].slot
        assert int(kept[0]) == 0
        del kept
        wait_until(lambda: server.statistics().ring.leases == 0, "the end of the last lease")


def test_payloads_are_read_in_place_only_without_being_consumed() -> None:
    with producing() as server, attached_to(server) as client, pytest.raises(ConfigError, match="in_place"):
        client.read_many([put(server, 1)], in_place=True)


# --- D5 ----------------------------------------------------------------------------------------------------------


class Faulty(Network):
    """A network whose client keeps the memory that it may write to: the board, and its lease page."""

    def __init__(self) -> None:
        super().__init__(CloseEvent())
        self.board = self.page = memoryview(b"")

    def open_attachment(self, descriptors: list[int], *arguments: Any, **options: Any) -> Any:
        self.board, self.page = (
            memoryview(mmap.mmap(each, os.fstat(each).st_size)).cast("Q") for each in descriptors[2:4]
        )
        return super().open_attachment(descriptors, *arguments, **options)


def test_d5_garbage_of_a_faulty_consumer_is_ignored_and_counted_and_harms_no_other() -> None:
    network = Faulty()
    with producing() as server, attached_to(server) as client, attached_to(server, network=network):
        refs = [put(server, seed) for seed in range(3)]
        garbage = (5, (1 << 64) - 1, 1 << 63, (1 << 63) | 1, 1 << 32)
        for index, word in enumerate(garbage):
            network.page[index] = word
        for index in range(len(network.board)):
            network.board[index] = garbage[index % len(garbage)]
        found = server.statistics().ring
        assert found.ignored_words >= len(garbage)
        assert (found.leases, found.ready, found.consumed) == (0, 3, 0)
        for seed, ref in enumerate(refs):
            assert client.read_bytes(ref).tobytes() == pattern(seed, NBYTES)
        assert server.statistics().ring.consumed == 3
        for seed in range(20):
            assert client.read_bytes(put(server, seed)).tobytes() == pattern(seed, NBYTES)


def test_d5_what_the_owner_has_seen_consumed_cannot_be_undone() -> None:
    network = Faulty()
    with producing(readers=2) as server, attached_to(server, network=network) as client:
        ref = put(server, 1)
        assert client.read_bytes(ref).nbytes == NBYTES
        assert server.ring.inspect()[ref.slot].consumed_by == 0b01
        for index in range(len(network.board)):
            network.board[index] = 0
        assert server.ring.inspect()[ref.slot].consumed_by == 0b01
        with attached_to(server, reader=1) as other:
            assert other.read_bytes(ref).tobytes() == pattern(1, NBYTES)
        assert server.wait_consumed(ref, timeout=10)
        assert server.statistics().ring.consumed == 1


# --- D8 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lane", ["tcp", "ucx"])
def test_d8_a_payload_consumed_directly_is_stale_over_a_network_lane_at_once(lane: Any) -> None:
    with producing(lane=("shm", lane)) as server, attached_to(server) as client, PayloadClient(lane=lane) as far:
        for seed in range(20):
            ref = put(server, seed)
            assert client.read_bytes(ref).tobytes() == pattern(seed, NBYTES)
            assert is_stale(far, ref)
        assert client.statistics().direct_reads == 20


@pytest.mark.parametrize("lane", ["tcp", "ucx"])
def test_d8_a_payload_consumed_over_a_network_lane_is_stale_directly(lane: Any) -> None:
    with producing(lane=("shm", lane)) as server, attached_to(server) as client, PayloadClient(lane=lane) as far:
        for seed in range(20):
            ref = put(server, seed)
            assert far.read_bytes(ref).tobytes() == pattern(seed, NBYTES)
            assert server.wait_consumed(ref, timeout=10)
            assert is_stale(client, ref)


def test_d8_a_payload_leased_both_ways_keeps_its_slot_until_both_have_ended() -> None:
    with producing(slots=2, on_full="overwrite", lane=("shm", "tcp"), readers=2) as server:
        with attached_to(server) as client, PayloadClient(lane="shm", reader=1, direct=False) as exchanging:
            ref = put(server, 1)
            with client.lease_bytes(ref) as near, exchanging.lease_bytes(ref) as far:
                put(server, 2)
                put(server, 3)
                assert near.data.tobytes() == far.data.tobytes() == pattern(1, NBYTES)
            put(server, 4)
            put(server, 5)
            assert is_stale(client, ref)


# --- D9 ----------------------------------------------------------------------------------------------------------

ACKNOWLEDGING = """
client = PayloadClient(lane="shm")
send()
while (found := receive()) is not None:
    client.read_bytes(PayloadRef.from_json(json.dumps(found)), timeout=20)
client.close()
"""


def test_d9_a_producer_that_waits_is_woken_by_the_consumer_that_acknowledges_last() -> None:
    with producing(slots=1) as server, Child(ACKNOWLEDGING) as child:
        child.receive()
        for seed in range(300):
            ref = server.put_bytes(pattern(seed, 100), timeout=20)
            child.send(as_json(ref))
        assert server.wait_consumed(ref, timeout=20)
        assert server.statistics().ring.consumed == 300
        assert server.statistics().counters.reads == 0  # after the first exchange nothing asked the server


def test_d9_every_thread_that_waits_is_woken() -> None:
    with producing(slots=1) as server, attached_to(server) as client:
        ref = put(server, 0)
        woken: list[int] = []

        def wait(call: Callable[[], int]) -> threading.Thread:
            thread = threading.Thread(target=lambda: woken.append(call()))
            thread.start()
            return thread

        threads = [wait(lambda: server.wait_consumed(ref, timeout=20)) for _ in range(3)]
        threads.append(wait(lambda: put(server, 1).sequence))
        client.read_bytes(ref)
        for thread in threads:
            thread.join(30)
        assert sorted(woken) == [1, True, True, True]


# --- D10 ---------------------------------------------------------------------------------------------------------


def test_d10_a_lease_that_two_threads_end_ends_once_and_clears_no_other_word() -> None:
    with producing(slots=2) as server, attached_to(server) as client:
        for seed in range(50):
            ref = put(server, seed)
            lease = client.lease_bytes(ref)
            lease.__enter__()
            together = threading.Barrier(3)

            def end(lease: Any = lease, together: threading.Barrier = together) -> None:
                together.wait(10)
                lease.finish(consumed=True)

            threads = [threading.Thread(target=end) for _ in range(2)]
            for thread in threads:
                thread.start()
            together.wait(10)
            other = put(server, seed + 1000)
            with client.lease_bytes(other) as kept:  # perhaps with the word that has just been given back
                for thread in threads:
                    thread.join(10)
                spare = server.put_bytes(b"", timeout=10)
                with pytest.raises(BufferFullError):
                    server.put_bytes(b"", timeout=0)
                assert kept.data.tobytes() == pattern(seed + 1000, NBYTES)
            assert client.consume([spare]) == 1
        found = server.statistics().ring
        assert (found.leases, found.ready, found.reading) == (0, 0, 0)


def test_d10_a_signal_handler_that_ends_the_lease_that_is_being_ended_changes_nothing() -> None:
    with producing(slots=2) as server, attached_to(server) as client:
        leases: list[Any] = []
        before = signal.signal(signal.SIGALRM, lambda *_: [each.finish(consumed=False) for each in leases])
        try:
            for seed in range(200):
                leases[:] = [client.lease_bytes(put(server, seed))]
                leases[0].__enter__()
                signal.setitimer(signal.ITIMER_REAL, 0.000_05 * (seed % 4 + 1))
                leases[0].finish(consumed=True)
                signal.setitimer(signal.ITIMER_REAL, 0)
                ready = server.ring.ready()
                assert server.statistics().ring.leases == 0
                for each in ready:  # the handler came first, and released it
                    assert client.read_bytes(server.ref(each.slot, each.sequence, each.nbytes)).nbytes == NBYTES
        finally:
            signal.signal(signal.SIGALRM, before)
        found = server.statistics().ring
        assert (found.consumed, found.ready, found.reading) == (200, 0, 0)


FORKED_BY_C = """
import ctypes
client = PayloadClient(lane="shm")
lease = client.lease_bytes(PayloadRef.from_json(json.dumps(receive())))
with lease as leased:
    pid = ctypes.PyDLL(None).fork()  # without the hooks of os.fork
    if not pid:
        lease.finish(consumed=True)
        del lease, leased
        os._exit(0)
    send([os.waitpid(pid, 0)[1], client.statistics().direct_reads])
    receive()
    found = leased.data.tobytes().hex()
send(found)
"""


def test_d10_copies_of_leases_that_die_in_a_child_that_c_code_has_forked_end_nothing() -> None:
    with producing(slots=2) as server, Child(FORKED_BY_C) as child:
        ref = put(server, 1)
        assert child.ask(as_json(ref)) == [0, 1]
        found = server.statistics().ring
        assert (found.leases, found.consumed) == (1, 0)
        assert child.ask() == pattern(1, NBYTES).hex()
        assert server.wait_consumed(ref, timeout=10)


# --- D11 ---------------------------------------------------------------------------------------------------------


def test_d11_a_payload_that_is_asked_for_while_its_drop_is_undecided_is_leased_and_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: list[Any] = []
    with producing(slots=2, on_full="overwrite") as server, attached_to(server, inline_bytes=0) as client:
        oldest, newer = put(server, 0), put(server, 1)
        barrier = membarrier.barrier

        def ask_first() -> None:
            if not found:
                lease = client.lease_bytes(oldest, timeout=10)
                found.append((lease, lease.__enter__()))
            barrier()

        monkeypatch.setattr(membarrier, "barrier", ask_first)
        put(server, 2)
        ((lease, leased),) = found
        assert leased.data.tobytes() == pattern(0, NBYTES)
        assert is_stale(client, newer)  # it was dropped instead
        del leased
        found.clear()
        lease.finish(consumed=False)
        wait_until(lambda: server.ring.get_ready_count() == 2, "the end of the lease to arrive")
        assert client.read_bytes(oldest).tobytes() == pattern(0, NBYTES)
