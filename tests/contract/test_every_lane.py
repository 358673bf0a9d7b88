"""What every lane must do for users of servers and clients: those of the table, and one that the test adds."""

import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from socketpair_lane import ADDED
from transport_fixtures import pattern
from waiting import wait_until

from dray import PayloadClient, PayloadRef, PayloadServer, SharedRingBuffer, make_secret
from dray.clock import Stopwatch
from dray.errors import (
    AuthenticationError,
    BufferClosedError,
    LeaseInUseError,
    MessageTruncated,
    ProducerLostError,
    StaleSlotError,
    TransportTimeout,
)
from dray.protocol.server_session import MAX_INLINE_BYTES
from dray.transport.lanes import LANES, Lane, LaneChoice
from dray.transport.lanes.base import ListenAt

IN_BAND = tuple(lane for lane in (*LANES.values(), ADDED) if lane.in_band)
SIZES = (0, 1, MAX_INLINE_BYTES, MAX_INLINE_BYTES + 1, 1 << 20)
ARRAYS = {"rewards": np.arange(5, dtype=np.float32), "tokens": np.ones((3, 2), np.int64)}


@pytest.fixture(params=(*LANES.values(), ADDED), ids=lambda lane: lane.name)
def lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Lane:
    """Each lane of the table, and one that is added to it."""
    monkeypatch.setitem(LANES, ADDED.name, ADDED)
    found: Lane = request.param
    return found


class Producer(NamedTuple):
    """A ring and its server on one lane."""

    ring: SharedRingBuffer
    server: PayloadServer


@contextlib.contextmanager
def producing(lane: Lane, **options: Any) -> Iterator[Producer]:
    choice: LaneChoice = lane.name
    ring = SharedRingBuffer(8, 2 << 20)
    with ring, PayloadServer(ring, lane=choice, threads=1, drain_timeout=0.5, **options) as server:
        yield Producer(ring, server)


def reading(lane: Lane, **options: Any) -> PayloadClient:
    choice: LaneChoice = lane.name
    return PayloadClient(lane=choice, **options)


@contextlib.contextmanager
def silent(lane: Lane) -> Iterator[str]:
    """The endpoint of a server that accepts no connection."""
    path = Path(os.environ["DRAY_RUNTIME_DIR"]) / "silent.sock"
    listener = lane.listen(ListenAt("127.0.0.1", path=path))
    try:
        yield listener.endpoint
    finally:
        listener.close()
        if listener.worker is not None:
            listener.worker.close()


def at(ref: PayloadRef, *endpoints: str) -> PayloadRef:
    """The same payload at other addresses."""
    return dataclasses.replace(ref, endpoints=endpoints)


# The results of these calls, in one place each.


def batch(client: PayloadClient, refs: list[PayloadRef]) -> dict[int, dict[str, Any]]:
    return {result.ref.sequence: result.payload for result in client.read_many(refs, timeout=10)}


def ready_by_stat(client: PayloadClient, ref: PayloadRef) -> int:
    return client.stat(ref, timeout=10).ring.ready


def leases(producer: Producer) -> int:
    return producer.ring.statistics().leases


def reads(client: PayloadClient, lane: Lane) -> int:
    return client.statistics().reads_by_lane.get(lane.name, 0)


def test_arrays_arrive_and_their_payload_is_consumed(lane: Lane) -> None:
    with producing(lane) as producer, reading(lane) as client:
        ref = producer.server.put(ARRAYS)
        found = client.read(ref, timeout=10)
        assert {name: array.tolist() for name, array in found.items()} == {
            name: array.tolist() for name, array in ARRAYS.items()
        }
        assert producer.server.wait_consumed(ref, timeout=10)
        assert reads(client, lane) == 1


def test_bytes_of_every_size_arrive_exactly(lane: Lane) -> None:
    with producing(lane) as producer, reading(lane) as client:
        for size in SIZES:
            ref = producer.server.put_bytes(pattern(size, size))
            assert client.read_bytes(ref, timeout=10).tobytes() == pattern(size, size)
            assert producer.server.wait_consumed(ref, timeout=10)


