"""Faults B12 to B14, C14 and W1 to W13 of docs/reference/failure-modes.md, as far as one process can show them."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import gc
import json
import os
import socket
import stat
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked_child import run_in_child
from transport_fixtures import (
    WatchedNetwork,
    counted,
    endpoint_of,
    has_ended,
    over_connections,
    pattern,
    ring_of,
    serving,
)
from waiting import wait_until

from dray import PayloadClient, PayloadRef, PayloadServer, SharedRingBuffer
from dray.clock import Deadline
from dray.errors import (
    AuthenticationError,
    BufferClosedError,
    BufferFullError,
    ConfigError,
    LeaseInUseError,
    MessageTruncated,
    ProducerLostError,
    TransportError,
    TransportTimeout,
)
from dray.protocol.frames import FRAME_BYTES, Flag, Frame, Kind, Status, parse
from dray.protocol.handshake import CHALLENGE, MAGIC, ClientHandshake
from dray.transport.lanes import SHM, parse_endpoint
from dray.transport.lanes.base import Endpoint, Stream
from dray.transport.lanes.ucx import UcxListener
from dray.transport.lanes.ucx_worker import UcxWorker

BAND = ("tcp", "ucx")
SECRET = b"the job's secret"


class ByHand:
    """A client of a Unix or TCP endpoint that sends what a test wants."""

    def __init__(self, endpoint: Endpoint) -> None:
        family = socket.AF_UNIX if endpoint.lane is SHM else socket.AF_INET
        self.sock = socket.socket(family, socket.SOCK_STREAM)
        self.sock.settimeout(10)
        self.sock.connect(endpoint.host if endpoint.lane is SHM else (endpoint.host, endpoint.port))
        self.lane = endpoint.lane

    def receive(self, size: int) -> bytes:
        got = b""
        while len(got) < size:
            part = self.sock.recv(size - len(got))
            if not part:
                return got
            got += part
        return got

    def shake(self, secret: bytes | None = None) -> None:
        handshake = ClientHandshake(self.lane, secret=secret)
        answer: bytes | None = handshake.hello()
        while answer is not None:
            self.sock.sendall(answer)
            answer = handshake.receive(self.receive(handshake.expects))

    def closed(self) -> bool:
        """The server ends the connection, after at most one more message."""
        with contextlib.suppress(ConnectionResetError):
            while self.sock.recv(65536):
                pass
        return True

    def __enter__(self) -> "ByHand":
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()


def has_read(client: PayloadClient, count: int) -> bool:
    return client.statistics().reads > count


# --- W11 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mine", "theirs"), [(None, SECRET), (b"another job's secret", SECRET), (SECRET, None)])
def test_w11_without_the_right_secret_no_payload_byte_is_sent(
    lane: Any, mine: bytes | None, theirs: bytes | None
) -> None:
    with serving(lane, secret=theirs) as server, PayloadClient(lane=lane, secret=mine) as client:
        ref = server.put_bytes(b"secret payload")
        with pytest.raises(AuthenticationError):
            client.read_bytes(ref, timeout=5)
        wait_until(lambda: counted(server, "auth_failures") == 1, "the failure to be counted")
        assert (counted(server, "bytes"), counted(server, "reads")) == (0, 0)
        assert client.statistics().quarantined == ()
        assert ring_of(server).get_ready_count() == 1
        with PayloadClient(lane=lane, secret=theirs) as right:
            assert bytes(right.read_bytes(ref, timeout=5)) == b"secret payload"


@pytest.mark.parametrize("name", ["shm", "tcp"])
@pytest.mark.parametrize("forged", ["reflected", "empty", "random"])
def test_w11_a_forged_proof_is_refused_before_anything_else(name: str, forged: str) -> None:
    with serving(name, secret=SECRET) as server:
        server.put_bytes(b"secret payload")
        with ByHand(endpoint_of(server, name)) as peer:
            peer.sock.sendall(ClientHandshake(peer.lane, secret=b"guess").hello())
            challenge = CHALLENGE.unpack(peer.receive(CHALLENGE.size))
            proof = {"reflected": challenge[6], "empty": bytes(32), "random": os.urandom(32)}[forged]
            peer.sock.sendall(proof + Frame(Kind.READ).pack())
            message, descriptors, _, _ = socket.recv_fds(peer.sock, 1000, 4)
            assert (message[:4], message[4], len(message), descriptors) == (MAGIC, 2, 8, [])
            assert peer.closed()
        assert counted(server, "auth_failures") == 1
        assert counted(server, "reads") == 0


# --- W3, W4 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shm", "tcp"])
@pytest.mark.parametrize(
    "junk",
    [
        b"GET / HTTP/1.1\r\n\r\n" + bytes(64),
        bytes(64),
        os.urandom(4096),
        struct.pack("<4sHBB", b"DRAY", 1, 99, 0) + bytes(56),
        struct.pack("<4sHBB", b"DRAY", 999, 2, 0) + bytes(56),
    ],
)
def test_w4_what_is_no_hello_closes_only_that_connection(name: str, junk: bytes) -> None:
    with serving(name) as server, PayloadClient(lane=name) as client:  # type: ignore[arg-type]
        ref = server.put_bytes(b"payload")
        client.read_bytes(ref, consume=False)
        with ByHand(endpoint_of(server, name)) as peer:
            peer.sock.sendall(junk)
            assert peer.closed()
        name_of_counter = "other_versions" if junk[4:6] == struct.pack("<H", 999) else "malformed"
        wait_until(lambda: counted(server, name_of_counter) == 1, "it to be counted")
        assert bytes(client.read_bytes(ref)) == b"payload"
        assert client.statistics().connects == 1


@pytest.mark.parametrize("name", ["shm", "tcp"])
@pytest.mark.parametrize(
    "frame",
    [
        Frame(9),
        Frame(Kind.STATUS),
        Frame(Kind.READ, status=77),
        Frame(Kind.READ, flags=255),
        Frame(Kind.ACK, flags=Flag.TEXT),
    ],
)
def test_w4_malformed_frames_close_only_that_connection_and_release_its_leases(name: str, frame: Frame) -> None:
    with serving(name) as server, PayloadClient(lane=name) as client:  # type: ignore[arg-type]
        ref = server.put_bytes(b"payload")
        client.read_bytes(ref, consume=False)
        with ByHand(endpoint_of(server, name)) as peer:
            peer.shake()
            peer.sock.sendall(Frame(Kind.READ, slot=ref.slot, sequence=ref.sequence, request=1).pack())
            assert parse(peer.receive(FRAME_BYTES)).status == Status.OK
            peer.sock.sendall(frame.pack())
            assert peer.closed()
        wait_until(lambda: counted(server, "malformed") == 1, "it to be counted")
        wait_until(lambda: ring_of(server).get_ready_count() == 1, "the lease to end")
        assert bytes(client.read_bytes(ref)) == b"payload"
        assert client.statistics().connects == 1


@pytest.mark.parametrize("name", ["shm", "tcp"])
def test_w4_random_bytes_after_the_handshake_harm_no_other_connection(name: str) -> None:
    with serving(name) as server, PayloadClient(lane=name) as client:  # type: ignore[arg-type]
        ref = server.put_bytes(b"payload")
        for seed in range(20):
            with ByHand(endpoint_of(server, name)) as peer:
                peer.shake()
                with contextlib.suppress(OSError):
                    peer.sock.sendall(pattern(seed, 1000))
        wait_until(lambda: server.statistics().open_connections == 0, "the connections to end")
        assert bytes(client.read_bytes(ref)) == b"payload"
        wait_until(lambda: ring_of(server).statistics().leases == 0, "the ACK to arrive")


def test_w4_a_client_that_never_reads_its_answers_delays_no_other_client() -> None:
    with serving("tcp") as server, PayloadClient(lane="tcp") as client:
        ref = server.put_bytes(b"payload")
        with ByHand(endpoint_of(server, "tcp")) as peer:
            peer.shake()
            peer.sock.settimeout(0.2)
            with contextlib.suppress(TimeoutError, ConnectionResetError):
                for request in range(100_000):
                    peer.sock.sendall(Frame(Kind.STAT, request=request).pack())
            assert bytes(client.read_bytes(ref, timeout=5)) == b"payload"


def test_w3_a_changed_payload_does_not_match_its_checksum(caplog: pytest.LogCaptureFixture) -> None:
    for name in BAND:
        with serving(name, checksum="commit") as server, PayloadClient(lane=name) as client:
            ref = server.put_bytes(pattern(1, 1000))
            ring = ring_of(server)
            offset = ring.segment.slot_offset(ref.slot)
            ring.segment.view[offset + 500] ^= 1
            with pytest.raises(MessageTruncated, match="checksum"):
                client.read_bytes(ref, timeout=5)
            with PayloadClient(lane=name, verify=False) as careless:
                assert bytes(careless.read_bytes(ref, consume=False)) != pattern(1, 1000)
            ring.segment.view[offset + 500] ^= 1
            assert bytes(client.read_bytes(ref, timeout=5)) == pattern(1, 1000)


# --- C14, W8 ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def wedged(name: str, directory: Path) -> Iterator[tuple[str, Callable[[], int]]]:
    """An endpoint that accepts and never answers, and how often it was tried."""
    if name == "ucx":
        with (
            contextlib.closing(UcxWorker(True)) as worker,
            contextlib.closing(UcxListener(worker, "127.0.0.1")) as ucx,
        ):

            def count() -> int:
                worker.progress()
                return ucx.waiting

            yield ucx.endpoint, count
        return
    family = socket.AF_UNIX if name == "shm" else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        path = str(Path(os.environ["DRAY_RUNTIME_DIR"]) / f"wedged-{directory.name[-20:]}")
        listener.bind(path if name == "shm" else ("127.0.0.1", 0))
        listener.listen(100)
        listener.setblocking(False)
        accepted: list[socket.socket] = []

        def count() -> int:
            with contextlib.suppress(BlockingIOError):
                while True:
                    accepted.append(listener.accept()[0])
            return len(accepted)

        yield (f"unix:{path}" if name == "shm" else f"tcp:127.0.0.1:{listener.getsockname()[1]}"), count
        for sock in accepted:
            sock.close()
        Path(path).unlink(missing_ok=True)


def test_c14_a_wedged_endpoint_costs_half_a_deadline_once_per_quarantine(lane: Any, tmp_path: Path) -> None:
    with serving(lane, slots=20) as server, wedged(lane, tmp_path) as (endpoint, tried):
        with PayloadClient(lane=lane) as client:
            for number in range(12):
                ref = server.put_bytes(bytes([number]))
                both = dataclasses.replace(ref, endpoints=(endpoint, *ref.endpoints))
                deadline = Deadline.after(1.0)
                assert bytes(client.read_bytes(both, timeout=1.0)) == bytes([number])
                assert not deadline.expired
            if lane != "ucx":
                assert tried() == 1
            assert client.statistics().quarantined == (endpoint,)
            assert client.statistics().retries == 1


def test_c14_a_wedged_lane_is_left_for_another(tmp_path: Path) -> None:
    with serving(["tcp"]) as server, wedged("shm", tmp_path) as (endpoint, _), PayloadClient() as client:
        ref = server.put_bytes(b"x")
        both = dataclasses.replace(ref, endpoints=(endpoint, *ref.endpoints))
        assert bytes(client.read_bytes(both, timeout=1.0)) == b"x"


def test_c14_a_wedged_endpoint_in_a_batch_costs_the_batch_nothing(lane: Any, tmp_path: Path) -> None:
    with serving(lane, slots=20) as server, wedged(lane, tmp_path) as (endpoint, _):
        with PayloadClient(lane=lane) as client:
            refs = [server.put({"n": np.int64(n)}) for n in range(20)]
            both = [dataclasses.replace(ref, endpoints=(endpoint, *ref.endpoints)) for ref in refs]
            found = [int(result.payload["n"]) for result in client.read_many(both, timeout=2.0)]
            assert found == list(range(20))


def test_c2_a_single_wedged_endpoint_is_a_timeout_within_the_deadline(lane: Any, tmp_path: Path) -> None:
    with wedged(lane, tmp_path) as (endpoint, _), PayloadClient(lane=lane) as client:
        ref = PayloadRef(b"p" * 16, 0, 0, 1, (endpoint,))
        deadline = Deadline.after(2.0)
        with pytest.raises(TransportTimeout):
            client.read_bytes(ref, timeout=0.4)
        assert not deadline.expired
        with pytest.raises(TransportTimeout):
            client.read_bytes(ref, timeout=0.2)


def test_w8_a_server_thread_that_dies_leaves_its_payloads_to_the_others() -> None:
    with serving("tcp", threads=2, slots=10) as server, PayloadClient() as client:
        dead = server.loops[0]
        dead.stop(Deadline.after(0))
        assert dead.join(Deadline.after(10))
        for number in range(10):
            assert bytes(client.read_bytes(server.put_bytes(bytes([number])), timeout=5)) == bytes([number])
        assert client.statistics().quarantined == tuple(dead.endpoints)


# --- W6 ---------------------------------------------------------------------------------------------------------


def test_w6_idle_connections_are_evicted_and_the_next_read_opens_another(lane: Any) -> None:
    network = WatchedNetwork()
    with over_connections(lane, idle_timeout=0.5) as server, PayloadClient(lane=lane, network=network) as client:
        ref = server.put_bytes(b"payload")
        for _ in range(2):
            client.read_bytes(ref, consume=False)
            wait_until(lambda: server.statistics().open_connections == 0, "the eviction")
            wait_until(lambda: has_ended(network.streams[-1]), "the client to notice it")
        assert counted(server, "evicted") == 2
        assert bytes(client.read_bytes(ref)) == b"payload"
        assert client.statistics().connects == 3
        assert (client.statistics().quarantined, client.statistics().retries) == ((), 0)


def test_w6_a_client_replaces_a_connection_before_it_is_evicted(lane: Any) -> None:
    with over_connections(lane) as server, PayloadClient(lane=lane, idle_seconds=0.0) as client:
        ref = server.put_bytes(b"payload")
        for _ in range(3):
            client.read_bytes(ref, consume=False)
        assert client.statistics().connects == 3
        wait_until(lambda: server.statistics().open_connections == 1, "the replaced ones to be closed")


def test_w6_a_connection_with_a_lease_is_not_idle() -> None:
    with over_connections("shm", idle_timeout=0.05) as server, PayloadClient() as client:
        ref = server.put({"a": np.arange(3)})
        other = server.put_bytes(b"x")
        with client.lease(ref) as arrays:
            with PayloadClient() as second:
                second.read_bytes(other)
                wait_until(lambda: counted(server, "evicted") == 1, "the eviction of the idle one")
                wait_until(lambda: server.statistics().open_connections == 1, "its end")
            assert arrays["a"].tolist() == [0, 1, 2]
        assert server.wait_consumed(ref, timeout=5)


def test_a_silent_reader_on_a_network_lane_loses_its_lease() -> None:
    with serving("tcp", lease_timeout=0.1) as server:
        ref = server.put_bytes(b"payload")
        with ByHand(endpoint_of(server, "tcp")) as peer:
            peer.shake()
            peer.sock.sendall(Frame(Kind.READ, slot=ref.slot, sequence=ref.sequence, request=1).pack())
            assert parse(peer.receive(FRAME_BYTES)).status == Status.OK
            assert peer.receive(7) == b"payload"
            assert peer.closed()
        wait_until(lambda: ring_of(server).get_ready_count() == 1, "the payload to be ready again")


def test_reader_that_stops_within_a_payload_loses_its_lease() -> None:
    nbytes = 32 << 20
    with serving("tcp", lease_timeout=0.2, slots=1, slot_bytes=nbytes) as server:
        ref = server.put_bytes(bytes(nbytes))
        with ByHand(endpoint_of(server, "tcp")) as peer:
            peer.shake()
            peer.sock.sendall(Frame(Kind.READ, slot=ref.slot, sequence=ref.sequence, request=1).pack())
            assert parse(peer.receive(FRAME_BYTES)).status == Status.OK
            assert len(peer.receive(1 << 20)) == 1 << 20
            wait_until(lambda: ring_of(server).get_ready_count() == 1, "the payload to be ready again")
        assert counted(server, "evicted") == 1


# --- X7 ---------------------------------------------------------------------------------------------------------


def test_read_is_answered_between_the_requests_that_another_client_has_pipelined() -> None:
    most = 1000
    requests = b"".join(Frame(Kind.STAT, request=number).pack() for number in range(most))
    with (
        serving("tcp") as server,
        concurrent.futures.ThreadPoolExecutor(1) as thread,
        contextlib.ExitStack() as opened,
    ):
        endpoint = endpoint_of(server, "tcp")
        greedy, modest = (opened.enter_context(ByHand(endpoint)) for _ in range(2))
        ref = server.put_bytes(b"payload")
        for peer in (greedy, modest):
            peer.shake()

        def statistics() -> list[dict[str, Any]]:
            return [json.loads(greedy.receive(parse(greedy.receive(FRAME_BYTES)).nbytes)) for _ in range(most)]

        def answered_before_the_read() -> int:
            """How many of the pipelined requests are answered before a read that is sent right behind them."""
            before = counted(server, "reads")
            answers = thread.submit(statistics)
            greedy.sock.sendall(requests)
            modest.sock.sendall(
                Frame(Kind.READ, flags=Flag.INLINE, slot=ref.slot, sequence=ref.sequence, request=before).pack()
            )
            assert parse(modest.receive(FRAME_BYTES)).status == Status.OK
            assert modest.receive(ref.nbytes) == b"payload"
            return sum(found["server"]["reads"] == before for found in answers.result(20))

        # On a busy machine the second client may itself come late, but not always.
        counts = sorted(answered_before_the_read() for _ in range(5))
        assert counts[2] < most / 2


# --- W13 --------------------------------------------------------------------------------------------------------


class Losing(WatchedNetwork):
    """Connections that break with the next ACK once `losing` is set; the client does not notice it."""

    def __init__(self) -> None:
        super().__init__(self._lose)
        self.losing = False

    def _lose(self, stream: Stream, items: Sequence[Any]) -> bool:
        if not self.losing or items[0][0] != Kind.ACK:
            return False
        self.losing = False
        with socket.socket(fileno=os.dup(stream.fileno())) as sock:
            sock.shutdown(socket.SHUT_RDWR)
        return True


@pytest.mark.parametrize("name", ["shm", "tcp"])
def test_w13_an_ack_lost_with_its_connection_is_repeated(name: Any) -> None:
    network = Losing()
    with over_connections(name, slots=2) as server, PayloadClient(lane=name, network=network) as client:
        first, second = server.put_bytes(b"first"), server.put_bytes(b"second")
        client.read_bytes(second, consume=False)
        network.losing = True
        assert bytes(client.read_bytes(first)) == b"first"
        wait_until(lambda: ring_of(server).statistics().leases == 0, "the lease to end")
        assert ring_of(server).get_ready_count() == 2
        client.read_bytes(second, consume=False, timeout=5)
        wait_until(lambda: ring_of(server).statistics().free == 1, "the ACK to be repeated")
        assert client.statistics().acks_replayed == 1
        assert ring_of(server).inspect()[first.slot].retired


@pytest.mark.parametrize("name", ["shm", "tcp"])
def test_w13_a_lost_ack_is_repeated_when_the_client_closes(name: Any) -> None:
    network = Losing()
    with serving(name) as server:
        with PayloadClient(lane=name, network=network) as client:
            ref = server.put_bytes(b"payload")
            client.read_bytes(ref, consume=False)
            network.losing = True
            client.read_bytes(ref)
        # Closing has opened another connection for the one ACK that no answer had confirmed.
        assert server.wait_consumed(ref, timeout=5)


# --- B13, B14 ---------------------------------------------------------------------------------------------------


def test_b13_a_slot_is_not_reused_while_a_view_of_it_exists() -> None:
    with serving("shm", slots=1) as server, PayloadClient() as client:
        ref = server.put({"a": np.arange(100)})
        with pytest.raises(LeaseInUseError) as caught, client.lease(ref) as arrays:
            view = arrays["a"].reshape(10, 10)[3:, 2]
        assert (caught.value.slot, caught.value.sequence) == (ref.slot, ref.sequence)
        assert arrays == {}
        gc.collect()
        expected = view.tolist()
        with pytest.raises(BufferFullError):
            server.put_bytes(b"other", timeout=0.05)
        assert view.tolist() == expected
        del view
        assert server.wait_consumed(ref, timeout=5)
        server.put_bytes(b"other", timeout=5)


def test_b13_a_view_outlives_its_client_and_its_producer() -> None:
    with serving("shm") as server:
        ref = server.put({"a": np.arange(100)})
        with PayloadClient() as client:
            with pytest.raises(LeaseInUseError), client.lease(ref) as arrays:
                view = arrays["a"][1:]
    assert view.tolist() == list(range(1, 100))
    del view


def test_b14_leases_of_one_connection_end_with_it_and_those_of_others_stay() -> None:
    with serving("shm", slots=2) as server:
        one, two = PayloadClient(), PayloadClient()
        refs = [server.put({"a": np.arange(3)}) for _ in range(2)]
        leases = [client.lease(ref) for client, ref in zip((one, two), refs, strict=True)]
        (first, second) = (dict(leases[0].__enter__()), dict(leases[1].__enter__()))
        assert sorted(lease.slot for lease in server.statistics().leases) == [ref.slot for ref in refs]
        assert {lease.pid for lease in server.statistics().leases} == {os.getpid()}
        del first
        leases[0].__exit__(None, None, None)
        assert server.wait_consumed(refs[0], timeout=5)
        assert not server.wait_consumed(refs[1], timeout=0)
        assert second["a"].tolist() == [0, 1, 2]
        del second
        leases[1].__exit__(None, None, None)
        assert server.wait_consumed(refs[1], timeout=5)
        one.close()
        two.close()


def test_b14_leases_of_a_connection_are_bounded_and_then_busy() -> None:
    with serving("shm", slots=4, max_leases=2) as server:
        refs = [server.put_bytes(b"x") for _ in range(3)]
        with ByHand(endpoint_of(server, "shm")) as peer:
            handshake = ClientHandshake(SHM)
            peer.sock.sendall(handshake.hello())
            peer.sock.sendall(handshake.receive(peer.receive(handshake.expects)) or b"")
            message, descriptors, _, _ = socket.recv_fds(peer.sock, 8, 1)
            os.close(descriptors[0])
            handshake.receive(message)
            for request, ref in enumerate(refs):
                frame = Frame(Kind.READ, slot=ref.slot, sequence=ref.sequence, request=request)
                peer.sock.sendall(frame.pack())
            found = [parse(peer.receive(FRAME_BYTES)).status for _ in refs]
        assert found == [Status.OK, Status.OK, Status.BUSY]
        wait_until(lambda: ring_of(server).get_ready_count() == 3, "the leases to end")


# --- B12 --------------------------------------------------------------------------------------------------------


def test_b12_inherited_objects_raise_in_a_child_and_the_parent_continues(lane: Any) -> None:
    with serving(lane) as server, PayloadClient(lane=lane) as client:
        ref = server.put_bytes(b"payload")
        client.read_bytes(ref, consume=False)

        def check() -> None:
            calls: list[Callable[[], object]] = [
                lambda: server.put_bytes(b"x"),
                lambda: server.put({"a": [1]}),
                lambda: server.wait_consumed(ref, 0),
                lambda: client.read_bytes(ref, timeout=1),
                lambda: client.lease(ref, timeout=1),
                lambda: list(client.read_many([ref], timeout=1)),
                lambda: client.consume([ref], timeout=1),
                lambda: client.stat(ref, timeout=1),
            ]
            for number, call in enumerate(calls):
                try:
                    call()
                except BufferClosedError:
                    continue
                raise AssertionError(f"call {number} did not raise")
            client.close()
            server.close()
            with PayloadClient(lane="shm" if lane == "ucx" else lane) as own, serving("shm"):
                assert own.statistics().reads == 0

        assert run_in_child(check) == ""
        assert bytes(client.read_bytes(ref, timeout=5)) == b"payload"
        assert server.wait_consumed(ref, timeout=5)


# --- W7 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BAND)
def test_w7_a_busy_port_moves_on_and_what_is_advertised_is_bound(name: Any) -> None:
    with serving(name) as first:
        port = parse_endpoint(first.endpoints[0]).port
        if port > 65000:
            pytest.skip("no room above the port")
        with serving(name, port=port, threads=3) as second:
            ports = [parse_endpoint(endpoint).port for endpoint in second.endpoints]
            assert len({port, *ports}) == 4
            assert all(port < other < port + 64 for other in ports)
            for endpoint in second.endpoints:
                ref = dataclasses.replace(second.put_bytes(b"x"), endpoints=(endpoint,))
                with PayloadClient(lane=name) as client:
                    assert bytes(client.read_bytes(ref, timeout=5)) == b"x"


def test_w7_a_partial_start_is_undone_and_raises() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 65535))
        taken.listen()
        with SharedRingBuffer(1, 64) as ring, pytest.raises(ConfigError) as caught:
            PayloadServer(ring, lane="tcp", port=65534, threads=3)
        assert caught.value.key == "port"
        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            free.bind(("127.0.0.1", 65534))


def listener_device(port: int) -> str:
    """The interface to which this process's listening socket on `port` is bound; empty without one."""
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        try:
            duplicate = os.dup(int(name))
        except OSError:
            continue
        if not stat.S_ISSOCK(os.fstat(duplicate).st_mode):
            os.close(duplicate)
            continue
        with socket.socket(fileno=duplicate) as sock:
            if (
                sock.family == socket.AF_INET
                and sock.getsockname()[1] == port
                and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            ):
                return sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\0").decode()
    raise AssertionError(f"nothing listens on port {port}")


