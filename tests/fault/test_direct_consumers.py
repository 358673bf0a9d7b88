"""Faults D2 to D4, D13 and D14 of docs/reference/failure-modes.md.

Direct consumers that die, stop, fork or are many.
"""

import contextlib
import gc
import time

import pytest
from direct_fixtures import NBYTES, as_json, attached_to, is_stale, producing, put
from forked_child import run_in_child
from transport_fixtures import SERVER, Child, counted, pattern, reference
from waiting import wait_until

from dray import PayloadClient, PayloadServer
from dray.errors import BufferClosedError, BufferFullError


def leases(server: PayloadServer) -> int:
    return server.statistics().ring.leases


# --- D2 ---------------------------------------------------------------------------------------------------------

HOLDING = """
client = PayloadClient(lane="shm")
held = []
send()
while (found := receive()) is not None:
    lease = client.lease_bytes(PayloadRef.from_json(json.dumps(found)), timeout=20)
    held.append((lease, lease.__enter__()))
    send(client.statistics().direct_reads)
"""
"""Leases what it gets, and ends no lease."""

KILLED = """
import signal
from dray.ring import attachment

def read(ref, moment):
    client, left = PayloadClient(lane="shm"), moment
    try:
        client.read_bytes(PayloadRef(ref.producer, 0, 1 << 61, 1, ref.endpoints))
    except StaleSlotError:
        pass
    def trace(frame, event, _):
        nonlocal left
        if frame.f_code.co_filename != attachment.__file__:
            return None
        if event == "line":
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace
    sys.settrace(trace)
    with client.lease_bytes(ref) as leased:
        assert leased.data.tobytes()
    sys.settrace(None)
    os._exit(0)

send()
while (found := receive()) is not None:
    ref, moment = PayloadRef.from_json(json.dumps(found[0])), found[1]
    pid = os.fork()
    if not pid:
        read(ref, moment)
    send(os.waitpid(pid, 0)[1])
"""
"""For each [reference, n], a process that reads the payload in place and is killed before the n-th line of it."""


def test_d2_a_payload_is_ready_again_when_the_consumer_that_reads_it_is_killed() -> None:
    with producing() as server, attached_to(server) as client, Child(HOLDING) as child:
        child.receive()
        refs = [put(server, seed) for seed in range(3)]
        child.ask(as_json(refs[0]))
        assert child.ask(as_json(refs[1])) >= 1
        assert leases(server) == 2
        child.kill()
        wait_until(lambda: server.ring.get_ready_count() == 3, "the leases of a dead process to end")
        for seed, ref in enumerate(refs):
            assert client.read_bytes(ref).tobytes() == pattern(seed, NBYTES)


@pytest.mark.timeout(240)
def test_d2_a_consumer_killed_at_any_line_of_a_lease_leaves_its_payload_ready_or_consumed() -> None:
    consumed: list[bool] = []
    with producing() as server, attached_to(server) as client, Child(KILLED) as child:
        child.receive()
        status = 9
        while status:
            seed = len(consumed)
            ref = put(server, seed)
            status = child.ask([as_json(ref), seed + 1])
            wait_until(lambda: server.statistics().ring.attachments == 1, "the end of a process to be seen")
            assert leases(server) == 0
            consumed.append(server.ring.get_ready_count() == 0)
            if consumed[-1]:
                assert is_stale(client, ref)
            else:
                assert client.read_bytes(ref).tobytes() == pattern(seed, NBYTES)
            assert server.statistics().ring.consumed == seed + 1
    first = consumed.index(True)
    assert first > 20, "killed before the word of the board"
    assert all(consumed[first:])


def test_d2_what_a_consumer_has_consumed_before_it_is_killed_stays_consumed() -> None:
    script = """
client = PayloadClient(lane="shm")
client.read_bytes(PayloadRef.from_json(json.dumps(receive())))  # it brings the attachment
client.read_bytes(PayloadRef.from_json(json.dumps(receive())))
os.kill(os.getpid(), 9)
"""
    with producing() as server, attached_to(server) as client, Child(script) as child:
        first, second = put(server, 1), put(server, 2)
        child.send(as_json(first))
        child.send(as_json(second))
        assert child.process.wait(30) == -9
        assert is_stale(client, first)
        assert is_stale(client, second)
        assert server.statistics().ring.consumed == 2


