"""Faults C6, C7, C9 and C13 where batches are read: real servers in processes of their own, on each lane."""

import contextlib
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from transport_fixtures import LANES, Child, reference
from waiting import wait_until

from dray.errors import BufferClosedError, DrayError, ProducerLostError, StaleSlotError, TransportError
from dray.prefetch import BatchReader, Fetched
from dray.protocol import PayloadRef
from dray.transport import PayloadClient
from dray.ucxx import (
    CompletionReader,
    UCXXBuffer,
    UCXXBufferConfig,
    UCXXConfig,
    UCXXDataPackerMixin,
    completion_for,
)

PRODUCER = """
ring = SharedRingBuffer(arguments.get("slots", 16), 1 << 16)
server = PayloadServer(ring, lane=(arguments["lane"],), threads=2, drain_timeout=0.5)
send(server.endpoints)
while (wanted := receive()) is not None:
    if wanted == "state":
        statistics = ring.statistics()
        send([statistics.free, statistics.ready, statistics.reading])
    else:
        send(json.loads(server.put({"value": np.full(100, wanted)}).to_json()))
server.close()
"""


@contextlib.contextmanager
def producer(lane: str, **arguments: object) -> Iterator[Child]:
    with Child(PRODUCER, lane=lane, **arguments) as child:
        child.endpoints = child.receive()  # type: ignore[attr-defined]
        yield child
        child.resume()


@contextlib.contextmanager
def reading(lane: str, **arguments: object) -> Iterator[BatchReader]:
    client = PayloadClient(lane=lane)  # type: ignore[arg-type]
    with BatchReader(client, **arguments) as reader:  # type: ignore[arg-type]
        yield reader


def put(child: Child, *values: int) -> list[PayloadRef]:
    return [reference(child.ask(value)) for value in values]


def values(fetched: list[Fetched]) -> list[object]:
    """The values that arrived, and the types of errors."""
    return [
        type(each.outcome) if isinstance(each.outcome, DrayError) else int(each.outcome["value"][0])
        for each in fetched
    ]


@pytest.mark.parametrize("lane", LANES)
def test_c6_a_stale_reference_is_dropped_and_the_rest_of_its_batch_is_not(lane: str) -> None:
    with producer(lane) as child, reading(lane) as reader:
        refs = put(child, 10, 11, 12, 13)
        assert (refs[0].slot, refs[0].sequence) == (0, 0)
        assert values(reader.fetch_all([refs[0], refs[2]])) == [10, 12]
        wait_until(lambda: reader.statistics().to_free == 0, "the two to be freed")
        assert values(reader.fetch_all(refs)) == [StaleSlotError, 11, StaleSlotError, 13]
        assert reader.statistics().failed == 2, "stale is never tried again"
        wait_until(lambda: child.ask("state") == [16, 0, 0], "every slot to be free")


@pytest.mark.parametrize("lane", LANES)
def test_c7_a_batch_that_timed_out_is_not_handed_out_as_another_s_and_not_lost(lane: str) -> None:
    with producer(lane) as child, reading(lane) as reader:
        first, second = put(child, 1, 2, 3), put(child, 4, 5)
        child.stop()
        assert reader.start(first, timeout=60)
        wait_until(lambda: reader.statistics().reading == 1, "the first batch to be read")
        assert not reader.wait(0.2)
        assert all(issubclass(each, TransportError) for each in values(reader.collect()))  # type: ignore[arg-type]
        assert reader.defer(second)
        child.resume()
        assert reader.wait(30)
        assert values(reader.collect()) == [4, 5]
        assert [reader.result(each) for each in first] == [None] * 3
        wait_until(lambda: child.ask("state") == [13, 3, 0], "the late payloads to be READY still")
        assert values(reader.fetch_all(first)) == [1, 2, 3]


@pytest.mark.parametrize("lane", LANES)
def test_c9_the_end_does_not_wait_for_a_fetch_that_hangs(lane: str) -> None:
    with producer(lane) as child:
        refs = put(child, 1, 2)
        child.stop()
        with reading(lane) as reader:
            assert reader.start(refs, timeout=60)
            ended: list[type[BaseException]] = []

            def wait() -> None:
                try:
                    reader.wait()
                except BufferClosedError as error:
                    ended.append(type(error))

            waiting = threading.Thread(target=wait)
            waiting.start()
            wait_until(lambda: reader.statistics().reading == 1, "the fetch to hang")
            began = time.monotonic()
            reader.close(timeout=1.0)
            waiting.join(10)
            assert time.monotonic() - began < 4.0
            assert ended == [BufferClosedError]
            child.resume()
            wait_until(lambda: reader.alive == 0, "the threads to end", 20)
        assert child.ask("state") == [14, 2, 0], "nothing was consumed"


