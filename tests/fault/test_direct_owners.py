"""Faults D6, D7 and D12 of docs/reference/failure-modes.md.

Owners that end, machines that refuse, barriers that fail.
"""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from direct_fixtures import NBYTES, as_json, attached_to, is_stale, producing, put
from transport_fixtures import SERVER, Child, pattern, reference
from waiting import wait_until

from dray import PayloadClient, PayloadRef, PayloadServer, SharedRingBuffer
from dray.errors import BufferClosedError, BufferFullError, ProducerLostError
from dray.protocol.handshake import AttachRequest
from dray.ring import membarrier
from dray.ring.consumer_events import Descriptor
from dray.transport.lanes.base import Network, WantedAttachment
from dray.transport.polling import CloseEvent

TESTS = Path(__file__).parents[1]

# --- D6 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "closed"])
def test_d6_views_outlive_the_producer_and_a_new_lease_is_producer_lost(killed: bool) -> None:
    with Child(SERVER, slots=4, slot_bytes=1 << 16) as child, PayloadClient(lane="shm") as client:
        child.receive()
        first, second, third = (reference(child.ask([seed, NBYTES])) for seed in range(3))
        client.read_bytes(first)
        lease = client.lease_bytes(second)
        with lease as leased:
            if killed:
                child.kill()
            else:
                child.send(None)
                assert child.process.wait(30) == 0
            assert leased.data.tobytes() == pattern(1, NBYTES)
            wait_until(lambda: is_lost(client, third), "the end of the producer to be noticed")
            for _ in range(3):
                with pytest.raises(ProducerLostError):
                    client.read_bytes(third, timeout=20)
            assert leased.data.tobytes() == pattern(1, NBYTES)
        with pytest.raises(ProducerLostError):
            client.consume([third], timeout=20)
        assert client.statistics().reads >= 2


def is_lost(client: PayloadClient, ref: PayloadRef) -> bool:
    """The payload of a dead producer can still be read for a moment, see `OWNER_CHECK_SECONDS`."""
    try:
        assert client.read_bytes(ref, timeout=20, consume=False).tobytes() == pattern(2, NBYTES)
    except ProducerLostError:
        return True
    return False


def test_d6_a_closed_client_leases_nothing_and_its_views_stay() -> None:
    with producing() as server, attached_to(server) as client:
        with client.lease_bytes(put(server, 1)) as leased:
            client.close()
            with pytest.raises(BufferClosedError):
                client.lease_bytes(put(server, 2))
            assert leased.data.tobytes() == pattern(1, NBYTES)


def test_d6_without_a_server_nothing_is_leased_and_with_the_next_one_everything_is_there() -> None:
    with SharedRingBuffer(4, 1 << 16) as ring, PayloadClient(lane="shm") as client:
        with PayloadServer(ring, lane="shm", threads=1) as server:
            refs = [put(server, seed) for seed in range(3)]
            client.read_bytes(refs[0], consume=False)
            assert client.read_bytes(refs[0]).tobytes() == pattern(0, NBYTES)
            direct = client.statistics().direct_reads
        with pytest.raises(ProducerLostError):
            client.read_bytes(refs[1], timeout=20)
        with PayloadServer(ring, lane="shm", threads=1) as server:
            for seed in (1, 2):
                ref = server.ref(refs[seed].slot, refs[seed].sequence, NBYTES)
                assert client.read_bytes(ref).tobytes() == pattern(seed, NBYTES)
            assert is_stale(client, server.ref(refs[0].slot, refs[0].sequence, NBYTES))
            assert client.statistics().direct_reads == direct + 2


# --- D7 ---------------------------------------------------------------------------------------------------------

REFUSED = """
sys.path.insert(0, arguments["tests"])
from forbidding import forbid
forbid(arguments["call"], code=arguments["code"])
"""
READING = """
with PayloadClient(lane="shm") as client:
    while (found := receive()) is not None:
        ref = PayloadRef.from_json(json.dumps(found))
        with client.lease_bytes(ref) as leased:
            data = leased.data.tobytes().hex()
        send([data, client.statistics().direct_reads])
"""
REFUSALS = [("membarrier", errno.EPERM), ("membarrier", errno.ENOSYS), ("pidfd_open", errno.ENOSYS)]


@pytest.mark.parametrize(("call", "code"), REFUSALS)
def test_d7_a_consumer_that_may_not_make_a_needed_call_reads_over_the_connection(call: str, code: int) -> None:
    refusal = {"tests": str(TESTS), "call": call, "code": code}
    with producing() as server, attached_to(server) as client, Child(REFUSED + READING, **refusal) as child:
        for seed in range(20):
            ref = put(server, seed)
            assert child.ask(as_json(ref)) == [pattern(seed, NBYTES).hex(), 0]
            assert server.wait_consumed(ref, timeout=10)
            assert client.read_bytes(put(server, seed)).tobytes() == pattern(seed, NBYTES)
        assert client.statistics().direct_reads == 20
        assert server.statistics().ring.attachments == 1


@pytest.mark.parametrize(("call", "code"), REFUSALS)
def test_d7_a_producer_that_may_not_make_a_needed_call_serves_over_the_connection(call: str, code: int) -> None:
    with (
        Child(REFUSED + SERVER, tests=str(TESTS), call=call, code=code, slots=4, slot_bytes=1 << 16) as child,
        PayloadClient(lane="shm") as client,
    ):
        child.receive()
        for seed in range(20):
            with client.lease_bytes(reference(child.ask([seed, NBYTES]))) as leased:
                assert leased.data.tobytes() == pattern(seed, NBYTES)
        assert (client.statistics().direct_reads, client.statistics().reads) == (0, 20)
        assert child.ask("statistics")["ring"]["attachments"] == 0