# --- D3 ---------------------------------------------------------------------------------------------------------


def test_d3_a_stopped_consumer_keeps_its_slots_and_the_others_continue() -> None:
    with producing(slots=6, max_leases=3) as server, attached_to(server) as client, Child(HOLDING) as child:
        child.receive()
        refs = [put(server, seed) for seed in range(3)]
        for ref in refs:
            child.ask(as_json(ref))
        child.stop()
        began = time.monotonic()
        for seed in range(50):
            assert client.read_bytes(put(server, seed)).tobytes() == pattern(seed, NBYTES)
        listed = [lease for lease in server.statistics().leases if lease.pid == child.pid]
        assert sorted(lease.slot for lease in listed) == sorted(ref.slot for ref in refs)
        elapsed = time.monotonic() - began
        later = [lease.age for lease in server.statistics().leases]
        assert min(later) >= elapsed * 0.5
        child.resume()
        child.kill()
        wait_until(lambda: server.ring.get_ready_count() == 3, "the leases of a dead process to end")


def test_d3_a_consumer_has_no_more_direct_leases_than_the_server_allows() -> None:
    with producing(slots=8, max_leases=2) as server, attached_to(server) as client:
        with contextlib.ExitStack() as held:
            for seed in range(2):
                held.enter_context(client.lease_bytes(put(server, seed)))
            assert client.statistics().direct_reads == 2
            further = held.enter_context(client.lease_bytes(put(server, 2)))  # over the connection
            assert client.statistics().direct_reads == 2
            assert further.data.tobytes() == pattern(2, NBYTES)
            del further
        assert client.read_bytes(put(server, 3)).tobytes() == pattern(3, NBYTES)
        assert client.statistics().direct_reads == 3


# --- D4 ---------------------------------------------------------------------------------------------------------


def test_d4_a_forked_child_cannot_lease_and_its_copies_of_leases_end_nothing() -> None:
    with Child(SERVER, slots=2, slot_bytes=1 << 16) as child, PayloadClient(lane="shm") as client:
        child.receive()
        first, second = reference(child.ask([1, NBYTES])), reference(child.ask([2, NBYTES]))
        assert client.read_bytes(first).tobytes() == pattern(1, NBYTES)
        leases = [client.lease_bytes(second)]
        entered = [leases[0].__enter__()]

        def check() -> None:
            with pytest.raises(BufferClosedError):
                client.lease_bytes(second)
            leases.pop().finish(consumed=True)
            entered.clear()
            client.close()
            gc.collect()

        assert run_in_child(check) == ""
        ring = child.ask("statistics")["ring"]
        assert (ring["leases"], ring["consumed"]) == (1, 1)
        assert entered[0].data.tobytes() == pattern(2, NBYTES)
        entered.clear()
        leases[0].finish(consumed=True)
        assert child.ask("statistics")["ring"]["consumed"] == 2


def test_d4_leases_of_a_parent_live_on_when_its_child_ends() -> None:
    with producing(slots=2, on_full="overwrite") as server, Child(FORKING) as child:
        ref = put(server, 1)
        child.send(as_json(ref))
        assert child.receive() == 0  # the status of the forked child
        for seed in range(2, 10):
            put(server, seed)
        assert leases(server) == 1
        assert child.ask() == pattern(1, NBYTES).hex()
        wait_until(lambda: leases(server) == 0, "the lease to end")


FORKING = """
client = PayloadClient(lane="shm")
ref = PayloadRef.from_json(json.dumps(receive()))
with client.lease_bytes(ref) as leased:
    if not (pid := os.fork()):
        sys.exit()
    send(os.waitpid(pid, 0)[1])
    receive()
    found = leased.data.tobytes().hex()
send(found)
receive()
"""


