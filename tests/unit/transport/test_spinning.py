"""Waits that begin with a few looks, and only where that has paid."""

import os
import select
from collections.abc import Iterator
from typing import Any

import pytest

from dray.transport.spinning import (
    GIVE_WAY_EVERY,
    MOST_RESTED,
    REST_GROWTH,
    SHORT_SECONDS,
    SLOW_LOOK_SECONDS,
    SPIN_SECONDS,
    Spinning,
    SpinningEpoll,
)

FOUND = [(7, select.POLLIN)]
LOOK = 1e-6


class Poll:
    """Finds something in the call of the given number, or in the one that may wait; notes the time-outs, and has a
    clock that only its calls and `give_way` move."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.found_in = 0
        self.sleep = 0.0
        self.look = LOOK
        self.away = 0.0
        self.time = 0.0

    def __call__(self, timeout: Any) -> list[tuple[int, int]]:
        self.asked.append(timeout)
        self.time += self.look if timeout == 0 else self.sleep
        return FOUND if timeout != 0 or len(self.asked) == self.found_in else []

    def now(self) -> float:
        return self.time

    def give_way(self) -> None:
        self.time += self.away


@pytest.fixture
def poll() -> Poll:
    return Poll()


@pytest.fixture
def spinning(poll: Poll) -> Spinning:
    """After a short wait."""
    made = Spinning(poll, poll.now, poll.give_way)
    made(5.0)
    poll.asked.clear()
    return made


def test_the_first_wait_sleeps_at_once(poll: Poll) -> None:
    assert Spinning(poll, poll.now)(5.0) == FOUND
    assert poll.asked == [5.0]


def test_after_a_short_wait_the_next_begins_with_looks_and_then_sleeps(spinning: Spinning, poll: Poll) -> None:
    assert spinning(3.0) == FOUND
    assert poll.asked[:-1] == [0] * (len(poll.asked) - 1)
    assert poll.asked[-1] == 3.0
    assert (len(poll.asked) - 1) * LOOK == pytest.approx(SPIN_SECONDS, rel=0.02)


def test_a_look_that_finds_something_ends_the_wait(spinning: Spinning, poll: Poll) -> None:
    poll.found_in = 3
    assert spinning(None) == FOUND
    assert poll.asked == [0, 0, 0]


@pytest.mark.parametrize(("sleep", "goes_on"), [(0.9 * SHORT_SECONDS, True), (1.1 * SHORT_SECONDS, False)])
def test_the_habit_ends_with_a_wait_that_took_long(
    spinning: Spinning, poll: Poll, sleep: float, goes_on: bool
) -> None:
    poll.sleep = sleep - SPIN_SECONDS  # the looks before it count
    spinning(5.0)
    poll.asked.clear()
    spinning(5.0)
    assert (poll.asked[0] == 0) is goes_on


def test_a_slow_look_is_followed_by_one_more(spinning: Spinning, poll: Poll) -> None:
    poll.look = 2 * SLOW_LOOK_SECONDS
    spinning(5.0)
    assert poll.asked == [0, 0, 5.0]


def test_a_thread_that_does_not_get_the_processor_back_at_once_sleeps(spinning: Spinning, poll: Poll) -> None:
    poll.away = 2 * SLOW_LOOK_SECONDS
    spinning(5.0)
    assert poll.asked == [0, 0, 5.0]


@pytest.mark.parametrize(("away", "goes_on"), [(0.9 * SHORT_SECONDS, True), (1.1 * SHORT_SECONDS, False)])
def test_a_peer_that_had_the_processor_and_answered_soon_may_have_it_again(
    spinning: Spinning, poll: Poll, away: float, goes_on: bool
) -> None:
    poll.away, poll.found_in = away, 2
    assert spinning(5.0) == FOUND
    poll.asked.clear()
    poll.found_in = 0
    spinning(5.0)
    assert (poll.asked[0] == 0) is goes_on


def rested(spinning: Spinning, poll: Poll) -> int:
    """How many waits sleep at once before the next one that looks."""
    count = -1
    poll.asked[:] = [5.0]
    while poll.asked[0] == 5.0:
        poll.asked.clear()
        spinning(5.0)
        count += 1
    return count


def test_slow_looks_have_ever_more_waits_sleep_at_once_up_to_a_bound(spinning: Spinning, poll: Poll) -> None:
    poll.away = 2 * SLOW_LOOK_SECONDS
    spinning(5.0)
    found = [rested(spinning, poll) for _ in range(6)]
    assert found[:3] == [1, REST_GROWTH + 1, REST_GROWTH * (REST_GROWTH + 1) + 1]
    assert found[-2:] == [MOST_RESTED, MOST_RESTED]


def test_looks_that_find_something_are_taken_more_often_again(spinning: Spinning, poll: Poll) -> None:
    poll.away = 2 * SLOW_LOOK_SECONDS
    spinning(5.0)
    rested(spinning, poll)
    poll.found_in = 1
    rested(spinning, poll)
    for _ in range(10):
        poll.asked.clear()
        spinning(5.0)
    poll.found_in = 0
    poll.asked.clear()
    spinning(5.0)
    assert rested(spinning, poll) == 1


def test_others_may_have_the_processor_after_the_first_look_and_now_and_then(poll: Poll) -> None:
    given: list[float] = []
    spinning = Spinning(poll, poll.now, lambda: given.append(poll.time))
    spinning(5.0)
    poll.found_in = len(poll.asked) + GIVE_WAY_EVERY + 2
    spinning(5.0)
    assert len(given) == 2
    assert given[0] < 3 * LOOK  # after the first look


def test_a_wait_of_no_time_is_one_look(spinning: Spinning, poll: Poll) -> None:
    assert spinning(0) == []
    assert poll.asked == [0]


@pytest.fixture
def epoll() -> Iterator[SpinningEpoll]:
    made = SpinningEpoll()
    yield made
    made.close()


def test_a_spinning_epoll_finds_what_is_registered_with_it(epoll: SpinningEpoll) -> None:
    event = os.eventfd(1)
    try:
        epoll.register(event, select.EPOLLIN)
        assert epoll.poll(1.0) == [(event, select.EPOLLIN)]
        epoll.modify(event, 0)
        assert epoll.poll(0.001) == []
        epoll.unregister(event)
    finally:
        os.close(event)
