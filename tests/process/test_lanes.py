"""Two processes on each lane: every byte, and what happens when one of them is killed or stopped."""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import select
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from transport_fixtures import (
    MAX_BYTES,
    READER,
    SERVER,
    SIZES,
    Child,
    pattern,
    reference,
    ring_of,
    serving,
)
from waiting import wait_until

from dray import PayloadClient, PayloadRef, PayloadServer, SharedRingBuffer
from dray.clock import Deadline
from dray.errors import BufferFullError, ProducerLostError, StaleSlotError, TransportError
from dray.transport.lanes import parse_endpoint

SCHEMES = {"shm": "unix", "tcp": "tcp", "ucx": "ucx"}


def server_on(lane: str, slots: int = 3, slot_bytes: int = 1 << 20, **options: Any) -> Child:
    return Child(SERVER, slots=slots, slot_bytes=slot_bytes, options={"lane": lane, "threads": 1, **options})


def test_payloads_of_every_size_arrive_byte_by_byte(lane: Any) -> None:
    with server_on(lane, slot_bytes=MAX_BYTES) as server, PayloadClient(lane=lane) as client:
        server.receive()
        for seed, nbytes in enumerate(SIZES):
            ref = reference(server.ask([seed, nbytes]))
            assert ref.nbytes == nbytes
            expected = pattern(seed, nbytes)
            assert memoryview(client.read_bytes(ref, consume=False)) == expected
            assert memoryview(client.read_bytes(ref)) == expected
            with pytest.raises(StaleSlotError):
                client.read_bytes(ref)
        assert client.statistics().connects == 1


@pytest.mark.parametrize("stage", ["asked", "received"])
def test_w1_a_reader_that_dies_before_its_ack_loses_nothing(lane: Any, stage: str) -> None:
    nbytes = 32 << 20  # more than sockets buffer: the reader that only asked is killed within the payload
    with serving(lane, slots=1, slot_bytes=nbytes) as server, PayloadClient(lane=lane) as client:
        payload = pattern(1, nbytes)
        ref = server.put_bytes(payload)
        text = json.loads(ref.to_json())
        with Child(READER, ref=text, scheme=SCHEMES[lane], stage=stage) as reader:
            assert reader.receive() == "there"
            wait_until(lambda: ring_of(server).statistics().leases == 1, "the lease")
            reader.kill()
            wait_until(lambda: ring_of(server).get_ready_count() == 1, "the payload to be ready again")
        assert ring_of(server).statistics().leases == 0
        assert memoryview(client.read_bytes(ref)) == payload
        assert server.wait_consumed(ref, timeout=5)


def test_w5_a_stopped_reader_holds_up_no_other_reader(lane: Any) -> None:
    nbytes = 8 << 20
    with serving(lane, slots=2, slot_bytes=nbytes) as server, PayloadClient(lane=lane) as client:
        ref = server.put_bytes(pattern(1, nbytes))
        text = json.loads(ref.to_json())
        with Child(READER, ref=text, scheme=SCHEMES[lane], stage="received") as reader:
            assert reader.receive() == "there"
            reader.stop()
            for seed in range(5):
                other = server.put_bytes(pattern(seed, nbytes), timeout=5)
                assert memoryview(client.read_bytes(other, timeout=10)) == pattern(seed, nbytes)
                assert server.wait_consumed(other, timeout=5)
            assert not server.wait_consumed(ref, timeout=0)
            reader.resume()
            assert reader.ask() == "acknowledged"
        assert server.wait_consumed(ref, timeout=5)


