"""The times after which an endpoint is tried again, and a connection replaced."""

import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
from transport_fixtures import LANES
from waiting import wait_until

from dray import PayloadClient, PayloadServer, SharedRingBuffer
from dray.clock import Deadline
from dray.identifiers import Wanted

TIMEOUT = 1.0
QUARANTINE = 0.4
SLACK = 1.0


class WedgingRing(SharedRingBuffer):
    """A ring in which the first server thread gets stuck with the next READ, while `wedged` is set."""

    def __init__(self) -> None:
        super().__init__(8, 1000)
        self.wedged = threading.Event()
        self.freed = threading.Event()

    def copy_many(self, wanted: Sequence[Wanted], most: int) -> Any:
        if self.wedged.is_set() and threading.current_thread().name == "dray-server-0":
            assert self.freed.wait(60)
        return super().copy_many(wanted, most)


@pytest.mark.parametrize("lane", LANES)
def test_a_wedged_thread_is_tried_once_per_quarantine_and_used_again_when_it_answers(lane: Any) -> None:
    with (
        WedgingRing() as ring,
        PayloadServer(ring, lane=lane, threads=2, direct=False) as server,
        PayloadClient(lane=lane, quarantine_seconds=QUARANTINE) as client,
    ):

        def read(number: int) -> int:
            """One read within its deadline; how often the wedged endpoint has been tried."""
            promised = Deadline.after(TIMEOUT + SLACK)
            ref = server.put_bytes(number.to_bytes(2, "little"))
            assert bytes(client.read_bytes(ref, timeout=TIMEOUT)) == number.to_bytes(2, "little")
            assert not promised.expired
            return int(client.statistics().retries)

        assert [read(number) for number in range(4)] == [0] * 4
        ring.wedged.set()
        tried: list[float] = []  # when the reads began that tried it
        limit = Deadline.after(30)
        number = 0
        while len(tried) < 3:
            assert not limit.expired
            began, number = time.monotonic(), number + 1
            if read(number % 1000) > len(tried):
                # It was skipped from the moment when its attempt had failed, after half the time of a read, and
                # each time for twice as long.
                skipped = QUARANTINE * 2 ** (len(tried) - 1)
                assert not tried or time.monotonic() - tried[-1] > skipped + TIMEOUT / 2
                tried.append(began)
        assert number > 3 * 3  # the other thread answered all the while
        ring.wedged.clear()
        ring.freed.set()
        wait_until(lambda: not client.statistics().quarantined, "the last quarantine to end")
        assert [read(number) for number in range(4)] == [3] * 4
        assert client.statistics().quarantined == ()


@pytest.mark.parametrize("lane", LANES)
def test_when_both_ends_were_idle_the_next_read_needs_no_quarantine(lane: Any) -> None:
    with (
        SharedRingBuffer(2, 1000) as ring,
        PayloadServer(ring, lane=lane, threads=2, idle_timeout=1.0, direct=False) as server,
        PayloadClient(lane=lane, idle_seconds=0.75) as client,
    ):
        ref = server.put_bytes(b"payload")
        for idle in range(3):
            for _ in range(4):
                assert bytes(client.read_bytes(ref, consume=False)) == b"payload"
            assert client.statistics().connects == 2 * (idle + 1)
            wait_until(lambda: server.statistics().open_connections == 0, "both windows to pass")
        assert bytes(client.read_bytes(ref)) == b"payload"
        assert (client.statistics().quarantined, client.statistics().retries) == ((), 0)
