"""Faults C1, C3 to C5, W2, W3, W8, W10, B2, B5 and B6 of docs/reference/failure-modes.md, over each lane.

Servers that misbehave, with dray's own streams and handshake, stand beside one that does not.
"""

import concurrent.futures
import contextlib
import dataclasses
import gc
import itertools
import logging
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from transport_fixtures import endpoint_of, pattern, ring_of
from transport_fixtures import over_connections as serving
from waiting import wait_until

from dray import PayloadClient, PayloadRef, PayloadServer
from dray.clock import Deadline
from dray.errors import (
    ConnectionClosed,
    ConnectionReset,
    MessageTruncated,
    PayloadTooLargeError,
    ProtocolError,
    SchemaError,
    StaleSlotError,
    TransportError,
    TransportTimeout,
    Unreachable,
)
from dray.payload import PayloadSchema, TensorSpec
from dray.protocol.frames import FRAME_BYTES, Flag, Frame, Kind, Outgoing, Payload, Status, parse
from dray.protocol.handshake import ServerHandshake, ServerIdentity
from dray.transport.connection import Connection
from dray.transport.lanes.base import Network, Stream
from dray.transport.lanes.socket import TcpListener, UnixListener
from dray.transport.lanes.ucx import UcxListener
from dray.transport.lanes.ucx_worker import UcxWorker
from dray.transport.polling import CloseEvent
from dray.transport.receive_buffers import ReceiveBuffers

BAND = ("tcp", "ucx")
_numbers = itertools.count()


class Hangup(Exception):
    """Close the connection."""


Behaviour = Callable[["Misbehaving", Stream, Frame], Sequence[Outgoing]]


class Misbehaving:
    """Shakes hands as the server of `good` would, and answers READ with its behaviour.

    Attributes:
        endpoint: where it listens.
        tried: connections that came.
        go: for behaviours that wait for the test.
    """

    def __init__(self, lane: str, good: PayloadServer, behaviour: Behaviour, slow: float = 0.0) -> None:
        ring = ring_of(good)
        self._identity = ServerIdentity(ring.producer_id, ring.slots, ring.slot_bytes, 8, ring.readers)
        self._segment = ring.segment.fileno()
        self._behaviour = behaviour
        self._slow = slow
        self._worker = UcxWorker(True) if lane == "ucx" else None
        self._listener: Any
        if self._worker is not None:
            self._listener = UcxListener(self._worker, "127.0.0.1")
        elif lane == "tcp":
            self._listener = TcpListener("127.0.0.1")
        else:
            self._listener = UnixListener(Path(os.environ["DRAY_RUNTIME_DIR"]) / f"bad-{next(_numbers)}.sock")
        self.endpoint: str = self._listener.endpoint
        self.tried = 0
        self.go = threading.Event()
        self.ended = threading.Event()
        self._streams: dict[Stream, ServerHandshake] = {}
        self._thread = threading.Thread(target=self._run)

    def wait(self, seconds: float) -> None:
        """Be slow, unless the test has ended."""
        self.ended.wait(seconds)

    def __enter__(self) -> "Misbehaving":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.go.set()
        self._thread.join(20)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while not self.ended.is_set():
                self._wait_for_something()
                for stream in self._accepted():
                    self.tried += 1
                    self.wait(self._slow)
                    self._streams[stream] = ServerHandshake(stream.lane, self._identity)
                for stream in list(self._streams):
                    try:
                        self._serve(stream)
                    except (Hangup, TransportError):
                        del self._streams[stream]
                        stream.close()
        finally:
            for stream in self._streams:
                stream.close()
            self._listener.close()
            if self._worker is not None:
                self._worker.close()

    def _accepted(self) -> Iterator[Stream]:
        while True:
            try:
                stream = self._listener.accept()
            except TransportError:  # it has gone meanwhile
                continue
            if stream is None:
                return
            yield stream

    def _wait_for_something(self) -> None:
        if self._worker is not None:
            self._worker.progress()
        poll = select.poll()
        for each in (*self._streams, *(() if self._worker else (self._listener,))):
            if each is self._listener or each.idle():
                poll.register(each.fileno(), select.POLLIN)
        if self._worker is not None:
            poll.register(self._worker.fileno(), select.POLLIN)
        poll.poll(5)

    def _serve(self, stream: Stream) -> None:
        handshake = self._streams[stream]
        stream.flush()
        while (message := stream.receive(FRAME_BYTES if handshake.done else handshake.expects)) is not None:
            if handshake.done:
                frame = parse(message)
                if frame.kind == Kind.READ:
                    self._send(stream, self._behaviour(self, stream, frame))
                continue
            answer = handshake.receive(message)
            shared = handshake.done and stream.lane.name == "shm"
            self._send(stream, [answer], [self._segment] if shared else ())

    def _send(self, stream: Stream, items: Sequence[Outgoing], descriptors: Sequence[int] = ()) -> None:
        stream.send(items, descriptors)
        deadline = Deadline.after(5)
        while not stream.flush() and not self.ended.is_set():
            assert not deadline.expired
            self._wait_for_something()


