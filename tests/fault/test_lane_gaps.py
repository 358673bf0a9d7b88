"""Faults B1, B14, C4, C14 and W4 to W13 of docs/reference/failure-modes.md.

They are shown on lanes that a plain socket cannot use.

The peer is a client's end that the test drives over dray's own streams, so that one test covers every lane.
"""

import contextlib
import dataclasses
import itertools
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transport_fixtures import Child, counted, endpoint_of, pattern, ring_of, serving
from waiting import wait_until

from dray import PayloadClient, PayloadRef, PayloadServer, SharedRingBuffer
from dray.clock import Deadline
from dray.errors import ConfigError, StaleSlotError, TransportError, TransportTimeout
from dray.protocol.frames import FRAME_BYTES, Flag, Frame, Kind, Outgoing, Payload, Status, parse
from dray.protocol.handshake import CHALLENGE, MAGIC, WELCOME, ClientHandshake, ServerHandshake, ServerIdentity
from dray.transport.lanes.base import Endpoint, Network, Stream, Worker
from dray.transport.lanes.socket import UnixListener
from dray.transport.lanes.ucx import UcxListener, UcxStream
from dray.transport.lanes.ucx_worker import UcxWorker
from dray.transport.polling import CloseEvent

BAND = ("tcp", "ucx")


class Peer:
    """A client's end of one connection, which sends any messages."""

    def __init__(self, server: PayloadServer, lane: str) -> None:
        endpoint = endpoint_of(server, lane)
        self.deadline = Deadline.after(20)
        self.worker = endpoint.lane.make_worker(endpoint)
        self.stream: Stream = endpoint.lane.connect(endpoint, self.deadline, self.worker)

    def send(self, message: bytes) -> None:
        self.stream.send([message])
        while not self.stream.flush():
            self.wait()

    def receive(self, size: int) -> bytes:
        while (message := self.stream.receive(size)) is None:
            self.wait()
        return bytes(message)

    def shake(self, secret: bytes | None = None) -> None:
        handshake = ClientHandshake(self.stream.lane, secret=secret)
        answer: bytes | None = handshake.hello()
        while answer is not None:
            self.send(answer)
            answer = handshake.receive(self.receive(handshake.expects))

    def status(self) -> Frame:
        return parse(self.receive(FRAME_BYTES))

    def read(self, ref: PayloadRef, request: int) -> tuple[Status, bytes]:
        """Request a payload; returns the status, and on a network lane the bytes."""
        target = bytearray(ref.nbytes if self.stream.lane.in_band else 0)
        tag = self.stream.expect(memoryview(target))
        self.send(Frame(Kind.READ, slot=ref.slot, sequence=ref.sequence, request=request, tag=tag).pack())
        status = Status(self.status().status)
        while not self.stream.payload_arrived(len(target) if status is Status.OK else 0):
            self.wait()
        return status, bytes(target)

    def acknowledge(self, ref: PayloadRef, request: int) -> None:
        flags = Flag.CONSUMED
        self.send(Frame(Kind.ACK, flags=flags, slot=ref.slot, request=request, sequence=ref.sequence).pack())

    def closed(self) -> bool:
        """The server ends the connection, after any messages."""
        with contextlib.suppress(TransportError):
            while True:
                self.receive(1)
        return True

    def wait(self) -> None:
        assert not self.deadline.expired
        if self.stream.idle():
            poll = select.poll()
            poll.register(self.stream.fileno(), select.POLLIN | (select.POLLOUT if self.stream.wants_write else 0))
            assert poll.poll(self.deadline.remaining * 1000), "no answer from the server"

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()
        if self.worker is not None:
            self.worker.close()


class HandClock:
    """A clock that a test advances."""

    def __init__(self) -> None:
        self._now = 1000.0

    def now(self) -> float:
        return self._now

    def advance(self, server: PayloadServer, seconds: float) -> None:
        """Let time pass, and let the server's threads check their time limits."""
        self._now += seconds
        for loop in server.loops:
            loop.wake()


