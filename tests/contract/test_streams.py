"""What the streams of every lane must do: those of the table, one that the test adds, and simulated ones."""

import contextlib
import functools
import itertools
import os
import random
import select
import signal
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from simulation import ManualClock
from simulation.faults import FaultPlan
from simulation.network import SimulatedKernel, socket_stream
from simulation.scheduler import Scheduler, Signal
from socketpair_lane import ADDED
from transport_fixtures import Child, pattern
from waiting import wait_until

from dray.clock import Deadline
from dray.errors import ConnectionClosed, ConnectionReset, MessageTruncated, TransportError
from dray.protocol.frames import Payload
from dray.transport.lanes import LANES, SHM, UCX, parse_endpoint
from dray.transport.lanes.base import ListenAt, Stream, Worker
from dray.transport.lanes.socket import UnixStream
from dray.transport.lanes.ucx import UcxStream

ALL = (*LANES, ADDED.name, *(f"simulated {name}" for name in LANES))
IN_BAND = tuple(name for name in ALL if {**LANES, ADDED.name: ADDED}[name.rpartition(" ")[2]].in_band)
SOCKETS = tuple(name for name in ALL if "ucx" not in name)
SIZES = (0, 1, 4096, 65_537, (8 << 20) + 1, 64 << 20)
_numbers = itertools.count()


@pytest.fixture(autouse=True)
def added_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lane is one module and one entry in the table."""
    monkeypatch.setitem(LANES, ADDED.name, ADDED)


class Pair:
    """Two connected streams and their workers; the client's end receives payloads."""

    def __init__(self, kind: str, stack: contextlib.ExitStack) -> None:
        self.kind = kind.rpartition(" ")[2]
        self.simulated = simulated_pair(self.kind) if kind != self.kind else None
        if self.simulated is not None:
            self.scheduler, self.workers, self.client, self.server = self.simulated
            self._check_connected(stack)
            return
        lane = LANES[kind]
        path = Path(os.environ["DRAY_RUNTIME_DIR"]) / f"{next(_numbers)}.sock"
        listener = lane.listen(ListenAt("127.0.0.1", path=path))
        address = parse_endpoint(listener.endpoint)
        mine = lane.make_worker(address)
        self.workers = [worker for worker in (mine, listener.worker) if worker is not None]
        for worker in self.workers:
            stack.callback(worker.close)
        stack.callback(listener.close)
        self.client: Stream = lane.connect(address, Deadline.after(10), mine)
        accepted: list[Stream] = []

        def accept() -> bool:
            self.progress()
            stream = listener.accept()
            if stream is not None:
                accepted.append(stream)
            return bool(accepted)

        wait_until(accept, "the connection")
        (self.server,) = accepted
        self._check_connected(stack)

    def _check_connected(self, stack: contextlib.ExitStack) -> None:
        for stream in (self.client, self.server):
            stack.callback(stream.close)
        self.client.send([b"hello"])
        assert self.until(receiving=self.server, size=5) == b"hello"
        self.sent(self.client)

    def progress(self) -> None:
        if self.simulated is not None:
            self.scheduler.run(self.scheduler.now() + 0.01, lambda: False)
        for worker in self.workers:
            worker.progress()

    def until(self, *, receiving: Stream, size: int) -> bytes:
        """The next message of `size` bytes."""
        found: list[bytes] = []

        def arrived() -> bool:
            message = receiving.receive(size)
            if message is not None:
                found.append(bytes(message))
            return bool(found)

        self.drive(arrived, f"a message of {size} bytes")
        return found[0]

    def drive(self, done: Callable[[], object], awaited: str, seconds: float = 20.0) -> None:
        """Flush and wait on both streams until `done()`."""
        turn = self._turn if self.simulated is None else self._simulated_turn
        wait_until(lambda: done() or turn(), awaited, seconds, pause=0.0)

    def _simulated_turn(self) -> None:
        for stream in (self.client, self.server):
            if stream.fileno() >= 0 and not getattr(stream, "closed", False):
                with contextlib.suppress(TransportError):
                    stream.flush()
                stream.idle()
        self.progress()

    def _turn(self) -> None:
        poll = select.poll()
        idle = True
        for stream in (self.client, self.server):
            if stream.fileno() < 0 or getattr(stream, "closed", False):
                continue
            with contextlib.suppress(TransportError):  # raised again where the test checks it
                stream.flush()
            idle = stream.idle() and idle
            poll.register(stream.fileno(), select.POLLIN | (select.POLLOUT if stream.wants_write else 0))
        for worker in self.workers:
            idle = worker.arm() and idle
        if idle:
            poll.poll(20)

    def wait_for_arrival(self, sender: Stream) -> None:
        """Wait until everything from `sender` has arrived at the other end's worker, which has not received it."""
        self.sent(sender)
        quiet, seen = 0, 0

        def still() -> bool:
            nonlocal quiet, seen
            self.progress()
            steps = sum(worker.steps for worker in self.workers)
            quiet, seen = (quiet + 1, steps) if steps == seen else (0, steps)
            return quiet > 100

        wait_until(still, "the workers to have nothing to do", pause=0.0)

    def sent(self, stream: Stream) -> None:
        self.drive(stream.flush, "everything to be sent")