# --- D13 --------------------------------------------------------------------------------------------------------


def test_d13_a_view_keeps_its_slot_after_its_connection_was_evicted() -> None:
    with producing(slots=2, on_full="overwrite", idle_timeout=0.05) as server, attached_to(server) as client:
        with client.lease_bytes(put(server, 1)) as leased:
            wait_until(lambda: counted(server, "evicted") >= 1, "the idle connection to be evicted")
            for seed in range(2, 10):
                put(server, seed)
            assert leased.data.tobytes() == pattern(1, NBYTES)
            assert leases(server) == 1
        assert client.read_bytes(put(server, 10)).tobytes() == pattern(10, NBYTES)
        assert client.statistics().direct_reads == 2
        assert leases(server) == 0


def test_d13_a_view_keeps_its_slot_after_the_pool_has_replaced_its_connection() -> None:
    with producing(slots=2, on_full="overwrite") as server, attached_to(server, idle_seconds=0.0) as client:
        ref = put(server, 1)
        with client.lease_bytes(ref) as leased:
            for seed in range(2, 10):
                client.stat(put(server, seed))
            assert counted(server, "connections") > 2
            assert leased.data.tobytes() == pattern(1, NBYTES)
            assert server.statistics().ring.attachments == 1
        assert is_stale(client, ref)


def test_d13_a_view_keeps_its_slot_after_its_client_was_closed() -> None:
    with producing(slots=2, on_full="overwrite") as server:
        with attached_to(server) as client:
            lease = client.lease_bytes(put(server, 1))
            view = lease.__enter__().data
        lease.finish(consumed=True)
        for seed in range(2, 10):
            put(server, seed)
        assert view.tobytes() == pattern(1, NBYTES)
        assert leases(server) == 1
        del view
        wait_until(lambda: server.statistics().ring.attachments == 0, "the attachment to end")
        assert leases(server) == 0


# --- D14 --------------------------------------------------------------------------------------------------------

MANY = """
clients = [PayloadClient(lane="shm") for _ in range(arguments["clients"])]
held = []
send()
while (found := receive()) is not None:
    refs = [PayloadRef.from_json(json.dumps(each)) for each in found]
    share = len(refs) // len(clients)
    for index, client in enumerate(clients):
        client.read_bytes(refs[index * share], consume=False)
        for ref in refs[index * share : (index + 1) * share]:
            lease = client.lease_bytes(ref, timeout=20)
            held.append((lease, lease.__enter__()))
    send(sum(client.statistics().direct_reads for client in clients))
"""


@pytest.mark.timeout(240)
def test_d14_with_64_attachments_that_use_all_their_leases_claims_and_retirements_continue() -> None:
    processes, clients, max_leases = 4, 16, 8
    pinned = processes * clients * max_leases
    with (
        producing(slots=pinned + 8, slot_bytes=1024, max_leases=max_leases) as server,
        attached_to(server) as client,
    ):
        with contextlib.ExitStack() as stack:
            children = [stack.enter_context(Child(MANY, clients=clients)) for _ in range(processes)]
            for child in children:
                child.receive()
                refs = [server.put_bytes(pattern(seed, 100), timeout=20) for seed in range(pinned // processes)]
                assert child.ask([as_json(ref) for ref in refs], seconds=60) >= len(refs)
            found = server.statistics().ring
            assert (found.attachments, found.leases) == (processes * clients + 1, pinned)
            for seed in range(200):
                ref = server.put_bytes(pattern(seed, 1000), timeout=20)
                assert client.read_bytes(ref).tobytes() == pattern(seed, 1000)
            refs = [server.put_bytes(b"kept", timeout=20) for _ in range(8)]
            with pytest.raises(BufferFullError):
                server.put_bytes(b"no room", timeout=0)
            assert client.consume(refs) == 8
            assert server.statistics().ring.leases == pinned
        wait_until(lambda: server.statistics().ring.attachments == 1, "the processes to end")
        found = server.statistics().ring
        assert (found.leases, found.ready, found.consumed) == (0, pinned, 208)
