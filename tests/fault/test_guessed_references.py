"""B1: references that a program made up, to payloads that are not committed when they are asked for."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from transport_fixtures import ring_of, serving

from dray import PayloadClient, PayloadRef
from dray.clock import Deadline
from dray.payload.codec import pack
from dray.protocol.frames import Outgoing
from dray.transport.lanes.base import Endpoint, Network, Stream, Worker

IMAGE = bytes(pack({"x": np.arange(5000.0)}))


class LateStream:
    """A stream whose requests leave once the client waits for the answer, and after `then` was called."""

    def __init__(self, stream: Any, then: Callable[[], None]) -> None:
        self._stream = stream
        self._then = then
        self._late: list[Sequence[Outgoing]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def send(self, items: Sequence[Outgoing], descriptor: int | None = None) -> bool:
        self._late.append(items)
        return True

    def receive(self, size: int, most: int = 1) -> memoryview | None:
        if self._late:
            self._then()
        self.flush()
        found: memoryview | None = self._stream.receive(size, most)
        return found

    def flush(self) -> bool:
        while self._late:
            self._stream.send(self._late.pop(0))
        return bool(self._stream.flush())


class LateNetwork(Network):
    """Every connection is a `LateStream`."""

    def __init__(self, then: Callable[[], None]) -> None:
        super().__init__()
        self._then = then

    def connect(self, address: Endpoint, deadline: Deadline, worker: Worker | None) -> Stream:
        return LateStream(super().connect(address, deadline, worker), self._then)


@pytest.mark.parametrize("how", ["read", "read_many", "lease"])
def test_b1_a_payload_committed_while_it_is_read_ahead_is_handed_out_as_it_was_committed(how: str) -> None:
    """On shm a client copies, and unpacks, before STATUS shows whether the payload was committed."""
    armed = False

    def commit() -> None:
        if armed and writer.open:
            writer.buffer[:] = IMAGE
            writer.commit()

    with (
        serving("shm", slot_bytes=len(IMAGE)) as server,
        PayloadClient(lane="shm", network=LateNetwork(commit)) as client,
    ):
        writer = ring_of(server).claim(len(IMAGE))
        client.read_bytes(server.put_bytes(b"first"), timeout=5)
        armed = True
        producer = ring_of(server).producer_id
        ref = PayloadRef(producer, writer.slot, writer.sequence, len(IMAGE), tuple(server.endpoints))
        if how == "read":
            assert bytes(client.read_bytes(ref, timeout=5)) == IMAGE
        elif how == "read_many":
            (result,) = client.read_many_bytes([ref], timeout=5)
            assert bytes(result.payload) == IMAGE
        else:
            with client.lease(ref, timeout=5) as arrays:
                assert np.array_equal(arrays["x"], np.arange(5000.0))
                arrays.clear()
        assert not writer.open
