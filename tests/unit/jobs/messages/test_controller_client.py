import contextlib
import ctypes
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from dray.errors import ControlPlaneError
from dray.jobs.messages import models
from dray.jobs.messages.controller_client import ControllerClient, ControllerLostError
from dray.jobs.messages.models import MembershipError

BODY = models.Unregister(name="rollout-0", incarnation="a", reason="done")


@contextlib.contextmanager
def peer(answer: Callable[[socket.socket, threading.Event], None]) -> Iterator[str]:
    """A server on a real socket that treats each connection with `answer`; yields its URL."""
    over = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))
    threads = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threads.append(threading.Thread(target=talk, args=(connection,)))
                threads[-1].start()

    def talk(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            answer(connection, over)

    acceptor = threading.Thread(target=serve)
    acceptor.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        over.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        acceptor.join()
        for thread in threads:
            thread.join()


def reply(status: str, body: str) -> Callable[[socket.socket, threading.Event], None]:
    text = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}"
    return lambda connection, _: connection.sendall(text.encode())


def test_answer_is_parsed() -> None:
    with (
        peer(reply("200 OK", '{"phase": "running", "stop": false}')) as url,
        ControllerClient(url, "t", 5) as client,
    ):
        assert not client.post("/unregister", BODY, models.Directive).stop


def test_peer_that_never_answers_is_given_up_in_time() -> None:
    with peer(lambda _, over: over.wait(30) and None) as url, ControllerClient(url, "t", 0.5) as client:
        began = time.monotonic()
        with pytest.raises(ControllerLostError):
            client.post("/unregister", BODY, models.Directive)
        assert 0.4 < time.monotonic() - began < 5


def test_peer_that_trickles_is_given_up_in_time() -> None:
    def trickle(connection: socket.socket, over: threading.Event) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while not over.wait(0.05):
            connection.sendall(b" ")

    with peer(trickle) as url, ControllerClient(url, "t", 0.5) as client:
        began = time.monotonic()
        with pytest.raises(ControllerLostError):
            client.status()
        assert time.monotonic() - began < 5


def test_absent_peer_is_retried_until_the_bound_and_not_longer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with ControllerClient(url, "t", 0.5) as client:
        began = time.monotonic()
        with pytest.raises(ControllerLostError):
            client.status()
        assert 0.4 < time.monotonic() - began < 5


@pytest.mark.parametrize("hurry_first", [True, False])
def test_process_that_is_about_to_end_does_not_wait_for_a_controller_that_refuses(hurry_first: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with ControllerClient(url, "t", 600, hurried=600) as client:
        if hurry_first:
            client.hurry()
        timer = threading.Timer(0.3, client.hurry)
        timer.start()
        for _ in range(3):
            with pytest.raises(ControllerLostError, match="the controller is gone"):
                client.post("/unregister", BODY, models.Directive)
        assert client.refused
        timer.join()


def test_answer_that_came_while_the_interpreter_was_held_is_not_lost() -> None:
    held = threading.Event()

    def answer(connection: socket.socket, over: threading.Event) -> None:
        held.wait(20)
        reply("200 OK", '{"phase": "running", "stop": false}')(connection, over)

    def hold() -> None:
        held.set()
        ctypes.PyDLL(None).sleep(2)

    with peer(answer) as url, ControllerClient(url, "t", 0.8) as client:
        timer = threading.Timer(0.2, hold)
        timer.start()
        assert not client.post("/unregister", BODY, models.Directive).stop
        timer.join()


def test_broken_connection_is_tried_again() -> None:
    attempts: list[int] = []

    def answer(connection: socket.socket, over: threading.Event) -> None:
        attempts.append(1)
        if len(attempts) == 3:
            reply("200 OK", '{"phase": "running", "stop": true}')(connection, over)

    with peer(answer) as url, ControllerClient(url, "t", 10) as client:
        assert client.post("/unregister", BODY, models.Directive).stop
    assert len(attempts) == 3


def test_process_that_is_about_to_end_does_not_wait_long() -> None:
    with peer(lambda _, over: over.wait(30) and None) as url, ControllerClient(url, "t", 60) as client:
        began = time.monotonic()
        timer = threading.Timer(0.2, client.hurry)
        timer.start()
        for _ in range(2):
            with pytest.raises(ControllerLostError):
                client.post("/unregister", BODY, models.Directive)
        timer.join()
        assert time.monotonic() - began < 20


def test_close_ends_calls_of_other_threads() -> None:
    with peer(lambda _, over: over.wait(30) and None) as url, ControllerClient(url, "t", 60) as client:
        timer = threading.Timer(0.2, client.close)
        timer.start()
        with pytest.raises(ControllerLostError, match="closed"):
            client.status()
        timer.join()
        client.close()


def test_refusals_become_typed_errors() -> None:
    refusal = '{"error": "not a member", "detail": "rollout-0 is dead"}'
    with peer(reply("409 Conflict", refusal)) as url, ControllerClient(url, "t", 5) as client:
        with pytest.raises(MembershipError, match="rollout-0 is dead"):
            client.post("/unregister", BODY, models.Directive)
    with (
        peer(reply("401 Unauthorized", '{"error": "unauthorised"}')) as url,
        ControllerClient(url, "t", 5) as client,
        pytest.raises(ControlPlaneError, match="unauthorised"),
    ):
        client.status()
    with (
        peer(reply("200 OK", "<html>")) as url,
        ControllerClient(url, "t", 5) as client,
        pytest.raises(ControlPlaneError, match="not a controller"),
    ):
        client.status()
