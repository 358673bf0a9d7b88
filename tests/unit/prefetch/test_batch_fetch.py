"""Layers 2 and 3: what is read when, and when it is given up. No threads, no clock but the numbers here."""

import math
import random

from hypothesis import given
from hypothesis import strategies as st
from prefetch_fixtures import HERE, REFUSED, REPLACED, THERE, TIMEOUT, arrays, ref, refs

from dray.errors import (
    BufferClosedError,
    DrayError,
    ProducerLostError,
    StaleSlotError,
    TransportTimeout,
    Unreachable,
)
from dray.prefetch import BatchFetch, Pause, Read, ReadTries
from dray.prefetch.batch import GROUP, MOST_GROUPS, ROUND_PAUSE

STALE = StaleSlotError("the payload was consumed")


def take(batch: BatchFetch, now: float = 0.0) -> Read:
    action = batch.next(now)
    assert isinstance(action, Read)
    return action


def answer(batch: BatchFetch, read: Read, outcome: DrayError | None = None, now: float = 0.0) -> bool:
    accepted = [batch.came(each, arrays(each) if outcome is None else outcome) for each in read.refs]
    batch.ended(read, now)
    return all(accepted)


def only_error(batch: BatchFetch) -> object:
    (fetched,) = batch.results()
    return fetched.outcome


# --- layer 2 ----------------------------------------------------------------------------------------------------


def test_each_try_gets_the_time_that_is_left() -> None:
    tries = ReadTries(by=16.0)
    assert tries.next(0.0) == 16.0
    assert tries.again(TIMEOUT, 8.0)
    assert tries.next(8.0) == 8.0
    assert not tries.again(TIMEOUT, 8.0)


def test_a_try_is_never_longer_than_allowed_nor_than_the_time_that_is_left() -> None:
    assert ReadTries(by=100.0, most=3, longest=5.0).next(0.0) == 5.0
    assert ReadTries(by=1.0).next(3.0) == 0.0
    assert ReadTries(by=math.inf).next(3.0) == math.inf


def test_no_try_follows_an_answer_of_a_healthy_server_or_the_end_of_the_time() -> None:
    tries = ReadTries(by=10.0, most=5)
    tries.next(0.0)
    assert not tries.again(STALE, 1.0)
    assert not tries.again(TIMEOUT, 10.0)
    assert tries.again(TIMEOUT, 9.0)


# --- layer 3 ----------------------------------------------------------------------------------------------------


def test_references_of_a_producer_are_read_together_and_of_several_in_turn() -> None:
    batch = BatchFetch(1, [*refs(GROUP + 1), *refs(3, THERE)], by=10.0)
    assert batch.wanted == 2
    first, second = take(batch), take(batch)
    assert first.refs == tuple(refs(GROUP))
    assert second.refs == tuple(refs(3, THERE))
    assert batch.next(0.0) is None
    answer(batch, first)
    assert take(batch).refs == (ref(GROUP),)
    assert (batch.reading, batch.wanted) == (2, 2)


def test_one_producer_has_two_groups_under_way_once_it_has_answered() -> None:
    batch = BatchFetch(1, refs(GROUP * 5), by=10.0)
    first = take(batch)
    batch.came(ref(0), TIMEOUT)
    assert batch.next(0.0) is None
    batch.came(ref(1), STALE)
    assert batch.wanted == MOST_GROUPS
    assert take(batch).refs[0] == ref(GROUP)
    assert batch.next(0.0) is None
    batch.ended(first, 0.0)
    assert take(batch).refs[0] == ref(GROUP * 2)


def test_a_producer_that_does_not_answer_leaves_its_place_to_others() -> None:
    batch = BatchFetch(1, [*refs(GROUP * 4), *refs(GROUP * 4, THERE)], by=10.0)
    stuck = take(batch)
    assert stuck.refs[0].producer == HERE
    for _ in range(4):
        read = take(batch)
        assert read.refs[0].producer == THERE
        answer(batch, read)