def status(frame: Frame, nbytes: int, offset: int = 0, checksum: int | None = None) -> bytes:
    flags = Flag.NONE if checksum is None else Flag.CHECKSUM
    answer = frame._replace(kind=Kind.STATUS, status=Status.OK, flags=flags, nbytes=nbytes, offset=offset)
    return answer._replace(checksum=checksum or 0).pack()


NBYTES = 1 << 20


def silent(bad: Misbehaving, stream: Stream, frame: Frame) -> Sequence[Outgoing]:
    return []


def closed(bad: Misbehaving, stream: Stream, frame: Frame) -> Sequence[Outgoing]:
    raise Hangup


def reset(bad: Misbehaving, stream: Any, frame: Frame) -> Sequence[Outgoing]:
    with socket.socket(fileno=os.dup(stream.fileno())) as duplicate:
        duplicate.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raise Hangup


def half_and_closed(bad: Misbehaving, stream: Any, frame: Frame) -> Sequence[Outgoing]:
    stream.send([status(frame, NBYTES)])
    if stream.lane.name == "tcp":
        stream.send([Payload(memoryview(bytes(NBYTES // 2)), frame.tag)])
    stream.flush()
    raise Hangup


def half(bad: Misbehaving, stream: Any, frame: Frame) -> Sequence[Outgoing]:
    sent = pattern(2, NBYTES // 2)
    digest = xxhash.xxh3_64(sent)
    for _ in range(NBYTES // 2 // 1024):  # the whole is never in memory, where the reader might find it
        digest.update(b"\x5a" * 1024)
    return [status(frame, NBYTES, checksum=digest.intdigest()), Payload(memoryview(sent), frame.tag)]


def with_a_change_at(place: int | None) -> Behaviour:
    """Sends a payload that arrives in many parts, one byte of which is another one than its checksum covers."""

    def behaviour(bad: Misbehaving, stream: Stream, frame: Frame) -> Sequence[Outgoing]:
        sent = bytearray(pattern(2, NBYTES))
        checksum = xxhash.xxh3_64_intdigest(sent)
        if place is not None:
            sent[place] ^= 1
        return [status(frame, NBYTES, checksum=checksum), Payload(memoryview(sent), frame.tag)]

    return behaviour


def announces_less(bad: Misbehaving, stream: Stream, frame: Frame) -> Sequence[Outgoing]:
    return [status(frame, NBYTES // 2), Payload(memoryview(bytes(NBYTES // 2)), frame.tag)]


def announces_more(bad: Misbehaving, stream: Stream, frame: Frame) -> Sequence[Outgoing]:
    return [status(frame, NBYTES * 2), Payload(memoryview(bytes(NBYTES * 2)), frame.tag)]


def sends_more(bad: Misbehaving, stream: Stream, frame: Frame) -> Sequence[Outgoing]:
    return [status(frame, NBYTES), Payload(memoryview(bytes(NBYTES * 2)), frame.tag)]


def late(bad: Misbehaving, stream: Stream, frame: Frame) -> Sequence[Outgoing]:
    bad.go.wait(20)
    return [status(frame, NBYTES), Payload(memoryview(b"\xff" * NBYTES), frame.tag)]


def served(lane: Any, slots: int = 4) -> Any:
    return serving(lane, slots=slots, slot_bytes=NBYTES)


def at(ref: PayloadRef, *endpoints: str) -> PayloadRef:
    return dataclasses.replace(ref, endpoints=endpoints)


# --- C1, C3, W2 -------------------------------------------------------------------------------------------------

FAILURES = [
    ("shm", silent, TransportTimeout),
    ("tcp", silent, TransportTimeout),
    ("ucx", silent, TransportTimeout),
    ("shm", closed, (ConnectionClosed, ConnectionReset)),
    ("tcp", closed, (ConnectionClosed, ConnectionReset)),
    ("ucx", closed, (ConnectionClosed, ConnectionReset)),  # the posted receive is cancelled
    ("tcp", reset, ConnectionReset),
    ("tcp", half_and_closed, MessageTruncated),
    ("ucx", half_and_closed, (MessageTruncated, ConnectionClosed, ConnectionReset)),
]


@pytest.mark.parametrize(("lane", "behaviour", "kind"), FAILURES)
def test_c1_a_transport_failure_is_typed_quarantined_and_read_elsewhere(
    lane: Any, behaviour: Behaviour, kind: Any
) -> None:
    with served(lane) as good, Misbehaving(lane, good, behaviour) as bad:
        ref = good.put_bytes(pattern(1, NBYTES))
        with PayloadClient(lane=lane) as alone:
            deadline = Deadline.after(10)
            with pytest.raises(kind) as caught:
                alone.read_bytes(at(ref, bad.endpoint), timeout=0.4 if behaviour is silent else 10)
            assert not deadline.expired
            assert caught.value.retryable
            assert alone.statistics().quarantined == (bad.endpoint,)
        with PayloadClient(lane=lane) as client:
            for _ in range(4):
                found = client.read_bytes(at(ref, bad.endpoint, *good.endpoints), timeout=2, consume=False)
                assert memoryview(found) == pattern(1, NBYTES)
            assert client.statistics().quarantined == (bad.endpoint,)
            assert client.statistics().retries == 1


@pytest.mark.parametrize("lane", BAND)
@pytest.mark.parametrize("place", [0, NBYTES // 2, NBYTES - 1])
def test_w3_a_byte_that_changed_anywhere_in_a_large_payload_is_noticed(lane: Any, place: int) -> None:
    with served(lane) as good, Misbehaving(lane, good, with_a_change_at(place)) as bad:
        ref = good.put_bytes(pattern(2, NBYTES))
        with PayloadClient(lane=lane) as client, pytest.raises(MessageTruncated, match="checksum"):
            client.read_bytes(at(ref, bad.endpoint), timeout=10)


@pytest.mark.parametrize("lane", BAND)
def test_a_large_payload_that_arrives_in_parts_has_the_checksum_of_the_whole(lane: Any) -> None:
    with served(lane) as good, Misbehaving(lane, good, with_a_change_at(None)) as bad:
        ref = good.put_bytes(pattern(1, NBYTES))
        with PayloadClient(lane=lane) as client:
            assert memoryview(client.read_bytes(at(ref, bad.endpoint), timeout=10)) == pattern(2, NBYTES)


@pytest.mark.parametrize("endpoint", ["unix:/nowhere/0.sock", "tcp:127.0.0.1:1", "ucx:127.0.0.1:1"])
def test_c1_an_endpoint_that_cannot_be_reached_is_quarantined_and_read_elsewhere(lane: Any, endpoint: str) -> None:
    with served(lane) as good, PayloadClient() as client:
        ref = good.put_bytes(pattern(1, NBYTES))
        for _ in range(4):
            found = client.read_bytes(at(ref, endpoint, *good.endpoints), timeout=5, consume=False)
            assert memoryview(found) == pattern(1, NBYTES)
        assert set(client.statistics().quarantined) <= {endpoint}
        assert client.statistics().retries <= 1


def test_unix_sockets_of_another_host_are_no_failures_where_another_lane_serves(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "dray.client")
    with serving(("shm", "tcp"), threads=2) as server, PayloadClient() as client:
        ref = server.put_bytes(b"payload")
        far = [f"unix:/tmp/dray-1000/5a0ee7c2/{n}.sock" for n in range(2)]
        ref = at(ref, *far, *(endpoint for endpoint in server.endpoints if not endpoint.startswith("unix:")))
        for _ in range(4):
            assert bytes(client.read_bytes(ref, timeout=10, consume=False)) == b"payload"
        statistics = client.statistics()
        assert (statistics.reads_by_lane, statistics.elsewhere) == ({"tcp": 4}, 2)
        assert (statistics.retries, statistics.quarantined) == (0, ())
    assert [record for record in caplog.records if record.name == "dray.client"] == []


def test_a_socket_missing_from_a_folder_of_this_host_is_a_failure() -> None:
    with serving(("shm", "tcp"), threads=2) as server, PayloadClient() as client:
        ref = server.put_bytes(b"payload")
        socket_path = Path(endpoint_of(server, "shm").host)
        socket_path.unlink()
        for _ in range(2):
            assert bytes(client.read_bytes(ref, timeout=10, consume=False)) == b"payload"
        statistics = client.statistics()
        assert (statistics.reads_by_lane, statistics.retries_by_cause) == ({"shm": 2}, {"unreachable": 1})
        assert statistics.quarantined == (f"unix:{socket_path}",)


@pytest.mark.parametrize(
    ("behaviour", "cause"), [(silent, "timeout"), (reset, "reset"), (half_and_closed, "truncated")]
)
def test_a_retry_is_counted_by_its_cause_and_logged_with_endpoint_cause_and_next_attempt(
    behaviour: Behaviour, cause: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "dray.client")
    with served("tcp") as good, Misbehaving("tcp", good, behaviour) as bad:
        (healthy,) = good.endpoints
        ref = at(good.put_bytes(pattern(1, NBYTES)), bad.endpoint, healthy)
        with PayloadClient(lane="tcp", quarantine_seconds=0.001) as client:
            for _ in range(4):  # every other one begins with the endpoint that fails
                client.read_bytes(ref, timeout=1, consume=False)
            statistics = client.statistics()
        assert (statistics.retries, statistics.retries_by_cause) == (2, {cause: 2})
        logged = [record for record in caplog.records if record.getMessage().startswith("attempt at")]
        assert [record.levelname for record in logged] == ["WARNING", "DEBUG"]
        for record, seconds in zip(logged, ("0.001", "0.002"), strict=True):
            message = record.getMessage()
            assert message.startswith(f"attempt at {bad.endpoint} failed: ")
            assert message.endswith(f"; quarantine: {seconds} s; next attempt: {healthy}")


def test_a_request_that_uses_up_all_its_time_is_not_a_retry_and_raises_its_own_error() -> None:
    with (
        served("tcp") as good,
        Misbehaving("tcp", good, silent) as bad,
        PayloadClient(lane="tcp", attempts=1) as client,
    ):
        ref = at(good.put_bytes(pattern(1, NBYTES)), bad.endpoint, *good.endpoints)
        with pytest.raises(TransportTimeout, match="waiting for STATUS") as caught:
            client.consume([ref], timeout=0.3)
        assert caught.value.endpoint == bad.endpoint
        assert client.statistics().retries == 0
        assert client.statistics().quarantined == (bad.endpoint,)


def test_c1_a_reference_without_an_endpoint_on_the_lane_is_unreachable() -> None:
    with serving("tcp") as server, PayloadClient(lane="shm") as client:
        with pytest.raises(Unreachable):
            client.read_bytes(server.put_bytes(b"x"), timeout=1)


def test_c3_the_second_endpoint_that_fails_is_quarantined_as_well(lane: Any) -> None:
    with served(lane) as good, Misbehaving(lane, good, closed) as one, Misbehaving(lane, good, closed) as two:
        ref = good.put_bytes(pattern(1, NBYTES))
        three = at(ref, one.endpoint, two.endpoint, *good.endpoints)
        with PayloadClient(lane=lane) as client:
            with pytest.raises(TransportError):
                client.read_bytes(at(ref, one.endpoint, two.endpoint), timeout=2)
            assert set(client.statistics().quarantined) == {one.endpoint, two.endpoint}
            for _ in range(3):
                assert client.read_bytes(three, timeout=2, consume=False).nbytes == NBYTES
            assert (one.tried, two.tried, client.statistics().retries) == (1, 1, 1)


@pytest.mark.parametrize("name", BAND)
def test_w2_a_failure_after_status_ok_gives_no_bytes_and_leaves_the_payload(name: Any) -> None:
    with (
        served(name) as good,
        Misbehaving(name, good, half_and_closed) as bad,
        PayloadClient(lane=name) as client,
    ):
        refs = [good.put_bytes(pattern(seed, NBYTES)) for seed in range(3)]
        with pytest.raises(TransportError):
            client.read_bytes(at(refs[0], bad.endpoint), timeout=2)
        outcomes = client.read_many([at(ref, bad.endpoint) for ref in refs], timeout=2, return_errors=True)
        assert all(isinstance(outcome.error, TransportError) for outcome in outcomes)
        assert client.statistics().reads == 0
        for seed, ref in enumerate(refs):
            assert memoryview(client.read_bytes(ref, timeout=5)) == pattern(seed, NBYTES)


def test_w2_a_slot_whose_lease_may_have_ended_while_it_was_copied_is_not_handed_out() -> None:
    """On shm nothing follows STATUS(ok); what can fail is the connection that holds the lease."""
    gone = threading.Event()

    def hangs_up(bad: Misbehaving, stream: Stream, frame: Frame) -> Sequence[Outgoing]:
        stream.send([status(frame, NBYTES, offset=ring_of(good).segment.slot_offset(frame.slot))])
        stream.flush()
        stream.close()
        gone.set()
        raise Hangup

    with served("shm") as good, Misbehaving("shm", good, hangs_up) as bad:
        ref = good.put_bytes(pattern(1, NBYTES))
        deadline = Deadline.after(10)
        connection = Connection.open(bad.endpoint, ref.producer, None, deadline)
        (target,) = connection.ask([ref], 0, deadline)
        assert gone.wait(10)
        held: Any = connection.answer(target, deadline, deadline)
        with pytest.raises(TransportError):
            connection.finish(held, True, deadline)
        assert connection.unconfirmed == []
        connection.close()
        del held


# --- W3 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BAND)
@pytest.mark.parametrize(
    ("behaviour", "kind"),
    [
        (half, (MessageTruncated, TransportTimeout)),
        (announces_less, ProtocolError),
        (announces_more, ProtocolError),
    ],
)
def test_w3_a_payload_of_another_length_is_never_handed_out(name: Any, behaviour: Behaviour, kind: Any) -> None:
    with served(name) as good, Misbehaving(name, good, behaviour) as bad, PayloadClient(lane=name) as client:
        ref = good.put_bytes(pattern(1, NBYTES))
        with pytest.raises(kind):
            client.read_bytes(at(ref, bad.endpoint), timeout=2)
        assert memoryview(client.read_bytes(ref, timeout=5)) == pattern(1, NBYTES)


def test_w3_a_longer_message_than_announced_is_truncated_on_ucx() -> None:
    with served("ucx") as good, Misbehaving("ucx", good, sends_more) as bad, PayloadClient(lane="ucx") as client:
        ref = good.put_bytes(pattern(1, NBYTES))
        with pytest.raises(MessageTruncated):
            client.read_bytes(at(ref, bad.endpoint), timeout=2)
        assert memoryview(client.read_bytes(ref, timeout=5)) == pattern(1, NBYTES)


def test_w3_an_offset_outside_of_the_slot_is_a_protocol_error() -> None:
    def elsewhere(bad: Misbehaving, stream: Stream, frame: Frame) -> Sequence[Outgoing]:
        return [status(frame, NBYTES, offset=64)]

    with served("shm") as good, Misbehaving("shm", good, elsewhere) as bad, PayloadClient(lane="shm") as client:
        ref = good.put_bytes(pattern(1, NBYTES))
        with pytest.raises(ProtocolError):
            client.read_bytes(at(ref, bad.endpoint), timeout=2)


# --- C4 ---------------------------------------------------------------------------------------------------------


def test_c4_one_deadline_bounds_a_slow_connect_a_slow_status_and_a_slow_payload(lane: Any) -> None:
    """Each step takes less than the deadline, all of them together more."""

    def slow(bad: Misbehaving, stream: Stream, frame: Frame) -> Sequence[Outgoing]:
        bad.wait(0.3)
        if bad.tried > 1:  # the last attempt: STATUS comes in time, its payload does not
            stream.send([status(frame, NBYTES, offset=0)])
            stream.flush()
            bad.wait(0.6)
        return []

    with served(lane) as good, Misbehaving(lane, good, slow, slow=0.3) as bad, PayloadClient(lane=lane) as client:
        ref = good.put_bytes(pattern(1, NBYTES))
        promised = Deadline.after(0.8 + 0.5)
        with pytest.raises((TransportTimeout, ProtocolError)):
            client.read_bytes(at(ref, bad.endpoint), timeout=0.8)
        assert not promised.expired


def test_c4_a_payload_that_trickles_ends_with_the_deadline() -> None:
    def trickle(bad: Misbehaving, stream: Stream, frame: Frame) -> Sequence[Outgoing]:
        stream.send([status(frame, NBYTES)])
        for _ in range(200):
            stream.send([Payload(memoryview(bytes(1000)), 0)])
            stream.flush()
            bad.wait(0.02)
        return []

    with served("tcp") as good, Misbehaving("tcp", good, trickle) as bad, PayloadClient(lane="tcp") as client:
        ref = good.put_bytes(pattern(1, NBYTES))
        promised = Deadline.after(0.5 + 0.5)
        with pytest.raises(TransportTimeout):
            client.read_bytes(at(ref, bad.endpoint), timeout=0.5)
        assert not promised.expired


# --- C5 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BAND)
def test_c5_memory_of_a_failed_read_comes_back_and_is_not_written_afterwards(name: Any) -> None:
    buffers = ReceiveBuffers()

    class NetworkWithBuffers(Network):
        def receive_buffers(self) -> ReceiveBuffers:
            return buffers

    network = NetworkWithBuffers(CloseEvent())
    with (
        served(name) as good,
        Misbehaving(name, good, late) as bad,
        PayloadClient(lane=name, network=network) as client,
    ):
        ref = good.put_bytes(pattern(1, NBYTES))
        for _ in range(3):
            with pytest.raises(TransportTimeout):
                client.read_bytes(at(ref, bad.endpoint), timeout=0.2)
        gc.collect()
        found = [client.read_bytes(ref, timeout=5, consume=False) for _ in range(4)]
        bad.go.set()  # what was asked for before comes now
        wait_until(lambda: bad.tried, "the server to have been tried")
        again = client.read_bytes(ref, timeout=5, consume=False)
        for data in (*found, again):
            assert memoryview(data) == pattern(1, NBYTES)
        del found, again, data
        gc.collect()
        assert buffers.free_bytes >= 4 * NBYTES


# --- W8, C14 ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def first_thread_wedged(server: PayloadServer) -> Iterator[str]:
    """The first thread of a server hangs for the length of the block; its endpoint."""
    loop: Any = server.loops[0]
    wedged, free = threading.Event(), threading.Event()

    def hang() -> None:
        wedged.set()
        free.wait(60)

    loop.connections.sweep = hang
    try:
        loop.wake()
        assert wedged.wait(10)
        yield str(loop.endpoints[0])
    finally:
        del loop.connections.sweep
        free.set()


def test_w8_a_wedged_thread_is_quarantined_and_the_others_serve_every_slot(lane: Any) -> None:
    with (
        serving(lane, threads=2, slots=40) as server,
        first_thread_wedged(server) as endpoint,
        PayloadClient(lane=lane, quarantine_seconds=1000) as client,
    ):
        for number in range(40):
            ref = server.put_bytes(bytes([number]))
            promised = Deadline.after(1.0 + 0.5)
            assert bytes(client.read_bytes(ref, timeout=1.0)) == bytes([number])
            assert not promised.expired
        assert client.statistics().quarantined == (endpoint,)
        assert client.statistics().retries == 1


@pytest.mark.parametrize("name", ["shm", "tcp"])
def test_wedged_thread_of_four_costs_no_more_than_what_healthy_answers_take(name: Any) -> None:
    """Without a deadline, half of the time would be unlimited."""
    with (
        serving(name, threads=4, slots=8) as server,
        PayloadClient(lane=name) as client,
        concurrent.futures.ThreadPoolExecutor(1) as thread,
    ):
        for number in range(4):
            client.read_bytes(server.put_bytes(bytes([number])), timeout=10)
        with first_thread_wedged(server) as endpoint:
            refs = [server.put_bytes(bytes([number])) for number in range(8)]
            found = [
                thread.submit(client.read_bytes, refs[0], timeout=None),
                thread.submit(client.read_bytes, refs[1], timeout=None, consume=False),
                thread.submit(client.consume, refs[1:4], timeout=None),
                thread.submit(client.stat, refs[0], timeout=None),
                thread.submit(lambda: {r.ref: r.payload for r in client.read_many_bytes(refs[4:], timeout=None)}),
            ]
            results = [each.result(20) for each in found]
            assert (bytes(results[0]), bytes(results[1]), results[2]) == (b"\0", b"\1", 3)
            assert {ref: bytes(read) for ref, read in results[4].items()} == {
                ref: bytes([number]) for number, ref in enumerate(refs) if number >= 4
            }
            assert client.statistics().quarantined == (endpoint,)
            assert client.statistics().retries_by_cause["timeout"] == 1


def test_each_kind_of_request_leaves_a_wedged_thread_for_another() -> None:
    """Also over a connection that stood before."""
    with serving("tcp", threads=2, slots=4) as server, concurrent.futures.ThreadPoolExecutor(4) as threads:
        refs = [server.put_bytes(bytes([number])) for number in range(4)]
        with contextlib.ExitStack() as opened:
            clients = [opened.enter_context(PayloadClient(lane="tcp")) for _ in range(4)]
            for client in clients:
                for _ in range(2):
                    client.read_bytes(refs[0], timeout=10, consume=False)
            with first_thread_wedged(server):
                asked = (
                    lambda: bytes(clients[0].read_bytes(refs[0], timeout=None)),
                    lambda: clients[1].consume(refs[1:2], timeout=None),
                    lambda: clients[2].stat(refs[0], timeout=None).open_connections > 0,
                    lambda: [bytes(read.payload) for read in clients[3].read_many_bytes(refs[2:], timeout=None)],
                )
                found = [each.result(20) for each in [threads.submit(ask) for ask in asked]]
                assert found == [b"\0", 1, True, [b"\2", b"\3"]]
                assert [client.statistics().retries_by_cause["timeout"] for client in clients] == [1] * 4


# --- W10 --------------------------------------------------------------------------------------------------------


def test_w10_connections_to_one_thread_never_get_each_others_messages(lane: Any) -> None:
    """Eight readers at once, while others abort their reads halfway."""
    count, nbytes = 8, 100_000
    with serving(lane, slots=count, slot_bytes=nbytes) as server:
        refs = [server.put_bytes(pattern(seed, nbytes)) for seed in range(count)]
        wrong: list[object] = []
        over = threading.Event()

        def read(index: int) -> None:
            try:
                with PayloadClient(lane=lane) as client:
                    for turn in range(40):
                        seed = (index + turn) % count
                        data = client.read_bytes(refs[seed], timeout=20, consume=False)
                        if memoryview(data) != pattern(seed, nbytes):
                            wrong.append((index, turn))
            except BaseException as error:
                wrong.append(error)
                raise

        def abort() -> None:
            worker = UcxWorker(True) if lane == "ucx" else None
            endpoint = str(endpoint_of(server, lane))
            for turn in itertools.count():
                if over.is_set():
                    break
                deadline = Deadline.after(20)
                connection = Connection.open(endpoint, refs[0].producer, None, deadline, worker=worker)
                connection.ask([refs[turn % count], refs[(turn + 3) % count]], 0, deadline)
                connection.close()
            if worker is not None:
                worker.close()

        readers = [threading.Thread(target=read, args=(index,)) for index in range(count)]
        aborting = threading.Thread(target=abort)
        for thread in (*readers, aborting):
            thread.start()
        for thread in readers:
            thread.join(60)
        over.set()
        aborting.join(60)
        assert wrong == []
        wait_until(lambda: ring_of(server).statistics().leases == 0, "the aborted reads' leases to end")
        assert ring_of(server).get_ready_count() == count


# --- B2, B5, B6 over connections --------------------------------------------------------------------------------


def test_b2_a_payload_that_cannot_be_put_leaves_its_slot_free(lane: Any) -> None:
    schema = PayloadSchema({"a": TensorSpec("F32", (None, 2)), "b": TensorSpec("I64", ())})

    class Breaks:
        dtype, shape, ndim, nbytes = np.dtype(np.float32), (1, 2), 2, 8

        def __array__(self, *_: Any, **__: Any) -> Any:
            raise ZeroDivisionError

    good = {"a": np.ones((3, 2), np.float32), "b": 1}
    with serving(lane, slots=1, slot_bytes=4096) as server, PayloadClient(lane=lane) as client:
        for arrays, error in (
            ({"a": good["a"]}, SchemaError),
            ({**good, "a": np.ones((3, 3), np.float32)}, SchemaError),
            ({**good, "a": np.ones((9999, 2), np.float32)}, PayloadTooLargeError),
            ({**good, "a": Breaks()}, Exception),
        ):
            with pytest.raises(error):
                server.put(arrays, schema=schema, timeout=1)
            assert ring_of(server).statistics().free == 1
        ref = server.put(good, schema=schema, timeout=1)
        assert client.read(ref, timeout=5)["a"].tolist() == [[1, 1]] * 3


def test_b5_a_slot_is_not_reused_until_both_connections_have_ended_their_leases(lane: Any) -> None:
    nbytes = 1000
    with serving(lane, slots=1, slot_bytes=nbytes) as server:
        ref = server.put_bytes(pattern(1, nbytes))
        workers = [UcxWorker(True) if lane == "ucx" else None for _ in range(2)]
        endpoint = str(endpoint_of(server, lane))
        deadline = Deadline.after(20)
        connections = [
            Connection.open(endpoint, ref.producer, None, deadline, worker=worker) for worker in workers
        ]
        held: list[Any] = []
        for connection in connections:
            (target,) = connection.ask([ref], 0, deadline)
            held.append(connection.answer(target, deadline, deadline))
        connections[0].acknowledge([(held[0].request, True)], deadline)
        connections[0].stat(deadline)
        assert (
            not ring_of(server).wait_consumed(ref.slot, ref.sequence, 0) or ring_of(server).statistics().free == 0
        )
        assert ring_of(server).statistics().free == 0
        assert memoryview(held[1].data()) == pattern(1, nbytes)
        with PayloadClient(lane=lane) as late_reader, pytest.raises(StaleSlotError):
            late_reader.read_bytes(ref, timeout=5)
        connections[1].acknowledge([(held[1].request, False)], deadline)
        connections[1].stat(deadline)
        assert ring_of(server).statistics().free == 1
        for connection in connections:
            connection.close()
        held.clear()
        for worker in filter(None, workers):
            worker.close()


def test_b6_references_that_fit_no_slot_are_clean_answers_on_one_connection(lane: Any) -> None:
    with serving(lane) as server, PayloadClient(lane=lane) as client:
        ref = server.put_bytes(b"payload")
        for wrong in (
            dataclasses.replace(ref, sequence=ref.sequence + 1),
            dataclasses.replace(ref, sequence=2**64 - 1),
            dataclasses.replace(ref, slot=ref.slot + 1),
            dataclasses.replace(ref, slot=10_000),
            dataclasses.replace(ref, slot=2**32 - 1),
        ):
            with pytest.raises(StaleSlotError):
                client.read_bytes(wrong, timeout=5)
            assert client.consume([wrong], timeout=5) == 0
        assert bytes(client.read_bytes(ref, timeout=5)) == b"payload"
        assert client.statistics().connects == 1
        assert client.statistics().quarantined == ()
