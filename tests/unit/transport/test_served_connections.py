"""What a server thread decides about its connections, without sockets."""

from collections.abc import Sequence

from dray.buffer import SharedRingBuffer
from dray.telemetry import Counters
from dray.testing import ManualClock
from dray.transport.served_connections import ServedConnections, ThreadSettings
from dray.wire.contract import Outgoing
from dray.wire.handshake import Lane, ServerIdentity
from dray.wire.session import ServerSession


class Silent:
    """A stream whose peer says nothing."""

    lane = Lane.UCX
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

    def expect(self, target: memoryview, tag: int) -> None:
        raise AssertionError

    def payload_arrived(self, nbytes: int) -> bool:
        raise AssertionError

    def close(self) -> None:
        pass


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
            served.serve_ucx()
            assert served.timeout(stopping=False) == 1005.0 - clock.now()
        clock.advance(1.0)
        assert served.sweep()
        assert not served
