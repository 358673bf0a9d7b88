"""A signal handler may raise while connections begin or end: they close, and no descriptor stays open."""

import contextlib
import functools
import gc
import os
import socket
import weakref
from collections.abc import Iterator
from pathlib import Path

import interruptions
import pytest
from transport_fixtures import SERVER, Child, endpoint_of, reference, serving
from waiting import wait_until

import dray.transport
from dray.clock import Deadline
from dray.protocol import PayloadRef
from dray.ring.direct import MAX_ATTACHMENTS_OF_PROCESS, direct_problem
from dray.transport import connecting
from dray.transport.connection import Connection
from dray.transport.lanes import UCX, ucx_sockets
from dray.transport.lanes.ucx_worker import UCXX_AVAILABLE, UcxWorker

ucx = pytest.mark.skipif(not UCXX_AVAILABLE, reason="ucxx is not installed")
direct = pytest.mark.skipif(bool(direct_problem()), reason=direct_problem() or "-")

interrupted = functools.partial(interruptions.interrupted, Path(dray.transport.__file__).parent)


@pytest.fixture
def _collects_nothing() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


@ucx
@pytest.mark.usefixtures("_collects_nothing")
def test_close_of_a_stream_that_an_exception_interrupted_anywhere_is_completed_by_another_call() -> None:
    moment, more = 1, True
    with serving("ucx") as server:
        while more:
            before = descriptors()
            worker = UcxWorker(True)
            stream = UCX.connect(endpoint_of(server, "ucx"), Deadline.after(20), worker)
            stream.expect(memoryview(bytearray(1000)))
            more = interrupted(stream.close, moment)
            stream.close()
            worker.close()
            # Although the stream still exists. The server closes its end meanwhile.
            wait_until(lambda before=before: descriptors() <= before, f"the descriptors, after moment {moment}")
            moment += 1
    assert moment > 10


@ucx
@pytest.mark.usefixtures("_collects_nothing")
def test_closed_connection_ends_without_a_collection_of_garbage() -> None:
    with serving("ucx") as server, UcxWorker(True) as worker:
        ref = server.put_bytes(b"payload")
        connection = Connection.open(ref.endpoints[0], ref.producer, None, Deadline.after(20), worker=worker)
        connection.stat(Deadline.after(20))
        stream = weakref.ref(connection._stream)  # noqa: SLF001
        connection.close()
        del connection
        # A stream whose close was interrupted has an endpoint, which keeps its worker and eight descriptors.
        assert stream() is None


@ucx
@pytest.mark.usefixtures("_collects_nothing")
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # of a socket whose owner the exception has ended
def test_search_for_listening_sockets_that_an_exception_interrupts_anywhere_keeps_no_descriptor() -> None:
    moment, more = 1, True
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        while more:
            before = descriptors()
            more = interrupted(lambda: ucx_sockets.listening_socket(port).close(), moment)
            assert descriptors() == before, moment
            moment += 1
    assert moment > 10


@direct
@pytest.mark.usefixtures("_collects_nothing")
def test_handshake_that_an_exception_interrupts_anywhere_keeps_no_descriptor() -> None:
    places = connecting.__file__, contextlib.__file__
    moment, more = 1, True
    while more:
        # In another process: a server keeps what the client of an interrupted handshake has sent, until that ends,
        # and lets one process attach so many times only.
        with Child(SERVER, slots=1, slot_bytes=100, options={"lane": "shm"}) as server:
            server.receive()
            ref = reference(server.ask([1, 100]))

            def connect(ref: PayloadRef = ref) -> None:
                connection = Connection.open(ref.endpoints[0], ref.producer, None, Deadline.after(20), attach_as=0)
                assert connection.attachment is not None
                connection.close()

            last = moment + MAX_ATTACHMENTS_OF_PROCESS
            while more and moment < last:
                before = descriptors()
                more = interruptions.interrupted(places, connect, moment)
                assert descriptors() == before, moment
                moment += 1
    assert moment > 10