def test_what_fails_retryably_is_read_in_three_rounds_with_a_pause_between_them() -> None:
    batch = BatchFetch(1, refs(2), by=100.0)
    read = take(batch)
    batch.came(ref(0), arrays(ref(0)))
    batch.came(ref(1), TIMEOUT)
    batch.ended(read, 5.0)
    assert not batch.settled
    assert batch.next(5.0) == Pause(5.0 + ROUND_PAUSE)
    assert batch.next(5.0) == Pause(5.0 + ROUND_PAUSE)
    for _ in range(2):
        assert not batch.settled
        read = take(batch, 6.0)
        assert read.refs == (ref(1),)
        answer(batch, read, TIMEOUT, 5.5)
    assert batch.settled
    first, second = batch.results()
    assert first.outcome == arrays(ref(0))
    assert second.outcome is TIMEOUT


def test_c6_a_stale_reference_is_dropped_in_round_one_and_the_rest_is_unaffected() -> None:
    batch = BatchFetch(1, refs(3), by=100.0)
    read = take(batch)
    for each, outcome in zip(read.refs, (STALE, TIMEOUT, arrays(ref(2))), strict=True):
        batch.came(each, outcome)
    batch.ended(read, 0.0)
    assert take(batch, 1.0).refs == (ref(1),)
    answer(batch, read=Read((ref(1),)))
    stale, again, good = (fetched.outcome for fetched in batch.results())
    assert stale is STALE
    assert again == arrays(ref(1))
    assert good == arrays(ref(2))


def test_c6_slot_zero_and_sequence_zero_are_a_reference_like_any_other() -> None:
    batch = BatchFetch(1, [ref(0)], by=10.0)
    answer(batch, take(batch))
    (fetched,) = batch.results()
    assert (fetched.batch, fetched.ref, fetched.outcome) == (1, ref(0), arrays(ref(0)))


def test_a_round_begins_when_the_one_before_is_over() -> None:
    batch = BatchFetch(1, [ref(0), ref(1, THERE)], by=100.0, pause=0.0)
    first, second = take(batch), take(batch)
    answer(batch, first, TIMEOUT)
    assert batch.next(0.0) is None
    answer(batch, second)
    assert take(batch).refs == first.refs


def test_a_reference_that_is_in_the_batch_twice_is_read_once() -> None:
    batch = BatchFetch(1, [ref(4), ref(4)], by=10.0)
    read = take(batch)
    assert read.refs == (ref(4),)
    answer(batch, read)
    assert [fetched.outcome for fetched in batch.results()] == [arrays(ref(4))] * 2


def test_a_batch_of_nothing_is_settled() -> None:
    batch = BatchFetch(1, [], by=0.0)
    assert batch.settled
    assert batch.next(0.0) is None
    assert batch.results() == []


# --- lost -------------------------------------------------------------------------------------------------------


def test_c13_refused_in_every_round_is_lost() -> None:
    batch = BatchFetch(1, refs(1), by=10.0, pause=0.0)
    for _ in range(3):
        answer(batch, take(batch), REFUSED)
    assert batch.settled
    assert only_error(batch) is REFUSED


def test_c13_refused_in_one_round_only_is_not_lost() -> None:
    for order in ((TIMEOUT, REFUSED, REFUSED), (REFUSED, TIMEOUT, REFUSED)):
        batch = BatchFetch(1, refs(1), by=10.0, pause=0.0)
        for error in order:
            answer(batch, take(batch), error)
        assert isinstance(only_error(batch), Unreachable)


def test_c13_a_server_that_comes_back_between_rounds_is_read() -> None:
    batch = BatchFetch(1, refs(1), by=10.0, pause=0.0)
    answer(batch, take(batch), REFUSED)
    answer(batch, take(batch))
    assert only_error(batch) == arrays(ref(0))


def test_c13_another_producer_in_its_place_is_lost_at_once() -> None:
    for error in (REPLACED, ProducerLostError("membership says so")):
        batch = BatchFetch(1, refs(1), by=10.0)
        answer(batch, take(batch), error)
        assert batch.settled
        assert only_error(batch) is error


# --- time -------------------------------------------------------------------------------------------------------