def test_a_payload_can_be_read_again_until_it_is_consumed(lane: Lane) -> None:
    with producing(lane) as producer, reading(lane) as client:
        refs = [producer.server.put_bytes(pattern(size, size)) for size in SIZES]
        for ref in refs + refs:
            assert client.read_bytes(ref, timeout=10, consume=False).tobytes() == pattern(ref.nbytes, ref.nbytes)
        assert client.consume(refs, timeout=10) == len(refs)
        assert client.consume(refs, timeout=10) == 0
        assert all(producer.server.wait_consumed(ref, timeout=10) for ref in refs)


def test_a_lease_consumes_at_its_end_and_is_in_place_where_payloads_stay_in_the_segment(lane: Lane) -> None:
    with producing(lane) as producer, reading(lane) as client:
        ref = producer.server.put(ARRAYS)
        with client.lease(ref, timeout=10) as arrays:
            assert arrays["rewards"].tolist() == ARRAYS["rewards"].tolist()
            assert leases(producer) == 1
            slot = producer.ring.segment.slot_offset(ref.slot)
            rewards = arrays["rewards"].tobytes()
            at_rewards = producer.ring.segment.view[slot : slot + ref.nbytes].tobytes().index(rewards)
            producer.ring.segment.view[slot + at_rewards] ^= 0xFF
            assert (arrays["rewards"].tobytes() == rewards) is lane.in_band
        assert producer.server.wait_consumed(ref, timeout=10)


@pytest.mark.parametrize("direct", [True, False])
def test_a_lease_of_bytes_gives_them_until_its_block_ends(lane: Lane, direct: bool) -> None:
    with producing(lane, direct=direct) as producer, reading(lane, direct=direct) as client:
        for nbytes in SIZES:
            ref = producer.server.put_bytes(pattern(5, nbytes))
            with client.lease_bytes(ref, timeout=10) as leased:
                assert leased.data.dtype == np.uint8
                assert leased.data.shape == (nbytes,)
                assert not leased.data.flags.writeable or lane.in_band or nbytes <= MAX_INLINE_BYTES
                assert leased.data.tobytes() == pattern(5, nbytes)
            with pytest.raises(BufferClosedError):
                _ = leased.data
            assert producer.server.wait_consumed(ref, timeout=10)


@pytest.mark.parametrize("direct", [True, False])
def test_bytes_that_the_program_keeps_after_the_block_stay_as_they_are(lane: Lane, direct: bool) -> None:
    with producing(lane, direct=direct) as producer, reading(lane, direct=direct) as client:
        ref = producer.server.put_bytes(pattern(5, 1 << 20))
        kept = []
        in_use = contextlib.nullcontext() if lane.in_band else pytest.raises(LeaseInUseError)
        with in_use, client.lease_bytes(ref, timeout=10) as leased:
            kept.append(leased.data)
        for _ in range(9):
            other = producer.server.put_bytes(bytes(1 << 20))
            client.consume([other], timeout=10)
        assert kept[0].tobytes() == pattern(5, 1 << 20)
        kept.clear()
        assert producer.server.wait_consumed(ref, timeout=10)


def test_a_lease_that_ends_with_an_exception_is_released(lane: Lane) -> None:
    with producing(lane) as producer, reading(lane) as client:
        ref = producer.server.put(ARRAYS)
        with pytest.raises(ZeroDivisionError), client.lease(ref, timeout=10):
            raise ZeroDivisionError
        assert client.read(ref, timeout=10)["tokens"].sum() == 6


def test_a_batch_arrives_complete(lane: Lane) -> None:
    with producing(lane) as producer, reading(lane) as client:
        refs = [producer.server.put({"number": np.full(1000 * number, number)}) for number in range(8)]
        found = batch(client, refs)
        assert [found[ref.sequence]["number"].tolist() for ref in refs] == [
            [number] * 1000 * number for number in range(8)
        ]
        assert all(producer.server.wait_consumed(ref, timeout=10) for ref in refs)


def test_a_server_reports_its_statistics(lane: Lane) -> None:
    with producing(lane) as producer, reading(lane) as client:
        ref = producer.server.put_bytes(b"payload")
        assert ready_by_stat(client, ref) == 1


def test_a_reference_to_a_consumed_payload_is_stale(lane: Lane) -> None:
    with producing(lane) as producer, reading(lane) as client:
        ref = producer.server.put_bytes(b"payload")
        client.read_bytes(ref, timeout=10)
        with pytest.raises(StaleSlotError):
            client.read_bytes(ref, timeout=10)
        assert client.read_bytes(producer.server.put_bytes(b"next"), timeout=10).tobytes() == b"next"