# --- W4 ---------------------------------------------------------------------------------------------------------

JUNK = [
    b"GET / HTTP/1.1\r\n\r\n" + bytes(64),
    bytes(64),
    os.urandom(4096),
    struct.pack("<4sHBB", b"DRAY", 1, 99, 0) + bytes(56),
    struct.pack("<4sHBB", b"DRAY", 999, 3, 0) + bytes(56),
]


def test_w4_what_is_no_hello_closes_only_that_connection_on_ucx() -> None:
    with serving("ucx") as server, PayloadClient(lane="ucx") as client:
        ref = server.put_bytes(b"payload")
        client.read_bytes(ref, consume=False)
        with contextlib.ExitStack() as stack:
            peers = [stack.enter_context(Peer(server, "ucx")) for _ in JUNK]
            for peer, junk in zip(peers, JUNK, strict=True):
                peer.send(junk)
            assert bytes(client.read_bytes(ref, timeout=5, consume=False)) == b"payload"
            assert all(peer.closed() for peer in peers)
        wait_until(lambda: counted(server, "malformed") == len(JUNK) - 1, "each to be counted")
        assert counted(server, "other_versions") == 1
        assert bytes(client.read_bytes(ref, timeout=5)) == b"payload"
        assert client.statistics().connects == 1
        assert counted(server, "auth_failures") == 0


def test_w4_a_message_longer_than_any_closes_only_that_connection_on_ucx() -> None:
    """The server refuses it by its size, before it allocates memory."""
    with serving("ucx") as server, PayloadClient(lane="ucx") as client, Peer(server, "ucx") as peer:
        ref = server.put_bytes(b"payload")
        peer.shake()
        assert isinstance(peer.stream, UcxStream)
        assert peer.stream.peer_tag is not None
        for nbytes in (FRAME_BYTES, 1 << 20):
            peer.stream.send([Payload(memoryview(bytearray(nbytes)), peer.stream.peer_tag)])
        assert peer.closed()
        wait_until(lambda: counted(server, "malformed") == 1, "it to be counted")
        assert bytes(client.read_bytes(ref, timeout=5)) == b"payload"


def test_w4_peers_that_do_not_speak_ucx_leave_other_connections_alone_on_ucx() -> None:
    """A plain TCP connection at UCX's port, which UCX itself must end."""
    with serving("ucx") as server, PayloadClient(lane="ucx") as client:
        ref = server.put_bytes(b"payload")
        port = endpoint_of(server, "ucx").port
        for junk in (b"", b"GET / HTTP/1.1\r\n\r\n", bytes(4096), pattern(1, 4096)):
            with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
                sock.sendall(junk)
                assert bytes(client.read_bytes(ref, timeout=5, consume=False)) == b"payload"
        with PayloadClient(lane="ucx") as other:
            assert bytes(other.read_bytes(ref, timeout=5)) == b"payload"


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
def test_w4_malformed_frames_close_only_that_connection_and_release_its_leases_on_ucx(frame: Frame) -> None:
    with serving("ucx") as server, PayloadClient(lane="ucx") as client:
        ref = server.put_bytes(b"payload")
        client.read_bytes(ref, consume=False)
        with Peer(server, "ucx") as peer:
            peer.shake()
            assert peer.read(ref, 1) == (Status.OK, b"payload")
            peer.send(frame.pack())
            assert peer.closed()
        wait_until(lambda: counted(server, "malformed") == 1, "it to be counted")
        wait_until(lambda: ring_of(server).get_ready_count() == 1, "the lease to end")
        assert bytes(client.read_bytes(ref, timeout=5)) == b"payload"
        assert client.statistics().connects == 1


