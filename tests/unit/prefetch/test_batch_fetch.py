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
from dray.prefetch import BatchFetch, Pause, Read, ReadAttempts
from dray.prefetch.batch import GROUP, MAX_GROUPS, ROUND_PAUSE

STALE = StaleSlotError("the payload was consumed")


def begin(batch: BatchFetch, now: float = 0.0) -> Read:
    action = batch.next(now)
    assert isinstance(action, Read)
    return action


def answer(batch: BatchFetch, read: Read, outcome: DrayError | None = None, now: float = 0.0) -> bool:
    accepted = [batch.report(each, arrays(each) if outcome is None else outcome) for each in read.refs]
    batch.finish(read, now)
    return all(accepted)


def only_error(batch: BatchFetch) -> object:
    (fetched,) = batch.results()
    return fetched.outcome


# --- layer 2 ----------------------------------------------------------------------------------------------------


def test_each_try_gets_the_time_that_is_left() -> None:
    attempts = ReadAttempts(16.0)
    assert attempts.start(0.0) == 16.0
    assert attempts.may_retry(TIMEOUT, 8.0)
    assert attempts.start(8.0) == 8.0
    assert not attempts.may_retry(TIMEOUT, 8.0)


def test_a_try_is_never_longer_than_allowed_nor_than_the_time_that_is_left() -> None:
    assert ReadAttempts(100.0, max_attempts=3, max_seconds=5.0).start(0.0) == 5.0
    assert ReadAttempts(1.0).start(3.0) == 0.0
    assert ReadAttempts(math.inf).start(3.0) == math.inf


def test_no_try_follows_an_answer_of_a_healthy_server_or_the_end_of_the_time() -> None:
    attempts = ReadAttempts(10.0, max_attempts=5)
    attempts.start(0.0)
    assert not attempts.may_retry(STALE, 1.0)
    assert not attempts.may_retry(TIMEOUT, 10.0)
    assert attempts.may_retry(TIMEOUT, 9.0)


# --- layer 3 ----------------------------------------------------------------------------------------------------


def test_references_of_a_producer_are_read_together_and_of_several_in_turn() -> None:
    batch = BatchFetch(1, [*refs(GROUP + 1), *refs(3, THERE)], deadline=10.0)
    assert batch.wanted == 2
    first, second = begin(batch), begin(batch)
    assert first.refs == tuple(refs(GROUP))
    assert second.refs == tuple(refs(3, THERE))
    assert batch.next(0.0) is None
    answer(batch, first)
    assert begin(batch).refs == (ref(GROUP),)
    assert (batch.reading, batch.wanted) == (2, 2)


def test_one_producer_has_two_groups_under_way_once_it_has_answered() -> None:
    batch = BatchFetch(1, refs(GROUP * 5), deadline=10.0)
    first = begin(batch)
    batch.report(ref(0), TIMEOUT)
    assert batch.next(0.0) is None
    batch.report(ref(1), STALE)
    assert batch.wanted == MAX_GROUPS
    assert begin(batch).refs[0] == ref(GROUP)
    assert batch.next(0.0) is None
    batch.finish(first, 0.0)
    assert begin(batch).refs[0] == ref(GROUP * 2)


def test_a_producer_that_does_not_answer_leaves_its_place_to_others() -> None:
    batch = BatchFetch(1, [*refs(GROUP * 4), *refs(GROUP * 4, THERE)], deadline=10.0)
    stuck = begin(batch)
    assert stuck.refs[0].producer == HERE
    for _ in range(4):
        read = begin(batch)
        assert read.refs[0].producer == THERE
        answer(batch, read)


