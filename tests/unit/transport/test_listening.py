"""Where connections come in, and how they are reached: paths, addresses, full backlogs, other users."""

import contextlib
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forbidding import no_more_descriptors
from forked_child import run_in_child
from transport_fixtures import counted, endpoint_of, serving
from waiting import wait_until

from dray import PayloadClient
from dray.clock import Deadline
from dray.errors import ConfigError, TransportTimeout, Unreachable
from dray.transport.lanes import LANES, SHM, TCP, Endpoint
from dray.transport.lanes.socket import UnixListener

SOCKETS = ("shm", "tcp")


@contextlib.contextmanager
def full_backlog(name: str) -> Iterator[tuple[socket.socket, Any]]:
    """A listening socket that has no room for one more connection, and its address."""
    path = str(Path(os.environ["DRAY_RUNTIME_DIR"]) / "full.sock")
    with contextlib.ExitStack() as stack:
        family = socket.AF_UNIX if name == "shm" else socket.AF_INET
        listening = stack.enter_context(socket.socket(family))
        listening.bind(path if name == "shm" else ("127.0.0.1", 0))
        stack.callback(Path(path).unlink, missing_ok=True)
        listening.listen(0)
        for _ in range(3):
            waiting = stack.enter_context(socket.socket(family))
            waiting.setblocking(False)
            waiting.connect_ex(listening.getsockname())
        yield listening, listening.getsockname()


def connect(name: str, address: Any, deadline: Deadline) -> Any:
    return LANES[name].connect(Endpoint(LANES[name], *([address] if name == "shm" else address)), deadline)


@pytest.mark.parametrize("name", SOCKETS)
def test_connecting_to_a_server_that_does_not_accept_ends_with_the_deadline(name: str) -> None:
    with full_backlog(name) as (_, address):
        promised = Deadline.after(2)
        with pytest.raises(TransportTimeout):
            connect(name, address, Deadline.after(0.2))
        assert not promised.expired


def test_connecting_waits_for_room_in_the_backlog() -> None:
    with full_backlog("shm") as (listening, address), contextlib.ExitStack() as stack:

        def accept() -> None:
            for _ in range(2):
                stack.enter_context(listening.accept()[0])

        thread = threading.Thread(target=accept)
        thread.start()
        stream = SHM.connect(Endpoint(SHM, address), Deadline.after(10))
        thread.join(10)
        assert not thread.is_alive()
        stream.close()


def test_a_host_that_does_not_exist_is_unreachable() -> None:
    with pytest.raises(Unreachable, match="unknown"):
        TCP.connect(Endpoint(TCP, "fe80::1%none", 40001), Deadline.after(5))


def test_a_socket_path_that_is_too_long_is_refused_by_its_length() -> None:
    with pytest.raises(ConfigError, match="107 bytes"):
        UnixListener(Path("/tmp", "x" * 104))


def test_a_socket_path_that_is_taken_is_not_taken_over() -> None:
    path = Path(os.environ["DRAY_RUNTIME_DIR"]) / "taken.sock"
    first = UnixListener(path)
    with contextlib.closing(first):
        with pytest.raises(Unreachable):
            UnixListener(path)
        SHM.connect(Endpoint(SHM, str(path)), Deadline.after(5)).close()
    assert not path.exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_process_of_another_user_is_not_served() -> None:
    with (
        tempfile.TemporaryDirectory(prefix="dray-", dir="/tmp") as open_to_all,
        serving("shm", directory=Path(open_to_all)) as server,
        PayloadClient(lane="shm") as client,
    ):
        ref = server.put_bytes(b"payload")
        path = Path(endpoint_of(server, "shm").host)
        for folder in (Path(open_to_all), *(each for each in path.parents if open_to_all in str(each.parent))):
            folder.chmod(0o755)
        path.chmod(0o666)

        def ask_as_another_user() -> None:
            os.setuid(65534)
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(10)
                sock.connect(str(path))
                assert sock.recv(100) == b""

        assert run_in_child(ask_as_another_user) == ""
        # The server closes the connection first, then counts.
        wait_until(lambda: counted(server, "auth_failures") == 1, "the refusal to be counted")
        assert bytes(client.read_bytes(ref)) == b"payload"


@pytest.mark.parametrize("closed_meanwhile", [False, True])
@pytest.mark.parametrize("name", SOCKETS)
def test_a_server_without_descriptors_accepts_later_and_does_not_spin(name: str, closed_meanwhile: bool) -> None:
    with serving(name) as server:
        endpoint = endpoint_of(server, name)
        with socket.socket(socket.AF_UNIX if name == "shm" else socket.AF_INET) as sock:
            with no_more_descriptors():
                sock.connect(endpoint.host if name == "shm" else (endpoint.host, endpoint.port))
                wait_until(lambda: counted(server, "accept_failures"), "the failure to accept")
            assert counted(server, "connections") == 0
            if closed_meanwhile:
                server.close()
                sock.settimeout(10)
                with contextlib.suppress(ConnectionResetError):
                    assert sock.recv(1) == b""
            else:
                wait_until(lambda: counted(server, "connections") == 1, "the connection to be accepted")
        assert counted(server, "accept_failures") == 1