def test_w4_random_bytes_after_the_handshake_harm_no_other_connection_on_ucx() -> None:
    with serving("ucx") as server, PayloadClient(lane="ucx") as client:
        ref = server.put_bytes(b"payload")
        for seed in range(8):
            with Peer(server, "ucx") as peer:
                peer.shake()
                with contextlib.suppress(TransportError):
                    peer.send(pattern(seed, 1000))
                    peer.closed()
        wait_until(lambda: server.statistics().open_connections == 0, "the connections to end")
        assert bytes(client.read_bytes(ref, timeout=5)) == b"payload"
        wait_until(lambda: ring_of(server).statistics().leases == 0, "the ACK to arrive")


@pytest.mark.parametrize("name", ["shm", "ucx"])
def test_w4_a_client_that_never_reads_its_answers_delays_no_other_client_on_its_lane(
    name: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server stops reading its requests, and evicts it like a silent client."""
    clock = HandClock()
    listener = UcxListener if name == "ucx" else UnixListener
    accept, accepted = listener.accept, []

    def recorded(self: Any) -> Any:
        stream = accept(self)
        accepted.extend([] if stream is None else [stream])
        return stream

    monkeypatch.setattr(listener, "accept", recorded)
    with serving(name, clock=clock) as server, PayloadClient(lane=name) as client:
        ref = server.put_bytes(b"payload")
        with Peer(server, name) as peer:
            peer.shake()
            (stuck,) = server.loops[0].connections.all()
            # The peer makes no progress, which would take answers in. So it sends no more than there is room for:
            # the server counts the last request of each batch.
            stale, numbers = Frame(Kind.READ, slot=ref.slot, sequence=ref.sequence + 1, tag=7), itertools.count()
            for sent in itertools.count():
                wait_until(lambda n=sent: stuck.unsent or n - counted(server, "stale") < 64, "requests to be read")
                if stuck.unsent:
                    break
                frames = [Frame(Kind.STAT)] * 16 + [stale]
                message = b"".join(frame._replace(request=next(numbers)).pack() for frame in frames)
                peer.stream.send([message])
            assert bytes(client.read_bytes(ref, timeout=5, consume=False)) == b"payload"
            with PayloadClient(lane=name) as other:
                assert bytes(other.read_bytes(ref, timeout=5)) == b"payload"
            server.put_bytes(b"another", timeout=5)
            client.close()
            wait_until(lambda: server.statistics().open_connections == 1, "the readers to leave")

            def evicted() -> bool:
                clock.advance(server, 121)  # repeated, because the server may have read a request since
                return counted(server, "evicted") == 1

            wait_until(evicted, "its end")
            wait_until(lambda: server.statistics().open_connections == 0, "its connection to be closed")


# --- W5, W6 -----------------------------------------------------------------------------------------------------


def test_w5_a_silent_reader_loses_its_lease_on_ucx() -> None:
    with serving("ucx", lease_timeout=0.1) as server, PayloadClient(lane="ucx") as client:
        ref = server.put_bytes(b"payload")
        with Peer(server, "ucx") as peer:
            peer.shake()
            assert peer.read(ref, 1) == (Status.OK, b"payload")
            assert peer.closed()
        wait_until(lambda: ring_of(server).get_ready_count() == 1, "the payload to be ready again")
        assert counted(server, "evicted") == 1
        assert bytes(client.read_bytes(ref, timeout=5)) == b"payload"


def test_w5_a_reader_that_stops_within_a_payload_loses_its_lease_on_ucx() -> None:
    nbytes = 16 << 20
    with serving("ucx", lease_timeout=0.2, slots=1, slot_bytes=nbytes) as server, Peer(server, "ucx") as peer:
        ref = server.put_bytes(pattern(1, nbytes))
        peer.shake()
        # From here on the peer's worker makes no progress, so the payload cannot leave the server.
        peer.stream.send([Frame(Kind.READ, slot=ref.slot, sequence=ref.sequence, tag=7).pack()])
        wait_until(lambda: counted(server, "reads") == 1, "the lease to begin")
        wait_until(lambda: counted(server, "evicted") == 1, "the eviction")
        wait_until(lambda: ring_of(server).get_ready_count() == 1, "the payload to be ready again")
        with PayloadClient(lane="ucx") as client:
            assert memoryview(client.read_bytes(ref, timeout=10)) == pattern(1, nbytes)
        server.put_bytes(b"another", timeout=5)


def test_w6_a_connection_with_a_lease_is_not_idle_on_any_lane(lane: Any) -> None:
    """On shm without a limit, on the other lanes until the limit of the lease."""
    clock = HandClock()
    with serving(lane, idle_timeout=10, lease_timeout=1000, clock=clock) as server:
        ref = server.put_bytes(b"payload")
        with Peer(server, lane) as holder, Peer(server, lane) as idle:
            holder.shake()
            idle.shake()
            assert holder.read(ref, 5)[0] is Status.OK
            clock.advance(server, 1e9 if lane == "shm" else 990)
            assert idle.closed()
            holder.acknowledge(ref, 5)
            assert server.wait_consumed(ref, timeout=5)
        # Through its lease, not through a repeated ACK.
        assert (counted(server, "acks_consumed"), counted(server, "late_acks")) == (1, 0)
        assert counted(server, "evicted") == 1


@pytest.mark.parametrize("name", BAND)
def test_w6_a_lease_keeps_a_connection_no_longer_than_its_limit(name: Any) -> None:
    clock = HandClock()
    with serving(name, idle_timeout=10, lease_timeout=1000, clock=clock) as server:
        ref = server.put_bytes(b"payload")
        with Peer(server, name) as holder:
            holder.shake()
            assert holder.read(ref, 5) == (Status.OK, b"payload")
            clock.advance(server, 1001)
            if name == "tcp":  # bytes have travelled since the last check: the limit begins with this one
                wait_until(lambda: server.statistics().leases[0].age == 0, "their progress to be noted")
                clock.advance(server, 1001)
            assert holder.closed()
            wait_until(lambda: ring_of(server).get_ready_count() == 1, "the lease to end")
        assert counted(server, "evicted") == 1


# --- W11 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forged", ["reflected", "empty", "random"])
def test_w11_a_forged_proof_is_refused_before_anything_else_on_ucx(forged: str) -> None:
    with serving("ucx", secret=b"the job's secret") as server, Peer(server, "ucx") as peer:
        ref = server.put_bytes(b"secret payload")
        assert peer.worker is not None
        target = bytearray(ref.nbytes)
        tag = peer.stream.expect(memoryview(target))
        peer.send(ClientHandshake(peer.stream.lane, secret=b"guess").hello())
        challenge = CHALLENGE.unpack(peer.receive(CHALLENGE.size))
        proof = {"reflected": challenge[6], "empty": bytes(32), "random": os.urandom(32)}[forged]
        peer.send(proof + Frame(Kind.READ, slot=ref.slot, sequence=ref.sequence, tag=tag).pack())
        assert WELCOME.unpack(peer.receive(WELCOME.size)) == (MAGIC, 2, 0)
        with pytest.raises(TransportError):
            peer.receive(1)
        assert target == bytearray(ref.nbytes)
        assert (counted(server, "auth_failures"), counted(server, "reads"), counted(server, "bytes")) == (1, 0, 0)
        assert ring_of(server).get_ready_count() == 1


# --- W13 --------------------------------------------------------------------------------------------------------


class LosesAcks(Network):
    """The machine's network, whose connections close instead of sending an ACK while `active`."""

    active = False

    def connect(self, address: Endpoint, deadline: Deadline, worker: Worker | None) -> Stream:
        stream = super().connect(address, deadline, worker)
        send = stream.send

        def send_but_acks(items: Sequence[Outgoing], descriptor: int | None = None) -> bool:
            if self.active and isinstance(items[0], bytes) and items[0][0] == Kind.ACK:
                self.active = False
                stream.close()
                return True
            return send(items, descriptor)

        stream.send = send_but_acks  # type: ignore[method-assign]
        return stream


def test_w13_an_ack_lost_with_its_connection_is_repeated_on_ucx() -> None:
    network = LosesAcks(CloseEvent())
    with serving("ucx", slots=2) as server, PayloadClient(lane="ucx", network=network) as client:
        first, second = server.put_bytes(b"first"), server.put_bytes(b"second")
        client.read_bytes(second, consume=False, timeout=5)
        network.active = True
        assert bytes(client.read_bytes(first, timeout=5)) == b"first"
        assert not network.active
        wait_until(lambda: ring_of(server).statistics().leases == 0, "the lease to end")
        assert ring_of(server).get_ready_count() == 2
        client.read_bytes(second, consume=False, timeout=5)
        wait_until(lambda: ring_of(server).statistics().free == 1, "the ACK to be repeated")
        assert client.statistics().acks_replayed == 1
        assert ring_of(server).inspect()[first.slot].retired
        assert ring_of(server).statistics().consumed == 1


def test_w13_a_lost_ack_is_repeated_when_the_client_closes_on_ucx() -> None:
    network = LosesAcks(CloseEvent())
    with serving("ucx") as server:
        with PayloadClient(lane="ucx", network=network) as client:
            ref = server.put_bytes(b"payload")
            client.read_bytes(ref, consume=False, timeout=5)
            network.active = True
            client.read_bytes(ref, timeout=5)
            assert not network.active
        assert server.wait_consumed(ref, timeout=5)
        assert ring_of(server).statistics().consumed == 1


# --- B14 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BAND)
def test_b14_leases_of_a_connection_are_bounded_and_then_busy_on_network_lanes(name: Any) -> None:
    with serving(name, slots=4, max_leases=2) as server:
        refs = [server.put_bytes(bytes([number])) for number in range(3)]
        with Peer(server, name) as peer:
            peer.shake()
            found = [peer.read(ref, request) for request, ref in enumerate(refs)]
            assert found == [(Status.OK, b"\0"), (Status.OK, b"\1"), (Status.BUSY, b"\0")]
            assert counted(server, "busy") == 1
            peer.acknowledge(refs[0], 0)
            assert peer.read(refs[2], 3) == (Status.OK, b"\2")
            with PayloadClient(lane=name) as client:  # the bound is each connection's own
                assert bytes(client.read_bytes(refs[2], timeout=5, consume=False)) == b"\2"
        wait_until(lambda: ring_of(server).get_ready_count() == 2, "the leases to end")
        assert ring_of(server).inspect()[refs[0].slot].retired


# --- W7 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unusable", ["a file", "below a file", "open to others", "too long"])
def test_w7_a_folder_that_cannot_be_used_starts_nothing_on_shm(tmp_path: Path, unusable: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "open").mkdir(mode=0o755)
    where = {"a file": "file", "below a file": "file/x", "open to others": "open", "too long": "x" * 100}
    threads = threading.active_count()
    with SharedRingBuffer(1, 64) as ring:
        with pytest.raises(ConfigError) as caught:
            PayloadServer(ring, lane=["shm", "tcp"], threads=2, directory=tmp_path / where[unusable])
        assert caught.value.key == "runtime directory"
        assert threading.active_count() == threads
        with PayloadServer(ring, lane="shm") as server, PayloadClient() as client:
            assert bytes(client.read_bytes(server.put_bytes(b"payload"), timeout=5)) == b"payload"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "open"]