@pytest.mark.parametrize("name", BAND)
def test_loopback_servers_cannot_be_reached_over_another_address(name: Any) -> None:
    with serving(name) as server:
        port = endpoint_of(server, name).port
        bound = [line.split()[1:4:2] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        (address,) = [where[:8] for where, state in bound if where.endswith(f":{port:04X}") and state == "0A"]
        if name == "tcp":
            assert address == "0100007F"
        else:
            assert listener_device(port) == "lo"


# --- W9 ---------------------------------------------------------------------------------------------------------


def test_w9_servers_stopped_with_reads_in_flight_leave_nothing(lane: Any) -> None:
    """The leak check of every test looks for descriptors, threads and memory; here, cycle by cycle as well.

    On UCX a client that connects while its server stops notices it when the kernel tries again, after a second.
    """
    cycles = 8 if lane == "ucx" else 30

    def held() -> tuple[int, int]:
        gc.collect()
        return len(os.listdir("/proc/self/fd")), threading.active_count()  # noqa: PTH208

    nbytes = 1 << 20
    before = held()
    outcomes: dict[str, int] = {}
    for cycle in range(cycles):
        with SharedRingBuffer(4, nbytes) as ring, PayloadClient(lane=lane) as client:
            server = PayloadServer(ring, lane=lane, threads=1, drain_timeout=0.05)
            refs = [server.put_bytes(pattern(seed, nbytes)) for seed in range(2)]
            started = threading.Barrier(3)

            def read(
                ref: PayloadRef, client: PayloadClient = client, started: threading.Barrier = started
            ) -> None:
                started.wait(10)
                try:
                    while True:
                        data = client.read_bytes(ref, timeout=2, consume=False)
                        assert data.nbytes == nbytes
                except (ProducerLostError, TransportError, BufferClosedError) as error:
                    outcomes[type(error).__name__] = outcomes.get(type(error).__name__, 0) + 1

            threads = [threading.Thread(target=read, args=(ref,)) for ref in refs]
            for thread in threads:
                thread.start()
            started.wait(10)
            wait_until(functools.partial(has_read, client, cycle % 7), "reads")
            closing = Deadline.after(5)
            server.close()
            assert not closing.expired
            for thread in threads:
                thread.join(20)
                assert not thread.is_alive()
            assert ring.statistics().leases == 0
        if cycle == 2:
            before = held()
    descriptors, threads_now = held()
    assert descriptors <= before[0]
    assert threads_now <= before[1]
    assert sum(outcomes.values()) == 2 * cycles


def test_a_client_closed_with_reads_in_flight_ends_them_in_order(lane: Any) -> None:
    nbytes = 4 << 20
    with serving(lane, slot_bytes=nbytes) as server:
        for _ in range(10):
            client = PayloadClient(lane=lane)
            ref = server.put_bytes(pattern(1, nbytes), timeout=5)
            found: list[str] = []

            def read(client: PayloadClient = client, ref: PayloadRef = ref, found: list[str] = found) -> None:
                try:
                    while True:
                        assert client.read_bytes(ref, timeout=5, consume=False).nbytes == nbytes
                except (BufferClosedError, TransportError) as error:
                    found.append(type(error).__name__)

            thread = threading.Thread(target=read)
            thread.start()
            wait_until(functools.partial(has_read, client, 0), "a read")
            client.close()
            thread.join(20)
            assert found == ["BufferClosedError"]
            ring_of(server).consume(ref.slot, ref.sequence)
        wait_until(lambda: server.statistics().open_connections == 0, "the connections to end")
        wait_until(lambda: ring_of(server).statistics().leases == 0, "their leases to end")
