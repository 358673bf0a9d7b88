"""`BatchReader`: the threads that carry out the decisions, with a source whose answers are given."""

import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from forked_child import run_in_child
from prefetch_fixtures import REFUSED, THERE, TIMEOUT, FakeSource, arrays, ref, refs
from waiting import wait_until

from dray.errors import (
    BufferClosedError,
    ConfigError,
    DrayError,
    SlotError,
    StaleSlotError,
    TransportTimeout,
)
from dray.prefetch import BatchReader
from dray.transport import ReadResult

STALE = StaleSlotError("the payload was consumed")


@pytest.fixture
def source() -> FakeSource:
    return FakeSource()


@pytest.fixture
def reader(source: FakeSource) -> Iterator[BatchReader]:
    with BatchReader(source) as reader:
        yield reader


def outcomes(fetched: list) -> list[object]:
    return [each.outcome if isinstance(each.outcome, DrayError) else "came" for each in fetched]


# --- now --------------------------------------------------------------------------------------------------------


def test_a_batch_comes_back_in_its_own_order_and_is_freed_after_that(
    reader: BatchReader, source: FakeSource
) -> None:
    wanted = [*refs(40), *refs(3, THERE, first=100), ref(5)]
    fetched = reader.fetch_all(wanted)
    assert [each.ref for each in fetched] == wanted
    assert all(each.outcome == arrays(each.ref) for each in fetched)
    wait_until(lambda: sorted(source.freed) == [*range(40), 100, 101, 102], "the payloads to be freed")


def test_what_is_not_to_be_consumed_is_not_freed(reader: BatchReader, source: FakeSource) -> None:
    reader.fetch_all(refs(3), consume=False)
    assert reader.statistics().to_free == 0
    assert source.freed == []


def test_layer_two_reads_twice_and_layer_three_has_three_rounds(reader: BatchReader, source: FakeSource) -> None:
    source.fail(ref(0), *[TIMEOUT] * 99)
    source.fail(ref(1), *[TIMEOUT] * 5)
    source.fail(ref(2), STALE, STALE)
    assert outcomes(reader.fetch_all(refs(4), timeout=30)) == [TIMEOUT, "came", STALE, "came"]
    assert [source.asked.count(sequence) for sequence in range(4)] == [6, 6, 1, 1]
    statistics = reader.statistics()
    assert (statistics.reads, statistics.reads_again, statistics.failed) == (2, 6, 6)


def test_one_payload_is_read_twice_in_the_calling_thread(reader: BatchReader, source: FakeSource) -> None:
    source.fail(ref(0), TIMEOUT)
    assert reader.read_one(ref(0)) == arrays(ref(0))
    source.fail(ref(1), TIMEOUT, REFUSED)
    with pytest.raises(type(REFUSED)):
        reader.read_one(ref(1), timeout=None)
    assert reader.alive == 0


def test_a_batch_whose_producer_does_not_answer_ends_at_its_deadline(
    reader: BatchReader, source: FakeSource
) -> None:
    source.gate.clear()
    (fetched,) = reader.fetch_all([ref(0)], timeout=0.1)
    assert isinstance(fetched.outcome, TransportTimeout)
    source.gate.set()
    wait_until(lambda: reader.statistics().late == 1, "the late payload")
    assert source.freed == []


def test_no_more_threads_than_there_is_to_read(source: FakeSource) -> None:
    with BatchReader(source, threads=3) as reader:
        source.gate.clear()
        reader.start([each for first in range(9) for each in refs(1, bytes([65 + first]) * 16)])
        wait_until(lambda: len(source.asked) == 3, "three reads")
        assert reader.alive == 3
        source.gate.set()
        assert reader.wait()
    with BatchReader(source, threads=3) as reader:
        reader.fetch_all([ref(0)])
        reader.fetch_all([ref(1)])
        assert reader.alive <= 2


