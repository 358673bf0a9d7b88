"""UCX workers and listeners: how they begin and end, and what their errors become."""

import ctypes
import functools
import select
import socket
import sys

import pytest
from transport_fixtures import serving
from waiting import wait_until

from dray import PayloadClient, PayloadServer, SharedRingBuffer, make_secret
from dray.clock import Deadline
from dray.errors import (
    ConfigError,
    ConnectionClosed,
    ConnectionReset,
    MessageTruncated,
    MissingDependencyError,
    TransportError,
    TransportTimeout,
    Unreachable,
)
from dray.transport.lanes import UCX, Endpoint, parse_endpoint, ucx_sockets, ucx_worker
from dray.transport.lanes.ucx import UcxListener
from dray.transport.lanes.ucx_worker import UcxWorker


def test_w9_a_connection_that_comes_while_a_worker_is_busy_until_its_end_is_refused() -> None:
    """The worker makes no progress until it closes, and the client is notified."""
    with UcxWorker(True) as mine:
        theirs = UcxWorker(True)
        listener = UcxListener(theirs, "127.0.0.1")
        stream = UCX.connect(parse_endpoint(listener.endpoint), Deadline.after(20), mine)
        with stream:
            assert theirs.arm()
            waiting = functools.partial(select.select, [theirs.fileno()], [], [], 0)
            wait_until(lambda: mine.progress() or waiting()[0], "the connection to come")
            listener.close()
            grace = Deadline.after(ucx_worker.RETIRED_SECONDS)
            wait_until(lambda: grace.expired, "the time for accepted connections to pass")
            theirs.close()
            with pytest.raises(TransportError):
                wait_until(lambda: mine.progress() or stream.receive(64), "the client to be notified", 2)


def own_address() -> str:
    """An address of this machine that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))  # no packet is sent
        except OSError:
            pytest.skip("this machine has no address but loopback")
        return str(sock.getsockname()[0])


def test_a_ucx_server_on_an_interface_is_read_at_its_address() -> None:
    host = own_address()
    secret = make_secret()
    with serving("ucx", host=host, secret=secret) as server, PayloadClient(lane="ucx", secret=secret) as client:
        ref = server.put_bytes(b"payload")
        assert ref.endpoints[0].startswith(f"ucx:{host}:")
        assert bytes(client.read_bytes(ref)) == b"payload"


def test_an_address_of_another_machine_cannot_be_listened_on() -> None:
    with UcxWorker(True) as worker:
        with pytest.raises(ConfigError) as caught:
            UcxListener(worker, "203.0.113.7")
    assert caught.value.key == "host"


def test_a_port_without_a_listener_has_no_socket() -> None:
    with pytest.raises(Unreachable):
        ucx_sockets.listening_socket(1)


def test_a_host_that_ucx_does_not_know_is_a_transport_error() -> None:
    with UcxWorker(True) as worker, pytest.raises(TransportError):
        UCX.connect(Endpoint(UCX, "no host", 40001), Deadline.after(20), worker)


ERRORS = {
    "UCXNotConnectedError": Unreachable,
    "UCXRejectedError": Unreachable,
    "UCXUnreachableError": Unreachable,
    "UCXNoDeviceError": Unreachable,
    "UCXTimedOutError": TransportTimeout,
    "UCXEndpointTimeoutError": TransportTimeout,
    "UCXMessageTruncatedError": MessageTruncated,
    "UCXCloseError": ConnectionClosed,
    "UCXCanceledError": ConnectionReset,
    "UCXConnectionResetError": ConnectionReset,
    "UCXIOError": ConnectionReset,
}


@pytest.mark.parametrize("name", ERRORS)
def test_c1_errors_of_ucx_are_distinguished_by_their_type(name: str) -> None:
    raised = getattr(ucx_worker.require()[0], name)("UCX's message")
    found = ucx_worker.from_ucx_error(raised, "ucx:127.0.0.1:1")
    assert type(found) is ERRORS[name]
    assert "UCX's message" in str(found)
    assert found.retryable
    if isinstance(found, Unreachable):
        assert found.refused == (name in ("UCXNotConnectedError", "UCXRejectedError"))


def test_without_the_package_the_error_names_the_command_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ucx_worker, "UCXX_AVAILABLE", False)
    with SharedRingBuffer(1, 10) as ring:
        for make in (lambda: PayloadClient(lane="ucx"), lambda: PayloadServer(ring, lane="ucx")):
            with pytest.raises(MissingDependencyError, match=r"pip install 'dray-rl\[ucxx\]'"):
                make()


def test_a_package_that_does_not_load_is_missing_too_and_the_error_has_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ucxx._lib.arr", None)
    with pytest.raises(MissingDependencyError, match=r"does not load \(.*ucxx\._lib\.arr"):
        ucx_worker.require()


def test_a_library_without_the_count_of_cancelled_requests_is_used_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    ucx_sockets.library_function.cache_clear()
    try:
        with serving("ucx") as server, PayloadClient(lane="ucx") as client:
            assert bytes(client.read_bytes(server.put_bytes(b"payload"))) == b"payload"
        assert not ucx_sockets.can_name_peers()  # no function was found
    finally:
        ucx_sockets.library_function.cache_clear()


def test_a_stream_shows_whether_it_is_open() -> None:
    with UcxWorker(True) as mine, UcxWorker(True) as theirs:
        listener = UcxListener(theirs, "127.0.0.1")
        stream = UCX.connect(parse_endpoint(listener.endpoint), Deadline.after(20), mine)
        assert repr(stream) == "<UcxStream open, sending>"  # the preamble
        stream.close()
        assert repr(stream) == "<UcxStream closed>"
        listener.close()
