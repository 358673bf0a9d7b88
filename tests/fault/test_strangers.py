"""Connections to a payload server without a proof of the secret are limited; readers still connect."""

import contextlib
import errno
import gc
import socket
import tracemalloc
from collections.abc import Iterator

import pytest
from forbidding import no_more_descriptors
from simulation import ManualClock
from transport_fixtures import Child, counted, endpoint_of, reference, serving
from waiting import wait_until

from dray import PayloadClient, PayloadServer
from dray.admission import MAX_UNPROVEN, UNPROVEN_CLOSED
from dray.clock import Deadline
from dray.protocol.handshake import NO_PROOF, ClientHandshake
from dray.transport.lanes import LANES, TCP, UCX, Endpoint
from dray.transport.lanes.ucx import UcxListener
from dray.transport.lanes.ucx_worker import UcxWorker

SECRET = bytes(range(32))


@pytest.fixture
def strangers() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as opened:
        yield opened


def connect(server: PayloadServer, lane: str, opened: contextlib.ExitStack) -> socket.socket:
    """A plain connection to the server's port or path."""
    endpoint = endpoint_of(server, lane)
    sock = opened.enter_context(socket.socket(socket.AF_UNIX if lane == "shm" else socket.AF_INET))
    sock.settimeout(10)
    sock.connect(endpoint.host if lane == "shm" else (endpoint.host, endpoint.port))
    return sock