OUT_OF_DESCRIPTORS = """
import gc, pathlib, resource, threading
folder = pathlib.Path(os.environ["DRAY_RUNTIME_DIR"])
folder.mkdir(mode=0o700)
def held():
    gc.collect()
    return len(os.listdir("/proc/self/fd"))
with SharedRingBuffer(1, 64) as ring:
    PayloadServer(ring, lane=arguments["lanes"], threads=2).close()
    before, (soft, hard) = held(), resource.getrlimit(resource.RLIMIT_NOFILE)
    for spare in range(40):
        resource.setrlimit(resource.RLIMIT_NOFILE, (before + spare, hard))
        raised = None
        try:
            PayloadServer(ring, lane=arguments["lanes"], threads=2).close()
        except Exception as error:
            raised = type(error).__name__
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        send([raised, held() - before, threading.active_count() - 1])
        if raised is None:
            break
send(os.listdir(folder))
"""


@pytest.mark.parametrize("lanes", [["shm"], ["tcp"], ["shm", "tcp"]])
def test_w7_a_start_that_runs_out_of_descriptors_is_undone_wherever_it_stops(
    lanes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each start has one descriptor more, until there are enough; later starts remove what earlier ones left.

    Not on ucx: UCX may end the process if it cannot open a descriptor.
    """
    folder = Path(os.environ["DRAY_RUNTIME_DIR"]) / f"out-{os.getpid()}-{'-'.join(lanes)}"
    monkeypatch.setenv("DRAY_RUNTIME_DIR", str(folder))
    with Child(OUT_OF_DESCRIPTORS, lanes=lanes) as child:
        outcomes = [child.receive()]
        while outcomes[-1][0] is not None:
            outcomes.append(child.receive())
        assert len(outcomes) > 3
        assert [outcome[1:] for outcome in outcomes] == [[0, 0]] * len(outcomes)
        assert child.receive() == []


NO_LISTENER = """
import pathlib, threading
with SharedRingBuffer(1, 64) as ring:
    try:
        PayloadServer(ring, threads=2, secret=make_secret())
    except DrayError as error:
        send(type(error).__name__)
    inodes = {os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.islink(entry.path)}
    found = [line.split() for line in pathlib.Path("/proc/net/tcp").read_text().splitlines()[1:]]
    send([line[1] for line in found if line[3] == "0A" and f"socket:[{line[9]}]" in inodes])
    send(threading.active_count())
    folder = pathlib.Path(os.environ["DRAY_RUNTIME_DIR"])
    send([path.name for path in folder.iterdir()])
    with PayloadServer(ring, lane=["shm", "tcp"]) as server, PayloadClient() as client:
        send(bytes(client.read_bytes(server.put_bytes(b"payload"), timeout=5)).decode())
"""


def test_w7_a_listener_that_ucx_cannot_have_undoes_the_other_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """UCX has no transport to listen with; it fails after the other lanes' sockets are bound."""
    folder = Path(os.environ["DRAY_RUNTIME_DIR"]) / f"none-{os.getpid()}"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("DRAY_RUNTIME_DIR", str(folder))
    monkeypatch.setenv("UCX_SOCKADDR_TLS_PRIORITY", "none")
    with Child(NO_LISTENER) as child:
        assert [child.receive() for _ in range(5)] == ["Unreachable", [], 1, [], "payload"]


def test_w7_a_partial_start_is_undone_and_raises_on_ucx() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 65535))
        taken.listen()
        with SharedRingBuffer(1, 64) as ring, pytest.raises(ConfigError) as caught:
            PayloadServer(ring, lane="ucx", port=65534, threads=3)
        assert caught.value.key == "port"
        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            free.bind(("127.0.0.1", 65534))