def simulated_pair(kind: str) -> tuple[Scheduler, list[Worker], Stream, Stream]:
    """Two streams over the simulated kernel, which splits and delays messages and has no faults."""
    rng = random.Random(1)
    scheduler = Scheduler(rng, ManualClock())
    kernel = SimulatedKernel(scheduler, FaultPlan(rng, Counter(), kinds=()))
    here, there = kernel.process("client"), kernel.process("server")
    workers: list[Worker] = []
    if kind == "ucx":
        mine, theirs = kernel.worker(here), kernel.worker(there)
        listener = kernel.listen("ucx:127.0.0.1:1", there, theirs.signal, theirs)
        client: Stream = UcxStream(mine, kernel.connect_ucx(listener.endpoint, mine), accepted=False)
        scheduler.run(scheduler.now() + 1.0, lambda: False)
        theirs.progress()  # reports the request
        workers = [mine, theirs]
    else:
        lane = LANES[kind]
        listener = kernel.listen(f"{lane.scheme}:1", there, Signal(scheduler), None)
        client = socket_stream(kernel.connect_socket(listener, lane, here))
    server = listener.accept()
    assert server is not None
    return scheduler, workers, client, server


@pytest.fixture(params=ALL)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with contextlib.ExitStack() as stack:
        yield Pair(request.param, stack)


