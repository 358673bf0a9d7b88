import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from dray.clock import Deadline
from dray.errors import AuthenticationError, TransportError
from dray.jobs.messages.auth import ConnectionInfo, ServerAuth, answer, connect, listen
from dray.jobs.messages.channel import Frames, framed

SECRET = bytes(range(32))
PURPOSE = ConnectionInfo(node="n2", attempt="001.1", rank=3)


def body_of(message: bytes) -> bytes:
    """The body of a message that is received as a whole."""
    frames = Frames()
    frames.feed(message)
    body = frames.next()
    assert body is not None
    return body


def nonce_of(host: ServerAuth) -> bytes:
    return body_of(host.challenge)


def test_ends_that_know_the_secret_recognise_each_other() -> None:
    host = ServerAuth(SECRET)
    words, expected = answer(SECRET, PURPOSE, nonce_of(host))
    found = host.feed(words)
    assert found is not None
    assert (found[0], body_of(found[1])) == (PURPOSE, expected)


def test_words_may_come_byte_by_byte() -> None:
    host = ServerAuth(SECRET)
    words, _ = answer(SECRET, PURPOSE, nonce_of(host))
    assert all(host.feed(words[index : index + 1]) is None for index in range(len(words) - 1))
    assert host.feed(words[-1:]) is not None


def test_secret_is_not_in_what_is_sent() -> None:
    host = ServerAuth(SECRET)
    words, _ = answer(SECRET, PURPOSE, nonce_of(host))
    found = host.feed(words)
    assert found is not None
    assert SECRET not in host.challenge + words + found[1]


def test_guest_without_the_secret_is_refused() -> None:
    host = ServerAuth(SECRET)
    with pytest.raises(AuthenticationError, match="does not know the job's secret"):
        host.feed(answer(b"another" * 5, PURPOSE, nonce_of(host))[0])


def test_words_of_an_earlier_connection_are_refused() -> None:
    earlier = ServerAuth(SECRET)
    words, _ = answer(SECRET, PURPOSE, nonce_of(earlier))
    with pytest.raises(AuthenticationError):
        ServerAuth(SECRET).feed(words)


def test_proof_of_the_node_is_none_of_the_head() -> None:
    words, expected = answer(SECRET, PURPOSE, bytes(32))
    assert body_of(words)[32:64] != expected


@pytest.mark.parametrize("change", [lambda words: words + b"x", lambda words: words[:40] + b"X" + words[41:]])
def test_changed_words_are_refused(change: Callable[[bytes], bytes]) -> None:
    host = ServerAuth(SECRET)
    with pytest.raises(AuthenticationError):
        host.feed(change(answer(SECRET, PURPOSE, nonce_of(host))[0]))


def test_purpose_that_is_too_long_is_refused_before_it_comes() -> None:
    with pytest.raises(AuthenticationError, match="65535 bytes was announced"):
        ServerAuth(SECRET).feed(b"\0\0\xff\xff")


@pytest.mark.parametrize(
    "sent",
    [
        b"\xff\xff\xff\xff",
        framed(b""),
        framed(bytes(31)),
        framed(bytes(32)) + framed(b""),
        framed(bytes(32)) + framed(bytes(32)),
    ],
)
def test_listener_that_sends_no_proof_of_the_secret_is_refused(sent: bytes) -> None:
    with closing(listen("127.0.0.1")) as listener, ThreadPoolExecutor(1) as pool:
        found = pool.submit(connect, listener.getsockname(), SECRET, PURPOSE, Deadline.after(10.0), 10.0)
        listener.setblocking(True)
        connected, _ = listener.accept()
        with connected:
            connected.sendall(sent)
            with pytest.raises(AuthenticationError, match="does not know the job's secret"):
                found.result()


def test_what_the_head_sends_after_its_proof_is_left_for_the_channel() -> None:
    with closing(listen("127.0.0.1")) as listener, ThreadPoolExecutor(1) as pool:
        found = pool.submit(connect, listener.getsockname(), SECRET, PURPOSE, Deadline.after(10.0), 10.0)
        listener.setblocking(True)
        connected, _ = listener.accept()
        with connected:
            host, found_proof = ServerAuth(SECRET), None
            connected.sendall(host.challenge)
            while found_proof is None:
                found_proof = host.feed(connected.recv(64))
            connected.sendall(found_proof[1] + b"next")
            with found.result() as guest:
                guest.settimeout(10.0)
                assert guest.recv(10) == b"next"


def test_head_that_sends_nothing_is_given_up_in_time() -> None:
    with closing(listen("127.0.0.1")) as listener:
        deadline = Deadline.after(0.3)
        with pytest.raises(TransportError, match="does not answer"):
            connect(listener.getsockname(), SECRET, PURPOSE, deadline, 10.0)
        assert deadline.elapsed < 3.0


def test_connection_has_a_bound_on_silence() -> None:
    with closing(listen("127.0.0.1")) as listener:
        listener.setblocking(True)

        def serve() -> None:
            connected, _ = listener.accept()
            with connected:
                host = ServerAuth(SECRET)
                connected.sendall(host.challenge)
                found = None
                while found is None:
                    found = host.feed(connected.recv(64))
                connected.sendall(found[1])
                connected.recv(1)

        thread = threading.Thread(target=serve)
        thread.start()
        with connect(listener.getsockname(), SECRET, PURPOSE, Deadline.after(10.0), 12.0) as connected:
            assert connected.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 12_000
            idle = connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
            between = connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL)
            assert idle + 3 * between <= 12
        thread.join()
