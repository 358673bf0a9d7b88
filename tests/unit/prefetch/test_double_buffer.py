"""The double buffer: which batch is whose, what is refused, what is late."""

import math

from prefetch_fixtures import TIMEOUT, arrays, ref, refs

from dray.errors import TransportTimeout
from dray.prefetch import BatchFetch, DoubleBuffer, Fetched, Read


def batch(number: int, first: int = 0, count: int = 1, deadline: float = 10.0) -> BatchFetch:
    return BatchFetch(number, refs(count, first=first), deadline)


def begin_read(fetching: BatchFetch) -> Read:
    read = fetching.next(0.0)
    assert isinstance(read, Read)
    return read


def arrive(fetching: BatchFetch) -> None:
    read = begin_read(fetching)
    for each in read.refs:
        fetching.report(each, arrays(each))
    fetching.finish(read, 0.0)


def test_c8_with_nothing_to_fetch_it_is_decided() -> None:
    buffers = DoubleBuffer()
    assert buffers.decided
    assert buffers.start(BatchFetch(1, [], 10.0))
    assert buffers.decided
    assert buffers.collect() == ([], [])


def test_a_batch_is_found_while_it_is_fetched_and_its_results_when_it_is_collected() -> None:
    buffers = DoubleBuffer()
    fetching = batch(1)
    assert buffers.start(fetching)
    assert not buffers.decided
    assert buffers.find(ref(0)) is fetching
    assert buffers.find(ref(1)) is None
    arrive(fetching)
    assert buffers.decided
    results, handed_out = buffers.collect()
    assert results == [Fetched(1, ref(0), arrays(ref(0)))]
    assert handed_out == [ref(0)]
    assert buffers.find(ref(0)) == results[0]


def test_a_collected_batch_takes_the_place_of_the_one_before() -> None:
    buffers = DoubleBuffer()
    for number in (1, 2):
        fetching = batch(number, first=number)
        assert buffers.start(fetching)
        arrive(fetching)
        buffers.collect()
    assert buffers.find(ref(1)) is None
    assert isinstance(buffers.find(ref(2)), Fetched)


def test_collecting_nothing_leaves_what_is_there() -> None:
    buffers = DoubleBuffer()
    fetching = batch(1)
    buffers.start(fetching)
    arrive(fetching)
    buffers.collect()
    assert buffers.collect() == ([], [])
    assert isinstance(buffers.find(ref(0)), Fetched)


def test_c9_a_second_start_is_refused_until_the_first_batch_is_collected() -> None:
    buffers = DoubleBuffer()
    fetching = batch(1)
    assert buffers.start(fetching)
    assert not buffers.replaceable
    assert not buffers.start(batch(2, first=5))
    arrive(fetching)
    assert buffers.replaceable
    buffers.collect()
    assert buffers.start(batch(2, first=5))


def test_c9_a_second_start_is_refused_while_a_read_of_the_first_batch_hangs() -> None:
    buffers = DoubleBuffer()
    fetching = batch(1)
    buffers.start(fetching)
    read = begin_read(fetching)
    buffers.collect()
    assert not buffers.start(batch(2, first=5))
    fetching.finish(read, 9.0)
    assert buffers.start(batch(2, first=5))


def test_c7_late_results_are_not_handed_out() -> None:
    buffers = DoubleBuffer()
    late = batch(1, first=0, count=2)
    buffers.start(late)
    read = begin_read(late)
    late.report(ref(0), arrays(ref(0)))
    results, handed_out = buffers.collect()
    assert [type(fetched.outcome) for fetched in results] == [dict, TransportTimeout]
    assert handed_out == [ref(0)]
    assert not late.report(ref(1), arrays(ref(1)))
    late.finish(read, 1.0)
    following = batch(2, first=10)
    assert buffers.start(following)
    arrive(following)
    results, _ = buffers.collect()
    assert [fetched.ref for fetched in results] == [ref(10)]
    assert buffers.find(ref(1)) is None


def test_a_deferred_batch_is_fetched_after_the_one_before_it_with_its_own_time() -> None:
    buffers = DoubleBuffer()
    first, second = batch(1), BatchFetch(2, refs(1, first=5), math.inf)
    buffers.start(first)
    assert buffers.defer(second, 30.0)
    assert not buffers.defer(batch(3), 30.0)
    assert buffers.advance(0.0) is None
    arrive(first)
    assert not buffers.replaceable
    assert not buffers.start(batch(4))
    buffers.collect()
    assert not buffers.decided
    assert buffers.advance(7.0) is second
    assert second.deadline == 37.0
    assert buffers.advance(7.0) is None
    assert buffers.find(ref(5)) is second


def test_a_deferred_batch_waits_for_reads_that_hang() -> None:
    buffers = DoubleBuffer()
    first, second = batch(1), batch(2, first=5)
    buffers.start(first)
    read = begin_read(first)
    buffers.defer(second, 30.0)
    buffers.collect()
    assert buffers.advance(1.0) is None
    assert not buffers.decided
    first.finish(read, 2.0)
    assert buffers.advance(2.0) is second


def test_result_before_collect_is_handed_out_once() -> None:
    buffers = DoubleBuffer()
    fetching = batch(1, count=3)
    buffers.start(fetching)
    read = begin_read(fetching)
    fetching.report(ref(0), arrays(ref(0)))
    fetching.report(ref(1), arrays(ref(1)))
    assert buffers.result(ref(0)) == (Fetched(1, ref(0), arrays(ref(0))), True)
    assert buffers.result(ref(0)) == (Fetched(1, ref(0), arrays(ref(0))), False)
    fetching.report(ref(2), TIMEOUT)
    fetching.finish(read, 0.0)
    _, handed_out = buffers.collect()
    assert handed_out == [ref(1)]


def test_result_that_has_not_arrived_ends_the_batch() -> None:
    buffers = DoubleBuffer()
    fetching = batch(1)
    buffers.start(fetching)
    read = begin_read(fetching)
    fetched, _ = buffers.result(ref(0))
    assert isinstance(fetched.outcome, TransportTimeout)
    assert not fetching.report(ref(0), arrays(ref(0)))
    assert not buffers.replaceable, "its read hangs: a start would be refused, and must not collect it before"
    fetching.finish(read, 1.0)
    assert buffers.replaceable
    buffers.collect()
    assert buffers.start(batch(2, first=5))
