"""Messages to a ucx server under unknown tags, or longer than any of the protocol, leave nothing in the server."""

import mmap
import secrets
from collections.abc import Iterator

import pytest
from transport_fixtures import SERVER, Child, Footprint, reference
from waiting import wait_until

from dray import PayloadClient, PayloadRef
from dray.clock import Deadline
from dray.protocol.frames import Payload
from dray.protocol.handshake import ClientHandshake
from dray.transport.lanes import UCX, parse_endpoint
from dray.transport.lanes.ucx import UcxStream
from dray.transport.lanes.ucx_worker import UCXX_AVAILABLE, UcxWorker

pytestmark = pytest.mark.skipif(not UCXX_AVAILABLE, reason="ucxx is not installed")

MAP_NORESERVE = 0x4000
STRAY_BYTES, STRAYS = 4096, 10_000
MEGABYTES_LEFT = 12


@pytest.fixture
def server() -> Iterator[Child]:
    with Child(SERVER, slots=4, slot_bytes=1 << 16, options={"lane": ["ucx"], "threads": 1}) as child:
        child.receive()
        yield child


def stream_to(worker: UcxWorker, ref: PayloadRef) -> UcxStream:
    """A connection whose two ends have exchanged their tags."""
    endpoint = parse_endpoint(ref.endpoints[0])
    stream = UCX.connect(endpoint, Deadline.after(20), worker)
    stream.send([ClientHandshake(UCX).hello()])
    wait_until(lambda: worker.progress() or (stream.flush() and stream.receive(128)), "CHALLENGE")
    return stream


def test_w4_messages_longer_than_memory_end_only_their_connection(server: Child) -> None:
    ref = reference(server.ask([1, 100]))
    worker = UcxWorker(True)
    with mmap.mmap(-1, 1 << 42, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE) as endless:
        stream = stream_to(worker, ref)
        for _ in range(3):
            assert stream.peer_tag is not None
            stream.send([Payload(memoryview(endless), stream.peer_tag)])
        wait_until(lambda: worker.progress() or server.ask("statistics")["open_connections"] == 0, "it to end")
        stream.close()
        worker.close()
    assert server.ask("statistics")["server"]["malformed"] == 1
    with PayloadClient(lane="ucx") as client:
        assert client.read_bytes(ref, timeout=10).nbytes == 100


def test_w4_messages_under_unknown_tags_are_dropped(server: Child) -> None:
    ref = reference(server.ask([1, 100]))
    worker = UcxWorker(True)
    stream = stream_to(worker, ref)
    with PayloadClient(lane="ucx") as client:
        client.read_bytes(ref, timeout=10, consume=False)
        before = Footprint.of(server.pid).megabytes
        for _ in range(STRAYS // 100):
            stream.send([Payload(memoryview(bytearray(STRAY_BYTES)), secrets.randbits(64)) for _ in range(100)])
            wait_until(lambda: worker.progress() or stream.flush(), "them to be sent")
            # UCX keeps the memory of the longest queue that there was. So the server, which may get its turn late,
            # answers a request before more are sent.
            client.read_bytes(ref, timeout=10, consume=False)
        assert client.read_bytes(ref, timeout=10).nbytes == 100
        assert STRAYS * STRAY_BYTES >> 20 > 3 * MEGABYTES_LEFT
        wait_until(lambda: Footprint.of(server.pid).megabytes < before + MEGABYTES_LEFT, "them to be dropped")
        assert server.ask("statistics")["server"]["malformed"] == 0
    stream.close()
    worker.close()