def test_c4_nothing_is_read_after_the_batch_s_time() -> None:
    batch = BatchFetch(1, refs(GROUP * 3), by=10.0)
    early = take(batch, 0.0)
    assert batch.next(10.0) is None
    answer(batch, early, TIMEOUT, 10.0)
    assert batch.next(10.0) is None
    assert batch.settled
    tried, untried = batch.results()[0].outcome, batch.results()[-1].outcome
    assert tried is TIMEOUT
    assert isinstance(untried, TransportTimeout)
    assert untried.sequence == GROUP * 3 - 1


def test_what_failed_is_given_up_when_the_time_ends_within_a_round() -> None:
    batch = BatchFetch(1, refs(GROUP + 1), by=10.0)
    answer(batch, take(batch), TIMEOUT, 5.0)
    assert batch.next(10.0) is None
    assert batch.settled
    assert batch.results()[0].outcome is TIMEOUT


def test_a_pause_does_not_outlive_the_batch() -> None:
    batch = BatchFetch(1, refs(1), by=1.0, pause=5.0)
    answer(batch, take(batch), TIMEOUT, 0.5)
    assert batch.next(0.5) == Pause(1.0)
    assert batch.next(1.0) is None
    assert only_error(batch) is TIMEOUT


def test_c7_what_comes_after_the_end_is_refused_and_does_not_change_the_results() -> None:
    batch = BatchFetch(1, refs(1), by=10.0)
    read = take(batch)
    batch.close()
    before = only_error(batch)
    assert isinstance(before, TransportTimeout)
    assert not answer(batch, read)
    assert only_error(batch) is before
    assert batch.settled


def test_an_ended_batch_reads_nothing_more() -> None:
    batch = BatchFetch(1, refs(GROUP + 1), by=10.0, pause=0.0)
    read = take(batch)
    batch.came(ref(0), TIMEOUT)
    error = BufferClosedError("the reader is closed")
    batch.close(error)
    batch.close()
    answer(batch, read, TIMEOUT)
    assert batch.next(0.0) is None
    assert {fetched.outcome for fetched in batch.results() if isinstance(fetched.outcome, DrayError)} == {error}


def test_its_representation_tells_the_state() -> None:
    batch = BatchFetch(3, refs(2), by=10.0)
    assert repr(batch) == "<BatchFetch 3: 0 of 2 done, 1 to read>"
    answer(batch, take(batch))
    assert repr(batch) == "<BatchFetch 3: 2 of 2 done, settled>"
    batch.close()
    assert repr(batch) == "<BatchFetch 3: 2 of 2 done, closed>"


# --- simulation -------------------------------------------------------------------------------------------------


@given(st.randoms(use_true_random=False), st.integers(0, 90), st.integers(1, 4), st.integers(1, 9))
def test_every_history_ends_in_time_with_one_outcome_for_each_reference(
    chance: random.Random, count: int, producers: int, threads: int
) -> None:
    wanted = [ref(index, bytes([65 + index % producers]) * 16) for index in range(count)]
    batch = BatchFetch(1, wanted, by=60.0)
    now = 0.0
    running: list[tuple[float, Read]] = []
    reads: dict[tuple[bytes, int], int] = {}
    for _ in range(10_000):
        if batch.settled:
            break
        action = batch.next(now) if len(running) < threads else None
        if isinstance(action, Read):
            assert now < batch.by
            assert len({each.producer for each in action.refs}) == 1
            running.append((chance.uniform(now, batch.by), action))
            for each in action.refs:
                reads[each.identity] = reads.get(each.identity, 0) + 1
            if len(running) < threads:
                continue
        wake = [end for end, _ in running]
        if isinstance(action, Pause):
            wake.append(action.until)
        now = max(now, min(wake)) if wake else now
        for each in [each for each in running if each[0] <= now][:1]:
            running.remove(each)
            for one in each[1].refs:
                outcome = chance.choice((None, None, TIMEOUT, STALE, REFUSED, REPLACED))
                assert batch.came(one, arrays(one) if outcome is None else outcome)
            batch.ended(each[1], now)
    assert batch.settled
    assert now <= batch.by
    assert all(times <= 3 for times in reads.values())
    assert [fetched.ref for fetched in batch.results()] == wanted
    for fetched in batch.results():
        if not isinstance(fetched.outcome, DrayError):
            assert fetched.outcome == arrays(fetched.ref)