# --- W8 ---------------------------------------------------------------------------------------------------------


class BreaksOnce(SharedRingBuffer):
    """A ring with a bug: one `read_raw` raises an unexpected exception."""

    broken = False

    def read_raw(self, slot: int, sequence: int, reader: int = 0) -> Any:
        if self.broken:
            self.broken = False
            raise ZeroDivisionError
        return super().read_raw(slot, sequence, reader)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_w8_a_server_thread_that_fails_leaves_everything_to_the_others(
    lane: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        BreaksOnce(12, 64) as ring,
        PayloadServer(ring, lane=lane, threads=3, drain_timeout=0.5) as server,
        PayloadClient(lane=lane, quarantine_seconds=1000) as client,
    ):
        refs = [server.put_bytes(bytes([number])) for number in range(12)]
        dead = server.loops[0]
        with Peer(server, lane) as peer:  # at the first thread's endpoint
            peer.shake()
            assert peer.read(refs[0], 0)[0] is Status.OK
            ring.broken = True
            peer.send(Frame(Kind.READ, slot=refs[1].slot, sequence=refs[1].sequence, request=1, tag=7).pack())
            assert peer.closed()
        wait_until(lambda: not dead.running, "the thread to end")
        # Others may have the numbers of the descriptors that the thread has closed: the server must not use them.
        others = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(30)]
        assert "its endpoints are closed" in caplog.text
        assert ring.statistics().leases == 0
        for number, ref in enumerate(refs):
            assert bytes(client.read_bytes(ref, timeout=5)) == bytes([number])
        assert client.statistics().quarantined == tuple(dead.endpoints)
        assert client.statistics().retries <= 1
        wait_until(lambda: ring.statistics().free == 12, "the ACKs to arrive")
        assert client.stat(server.put_bytes(b"another"), timeout=5).ring.ready == 1
        server.close()
        for other in others:
            with pytest.raises(BlockingIOError):
                os.eventfd_read(other)
            os.close(other)


