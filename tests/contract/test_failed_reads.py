"""Errors of reads keep no memory: not what the failed call and its callers have had."""

import gc
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from dray.errors import DrayError, ProducerLostError, StaleSlotError, TransportError
from dray.ring import SharedRingBuffer
from dray.transport import PayloadClient, PayloadServer


class Local:
    """What a caller has."""


@pytest.fixture(autouse=True)
def _no_collector() -> Iterator[None]:
    """What is kept until the garbage collector comes is kept for an unknown time."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def what_is_kept(call: Callable[[], object], *errors: type[DrayError]) -> Local | None:
    """The local variable of a caller whose call fails."""

    def caller() -> weakref.ref[Local]:
        local = Local()
        with pytest.raises(errors) as raised:
            call()
        del raised
        return weakref.ref(local)

    return caller()()


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("lane", ["shm", "tcp", "ucx"])
def test_the_error_of_a_read_keeps_nothing_of_its_callers(lane: str, direct: bool) -> None:
    if lane == "ucx":
        pytest.importorskip("ucxx")
    with SharedRingBuffer(2, 1000) as ring, PayloadClient(direct=direct) as client:
        server = PayloadServer(ring, lane=lane)  # type: ignore[arg-type]
        stale = server.put({"x": np.arange(3)})
        client.read(stale)
        assert what_is_kept(lambda: client.read(stale, timeout=10), StaleSlotError) is None
        assert what_is_kept(lambda: client.lease(stale, timeout=10).__enter__(), StaleSlotError) is None
        lost = server.put({"x": np.arange(3)})
        server.close()
        errors = ProducerLostError, TransportError
        assert what_is_kept(lambda: client.read(lost, timeout=1), *errors) is None
        assert what_is_kept(lambda: client.read(lost, timeout=0), *errors) is None