class OtherKernel(Network):
    """The network of a process under another kernel, which shares this machine's memory and sockets."""

    def __init__(self) -> None:
        super().__init__(CloseEvent())

    def attach_request(self, reader: int) -> WantedAttachment:
        return WantedAttachment(AttachRequest(bytes(32), reader), Descriptor(os.pidfd_open, os.getpid()))


def test_d7_a_consumer_under_another_kernel_reads_over_the_connection() -> None:
    with producing() as server, attached_to(server, network=OtherKernel()) as client:
        for seed in range(10):
            assert client.read_bytes(put(server, seed)).tobytes() == pattern(seed, NBYTES)
        assert (client.statistics().direct_reads, server.statistics().ring.attachments) == (0, 0)


@pytest.mark.parametrize(
    ("options", "other"), [({"direct": False}, {}), ({}, {"direct": False})], ids=["server", "client"]
)
def test_d7_a_setting_of_either_side_forces_the_connection(options: dict[str, Any], other: dict[str, Any]) -> None:
    with producing(**options) as server, attached_to(server, **other) as client:
        for seed in range(10):
            with client.lease_bytes(put(server, seed)) as leased:
                assert leased.data.tobytes() == pattern(seed, NBYTES)
        assert (client.statistics().direct_reads, server.statistics().ring.attachments) == (0, 0)


DOCTOR = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from forbidding import forbid
if sys.argv[1] != "nothing":
    forbid(sys.argv[1])
sys.argv[1:] = ["doctor", "--timeout", "20"]
from dray.cli.app import main
main()
"""


@pytest.mark.parametrize(
    ("call", "fact"),
    [
        ("nothing", "possible"),
        ("membarrier", "not possible: membarrier is refused (Operation not permitted)"),
    ],
)
def test_d7_doctor_shows_whether_payloads_can_be_leased_directly_and_why_not(call: str, fact: str) -> None:
    command = [sys.executable, "-c", DOCTOR, str(TESTS), call]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert f"direct leases: {fact}" in done.stdout.splitlines(), done.stderr
    assert any(line.startswith("shm: works: ") for line in done.stdout.splitlines())


# --- D12 --------------------------------------------------------------------------------------------------------


def refuse() -> None:
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


def test_d12_a_barrier_that_fails_frees_nothing_and_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with producing(slots=2) as server, attached_to(server) as client:
        refs = [put(server, seed) for seed in range(2)]
        for ref in refs:
            client.read_bytes(ref)
        with monkeypatch.context() as patch:
            patch.setattr(membarrier, "barrier", refuse)
            with pytest.raises(BufferFullError, match="membarrier has failed: Cannot allocate memory"):
                server.put_bytes(b"no slot", timeout=0.3)
            found = server.statistics().ring
            assert (found.free, found.consumed, found.reading) == (0, 2, 2)
            assert found.barrier_failures >= 2
            assert all(is_stale(client, ref) for ref in refs)
        assert client.read_bytes(put(server, 7)).tobytes() == pattern(7, NBYTES)
        assert client.statistics().direct_reads == 3


def test_d12_a_drop_whose_barrier_fails_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with producing(slots=2, on_full="overwrite") as server, attached_to(server) as client:
        refs = [put(server, seed) for seed in range(2)]
        with monkeypatch.context() as patch:
            patch.setattr(membarrier, "barrier", refuse)
            with pytest.raises(BufferFullError):
                server.put_bytes(b"no slot", timeout=0.3)
        for seed, ref in enumerate(refs):
            assert client.read_bytes(ref).tobytes() == pattern(seed, NBYTES)
        assert client.statistics().direct_reads == 2


def test_d12_after_a_failed_barrier_new_consumers_read_over_their_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with producing(slots=2, on_full="overwrite") as server, attached_to(server) as client:
        put(server, 0)
        put(server, 1)
        with monkeypatch.context() as patch:
            patch.setattr(membarrier, "barrier", refuse)
            with pytest.raises(BufferFullError):
                server.put_bytes(b"no slot", timeout=0)
        with attached_to(server) as new:
            for seed in range(5):
                assert new.read_bytes(put(server, seed)).tobytes() == pattern(seed, NBYTES)
                assert client.read_bytes(put(server, seed)).tobytes() == pattern(seed, NBYTES)
            assert (client.statistics().direct_reads, new.statistics().direct_reads) == (5, 0)
        found = server.statistics().ring
        assert (found.attachments, found.barrier_failures) == (1, 1)


def test_d12_where_barriers_are_slow_new_consumers_read_over_their_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passes = membarrier.barrier

    def slow() -> None:
        time.sleep(0.002)  # what the kernel takes here, not a wait for anything
        passes()

    with producing(slots=2, on_full="overwrite") as server, attached_to(server) as client:
        monkeypatch.setattr(membarrier, "barrier", slow)
        for seed in range(60):
            put(server, seed)
        found = server.statistics().ring
        assert found.barrier_p99 is not None
        assert found.barrier_p99 >= 0.002
        with attached_to(server) as new:
            assert new.read_bytes(put(server, 1)).tobytes() == pattern(1, NBYTES)
            assert client.read_bytes(put(server, 2)).tobytes() == pattern(2, NBYTES)
            assert (client.statistics().direct_reads, new.statistics().direct_reads) == (1, 0)
        assert server.statistics().ring.barrier_failures == 0