# --- C4, C14 ----------------------------------------------------------------------------------------------------

Answer = Callable[["UcxEnd", UcxStream, Frame], None]


class UcxEnd:
    """A server's end on ucx, driven by a thread of the test; without an `answer` it sends nothing.

    Attributes:
        endpoint: its address.
        tried: the number of connections so far.
        ended: set when the test has ended.
    """

    def __init__(self, good: PayloadServer, answer: Answer | None) -> None:
        ring = ring_of(good)
        self._identity = ServerIdentity(ring.producer_id, ring.slots, ring.slot_bytes, 8, ring.readers)
        self._answer = answer
        self._worker = UcxWorker(True)
        self._listener = UcxListener(self._worker, "127.0.0.1")
        self._streams: dict[UcxStream, ServerHandshake] = {}
        self._thread = threading.Thread(target=self._run)
        self.endpoint = self._listener.endpoint
        self.tried = 0
        self.ended = threading.Event()

    def __enter__(self) -> "UcxEnd":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._thread.join(20)
        assert not self._thread.is_alive()

    def drive(self, seconds: float) -> None:
        """Let the worker make progress for at most `seconds`."""
        poll = select.poll()
        poll.register(self._worker.fileno(), select.POLLIN)
        until = Deadline.after(seconds)
        while not until.expired and not self.ended.is_set():
            self._worker.progress()
            if self._worker.arm():
                poll.poll(min(until.remaining, 0.02) * 1000)

    def _run(self) -> None:
        try:
            while not self.ended.is_set():
                self.drive(0.005)
                self._accept()
                for stream in [] if self._answer is None else list(self._streams):
                    try:
                        self._serve(stream, self._streams[stream])
                    except TransportError:
                        del self._streams[stream]
                        stream.close()
        finally:
            for stream in self._streams:
                stream.close()
            self._listener.close()
            self._worker.close()

    def _accept(self) -> None:
        with contextlib.suppress(TransportError):  # a client may have closed already
            while (stream := self._listener.accept()) is not None:
                self.tried += 1
                self._streams[stream] = ServerHandshake(stream.lane, self._identity)

    def _serve(self, stream: UcxStream, handshake: ServerHandshake) -> None:
        assert self._answer is not None
        stream.flush()
        while (message := stream.receive(FRAME_BYTES if handshake.done else handshake.expects)) is not None:
            if not handshake.done:
                stream.send([handshake.receive(message)])
            elif (frame := parse(message)).kind == Kind.READ:
                self._answer(self, stream, frame)


