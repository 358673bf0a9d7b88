"""What a server thread decides about its connections, without sockets."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from simulation import ManualClock

from dray.counters import Counters
from dray.protocol.frames import FRAME_BYTES, Frame, Kind, Outgoing, Payload, parse
from dray.protocol.handshake import ClientHandshake, ServerIdentity
from dray.protocol.server_session import ServerSession
from dray.ring import SharedRingBuffer
from dray.transport.lanes import TCP, UCX
from dray.transport.lanes.base import Lane
from dray.transport.served_connections import (
    TURN_SECONDS,
    ServedConnections,
    ThreadSettings,
)


class Silent:
    """A stream whose peer says nothing."""

    lane = UCX
    worker: Any = "any"
    peer_pid = None
    wants_write = False
    drained = True

    def fileno(self) -> int:
        return 0

    def idle(self) -> bool:
        return True

    def receive(self, size: int, most: int = 1) -> memoryview | None:
        return None

    def send(self, items: Sequence[Outgoing], descriptor: int | None = None) -> bool:
        return True

    def flush(self) -> bool:
        return True

    def expect(self, target: memoryview) -> int:
        raise AssertionError

    def payload_arrived(self, nbytes: int) -> bool:
        raise AssertionError

    def progress(self) -> object:
        return None

    def close(self) -> None:
        pass


class Talking(Silent):
    """A stream with a peer that has shaken hands and then sends requests; it says of itself what a test wants.

    Attributes:
        lane: which one.
        sent: what left.
        full: there is no room for what is sent.
        travelled: how far the bytes have come.
    """

    def __init__(self, lane: Lane) -> None:
        self.lane = lane  # type: ignore[misc]
        self.worker = "any" if lane.tagged else None
        self.sent: list[Outgoing] = []
        self.full = False
        self.travelled = 0
        self._handshake = ClientHandshake(lane)
        self._inbox = self._handshake.hello()

    def ask(self, *frames: Frame) -> None:
        self._inbox += b"".join(frame.pack() for frame in frames)

    def statuses(self) -> list[Frame]:
        frames = [item for item in self.sent if isinstance(item, bytes) and len(item) == FRAME_BYTES]
        return [parse(frame) for frame in frames]

    def receive(self, size: int, most: int = 1) -> memoryview | None:
        size *= max(1, min(most, len(self._inbox) // size))
        if len(self._inbox) < size:
            return None
        message, self._inbox = self._inbox[:size], self._inbox[size:]
        return memoryview(message)

    def send(self, items: Sequence[Outgoing], descriptor: int | None = None) -> bool:
        if not self._handshake.done:
            (message,) = items
            assert isinstance(message, bytes)
            self._inbox += self._handshake.receive(message) or b""
            return True
        self.sent += items
        return not self.full

    def flush(self) -> bool:
        return not self.full

    def progress(self) -> object:
        return self.travelled


def serving(
    ring: SharedRingBuffer, clock: ManualClock, describe: Callable[[], str] = lambda: "{}"
) -> ServedConnections:
    """The connections of a server of `ring`, with an idle limit of 1000 s and a lease limit of 10 s."""
    identity = ServerIdentity(ring.producer_id, ring.slots, ring.slot_bytes, 8, 1)
    return ServedConnections(
        lambda lane: ServerSession(lane, ring, identity, describe=describe),
        -1,
        ThreadSettings(idle=1000.0, lease=10.0),
        Counters(),
        clock,
        lambda _: None,
        lambda _: None,
    )


def read_asked(ring: SharedRingBuffer, stream: Talking, request: int = 1) -> None:
    """The peer asks for a payload as large as a slot."""
    with ring.claim(ring.slot_bytes, 0) as writer:
        writer.commit()
    stream.ask(Frame(Kind.READ, slot=writer.slot, sequence=writer.sequence, request=request, tag=request))


@pytest.mark.parametrize("lane", [TCP, UCX])
def test_turn_of_a_connection_ends_with_its_time_and_the_others_are_served_before_the_next(lane: Lane) -> None:
    clock = ManualClock()

    def describe() -> str:
        clock.advance(TURN_SECONDS / 2)
        return "{}"

    with SharedRingBuffer(2, 64) as ring:
        served = serving(ring, clock, describe)
        greedy, modest = Talking(lane), Talking(lane)
        served.add(greedy)
        served.add(modest)
        connections = {connection.stream: connection for connection in served.all()}
        greedy.ask(*(Frame(Kind.STAT, request=number) for number in range(20)))
        modest.ask(Frame(Kind.CONSUME, request=7))
        assert served.serve(connections[greedy])
        assert [frame.request for frame in greedy.statuses()] == [0, 1]
        assert not served.serve(connections[modest])
        assert [frame.request for frame in modest.statuses()] == [7]
        serve_again = served.serve_driven if lane is UCX else served.serve_again
        turns = 1
        while serve_again():
            turns += 1
        assert [frame.request for frame in greedy.statuses()] == list(range(20))
        assert turns == 10
        served.close()


def passed(served: ServedConnections, clock: ManualClock, seconds: float) -> bool:
    """Let time pass, with every sweep that is due; whether a connection was ended."""
    until = clock.now() + seconds
    while True:
        wait = served.timeout(stopping=False)
        step = until - clock.now() if wait is None else min(wait, until - clock.now())
        clock.advance(step)
        if served.sweep() and not served:
            return True
        if clock.now() >= until:
            return False


def test_reader_to_which_bytes_travel_keeps_its_lease_and_loses_it_when_they_stop() -> None:
    clock = ManualClock()
    with SharedRingBuffer(1, 1 << 20) as ring:
        served = serving(ring, clock)
        stream = Talking(TCP)
        served.add(stream)
        stream.full = True
        read_asked(ring, stream)
        (connection,) = served.all()
        served.serve(connection)
        for _ in range(20):
            stream.travelled += 1
            assert not passed(served, clock, 9.0)
            served.serve(connection)
            assert served.timeout(stopping=False) != 0
        assert ring.statistics().leases == 1
        assert passed(served, clock, 13.0)
        assert ring.get_ready_count() == 1


@pytest.mark.parametrize("lane", [TCP, UCX])
def test_reader_without_progress_loses_its_lease_after_its_limit(lane: Lane) -> None:
    clock = ManualClock()
    with SharedRingBuffer(1, 64) as ring:
        served = serving(ring, clock)
        stream = Talking(lane)
        served.add(stream)
        read_asked(ring, stream)
        (connection,) = served.all()
        served.serve(connection)
        assert any(isinstance(item, Payload) for item in stream.sent)
        assert not passed(served, clock, 9.9)
        assert passed(served, clock, 3.0)
        assert ring.get_ready_count() == 1


def test_payload_that_is_on_its_way_keeps_the_lease_at_most_as_long_as_a_slow_one_takes_on_ucx() -> None:
    """A worker that others keep busy says nothing of this payload."""
    clock = ManualClock()
    seconds = 30
    with SharedRingBuffer(1, seconds * UCX.min_bytes_per_second) as ring:
        served = serving(ring, clock)
        stream = Talking(UCX)
        served.add(stream)
        stream.full = True
        read_asked(ring, stream)
        (connection,) = served.all()
        served.serve(connection)
        for _ in range(seconds):
            stream.travelled += 1
            assert not passed(served, clock, 1.0)
        stream.travelled += 1
        assert not passed(served, clock, 9.0)
        stream.travelled += 1
        assert passed(served, clock, 3.0)
        served.close()


def test_payload_that_has_left_gives_its_reader_the_whole_limit_again() -> None:
    clock = ManualClock()
    with SharedRingBuffer(1, 100 * UCX.min_bytes_per_second) as ring:
        served = serving(ring, clock)
        stream = Talking(UCX)
        served.add(stream)
        stream.full = True
        read_asked(ring, stream)
        (connection,) = served.all()
        served.serve(connection)
        for _ in range(90):
            stream.travelled += 1
            assert not passed(served, clock, 1.0)
        stream.full = False
        served.serve(connection)
        assert not passed(served, clock, 9.9)
        assert passed(served, clock, 3.0)


def test_a_silent_connection_is_looked_at_when_its_time_is_over_and_not_before() -> None:
    clock = ManualClock()
    with SharedRingBuffer(2, 64) as ring:
        identity = ServerIdentity(ring.producer_id, 2, 64, 8, 1)
        served = ServedConnections(
            lambda lane: ServerSession(lane, ring, identity),
            -1,
            ThreadSettings(idle=5.0, lease=1.0),
            Counters(),
            clock,
            lambda _: None,
            lambda _: None,
        )
        served.add(Silent())
        for _ in range(4):
            clock.advance(1.1)
            served.sweep()
            served.serve_driven()
            assert served.timeout(stopping=False) == 1005.0 - clock.now()
        clock.advance(1.0)
        assert served.sweep()
        assert not served