def is_closed(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def test_silent_and_trickling_connections_displace_each_other_and_no_reader(
    lane: str, strangers: contextlib.ExitStack
) -> None:
    with serving(lane, secret=SECRET) as server, PayloadClient(lane=lane, secret=SECRET) as client:
        ref = server.put_bytes(b"payload")
        assert bytes(client.read_bytes(ref, timeout=20, consume=False)) == b"payload"
        opened = [connect(server, lane, strangers) for _ in range(2 * MAX_UNPROVEN)]
        for sock in opened[::2]:
            # Some are closed already.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(b"D")
        wait_until(lambda: counted(server, UNPROVEN_CLOSED) >= MAX_UNPROVEN, "the first ones to be closed")
        wait_until(lambda: sum(map(is_closed, opened)) >= MAX_UNPROVEN, "their ends to come")
        assert bytes(client.read_bytes(ref, timeout=20, consume=False)) == b"payload"
        with PayloadClient(lane=lane, secret=SECRET) as another:
            assert bytes(another.read_bytes(ref, timeout=20)) == b"payload"
        assert server.statistics().open_connections <= MAX_UNPROVEN + 2


@pytest.mark.parametrize("name", ["shm", "tcp"])
def test_a_proof_must_come_in_time_whatever_was_sent_before(name: str, strangers: contextlib.ExitStack) -> None:
    with serving(name, secret=SECRET, idle_timeout=0.5) as server:
        silent, started = connect(server, name, strangers), connect(server, name, strangers)
        started.sendall(ClientHandshake(LANES[name], secret=SECRET).hello())
        assert started.recv(200)[:4] == b"DRAY"
        wait_until(lambda: counted(server, UNPROVEN_CLOSED) == 2, "both to be closed")
        wait_until(lambda: is_closed(silent) and is_closed(started), "their ends to come")
        assert counted(server, "evicted") == 0


def test_a_ucx_connection_without_a_handshake_is_closed_in_time() -> None:
    with serving("ucx", idle_timeout=0.5) as server, UcxWorker(True) as worker:
        endpoint = endpoint_of(server, "ucx")
        with UCX.connect(endpoint, Deadline.after(20), worker):
            wait_until(
                lambda: worker.progress() or counted(server, UNPROVEN_CLOSED), "the connection to be closed"
            )
        assert counted(server, "connections") == 1


@pytest.mark.parametrize("name", ["shm", "tcp"])
def test_a_connection_has_little_memory_before_the_proof(name: str, strangers: contextlib.ExitStack) -> None:
    with serving(name, secret=SECRET) as server:
        connect(server, name, strangers)
        wait_until(lambda: counted(server, "connections") == 1, "the first connection")
        gc.collect()
        tracemalloc.start()
        try:
            for _ in range(MAX_UNPROVEN - 1):
                connect(server, name, strangers).sendall(b"D")
            wait_until(lambda: counted(server, "connections") == MAX_UNPROVEN, "the connections")
            held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert held / (MAX_UNPROVEN - 1) < 16_000


def test_malformed_connections_are_counted_and_few_lines(
    caplog: pytest.LogCaptureFixture, strangers: contextlib.ExitStack
) -> None:
    no_frame = ClientHandshake(TCP).hello() + NO_PROOF + b"\xff" * 64
    with serving("tcp") as server:
        caplog.clear()
        for _ in range(30):
            sock = connect(server, "tcp", strangers)
            sock.sendall(no_frame)
            with contextlib.suppress(ConnectionResetError):
                while sock.recv(1000):
                    pass
        wait_until(lambda: counted(server, "malformed") == 30, "all to be counted")
        lines = [each.message for each in caplog.records if each.name == "dray.server"]
        assert len(lines) == 1
        assert lines[0].startswith("connection closed: ")


# --- what UCX accepts -------------------------------------------------------------------------------------------


def test_peers_that_do_not_speak_ucx_are_shut_down_in_time_at_every_port_and_others_are_not() -> None:
    clock = ManualClock()
    with contextlib.ExitStack() as opened:
        mine, theirs = (opened.enter_context(UcxWorker(True)) for _ in range(2))
        listener = opened.enter_context(UcxListener(theirs, "127.0.0.1", clock=clock))
        port = int(listener.endpoint.rpartition(":")[2])
        silent = listener.silent
        assert silent is not None
        assert theirs.data_ports
        strangers = [
            opened.enter_context(socket.create_connection(("127.0.0.1", each)))
            for each in (port, *theirs.data_ports)
        ]
        stream = opened.enter_context(UCX.connect(Endpoint(UCX, "127.0.0.1", port), Deadline.after(20), mine))
        wait_until(lambda: theirs.progress() or mine.progress() or listener.waiting, "the request")
        accepted = listener.accept()
        assert accepted is not None
        opened.enter_context(accepted)
        assert silent.shut_down() == 0
        clock.advance(9.0)
        assert silent.shut_down() == 0
        clock.advance(1.0)
        assert silent.shut_down() == len(strangers)
        for sock in strangers:
            sock.settimeout(10)
            assert sock.recv(1) == b""
        assert silent.shut_down() == 0
        stream.send([b"message"])

        def arrived() -> bool:
            mine.progress()
            theirs.progress()
            stream.flush()
            return accepted.receive(7) == b"message"

        wait_until(arrived, "the message")


def test_a_server_whose_descriptors_ucx_has_used_up_serves_on() -> None:
    """In a process of its own, which may open 256."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 4096))\n"
    script = """
ring = SharedRingBuffer(2, 4096)
with PayloadServer(ring, lane="ucx", threads=1) as server:
    send(json.loads(server.put_bytes(b"payload").to_json()))
    while receive() is not None:
        send(server.statistics().to_dict()["server"])
send("closed")
"""
    with contextlib.ExitStack() as opened, Child(limit + script) as child:
        ref = reference(child.receive())
        host, _, port = ref.endpoints[0].removeprefix("ucx:").rpartition(":")
        for _ in range(400):
            sock = opened.enter_context(socket.socket())
            sock.setblocking(False)
            assert sock.connect_ex((host, int(port))) == errno.EINPROGRESS
        wait_until(lambda: child.ask("statistics")[UNPROVEN_CLOSED] >= 400 - MAX_UNPROVEN, "most to be closed")
        with PayloadClient(lane="ucx") as client:
            assert bytes(client.read_bytes(ref, timeout=20)) == b"payload"
        assert child.ask() == "closed"


def test_a_ucx_server_ends_when_no_descriptor_is_left() -> None:
    with serving("ucx") as server:
        with no_more_descriptors():
            server.close()