def test_w5_a_reader_stopped_within_a_payload_holds_up_no_other_reader(lane: Any) -> None:
    nbytes = 32 << 20
    with serving(lane, slots=2, slot_bytes=nbytes) as server, PayloadClient(lane=lane) as client:
        ref = server.put_bytes(pattern(1, nbytes))
        text = json.loads(ref.to_json())
        with Child(READER, ref=text, scheme=SCHEMES[lane], stage="asked") as reader:
            assert reader.receive() == "there"
            wait_until(lambda: ring_of(server).statistics().leases == 1, "the lease")
            reader.stop()
            small = server.put_bytes(b"small", timeout=5)
            assert bytes(client.read_bytes(small, timeout=10)) == b"small"
            assert memoryview(client.read_bytes(ref, timeout=20, consume=False)) == pattern(1, nbytes)


@contextlib.contextmanager
def slowed(endpoint: str, bytes_per_second: int) -> Iterator[str]:
    """A relay to a TCP endpoint, for one connection, that limits the rate of the server's bytes; its endpoint."""
    address = parse_endpoint(endpoint)
    chunk = 1 << 16
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as up:
        listener.settimeout(20)
        up.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, chunk)
        up.connect((address.host, address.port))

        def relay() -> None:
            down, _ = listener.accept()
            with down, contextlib.suppress(ConnectionError):
                while not done.is_set():
                    readable, _, _ = select.select([down, up], [], [], 0.1)
                    if down in readable:
                        up.sendall(down.recv(chunk))
                    if up in readable:
                        part = up.recv(chunk)
                        if not part:
                            return
                        down.sendall(part)
                        done.wait(len(part) / bytes_per_second)

        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            relayed = thread.submit(relay)
            try:
                yield f"tcp:127.0.0.1:{listener.getsockname()[1]}"
            finally:
                done.set()
                relayed.result(20)


SLOW_OPTIONS = {"threads": 1, "lease_timeout": 0.6}


def test_transfer_that_takes_longer_than_the_lease_timeout_is_not_cut() -> None:
    """Neither by the server nor by the client: each payload has the whole deadline of its batch."""
    options = {**SLOW_OPTIONS, "lane": ["tcp"]}
    with (
        Child(SERVER, slots=6, slot_bytes=2 << 20, options=options) as server,
        PayloadClient(lane="tcp") as client,
    ):
        (direct,) = server.receive()
        with slowed(direct, 4 << 20) as slow:
            refs = [reference(server.ask([seed, nbytes])) for seed, nbytes in enumerate((10, 10, *[2 << 20] * 4))]
            refs = [dataclasses.replace(ref, endpoints=(slow, direct)) for ref in refs]
            # Both endpoints have answered soon, so that the client would not wait long for either.
            for ref in refs[:2]:
                client.read_bytes(ref, timeout=20)
            found = {each.ref: each.payload for each in client.read_many_bytes(refs[2:], timeout=30)}
            assert [bytes(found[ref]) for ref in refs[2:]] == [pattern(seed, 2 << 20) for seed in range(2, 6)]
            assert client.statistics().retries == 0
            assert server.ask("statistics")["server"]["evicted"] == 0


SLOW_READER = """
import time

class SlowWorker(UcxWorker):
    def progress(self, steps=1):
        time.sleep(0.1)
        super().progress(1)

    def has_progressed(self):
        before = self.steps
        self.progress()
        return self.steps > before

ref = PayloadRef.from_json(json.dumps(arguments["ref"]))
deadline = Deadline.after(30)
connection = Connection.open(ref.endpoints[0], ref.producer, None, deadline, worker=SlowWorker(True))
(target,) = connection.ask([ref], 0, deadline)
asked = time.monotonic()
held = connection.answer(target, deadline, deadline)
took = time.monotonic() - asked
connection.finish(held, True, deadline)
connection.stat(deadline)
assert held.data().tobytes() == pattern(1, ref.nbytes)
send(took)
"""
"""Lets UCX make one step at a time, 0.1 s apart, while a payload is on its way; sends the seconds that it took."""


