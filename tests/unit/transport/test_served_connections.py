"""What a server thread decides about its connections, without sockets."""

from collections.abc import Callable
from typing import Any

import pytest
from scripted_streams import ScriptedStream, SilentStream
from simulation import ManualClock

from dray.errors import ConnectionClosed
from dray.protocol.frames import Frame, Kind, Payload
from dray.protocol.handshake import ServerIdentity
from dray.ring import SharedRingBuffer
from dray.transport.lanes import TCP, UCX
from dray.transport.lanes.base import Lane
from dray.transport.served_connections import TURN_SECONDS, ServedConnections
from dray.transport.service import Service
from dray.transport.trace import Discard, TraceEvent


def serving(
    ring: SharedRingBuffer, clock: ManualClock, describe: Callable[[], str] = lambda: "{}", **changed: Any
) -> ServedConnections:
    """The connections of a server of `ring`, with an idle limit of 1000 s and a lease limit of 10 s."""
    identity = ServerIdentity(ring.producer_id, ring.slots, ring.slot_bytes, 8, 1)
    options: dict[str, Any] = {"idle_timeout": 1000.0, "lease_timeout": 10.0, **changed}
    return ServedConnections(Service(ring=ring, identity=identity, describe=describe, clock=clock, **options))


def request_read(ring: SharedRingBuffer, stream: ScriptedStream, request: int = 1) -> None:
    """Let the peer request a payload as large as a slot."""
    with ring.claim(ring.slot_bytes, 0) as writer:
        writer.commit()
    stream.request(Frame(Kind.READ, slot=writer.slot, sequence=writer.sequence, request=request, tag=request))


@pytest.mark.parametrize("lane", [TCP, UCX])
def test_turn_of_a_connection_ends_with_its_time_and_the_others_are_served_before_the_next(lane: Lane) -> None:
    clock = ManualClock()

    def describe() -> str:
        clock.advance(TURN_SECONDS / 2)
        return "{}"

    with SharedRingBuffer(2, 64) as ring:
        served = serving(ring, clock, describe)
        greedy, modest = ScriptedStream(lane), ScriptedStream(lane)
        connections = {stream: served.add(stream) for stream in (greedy, modest)}
        greedy.request(*(Frame(Kind.STAT, request=number) for number in range(20)))
        modest.request(Frame(Kind.CONSUME, request=7))
        assert served.serve(connections[greedy])
        assert [frame.request for frame in greedy.statuses()] == [0, 1]
        assert not served.serve(connections[modest])
        assert [frame.request for frame in modest.statuses()] == [7]
        serve_unfinished = served.serve_driven if lane is UCX else served.serve_unfinished
        turns = 1
        while serve_unfinished():
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
        stream = ScriptedStream(TCP)
        served.add(stream)
        stream.full = True
        request_read(ring, stream)
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
        stream = ScriptedStream(lane)
        served.add(stream)
        request_read(ring, stream)
        (connection,) = served.all()
        served.serve(connection)
        assert any(isinstance(item, Payload) for item in stream.sent)
        assert not passed(served, clock, 9.9)
        assert passed(served, clock, 3.0)
        assert ring.get_ready_count() == 1


def test_payload_that_is_on_its_way_keeps_the_lease_at_most_as_long_as_a_slow_one_takes_on_ucx() -> None:
    """The progress of a worker that other connections keep busy is no progress of this payload."""
    clock = ManualClock()
    seconds = 30
    with SharedRingBuffer(1, seconds * UCX.min_bytes_per_second) as ring:
        served = serving(ring, clock)
        stream = ScriptedStream(UCX)
        served.add(stream)
        stream.full = True
        request_read(ring, stream)
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
        stream = ScriptedStream(UCX)
        served.add(stream)
        stream.full = True
        request_read(ring, stream)
        (connection,) = served.all()
        served.serve(connection)
        for _ in range(90):
            stream.travelled += 1
            assert not passed(served, clock, 1.0)
        stream.full = False
        served.serve(connection)
        assert not passed(served, clock, 9.9)
        assert passed(served, clock, 3.0)


def test_a_silent_connection_is_checked_when_its_time_is_over_and_not_before() -> None:
    clock = ManualClock()
    with SharedRingBuffer(2, 64) as ring:
        served = serving(ring, clock, idle_timeout=5.0, lease_timeout=1.0)
        served.add(SilentStream())
        for _ in range(4):
            clock.advance(1.1)
            served.sweep()
            served.serve_driven()
            assert served.timeout(stopping=False) == 1005.0 - clock.now()
        clock.advance(1.0)
        assert served.sweep()
        assert not served


def test_a_closed_connection_is_traced_with_the_leases_that_it_held() -> None:
    events: list[TraceEvent] = []
    with SharedRingBuffer(2, 64) as ring:
        served = serving(ring, ManualClock(), trace=events.append)
        stream = ScriptedStream(TCP)
        connection = served.add(stream, "tcp:here")
        request_read(ring, stream)
        served.serve(connection)
        assert [(each.slot, each.sequence) for each in served.leases()] == [(0, 0)]
        stream.end()
        served.serve(connection)
        assert served.leases() == []
    (discard,) = (event for event in events if isinstance(event, Discard))
    assert (discard.endpoint, discard.leases) == ("tcp:here", 1)
    assert isinstance(discard.error, ConnectionClosed)


def test_leases_of_a_closed_connection_stand_until_its_stream_is_drained() -> None:
    with SharedRingBuffer(2, 64) as ring:
        served = serving(ring, ManualClock())
        stream = ScriptedStream(UCX)
        served.add(stream)
        request_read(ring, stream)
        served.serve_driven()
        stream.drained = False
        served.discard_all()
        assert not served
        assert len(served.leases()) == ring.statistics().leases == 1
        stream.drained = True
        assert served.sweep()
        assert (served.leases(), ring.statistics().leases) == ([], 0)


def test_counters_of_closed_connections_stay() -> None:
    with SharedRingBuffer(2, 64) as ring:
        served = serving(ring, ManualClock())
        for number in range(2):
            stream = ScriptedStream(TCP)
            connection = served.add(stream)
            request_read(ring, stream)
            served.serve(connection)
            totals = served.totals()
            assert (totals["connections"], totals["reads"], totals["bytes"]) == (
                number + 1,
                number + 1,
                64 * number + 64,
            )
            served.discard_all()
            assert served.totals() == totals
        served.close()
        assert served.totals() == totals