def test_a_read_waits_for_no_thread_that_another_read_holds(source: FakeSource) -> None:
    with BatchReader(source) as reader:
        source.gate.clear()
        assert reader.start([ref(0)])
        wait_until(lambda: source.asked == [0], "the first read")
        fetching = threading.Thread(target=reader.fetch_all, args=([ref(1)],))
        fetching.start()
        wait_until(lambda: source.asked == [0, 1], "the second read, while the first one hangs")
        source.gate.set()
        fetching.join(10)


def test_a_source_that_refuses_as_a_whole_fails_every_reference(source: FakeSource) -> None:
    class Refusing(FakeSource):
        def read_many(self, of: Any, **_: Any) -> Any:
            yield ReadResult(ref(0), arrays(ref(0)))
            raise BufferClosedError("the client is closed")

    with BatchReader(Refusing()) as reader:
        came, *refused = reader.fetch_all(refs(3), timeout=10)
        assert came.outcome == arrays(ref(0))
        assert [type(each.outcome) for each in refused] == [BufferClosedError] * 2


def test_calls_that_wait_raise_the_error_that_ended_a_thread(source: FakeSource) -> None:
    with BatchReader(source) as reader:
        source.fail(ref(0), MemoryError("no memory for this payload"))
        with pytest.raises(MemoryError):
            reader.fetch_all([ref(0)], timeout=30)


def test_arguments_that_make_no_sense_are_refused(source: FakeSource) -> None:
    for arguments in ({"threads": 0}, {"threads": 65}, {"attempts": 0}, {"rounds": 0}, {"read_timeout": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(arguments))):
            BatchReader(source, **arguments)


# --- in the background ------------------------------------------------------------------------------------------


def test_c8_a_batch_of_nothing_has_come_at_once(reader: BatchReader) -> None:
    assert reader.wait(0)
    assert reader.start([])
    assert reader.wait(0)
    assert reader.collect() == []
    assert reader.alive == 0


def test_the_next_batch_is_fetched_while_the_one_before_is_used(reader: BatchReader, source: FakeSource) -> None:
    assert reader.start(refs(3))
    assert reader.defer(refs(3, first=10))
    assert reader.wait()
    source.gate.clear()
    assert [each.ref for each in reader.collect()] == refs(3)
    wait_until(lambda: 10 in source.asked, "the deferred batch to begin")
    assert outcomes([reader.result(ref(index)) for index in range(3)]) == ["came"] * 3
    source.gate.set()
    assert reader.wait()
    assert [each.ref for each in reader.collect()] == refs(3, first=10)
    assert reader.result(ref(0)) is None
    wait_until(lambda: sorted(source.freed) == [0, 1, 2, 10, 11, 12], "the payloads to be freed")


def test_with_nothing_before_it_a_deferred_batch_begins_at_once(reader: BatchReader) -> None:
    assert reader.defer(refs(2))
    assert reader.wait()
    assert outcomes(reader.collect()) == ["came", "came"]


def test_a_payload_stays_with_its_producer_until_it_is_handed_out(reader: BatchReader, source: FakeSource) -> None:
    reader.start(refs(3))
    assert reader.wait()
    assert source.freed == []
    assert outcomes([reader.result(ref(1))]) == ["came"]
    wait_until(lambda: source.freed == [1], "the one that was handed out to be freed")
    reader.collect()
    wait_until(lambda: sorted(source.freed) == [0, 1, 2], "the others to be freed, once")


def test_a_start_collects_a_batch_that_has_come(reader: BatchReader) -> None:
    reader.start([ref(0)])
    assert reader.wait()
    assert reader.start([ref(1)])
    assert outcomes([reader.result(ref(0)), reader.result(ref(1))]) == ["came", "came"]


def test_result_waits_for_the_payload(reader: BatchReader, source: FakeSource) -> None:
    source.gate.clear()
    reader.start([ref(0)])
    opening = threading.Timer(0.1, source.gate.set)
    opening.start()
    assert outcomes([reader.result(ref(0))]) == ["came"]
    opening.join()


def test_result_waits_until_the_deadline_of_the_batch(reader: BatchReader, source: FakeSource) -> None:
    source.gate.clear()
    reader.start([ref(0)], timeout=0.1)
    fetched = reader.result(ref(0))
    assert fetched is not None
    assert isinstance(fetched.outcome, TransportTimeout)