def test_transfer_that_takes_longer_than_the_lease_timeout_is_not_cut_on_ucx() -> None:
    nbytes = 64 << 20
    with Child(SERVER, slots=1, slot_bytes=nbytes, options={**SLOW_OPTIONS, "lane": ["ucx"]}) as server:
        server.receive()
        ref = server.ask([1, nbytes])
        with Child(SLOW_READER, ref=ref) as reader:
            assert reader.receive() > SLOW_OPTIONS["lease_timeout"]
        counted = server.ask("statistics")["server"]
        assert (counted["evicted"], counted["acks_consumed"]) == (0, 1)


def test_b14_a_stopped_in_place_reader_pins_its_slot_until_it_dies() -> None:
    with serving("shm", slots=1) as server:
        ref = server.put_bytes(b"pinned")
        text = json.loads(ref.to_json())
        with Child(READER, ref=text, scheme="unix", stage="received") as reader:
            assert reader.receive() == "there"
            reader.stop()
            (lease,) = server.statistics().leases
            assert (lease.pid, lease.slot, lease.sequence) == (reader.pid, ref.slot, ref.sequence)
            assert lease.age >= 0
            with pytest.raises(BufferFullError):
                server.put_bytes(b"next", timeout=0.05)
            reader.kill()
            wait_until(lambda: ring_of(server).get_ready_count() == 1, "the payload to be ready again")
            assert server.statistics().leases == ()


def wait_until_lost(client: PayloadClient, ref: PayloadRef) -> None:
    """A direct read needs no producer; its end is noticed a moment later."""

    def lost() -> bool:
        try:
            client.read_bytes(ref, timeout=5, consume=False)
        except ProducerLostError:
            return True
        return False

    wait_until(lost, "the producer to be lost")


def test_c13_a_killed_producer_is_lost_and_not_stale(lane: Any) -> None:
    with server_on(lane) as server, PayloadClient(lane=lane) as client:
        server.receive()
        refs = [reference(server.ask([seed, 1000])) for seed in range(2)]
        assert memoryview(client.read_bytes(refs[0])) == pattern(0, 1000)
        server.kill()
        if lane == "shm":
            wait_until_lost(client, refs[1])
        deadline = Deadline.after(5)
        with pytest.raises(ProducerLostError) as caught:
            client.read_bytes(refs[1], timeout=5)
        assert not deadline.expired
        assert not caught.value.retryable
        with pytest.raises(ProducerLostError):
            client.consume(refs, timeout=5)
        with PayloadClient() as fresh, pytest.raises(ProducerLostError):
            fresh.read_bytes(refs[1], timeout=5)


def test_c13_a_stopped_producer_is_a_timeout_and_not_lost(lane: Any) -> None:
    with server_on(lane) as server, PayloadClient(lane=lane, direct=False) as client:
        server.receive()
        ref = reference(server.ask([1, 1000]))
        client.read_bytes(ref, consume=False)
        server.stop()
        deadline = Deadline.after(3)
        with pytest.raises(TransportError):
            client.read_bytes(ref, timeout=1)
        assert not deadline.expired
        server.resume()
        assert memoryview(client.read_bytes(ref, timeout=10)) == pattern(1, 1000)


def test_payloads_of_a_stopped_producer_are_read_directly() -> None:
    with server_on("shm") as server, PayloadClient(lane="shm") as client:
        server.receive()
        refs = [reference(server.ask([seed, 1000])) for seed in range(3)]
        client.read_bytes(refs[0])
        server.stop()
        try:
            for seed in (1, 2):
                assert memoryview(client.read_bytes(refs[seed], timeout=5)) == pattern(seed, 1000)
        finally:
            server.resume()


def test_a_producer_killed_within_a_payload_never_gives_partial_bytes(lane: Any) -> None:
    """W2: what arrives is whole or an error."""
    nbytes = 64 << 20
    with server_on(lane, slot_bytes=nbytes) as server, PayloadClient(lane=lane) as client:
        server.receive()
        refs = [reference(server.ask([seed, nbytes])) for seed in range(2)]
        expected = [pattern(seed, nbytes) for seed in range(2)]
        killer = threading.Timer(0.05, os.kill, (server.pid, signal.SIGKILL))

        def read_until_it_fails() -> None:
            killer.start()
            for number in range(1000):
                data = client.read_bytes(refs[number % 2], timeout=20, consume=False)
                assert memoryview(data) == expected[number % 2]

        with pytest.raises((ProducerLostError, TransportError)):
            read_until_it_fails()
        killer.join(10)