@pytest.fixture(params=IN_BAND)
def in_band(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """Lanes on which payloads travel."""
    with contextlib.ExitStack() as stack:
        yield Pair(request.param, stack)


def expect(pair: Pair, nbytes: int) -> tuple[bytearray, int]:
    target = bytearray(nbytes)
    return target, pair.client.expect(memoryview(target))


def test_messages_arrive_whole_and_in_order_both_ways(pair: Pair) -> None:
    for sender, receiver in ((pair.client, pair.server), (pair.server, pair.client)):
        sizes = [64, 128, 1, 8, 64, 64, 5000, 64]
        messages = [pattern(seed, size) for seed, size in enumerate(sizes)]
        sender.send(messages[:4])
        sender.send(messages[4:])
        for message in messages:
            assert pair.until(receiving=receiver, size=len(message)) == message
        pair.sent(sender)


def test_nothing_has_arrived_before_it_was_sent(pair: Pair) -> None:
    assert pair.server.receive(64) is None
    assert pair.client.receive(64) is None
    pair.client.send([b"x" * 64])
    assert pair.until(receiving=pair.server, size=64) == b"x" * 64
    assert pair.server.receive(64) is None


def test_a_message_sent_in_parts_arrives_whole(pair: Pair) -> None:
    assert pair.server.receive(64) is None
    pair.client.send([b"a" * 30])
    pair.sent(pair.client)
    pair.progress()
    assert pair.server.receive(64) is None
    pair.client.send([b"b" * 34])
    assert pair.until(receiving=pair.server, size=64) == b"a" * 30 + b"b" * 34


def test_many_small_messages_arrive(pair: Pair) -> None:
    count = 3000
    pair.client.send([number.to_bytes(64, "little") for number in range(count)])
    got = 0

    def drain() -> bool:
        nonlocal got
        while (message := pair.server.receive(64)) is not None:
            assert int.from_bytes(message, "little") == got
            got += 1
        return got == count

    pair.drive(drain, "all messages")
    pair.sent(pair.client)


@pytest.mark.parametrize("nbytes", SIZES)
def test_payloads_of_every_size_arrive_exactly(in_band: Pair, nbytes: int) -> None:
    if in_band.simulated is not None and nbytes > 1 << 24:
        pytest.skip("too large for the simulation")
    payload = pattern(nbytes, nbytes)
    target, tag = expect(in_band, nbytes)
    in_band.server.send([b"s" * 64, Payload(memoryview(payload), tag)])
    assert in_band.until(receiving=in_band.client, size=64) == b"s" * 64
    in_band.drive(lambda: in_band.client.payload_arrived(nbytes), "the payload")
    assert target == payload
    in_band.sent(in_band.server)


def test_messages_and_payloads_interleave(in_band: Pair) -> None:
    sizes = [10, 0, 300_000, 1, 70_000, 0, 64]
    payloads = [pattern(seed, size) for seed, size in enumerate(sizes)]
    targets = [expect(in_band, size) for size in sizes]
    for index, payload in enumerate(payloads):
        in_band.server.send([index.to_bytes(64, "little"), Payload(memoryview(payload), targets[index][1])])
    for index, payload in enumerate(payloads):
        assert in_band.until(receiving=in_band.client, size=64) == index.to_bytes(64, "little")
        in_band.drive(functools.partial(in_band.client.payload_arrived, len(payload)), "the payload")
        assert targets[index][0] == payload
    in_band.client.send([b"a" * 64])
    assert in_band.until(receiving=in_band.server, size=64) == b"a" * 64
    in_band.sent(in_band.server)


@pytest.mark.parametrize("kind", ["ucx", "simulated ucx"])
def test_a_payload_that_comes_before_its_message_does_not_keep_the_driver_busy(kind: str) -> None:
    with contextlib.ExitStack() as stack:
        pair = Pair(kind, stack)
        _, tag = expect(pair, 1000)
        pair.server.send([Payload(memoryview(bytes(1000)), tag)])
        pair.wait_for_arrival(pair.server)
        assert pair.client.receive(64) is None
        assert pair.client.idle()
        pair.server.send([b"s" * 64])
        assert pair.until(receiving=pair.client, size=64) == b"s" * 64
        assert pair.client.payload_arrived(1000)


@pytest.mark.parametrize("kind", ["ucx", "simulated ucx"])
def test_a_message_that_comes_before_the_payload_does_not_keep_the_driver_busy(kind: str) -> None:
    with contextlib.ExitStack() as stack:
        pair = Pair(kind, stack)
        target, tag = expect(pair, 1000)
        pair.server.send([b"n" * 64])
        pair.wait_for_arrival(pair.server)
        assert not pair.client.payload_arrived(1000)
        assert pair.client.idle()
        pair.server.send([Payload(memoryview(b"p" * 1000), tag)])
        pair.drive(lambda: pair.client.payload_arrived(1000), "the payload")
        assert target == b"p" * 1000
        assert pair.until(receiving=pair.client, size=64) == b"n" * 64


def test_an_expected_payload_that_was_refused_leaves_the_next_one_alone(in_band: Pair) -> None:
    (refused, first), (given, second) = expect(in_band, 1000), expect(in_band, 5)
    nothing = [Payload(memoryview(b""), first)] if in_band.client.lane.tagged else []
    in_band.server.send([b"n" * 64, *nothing, b"y" * 64, Payload(memoryview(b"hello"), second)])
    in_band.until(receiving=in_band.client, size=64)
    in_band.drive(lambda: in_band.client.payload_arrived(0), "the answer without a payload")
    in_band.until(receiving=in_band.client, size=64)
    in_band.drive(lambda: in_band.client.payload_arrived(5), "the payload")
    assert given == b"hello"
    assert refused == bytes(1000)


@pytest.mark.parametrize("nbytes", [999, 1001])
def test_a_payload_of_another_length_than_expected_is_truncated(in_band: Pair, nbytes: int) -> None:
    _, tag = expect(in_band, 1000)
    in_band.server.send([b"s" * 64, Payload(memoryview(bytes(nbytes)), tag)])
    in_band.until(receiving=in_band.client, size=64)
    with pytest.raises(MessageTruncated):
        in_band.drive(lambda: in_band.client.payload_arrived(nbytes), "the payload")


def test_a_peer_that_closes_between_messages_is_closed(pair: Pair) -> None:
    pair.client.send([b"x" * 64])
    assert pair.until(receiving=pair.server, size=64) == b"x" * 64
    pair.client.close()
    with pytest.raises(ConnectionClosed):
        pair.until(receiving=pair.server, size=64)


@pytest.mark.parametrize("kind", SOCKETS)
def test_a_peer_that_closes_within_a_message_is_truncated(kind: str) -> None:
    with contextlib.ExitStack() as stack:
        pair = Pair(kind, stack)
        pair.client.send([b"x" * 40])
        pair.sent(pair.client)
        pair.client.close()
        with pytest.raises(MessageTruncated):
            pair.until(receiving=pair.server, size=64)


@pytest.mark.parametrize("kind", ["ucx", "simulated ucx"])
def test_a_peer_that_closes_within_a_message_on_ucx_is_an_error(kind: str) -> None:
    """UCX does not report how much of a message had arrived."""
    with contextlib.ExitStack() as stack:
        pair = Pair(kind, stack)
        pair.client.send([b"x" * 40])
        pair.sent(pair.client)
        pair.client.close()
        with pytest.raises(TransportError):
            pair.until(receiving=pair.server, size=64)


@pytest.mark.parametrize("kind", sorted(set(SOCKETS) & set(IN_BAND)))
def test_a_peer_that_closes_within_a_payload_never_completes_it(kind: str) -> None:
    """For UCX see tests/process: there ucxx keeps an endpoint that closed within a send until the process ends."""
    with contextlib.ExitStack() as stack:
        close_within_payload(Pair(kind, stack))


def close_within_payload(in_band: Pair) -> None:
    _, tag = expect(in_band, 32 << 20)
    payload = bytes(32 << 20)
    in_band.server.send([b"s" * 64, Payload(memoryview(payload), tag)])
    in_band.until(receiving=in_band.client, size=64)
    assert not in_band.client.payload_arrived(32 << 20)
    in_band.server.close()
    with pytest.raises((MessageTruncated, ConnectionReset)):
        in_band.drive(lambda: in_band.client.payload_arrived(32 << 20), "the payload")


PEER = """
import select
from pathlib import Path
from dray.transport.lanes import LANES
from dray.transport.lanes.base import ListenAt
listener = LANES[arguments["kind"]].listen(ListenAt("127.0.0.1", path=Path(arguments["path"])))
worker = listener.worker
send(listener.endpoint)
stream = None
while stream is None:
    if worker:
        worker.progress()
    stream = listener.accept()
stream.send([b"h" * 64])
while not stream.flush():
    stream.idle()
    select.select([stream.fileno()], [], [], 0.01)
if worker:
    for _ in range(1000):
        worker.progress()
send("sent")
while True:
    select.select([], [], [], 60)
"""


@pytest.mark.parametrize("kind", sorted(LANES))
def test_a_killed_peer_is_noticed(kind: str) -> None:
    path = str(Path(os.environ["DRAY_RUNTIME_DIR"]) / f"peer-{next(_numbers)}.sock")
    deadline = Deadline.after(20)
    with Child(PEER, kind=kind, path=path) as peer, contextlib.ExitStack() as stack:
        address = parse_endpoint(peer.receive())
        worker = address.lane.make_worker(address)
        if worker is not None:
            stack.callback(worker.close)
        stream = address.lane.connect(address, deadline, worker)
        stack.callback(stream.close)

        def next_message() -> None:
            poll = select.poll()
            while stream.receive(64) is None:
                assert not deadline.expired, "the peer's death was not noticed"
                if stream.idle():
                    poll.register(stream.fileno(), select.POLLIN)
                    poll.poll(100)

        next_message()
        assert peer.receive() == "sent"
        os.kill(peer.pid, signal.SIGKILL)
        with pytest.raises((ConnectionClosed, ConnectionReset)):
            next_message()
    Path(path).unlink(missing_ok=True)


def test_a_peer_that_does_not_read_is_not_waited_for(pair: Pair) -> None:
    message = pattern(1, 64 * 1024)
    for _ in range(400):
        pair.client.send([message])
    assert not pair.client.flush()
    assert not pair.client.flush()
    if pair.client.worker is None:
        assert pair.client.wants_write
    for _ in range(400):
        assert pair.until(receiving=pair.server, size=len(message)) == message
    pair.sent(pair.client)
    assert not pair.client.wants_write


@pytest.mark.parametrize("kind", SOCKETS)
def test_closing_with_unsent_messages_returns_at_once(kind: str) -> None:
    with contextlib.ExitStack() as stack:
        pair = Pair(kind, stack)
        pair.client.send([Payload(memoryview(bytearray(32 << 20)), 7)])
        assert not pair.client.flush()
        pair.client.close()
        assert pair.client.drained


def test_closing_twice_is_fine_and_nothing_holds_memory_afterwards(pair: Pair) -> None:
    pair.client.expect(memoryview(bytearray(1000)))
    assert pair.client.receive(64) is None
    pair.client.close()
    pair.client.close()
    pair.drive(lambda: pair.client.drained, "the memory to be free")
    with pytest.raises(TransportError):
        pair.client.receive(64)


def test_nothing_is_written_to_memory_after_it_is_drained(in_band: Pair) -> None:
    target, tag = expect(in_band, 8 << 20)
    in_band.server.send([Payload(memoryview(b"\xff" * (8 << 20)), tag)])
    in_band.server.flush()
    in_band.client.close()
    in_band.drive(lambda: in_band.client.drained, "the memory to be free")
    frozen = bytes(target)
    with pytest.raises(TransportError):
        in_band.drive(lambda: in_band.server.flush() and in_band.server.receive(64), "the end of the connection")
    assert target == frozen


def test_both_ends_may_send_much_at_once(pair: Pair) -> None:
    """Neither end waits for the other, so crossed streams cannot stop each other."""
    message = pattern(3, 4 << 20)
    pair.client.send([message])
    pair.server.send([message])
    got: set[str] = set()

    def both() -> bool:
        for name, stream in (("client", pair.client), ("server", pair.server)):
            if name not in got and (found := stream.receive(len(message))) is not None:
                assert found == message
                got.add(name)
        return len(got) == 2

    pair.drive(both, "both messages")


def test_two_connections_do_not_get_each_others_messages() -> None:
    """W10: on one UCX worker, where tags are shared."""
    with contextlib.ExitStack() as stack:
        listener = UCX.listen(ListenAt("127.0.0.1"))
        server, address = listener.worker, parse_endpoint(listener.endpoint)
        client = UCX.make_worker(address)
        stack.callback(server.close)
        stack.callback(client.close)
        stack.callback(listener.close)
        mine = [UCX.connect(address, Deadline.after(10), client) for _ in range(2)]
        theirs: list[UcxStream] = []

        def progress() -> None:
            client.progress()
            server.progress()
            for stream in (*mine, *theirs):
                stream.flush()

        def both_connected() -> bool:
            progress()
            if (stream := listener.accept()) is not None:
                theirs.append(stream)
            return len(theirs) == 2

        wait_until(both_connected, "both connections")
        for stream in (*mine, *theirs):
            stack.callback(stream.close)
        targets = [bytearray(1000), bytearray(1000)]
        tags = [stream.expect(memoryview(target)) for stream, target in zip(mine, targets, strict=True)]
        assert tags[0] != tags[1]
        for index, stream in enumerate(mine):
            stream.send([bytes([index]) * 64])
        seen: dict[int, UcxStream] = {}

        def both_seen() -> bool:
            progress()
            for stream in theirs:
                if stream not in seen.values() and (message := stream.receive(64)) is not None:
                    seen[message[0]] = stream
            return len(seen) == 2

        wait_until(both_seen, "a message on each")
        for index in (1, 0):
            seen[index].send([Payload(memoryview(bytes([index + 1]) * 1000), tags[index])])

        arrived: set[UcxStream] = set()

        def both_arrived() -> bool:
            progress()
            arrived.update(stream for stream in mine if stream not in arrived and stream.payload_arrived(1000))
            return len(arrived) == 2

        wait_until(both_arrived, "both payloads")
        assert targets == [b"\x01" * 1000, b"\x02" * 1000]


def test_descriptors_travel_with_a_message() -> None:
    left, right = socket.socketpair()
    sender, receiver = UnixStream(left, SHM), UnixStream(right, SHM)
    reading, writing = os.pipe()
    try:
        taken: list[int] = []
        assert receiver.receive_with_descriptors(8, taken) is None
        assert taken == []
        sender.send([b"WELCOME!"], [writing, writing])
        assert sender.flush()
        receiver.idle()
        assert receiver.receive_with_descriptors(8, taken) == b"WELCOME!"
        assert len(taken) == 2
        os.write(taken[1], b"through")
        for descriptor in taken:
            os.close(descriptor)
        assert os.read(reading, 10) == b"through"
    finally:
        sender.close()
        receiver.close()
        os.close(reading)
        os.close(writing)


def test_a_socket_stream_shows_its_descriptor() -> None:
    left, right = socket.socketpair()
    stream = UnixStream(left, SHM)
    right.close()
    assert f"fd {stream.fileno()}" in repr(stream)
    stream.close()
    assert "closed" in repr(stream)