@pytest.mark.parametrize("given", ["the secret", "another secret", "no secret"])
def test_only_clients_with_the_secret_are_served(lane: Lane, given: str) -> None:
    secret = make_secret()
    secrets = {"the secret": secret, "another secret": make_secret(), "no secret": None}
    with producing(lane, secret=secret) as producer, reading(lane, secret=secrets[given]) as client:
        ref = producer.server.put_bytes(b"payload")
        if given == "the secret":
            assert client.read_bytes(ref, timeout=10).tobytes() == b"payload"
        else:
            with pytest.raises(AuthenticationError):
                client.read_bytes(ref, timeout=10)
            assert producer.ring.get_ready_count() == 1


def test_another_producer_at_the_address_is_not_read(lane: Lane) -> None:
    with producing(lane) as producer, producing(lane) as other, reading(lane) as client:
        ref = producer.server.put_bytes(b"payload")
        other.server.put_bytes(b"another")
        with pytest.raises(ProducerLostError):
            client.read_bytes(at(ref, *other.server.endpoints), timeout=10)
        assert other.ring.get_ready_count() == 1


def test_a_server_that_does_not_answer_is_given_up_at_the_deadline(lane: Lane) -> None:
    with producing(lane) as producer, silent(lane) as endpoint, reading(lane) as client:
        ref = producer.server.put_bytes(b"payload")
        stopwatch = Stopwatch()
        with pytest.raises(TransportTimeout):
            client.read_bytes(at(ref, endpoint), timeout=0.3)
        assert stopwatch.elapsed < 5
        assert client.read_bytes(at(ref, endpoint, *ref.endpoints), timeout=10).tobytes() == b"payload"


def test_closing_a_client_ends_its_waits(lane: Lane) -> None:
    ended: list[BaseException] = []
    with producing(lane) as producer, silent(lane) as endpoint, reading(lane) as client:
        ref = at(producer.server.put_bytes(b"payload"), endpoint)

        def read() -> None:
            try:
                client.read_bytes(ref, timeout=60)
            except BaseException as error:
                ended.append(error)

        thread = threading.Thread(target=read)
        thread.start()
        thread.join(0.05)  # in the wait, most likely
        client.close()
        thread.join(10)
        assert not thread.is_alive()
        assert [type(error) for error in ended] == [BufferClosedError]


def test_leases_return_when_their_client_goes_away(lane: Lane) -> None:
    with producing(lane) as producer:
        refs = [producer.server.put_bytes(pattern(number, 100_000)) for number in range(2)]
        client = reading(lane)
        held = [client.lease(ref, timeout=10) for ref in refs]
        assert leases(producer) == len(held)
        client.close()
        wait_until(lambda: leases(producer) == 0, "the leases to return")
        assert producer.ring.get_ready_count() == len(refs)


@pytest.mark.parametrize("lane", IN_BAND, ids=lambda lane: lane.name, indirect=True)
def test_a_payload_that_does_not_match_its_checksum_is_refused(lane: Lane) -> None:
    with producing(lane, checksum="commit") as producer, reading(lane) as client:
        ref = producer.server.put_bytes(pattern(1, 1000))
        view, offset = producer.ring.segment.view, producer.ring.segment.slot_offset(ref.slot)
        view[offset + 500] ^= 1
        with pytest.raises(MessageTruncated, match="checksum"):
            client.read_bytes(ref, timeout=10)
        view[offset + 500] ^= 1
        assert client.read_bytes(ref, timeout=10).tobytes() == pattern(1, 1000)


def test_memory_of_results_is_the_callers_own(lane: Lane) -> None:
    with producing(lane) as producer, reading(lane) as client:
        ref = producer.server.put(ARRAYS)
        mine = client.read(ref, timeout=10, consume=False)
        mine["rewards"][:] = 0
        assert client.read(ref, timeout=10)["rewards"].tolist() == ARRAYS["rewards"].tolist()


@pytest.mark.parametrize("call", [PayloadServer.close, PayloadClient.close], ids=["server", "client"])
def test_closing_twice_is_fine(lane: Lane, call: Callable[[Any], None]) -> None:
    with producing(lane) as producer, reading(lane) as client:
        assert client.read_bytes(producer.server.put_bytes(b"payload"), timeout=10).tobytes() == b"payload"
        closed = producer.server if call is PayloadServer.close else client
        call(closed)
        call(closed)
