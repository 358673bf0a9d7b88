"""The controller behind real sockets, and connections that do not show the job's token."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
import uvicorn
from forbidding import no_more_descriptors
from waiting import wait_until

from dray.admission import ACCEPT_FAILURES, MAX_UNPROVEN, UNPROVEN_CLOSED, Unproven
from dray.jobs.controller import listener as listener_module
from dray.jobs.controller.app import Controller
from dray.jobs.controller.listener import HttpServer, bind
from dray.jobs.folder import JobFolder, JobSpec
from dray.jobs.job_file import parse_job
from dray.jobs.messages import models
from dray.jobs.messages.controller_client import ControllerClient
from dray.jobs.messages.models import Role


class Served:
    """A controller that serves in a thread."""

    def __init__(self, folder: Path) -> None:
        config = parse_job(
            {
                "job": {"name": "small", "max_steps": 3},
                "rollout": {"worker": "a.py:A", "replicas": 1},
                "policy": {"trainer": "a.py:B", "batch_size": 2},
            }
        )
        spec = JobSpec(config, folder / "job.toml", JobFolder(folder), b"s" * 32, "unix:///x", "small", False, 0)
        self.token = spec.token
        self.controller = Controller(spec)
        listener = bind("127.0.0.1", 0)
        self.address: tuple[str, int] = listener.getsockname()
        self.url = f"http://127.0.0.1:{self.address[1]}"
        settings = uvicorn.Config(self.controller.application, log_config=None, access_log=False, lifespan="off")
        self._server = HttpServer(settings, listener, self.controller.connections)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve()))
        self._thread.start()
        wait_until(lambda: self._server.started, "the controller to accept")

    def counted(self, name: str) -> int:
        return int(self.controller.connections[name])

    def client(self) -> ControllerClient:
        return ControllerClient(self.url, self.token, 10.0)

    def register(self, client: ControllerClient) -> None:
        body = models.Register(name="rollout-0", incarnation="a", role=Role.ROLLOUT, pid=1)
        client.post("/register", body, models.Directive)

    def metrics(self) -> str:
        request = Request(f"{self.url}/metrics", headers={"Authorization": f"Bearer {self.token}"})
        with urlopen(request, timeout=10) as answer:
            return str(answer.read().decode())

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(10.0)
        assert not self._thread.is_alive()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with contextlib.closing(Served(tmp_path)) as server:
        yield server


@pytest.fixture
def strangers() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as opened:
        yield opened


def connect(served: Served, strangers: contextlib.ExitStack, first: bytes = b"") -> socket.socket:
    sock = strangers.enter_context(socket.create_connection(served.address, timeout=10))
    sock.sendall(first)
    return sock


def test_half_open_connections_displace_each_other_and_no_client(
    served: Served, strangers: contextlib.ExitStack
) -> None:
    with served.client() as client:
        served.register(client)
        for first in (b"", b"POST /heartbeat HTTP/1.1\r\nHost: x\r\n"):
            for _ in range(MAX_UNPROVEN):
                connect(served, strangers, first)
        wait_until(lambda: served.counted(UNPROVEN_CLOSED) == MAX_UNPROVEN, "the first ones to be closed")
        assert client.status().members[0].name == "rollout-0"  # over the connection that it had
        with served.client() as another:
            assert another.status().members[0].name == "rollout-0"
        count = MAX_UNPROVEN + 1  # the new client displaced one more, and gave its place back with the token
        assert served.counted(UNPROVEN_CLOSED) == count
        assert f'dray_unproven_connections_closed_total{{job="small"}} {float(count)}' in served.metrics()


def test_connections_without_the_token_are_closed_in_time_and_those_with_it_stay(
    tmp_path: Path, strangers: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener_module, "Unproven", partial(Unproven, seconds=0.3))
    with contextlib.closing(Served(tmp_path)) as served, served.client() as client:
        served.register(client)
        connections = served.counted(UNPROVEN_CLOSED)
        silent = connect(served, strangers)
        partial_ = connect(served, strangers, b"GET /status HTTP/1.1\r\n")
        asked = connect(served, strangers, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert asked.recv(1000).startswith(b"HTTP/1.1 200")
        for sock in (silent, partial_, asked):
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(1000) in (b"", b"ok\n")
        wait_until(lambda: served.counted(UNPROVEN_CLOSED) == connections + 3, "them to be counted")
        assert client.status().members[0].name == "rollout-0"
        assert served.counted(UNPROVEN_CLOSED) == connections + 3


def test_a_request_with_a_wrong_token_is_the_last_of_its_connection(
    served: Served, strangers: contextlib.ExitStack
) -> None:
    request = b"GET /status HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer wrong\r\n\r\n"
    sock = connect(served, strangers, request)
    received = b""
    while chunk := sock.recv(1000):
        received += chunk
    assert received.startswith(b"HTTP/1.1 401")
    assert b"\r\nconnection: close\r\n" in received.lower()


def test_requests_that_are_not_http_are_few_lines(
    served: Served, strangers: contextlib.ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(20):
        sock = connect(served, strangers, b"\x16\x03\x01\x02\x00\r\n\r\n")
        assert sock.recv(1000).startswith(b"HTTP/1.1 400")
    assert [each.message for each in caplog.records if each.levelname == "WARNING"] == [
        "Invalid HTTP request received."
    ]


def test_a_controller_without_descriptors_accepts_later_and_does_not_spin(
    served: Served, strangers: contextlib.ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as sock:
        with no_more_descriptors():
            sock.connect(served.address)
            wait_until(lambda: served.counted(ACCEPT_FAILURES), "the failure to accept")
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        sock.settimeout(10)
        assert sock.recv(1000).startswith(b"HTTP/1.1 200")
    assert served.counted(ACCEPT_FAILURES) == 1
    assert ["Too many open files" in message for message in caplog.messages if "accepted" in message] == [True]
