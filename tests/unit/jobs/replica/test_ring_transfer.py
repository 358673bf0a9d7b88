"""Both ends of `transfer = "reference"` with rings and clients, without a replica, a Redis and a job."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from waiting import wait_until

from dray.errors import DrayError
from dray.jobs.queue import Delivery, RolloutEntry
from dray.jobs.replica.ring_transfer import GroupSource, RingReader
from dray.jobs.replica.user_code import RolloutPayload
from dray.payload import pack
from dray.prefetch import BatchReader
from dray.ring import SharedRingBuffer
from dray.transport import PayloadClient, PayloadServer


@pytest.fixture
def ring() -> Iterator[SharedRingBuffer]:
    with SharedRingBuffer(4, 1 << 20, readers=2) as made:
        yield made


@pytest.fixture
def server(ring: SharedRingBuffer) -> Iterator[PayloadServer]:
    with PayloadServer(ring, lane="shm") as made:
        yield made


@pytest.fixture
def reader() -> Iterator[tuple[RingReader, BatchReader]]:
    clients = [PayloadClient(lane="shm", reader=number) for number in range(2)]
    with BatchReader(GroupSource(clients, in_place=True), consume=False) as batches:
        yield RingReader(clients[0], batches, 10.0), batches


def put(server: PayloadServer, number: int) -> Delivery:
    reference = server.put({"x": np.full(3, number)}, timeout=0)
    payload = RolloutPayload({}, number, 0)
    entry = payload.entry("rollout-0", reference.producer.hex(), reference.sequence, reference=reference.to_json())
    return Delivery(entry, 1, f"{number}-0")


def read(reader: RingReader, deliveries: list[Delivery]) -> dict[int, Any]:
    found = reader.read(deliveries)
    return {
        delivery.entry.work_item: type(each) if isinstance(each, DrayError) else int(each["x"][0])
        for delivery, each in found
    }


def test_payloads_are_read_by_reference_and_inline_and_freed_for_all_readers(
    server: PayloadServer, ring: SharedRingBuffer, reader: tuple[RingReader, BatchReader]
) -> None:
    ends, _ = reader
    assert (ends.transfer, ends.lane) == ("", "")
    referred = [put(server, 0), put(server, 1)]
    inline = RolloutEntry("0f" * 16, 2, 0, "rollout-0", 2, payload=bytes(pack({"x": np.full(3, 2)})))
    assert read(ends, [*referred, Delivery(inline, 1, "2-0")]) == {0: 0, 1: 1, 2: 2}
    assert (ends.transfer, ends.lane) == ("reference+inline", "shm")
    assert ring.get_ready_count() == 2
    ends.consume([each.entry for each in referred])
    wait_until(lambda: not ends.unfreed(), "the end of the requests")
    assert (ring.get_ready_count(), ends.statistics()["unfreed"]) == (0, 0)


def test_last_requests_to_free_payloads_are_made_while_the_clients_are_open(
    server: PayloadServer, ring: SharedRingBuffer, reader: tuple[RingReader, BatchReader]
) -> None:
    ends, batches = reader
    deliveries = [put(server, number) for number in range(4)]
    ends.consume([each.entry for each in deliveries])
    batches.close()
    assert (ring.get_ready_count(), batches.unfreed) == (0, 0)