@pytest.mark.parametrize("lane", ["tcp", "ucx"])
@pytest.mark.parametrize("secret", [None, b"another job's secret"])
def test_c13_another_producer_on_the_address_is_recognised(lane: Any, secret: bytes | None) -> None:
    """The first server ends; a second one, of another job perhaps, gets its port."""
    with SharedRingBuffer(2, 1000) as ring, PayloadServer(ring, lane=lane, threads=1) as first:
        ref = first.put_bytes(b"mine")
        port = parse_endpoint(first.endpoints[0]).port
        first.close()
        with serving(lane, port=port, secret=secret) as second, PayloadClient(lane=lane) as client:
            if parse_endpoint(second.endpoints[0]).port != port:
                pytest.skip(f"port {port} was not free again")
            with pytest.raises(ProducerLostError):
                client.read_bytes(ref, timeout=5)
            assert second.statistics().counters.auth_failures == 0


def test_another_producer_on_one_address_is_passed_over_for_the_right_one() -> None:
    with serving("tcp") as other, serving("tcp") as right, PayloadClient() as client:
        for _ in range(4):
            ref = right.put_bytes(b"right")
            both = dataclasses.replace(ref, endpoints=(*other.endpoints, *right.endpoints))
            assert bytes(client.read_bytes(both, timeout=5)) == b"right"


def test_b12_a_forked_child_does_not_hide_its_parents_death(lane: Any) -> None:
    """A surviving child keeps neither connections nor listeners alive."""
    with server_on(lane) as server, PayloadClient(lane=lane) as client:
        server.receive()
        refs = [reference(server.ask([seed, 1000])) for seed in range(2)]
        assert memoryview(client.read_bytes(refs[0])) == pattern(0, 1000)
        child = server.ask("fork")
        try:
            assert memoryview(client.read_bytes(refs[1], consume=False, timeout=5)) == pattern(1, 1000)
            server.kill()
            if lane == "shm":
                wait_until_lost(client, refs[1])
            deadline = Deadline.after(5)
            with pytest.raises((ProducerLostError, TransportError)) as caught:
                client.read_bytes(refs[1], timeout=3)
            assert not deadline.expired
            if lane != "ucx":
                assert isinstance(caught.value, ProducerLostError)
        finally:
            os.kill(child, signal.SIGKILL)


READER_THAT_FORKS = """
ref = PayloadRef.from_json(json.dumps(arguments["ref"]))
client = PayloadClient(lane=arguments["lane"])
lease = client.lease(ref)
child = os.fork()
if not child:
    import signal
    signal.pause()
send(child)
receive()
"""


def test_b12_a_forked_child_of_a_dead_reader_pins_nothing() -> None:
    with serving("shm", slots=1) as server:
        ref = server.put({"a": [1, 2, 3]})
        text = json.loads(ref.to_json())
        with Child(READER_THAT_FORKS, ref=text, lane="shm") as reader:
            child = reader.receive()
            try:
                wait_until(lambda: ring_of(server).statistics().leases == 1, "the lease")
                reader.process.kill()
                wait_until(lambda: ring_of(server).get_ready_count() == 1, "the payload to be ready again")
            finally:
                os.kill(child, signal.SIGKILL)


def test_sockets_of_killed_servers_do_not_stop_the_next_one() -> None:
    with server_on("shm") as server:
        (endpoint,) = server.receive()
        path = endpoint.removeprefix("unix:")
        server.kill()
        assert os.path.exists(path)  # noqa: PTH110
        with serving("shm"), socket.socket(socket.AF_UNIX) as sock, pytest.raises(FileNotFoundError):
            sock.connect(path)