def test_result_stops_waiting_when_its_batch_is_collected(reader: BatchReader, source: FakeSource) -> None:
    source.gate.clear()
    reader.start([ref(0)])
    collecting = threading.Timer(0.1, reader.collect)
    collecting.start()
    fetched = reader.result(ref(0))
    collecting.join()
    assert fetched is not None
    assert isinstance(fetched.outcome, TransportTimeout)


def test_c7_a_batch_that_timed_out_gives_the_next_one_nothing(reader: BatchReader, source: FakeSource) -> None:
    source.gate.clear()
    assert reader.start(refs(2), timeout=30)
    wait_until(lambda: source.asked, "the first batch to be read")
    assert not reader.wait(0.05)
    first = reader.collect()
    assert all(isinstance(each.outcome, TransportTimeout) for each in first)
    assert not reader.start(refs(2, first=10))
    assert reader.statistics().refused_starts == 1
    source.gate.set()
    wait_until(lambda: reader.statistics().reading == 0, "the reads of the first batch to end")
    assert reader.start(refs(2, first=10))
    assert reader.wait()
    second = reader.collect()
    assert [(each.batch, each.outcome) for each in second] == [
        (second[0].batch, arrays(each)) for each in refs(2, first=10)
    ]
    assert second[0].batch != first[0].batch
    assert reader.statistics().late >= 1
    wait_until(lambda: sorted(source.freed) == [10, 11], "the second batch to be freed")
    assert not {0, 1} & set(source.freed), "late payloads stay with their producer"


def test_a_deferred_batch_begins_when_the_last_read_before_it_has_ended(
    reader: BatchReader, source: FakeSource
) -> None:
    source.gate.clear()
    reader.start([ref(0)])
    wait_until(lambda: source.asked, "the first read")
    reader.defer([ref(1)])
    reader.collect()
    assert not reader.wait(0.05)
    source.gate.set()
    assert reader.wait()
    assert outcomes(reader.collect()) == ["came"]


# --- freeing ----------------------------------------------------------------------------------------------------


def test_freeing_is_tried_again_and_counted_when_given_up(reader: BatchReader, source: FakeSource) -> None:
    source.free_errors = [TIMEOUT]
    reader.discard([ref(0)])
    wait_until(lambda: source.freed == [0], "the second attempt")
    source.free_errors = [SlotError("the ring is closed")]
    reader.discard([ref(1)])
    wait_until(lambda: reader.statistics().unfreed == 1, "the payload to be given up")
    assert reader.statistics().freed == 1


def test_freeing_may_be_tried_more_often_and_what_waits_is_known(source: FakeSource) -> None:
    source.free_errors = [TIMEOUT] * 6
    source.free_gate.clear()
    with BatchReader(source, consume=False, free_attempts=7, free_pause=0.01) as reader:
        reader.discard(refs(2))
        assert (reader.to_free(), reader.unfreed) == (refs(2), 2)
        source.free_gate.set()
        wait_until(lambda: reader.unfreed == 0, "the seventh attempt")
        assert (source.freed, reader.to_free()) == ([0, 1], [])


def test_what_was_handed_out_is_freed_before_the_end(source: FakeSource) -> None:
    with BatchReader(source) as reader:
        reader.fetch_all(refs(5))
    assert sorted(source.freed) == list(range(5))


# --- the end ----------------------------------------------------------------------------------------------------


def test_c9_close_wakes_waiting_calls_and_closes_the_source_before_it_joins(source: FakeSource) -> None:
    reader = BatchReader(source)
    source.gate.clear()
    raised: list[BaseException] = []

    def wait_for(call: object, *arguments: object) -> None:
        try:
            call(*arguments)  # type: ignore[operator]
        except BufferClosedError as error:
            raised.append(error)

    reader.start([ref(0)])
    calls = ((reader.wait,), (reader.result, ref(0)), (reader.fetch_all, [ref(1)]))
    waiting = [threading.Thread(target=wait_for, args=call) for call in calls]
    for thread in waiting:
        thread.start()
    wait_until(lambda: len(source.asked) == 2, "both reads to hang")
    reader.close()
    for thread in waiting:
        thread.join(5)
    assert len(raised) == 3
    assert source.closed == 1
    assert reader.alive == 0