def status_ok(frame: Frame, nbytes: int) -> bytes:
    return frame._replace(kind=Kind.STATUS, status=Status.OK, flags=Flag.NONE, nbytes=nbytes).pack()


def a_late_status_and_no_payload(end: UcxEnd, stream: UcxStream, frame: Frame) -> None:
    end.drive(0.15)
    stream.send([status_ok(frame, 1000)])
    stream.flush()


def a_status_byte_by_byte(end: UcxEnd, stream: UcxStream, frame: Frame) -> None:
    for byte in status_ok(frame, 1000):
        stream.send([bytes([byte])])
        stream.flush()
        end.drive(0.03)


@pytest.mark.parametrize("answer", [a_late_status_and_no_payload, a_status_byte_by_byte])
@pytest.mark.parametrize("batch", [False, True])
def test_c4_what_trickles_ends_with_the_one_deadline_on_ucx(answer: Answer, batch: bool) -> None:
    with serving("ucx") as good, UcxEnd(good, answer) as end, PayloadClient(lane="ucx") as client:
        refs = [good.put_bytes(pattern(seed, 1000)) for seed in range(2)]
        slow = [dataclasses.replace(ref, endpoints=(end.endpoint,)) for ref in refs]
        promised = Deadline.after(0.6 + 0.5)
        if batch:
            outcomes = [result.error for result in client.read_many(slow, timeout=0.6, return_errors=True)]
        else:
            with pytest.raises(TransportTimeout) as caught:
                client.read_bytes(slow[0], timeout=0.6)
            outcomes = [caught.value]
        assert not promised.expired
        assert [type(outcome) for outcome in outcomes] == [TransportTimeout] * len(outcomes)
        assert len(outcomes) == 1 + batch
        assert client.statistics().reads == 0
        for seed, ref in enumerate(refs):
            assert memoryview(client.read_bytes(ref, timeout=5)) == pattern(seed, 1000)


