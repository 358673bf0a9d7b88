"""A client that outlives its producers keeps nothing of them."""

import gc
import os
from typing import Any

import pytest
from transport_fixtures import LANES, serving

from dray import PayloadClient
from dray.clock import Deadline


class SteppedClock:
    """Real time, and what a test adds to it."""

    def __init__(self) -> None:
        self.added = 0.0

    def now(self) -> float:
        return Deadline.after(0).at + self.added


@pytest.mark.parametrize("lane", LANES)
def test_connections_to_producers_that_are_gone_do_not_add_up(lane: Any) -> None:
    clock = SteppedClock()
    with PayloadClient(lane=lane, clock=clock) as client:
        descriptors = []
        for _ in range(8):
            with serving(lane) as server:
                refs = [server.put_bytes(bytes([number])) for number in range(2)]
                for number, ref in enumerate(refs):
                    assert bytes(client.read_bytes(ref)) == bytes([number])
            gc.collect()
            descriptors.append(len(os.listdir("/proc/self/fd")))  # noqa: PTH208
            clock.added += 101.0
        assert max(descriptors[2:]) <= max(descriptors[:2])
        assert client.statistics().idle_connections == 1