def test_c9_a_read_that_cannot_be_woken_does_not_hold_the_end(source: FakeSource) -> None:
    source.opens_when_closed = False
    source.gate.clear()
    reader = BatchReader(source)
    reader.start([ref(0)])
    wait_until(lambda: source.asked, "the read to hang")
    reader.close(timeout=0.1)
    assert reader.alive == 1
    source.gate.set()
    reader.close()
    assert reader.alive == 0
    assert source.freed == []


def test_close_does_not_wait_for_payloads_that_cannot_be_freed_in_time(source: FakeSource) -> None:
    source.free_gate.clear()
    reader = BatchReader(source)
    reader.discard(refs(2))
    reader.close(timeout=0.1)
    for _ in range(2):
        statistics = reader.statistics()
        assert (statistics.freed, statistics.unfreed, statistics.to_free) == (0, 0, 2)
        assert reader.alive == 1
        reader.close(timeout=0.1)
    source.free_gate.set()
    reader.close()
    assert (reader.statistics().freed, reader.alive) == (2, 0)


def test_payloads_are_freed_while_all_reads_hang(source: FakeSource) -> None:
    with BatchReader(source, threads=1) as reader:
        source.gate.clear()
        reader.start([ref(0)])
        wait_until(lambda: source.asked, "the only thread to hang")
        reader.discard(refs(2, first=5))
        wait_until(lambda: sorted(source.freed) == [5, 6], "the payloads to be freed")


def test_after_close_every_call_raises_buffer_closed_error(source: FakeSource) -> None:
    reader = BatchReader(source)
    reader.close()
    reader.close()
    for call in (
        lambda: reader.read_one(ref(0)),
        lambda: reader.fetch_all([]),
        lambda: reader.start([]),
        lambda: reader.defer([]),
        lambda: reader.wait(0),
        lambda: reader.collect(),
        lambda: reader.result(ref(0)),
        lambda: reader.discard([]),
    ):
        with pytest.raises(BufferClosedError):
            call()


def test_b12_a_forked_child_cannot_use_the_reader(reader: BatchReader) -> None:
    reader.fetch_all([ref(0)])

    def use() -> None:
        reader.close()
        with pytest.raises(BufferClosedError):
            reader.fetch_all([ref(1)])

    assert run_in_child(use) == ""
    assert outcomes(reader.fetch_all([ref(1)])) == ["came"]


def test_an_error_that_is_kept_keeps_nothing_of_those_who_raised_it(
    reader: BatchReader, source: FakeSource
) -> None:
    error, cause = TransportTimeout("no answer"), TransportTimeout("no answer from one endpoint")
    error.__cause__, cause.__cause__ = cause, error  # layer 1 raises its last error from itself
    source.fail(ref(0), *[error] * 6)
    (fetched,) = reader.fetch_all([ref(0)], timeout=10)
    assert fetched.outcome is error
    assert error.__traceback__ is cause.__traceback__ is None


@pytest.mark.parametrize("ahead", [False, True], ids=["at once", "in the background"])
def test_reader_that_frees_nothing_keeps_no_payload_that_it_has_handed_out(
    source: FakeSource, ahead: bool
) -> None:
    """They may lie in slots of their producers, which these need before the next batch can be read."""
    with BatchReader(source, consume=False) as reader:
        if ahead:
            assert reader.start(refs(3))
            assert reader.wait(20)
            results = reader.collect()
        else:
            results = reader.fetch_all(refs(3), consume=False)
        kept = [weakref.ref(array) for each in results for array in each.outcome.values()]
        assert len(kept) >= 3
        del results
        wait_until(lambda: not any(each() is not None for each in kept), "the end of the last payload")
        assert source.freed == []