def test_what_fails_retryably_is_read_in_three_rounds_with_a_pause_between_them() -> None:
    batch = BatchFetch(1, refs(2), deadline=100.0)
    read = begin(batch)
    batch.report(ref(0), arrays(ref(0)))
    batch.report(ref(1), TIMEOUT)
    batch.finish(read, 5.0)
    assert not batch.decided
    assert batch.next(5.0) == Pause(5.0 + ROUND_PAUSE)
    assert batch.next(5.0) == Pause(5.0 + ROUND_PAUSE)
    for _ in range(2):
        assert not batch.decided
        read = begin(batch, 6.0)
        assert read.refs == (ref(1),)
        answer(batch, read, TIMEOUT, 5.5)
    assert batch.decided
    first, second = batch.results()
    assert first.outcome == arrays(ref(0))
    assert second.outcome is TIMEOUT


def test_c6_a_stale_reference_is_dropped_in_round_one_and_the_rest_is_unaffected() -> None:
    batch = BatchFetch(1, refs(3), deadline=100.0)
    read = begin(batch)
    for each, outcome in zip(read.refs, (STALE, TIMEOUT, arrays(ref(2))), strict=True):
        batch.report(each, outcome)
    batch.finish(read, 0.0)
    assert begin(batch, 1.0).refs == (ref(1),)
    answer(batch, read=Read((ref(1),)))
    stale, again, good = (fetched.outcome for fetched in batch.results())
    assert stale is STALE
    assert again == arrays(ref(1))
    assert good == arrays(ref(2))


def test_c6_slot_zero_and_sequence_zero_are_a_reference_like_any_other() -> None:
    batch = BatchFetch(1, [ref(0)], deadline=10.0)
    answer(batch, begin(batch))
    (fetched,) = batch.results()
    assert (fetched.batch, fetched.ref, fetched.outcome) == (1, ref(0), arrays(ref(0)))


def test_a_round_begins_when_the_one_before_has_ended() -> None:
    batch = BatchFetch(1, [ref(0), ref(1, THERE)], deadline=100.0, pause=0.0)
    first, second = begin(batch), begin(batch)
    answer(batch, first, TIMEOUT)
    assert batch.next(0.0) is None
    answer(batch, second)
    assert begin(batch).refs == first.refs


def test_a_reference_that_is_in_the_batch_twice_is_read_once() -> None:
    batch = BatchFetch(1, [ref(4), ref(4)], deadline=10.0)
    read = begin(batch)
    assert read.refs == (ref(4),)
    answer(batch, read)
    assert [fetched.outcome for fetched in batch.results()] == [arrays(ref(4))] * 2


def test_an_empty_batch_is_decided() -> None:
    batch = BatchFetch(1, [], deadline=0.0)
    assert batch.decided
    assert batch.next(0.0) is None
    assert batch.results() == []


# --- lost -------------------------------------------------------------------------------------------------------


def test_c13_refused_in_every_round_is_lost() -> None:
    batch = BatchFetch(1, refs(1), deadline=10.0, pause=0.0)
    for _ in range(3):
        answer(batch, begin(batch), REFUSED)
    assert batch.decided
    assert only_error(batch) is REFUSED


def test_c13_refused_in_one_round_only_is_not_lost() -> None:
    for order in ((TIMEOUT, REFUSED, REFUSED), (REFUSED, TIMEOUT, REFUSED)):
        batch = BatchFetch(1, refs(1), deadline=10.0, pause=0.0)
        for error in order:
            answer(batch, begin(batch), error)
        assert isinstance(only_error(batch), Unreachable)


def test_c13_a_server_that_comes_back_between_rounds_is_read() -> None:
    batch = BatchFetch(1, refs(1), deadline=10.0, pause=0.0)
    answer(batch, begin(batch), REFUSED)
    answer(batch, begin(batch))
    assert only_error(batch) == arrays(ref(0))


def test_c13_another_producer_in_its_place_is_lost_at_once() -> None:
    for error in (REPLACED, ProducerLostError("another reason")):
        batch = BatchFetch(1, refs(1), deadline=10.0)
        answer(batch, begin(batch), error)
        assert batch.decided
        assert only_error(batch) is error


# --- time -------------------------------------------------------------------------------------------------------