def test_c9_a_second_set_up_is_refused_while_a_read_of_the_first_hangs() -> None:
    packer = UCXXDataPackerMixin()
    with producer("tcp") as child:
        completions = [completion_for(each) for each in put(child, 1)]
        child.stop()
        packer.setup_ucxx_reader({"ucxx_prefetch_timeout": 60}, lane="tcp")
        assert packer.ucxx_reader is not None
        former = packer.ucxx_reader
        assert packer.start_prefetch(completions)
        wait_until(lambda: former.statistics().batches.reading == 1, "the fetch to hang")
        if not packer.cleanup_ucxx_reader(timeout=0.2):
            with pytest.raises(DrayError, match="still has 1 threads"):
                packer.setup_ucxx_reader(lane="tcp")
            child.resume()
            wait_until(packer.cleanup_ucxx_reader, "the former reader to end", 20)
        child.resume()
        packer.setup_ucxx_reader(lane="tcp")
        assert packer.get_policy_input(0, completions[0])["value"][0] == 1
        assert packer.cleanup_ucxx_reader()


@pytest.mark.parametrize("lane", LANES)
def test_a_producer_that_does_not_answer_holds_up_its_own_payloads_only(lane: str) -> None:
    with producer(lane) as stopped, producer(lane) as healthy, reading(lane, threads=2) as reader:
        stuck, good = put(stopped, *range(10)), put(healthy, *range(10, 20))
        stopped.stop()
        assert reader.start([*stuck, *good], timeout=3)
        began = time.monotonic()
        assert values([reader.result(each) for each in good]) == list(range(10, 20))  # type: ignore[misc]
        assert time.monotonic() - began < 2.5
        assert reader.wait()
        outcomes = values(reader.collect())
        assert all(issubclass(each, TransportError) for each in outcomes[:10])  # type: ignore[arg-type]
        assert outcomes[10:] == list(range(10, 20))


@pytest.mark.parametrize("lane", LANES)
def test_c13_a_killed_producer_is_lost_and_neither_stale_nor_late(lane: str) -> None:
    with producer(lane) as killed, producer(lane) as stopped, producer(lane) as healthy, reading(lane) as reader:
        lost, late, good = put(killed, 1, 2), put(stopped, 3), put(healthy, 4, 5)
        reader.fetch_all(good[:1])
        wait_until(lambda: reader.statistics().to_free == 0, "the first one to be freed")
        killed.kill()
        stopped.stop()
        outcomes = values(reader.fetch_all([*lost, *late, *good], timeout=2))
        assert outcomes[:2] == [ProducerLostError] * 2
        assert issubclass(outcomes[2], TransportError)  # type: ignore[arg-type]
        assert outcomes[3:] == [StaleSlotError, 5]


@pytest.mark.parametrize("lane", ["tcp", "ucx"])
def test_c13_another_producer_on_the_address_is_detected(lane: str) -> None:
    with reading(lane) as reader:
        with producer(lane) as first:
            refs = put(first, 1)
            port = int(refs[0].endpoints[0].rpartition(":")[2])
        with UCXXBuffer(UCXXBufferConfig(lane=(lane,), port=port, slots=2, n_server_threads=2)) as other:  # type: ignore[arg-type]
            assert set(other.server.endpoints) & set(refs[0].endpoints)
            other.write({"rewards": np.ones(3)})
            assert values(reader.fetch_all(refs, timeout=20)) == [ProducerLostError]
            assert other.ring.get_ready_count() == 1


def test_an_episode_that_cannot_be_read_in_time_stays_until_it_is_read_or_discarded() -> None:
    with producer("tcp", slots=2) as child:
        config = UCXXConfig(ucxx_prefetch_timeout=1.0)
        with CompletionReader(config, lane="tcp") as reader:
            first, second = (completion_for(ref) for ref in put(child, 1, 2))
            child.stop()
            assert reader.start_prefetch([first, second])
            assert reader.collect_prefetch() == 0
            assert reader.resolve(first) is None
            assert reader.resolve(second) is None
            assert reader.statistics().skipped_transport == 2
            child.resume()
            found = reader.resolve(first)
            assert found is not None
            assert found["value"][0] == 1
            assert reader.statistics().batches.freed == 0
            assert child.ask("state")[1] >= 1, "the other one is READY still"
            reader.discard([second])
            wait_until(lambda: child.ask("state") == [2, 0, 0], "both slots to be free again", 20)
