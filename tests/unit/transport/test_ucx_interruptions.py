"""A signal handler may raise while UCX objects begin or end: they close, and no descriptor stays open."""

import functools
import gc
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

import interruptions
import pytest
from transport_fixtures import endpoint_of, serving
from waiting import wait_until

import dray.transport
from dray.clock import Deadline
from dray.transport.connection import Connection
from dray.transport.lanes import UCX, ucx_sockets
from dray.transport.lanes.ucx_worker import UCXX_AVAILABLE, UcxWorker

pytestmark = pytest.mark.skipif(not UCXX_AVAILABLE, reason="ucxx is not installed")

interrupted = functools.partial(interruptions.interrupted, Path(dray.transport.__file__).parent)


@pytest.fixture
def _collects_nothing() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


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


@pytest.mark.usefixtures("_collects_nothing")
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # of a socket whose owner the exception has ended
def test_search_for_listening_sockets_that_an_exception_interrupts_anywhere_keeps_no_descriptor() -> None:
    moment, more = 1, True
    with serving("ucx") as server:
        port = endpoint_of(server, "ucx").port
        while more:
            before = descriptors()
            more = interrupted(lambda: ucx_sockets.listening_socket(port).close(), moment)
            assert descriptors() == before, moment
            moment += 1
    assert moment > 10