def test_c4_nothing_is_read_after_the_batch_s_time() -> None:
    batch = BatchFetch(1, refs(GROUP * 3), deadline=10.0)
    early = begin(batch, 0.0)
    assert batch.next(10.0) is None
    answer(batch, early, TIMEOUT, 10.0)
    assert batch.next(10.0) is None
    assert batch.decided
    tried, untried = batch.results()[0].outcome, batch.results()[-1].outcome
    assert tried is TIMEOUT
    assert isinstance(untried, TransportTimeout)
    assert untried.sequence == GROUP * 3 - 1


def test_what_failed_is_given_up_when_the_time_ends_within_a_round() -> None:
    batch = BatchFetch(1, refs(GROUP + 1), deadline=10.0)
    answer(batch, begin(batch), TIMEOUT, 5.0)
    assert batch.next(10.0) is None
    assert batch.decided
    assert batch.results()[0].outcome is TIMEOUT


def test_a_pause_does_not_outlive_the_batch() -> None:
    batch = BatchFetch(1, refs(1), deadline=1.0, pause=5.0)
    answer(batch, begin(batch), TIMEOUT, 0.5)
    assert batch.next(0.5) == Pause(1.0)
    assert batch.next(1.0) is None
    assert only_error(batch) is TIMEOUT


def test_c7_what_comes_after_the_end_is_refused_and_does_not_change_the_results() -> None:
    batch = BatchFetch(1, refs(1), deadline=10.0)
    read = begin(batch)
    batch.close()
    before = only_error(batch)
    assert isinstance(before, TransportTimeout)
    assert not answer(batch, read)
    assert only_error(batch) is before
    assert batch.decided


def test_an_ended_batch_reads_nothing_more() -> None:
    batch = BatchFetch(1, refs(GROUP + 1), deadline=10.0, pause=0.0)
    read = begin(batch)
    batch.report(ref(0), TIMEOUT)
    error = BufferClosedError("the reader is closed")
    batch.close(error)
    batch.close()
    answer(batch, read, TIMEOUT)
    assert batch.next(0.0) is None
    assert {fetched.outcome for fetched in batch.results() if isinstance(fetched.outcome, DrayError)} == {error}


def test_representation_shows_the_state() -> None:
    batch = BatchFetch(3, refs(2), deadline=10.0)
    assert repr(batch) == "<BatchFetch 3: 0 of 2 done, 1 to read>"
    answer(batch, begin(batch))
    assert repr(batch) == "<BatchFetch 3: 2 of 2 done, decided>"
    batch.close()
    assert repr(batch) == "<BatchFetch 3: 2 of 2 done, closed>"


# --- simulation -------------------------------------------------------------------------------------------------


@given(st.randoms(use_true_random=False), st.integers(0, 90), st.integers(1, 4), st.integers(1, 9))
def test_every_history_ends_in_time_with_one_outcome_for_each_reference(
    chance: random.Random, count: int, producers: int, threads: int
) -> None:
    wanted = [ref(index, bytes([65 + index % producers]) * 16) for index in range(count)]
    batch = BatchFetch(1, wanted, deadline=60.0)
    now = 0.0
    running: list[tuple[float, Read]] = []
    reads: dict[tuple[bytes, int], int] = {}
    for _ in range(10_000):
        if batch.decided:
            break
        action = batch.next(now) if len(running) < threads else None
        if isinstance(action, Read):
            assert now < batch.deadline
            assert len({each.producer for each in action.refs}) == 1
            running.append((chance.uniform(now, batch.deadline), action))
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
                assert batch.report(one, arrays(one) if outcome is None else outcome)
            batch.finish(each[1], now)
    assert batch.decided
    assert now <= batch.deadline
    assert all(times <= 3 for times in reads.values())
    assert [fetched.ref for fetched in batch.results()] == wanted
    for fetched in batch.results():
        if not isinstance(fetched.outcome, DrayError):
            assert fetched.outcome == arrays(fetched.ref)