def a_stale_status_without_its_empty_payload(end: UcxEnd, stream: UcxStream, frame: Frame) -> None:
    stream.send([frame._replace(kind=Kind.STATUS, status=Status.STALE, flags=Flag.NONE).pack()])
    stream.flush()


@pytest.mark.parametrize("batch", [False, True])
def test_b1_what_was_found_stale_stays_stale_if_its_connection_fails_then_on_ucx(
    batch: bool,
) -> None:
    with (
        serving("ucx") as good,
        UcxEnd(good, a_stale_status_without_its_empty_payload) as end,
        PayloadClient(lane="ucx", inline_bytes=0) as client,
    ):
        refs = [good.put_bytes(pattern(seed, 1000)) for seed in range(2)]
        wedged = [dataclasses.replace(ref, endpoints=(end.endpoint, *ref.endpoints)) for ref in refs]
        if batch:
            outcomes = [result.error for result in client.read_many(wedged, timeout=2, return_errors=True)]
        else:
            with pytest.raises(StaleSlotError) as caught:
                client.read_bytes(wedged[0], timeout=2)
            outcomes = [caught.value]
        assert [type(outcome) for outcome in outcomes] == [StaleSlotError] * (1 + batch)
        assert client.statistics().retries == 0
        assert client.statistics().idle_connections == 0


@pytest.mark.parametrize("quarantine_seconds", [0.0, 1000.0])
def test_c14_a_wedged_endpoint_is_tried_once_per_quarantine_on_ucx(quarantine_seconds: float) -> None:
    with (
        serving("ucx") as good,
        UcxEnd(good, None) as mute,
        PayloadClient(lane="ucx", quarantine_seconds=quarantine_seconds) as client,
    ):
        ref = good.put_bytes(b"payload")
        both = dataclasses.replace(ref, endpoints=(mute.endpoint, *ref.endpoints))
        for _ in range(4):
            promised = Deadline.after(2.0)
            assert bytes(client.read_bytes(both, timeout=2.0, consume=False)) == b"payload"
            assert not promised.expired
        # Without a quarantine every second read begins at this endpoint; with one, only one read does.
        tries = 1 if quarantine_seconds else 2
        assert client.statistics().retries == tries
        wait_until(lambda: mute.tried >= tries, "the tries to be seen")
        assert mute.tried == tries
