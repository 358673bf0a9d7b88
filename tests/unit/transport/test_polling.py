"""Waits that begin with polls without sleep, if earlier waits were short."""

import os
import select
from collections.abc import Iterator
from typing import Any

import pytest

from dray.clock import Deadline
from dray.transport.lanes.base import Worker
from dray.transport.polling import (
    BACKOFF_FACTOR,
    MAX_BACKOFF,
    SHORT_SECONDS,
    SLOW_POLL_SECONDS,
    SPIN_SECONDS,
    YIELD_EVERY,
    AdaptiveEpoll,
    AdaptivePoller,
)

FOUND = [(7, select.POLLIN)]
POLL_SECONDS = 1e-6


class Poll:
    """Finds something in the call with a given number, or in one with a timeout; records the timeouts.

    Only its calls and `yield_processor` advance its clock.
    """

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.found_in = 0
        self.sleep = 0.0
        self.seconds = POLL_SECONDS
        self.away = 0.0
        self.time = 0.0

    def __call__(self, timeout: Any) -> list[tuple[int, int]]:
        self.asked.append(timeout)
        self.time += self.seconds if timeout == 0 else self.sleep
        return FOUND if timeout != 0 or len(self.asked) == self.found_in else []

    def now(self) -> float:
        return self.time

    def yield_processor(self) -> None:
        self.time += self.away


@pytest.fixture
def poll() -> Poll:
    return Poll()


@pytest.fixture
def poller(poll: Poll) -> AdaptivePoller:
    """After a short wait."""
    made = AdaptivePoller(poll, poll.now, poll.yield_processor)
    made(5.0)
    poll.asked.clear()
    return made


def test_the_first_wait_sleeps_at_once(poll: Poll) -> None:
    assert AdaptivePoller(poll, poll.now)(5.0) == FOUND
    assert poll.asked == [5.0]


def test_after_a_short_wait_the_next_begins_with_polls_and_then_sleeps(poller: AdaptivePoller, poll: Poll) -> None:
    assert poller(3.0) == FOUND
    assert poll.asked[:-1] == [0] * (len(poll.asked) - 1)
    assert poll.asked[-1] == 3.0
    assert (len(poll.asked) - 1) * POLL_SECONDS == pytest.approx(SPIN_SECONDS, rel=0.02)


def test_a_poll_that_finds_something_ends_the_wait(poller: AdaptivePoller, poll: Poll) -> None:
    poll.found_in = 3
    assert poller(None) == FOUND
    assert poll.asked == [0, 0, 0]


@pytest.mark.parametrize(("sleep", "polls_next"), [(0.9 * SHORT_SECONDS, True), (1.1 * SHORT_SECONDS, False)])
def test_a_long_wait_turns_polling_off_for_the_next_one(
    poller: AdaptivePoller, poll: Poll, sleep: float, polls_next: bool
) -> None:
    poll.sleep = sleep - SPIN_SECONDS  # the polls before it count
    poller(5.0)
    poll.asked.clear()
    poller(5.0)
    assert (poll.asked[0] == 0) is polls_next


def test_a_slow_poll_is_followed_by_one_more(poller: AdaptivePoller, poll: Poll) -> None:
    poll.seconds = 2 * SLOW_POLL_SECONDS
    poller(5.0)
    assert poll.asked == [0, 0, 5.0]


def test_a_thread_that_does_not_get_the_processor_back_at_once_sleeps(poller: AdaptivePoller, poll: Poll) -> None:
    poll.away = 2 * SLOW_POLL_SECONDS
    poller(5.0)
    assert poll.asked == [0, 0, 5.0]


@pytest.mark.parametrize(("away", "polls_next"), [(0.9 * SHORT_SECONDS, True), (1.1 * SHORT_SECONDS, False)])
def test_a_peer_that_had_the_processor_and_answered_soon_may_have_it_again(
    poller: AdaptivePoller, poll: Poll, away: float, polls_next: bool
) -> None:
    poll.away, poll.found_in = away, 2
    assert poller(5.0) == FOUND
    poll.asked.clear()
    poll.found_in = 0
    poller(5.0)
    assert (poll.asked[0] == 0) is polls_next


def backed_off(poller: AdaptivePoller, poll: Poll) -> int:
    """How many waits sleep at once before the next one that polls first."""
    count = -1
    poll.asked[:] = [5.0]
    while poll.asked[0] == 5.0:
        poll.asked.clear()
        poller(5.0)
        count += 1
    return count


def test_slow_polls_have_ever_more_waits_sleep_at_once_up_to_a_bound(poller: AdaptivePoller, poll: Poll) -> None:
    poll.away = 2 * SLOW_POLL_SECONDS
    poller(5.0)
    found = [backed_off(poller, poll) for _ in range(6)]
    assert found[:3] == [1, BACKOFF_FACTOR + 1, BACKOFF_FACTOR * (BACKOFF_FACTOR + 1) + 1]
    assert found[-2:] == [MAX_BACKOFF, MAX_BACKOFF]


def test_successful_polls_make_polling_more_frequent_again(poller: AdaptivePoller, poll: Poll) -> None:
    poll.away = 2 * SLOW_POLL_SECONDS
    poller(5.0)
    backed_off(poller, poll)
    poll.found_in = 1
    backed_off(poller, poll)
    for _ in range(10):
        poll.asked.clear()
        poller(5.0)
    poll.found_in = 0
    poll.asked.clear()
    poller(5.0)
    assert backed_off(poller, poll) == 1


def test_the_processor_is_yielded_after_the_first_poll_and_then_regularly(poll: Poll) -> None:
    given: list[float] = []
    poller = AdaptivePoller(poll, poll.now, lambda: given.append(poll.time))
    poller(5.0)
    poll.found_in = len(poll.asked) + YIELD_EVERY + 2
    poller(5.0)
    assert len(given) == 2
    assert given[0] < 3 * POLL_SECONDS  # after the first poll


def test_a_wait_until_a_deadline_sleeps_for_what_polling_has_left_of_it(
    poller: AdaptivePoller, poll: Poll
) -> None:
    deadline = Deadline.after(5.0, poll)
    assert poller.until(deadline) == FOUND
    assert len(poll.asked) > 1
    assert poll.asked[:-1] == [0] * (len(poll.asked) - 1)
    assert poll.asked[-1] == pytest.approx(deadline.remaining * 1000)


def test_a_wait_until_a_deadline_that_has_passed_polls_once(poll: Poll) -> None:
    assert AdaptivePoller(poll, poll.now).until(Deadline.after(0.0, poll)) == []
    assert poll.asked == [0]


def test_a_wait_of_no_time_is_one_poll(poller: AdaptivePoller, poll: Poll) -> None:
    assert poller(0) == []
    assert poll.asked == [0]


@pytest.fixture
def epoll() -> Iterator[AdaptiveEpoll]:
    made = AdaptiveEpoll()
    yield made
    made.close()


def test_a_spinning_epoll_finds_what_is_registered_with_it(epoll: AdaptiveEpoll) -> None:
    event = os.eventfd(1)
    try:
        epoll.register(event, select.EPOLLIN)
        assert epoll.poll(1.0) == [(event, select.EPOLLIN)]
        epoll.modify(event, 0)
        assert epoll.poll(0.001) == []
        epoll.unregister(event)
    finally:
        os.close(event)


class Busy(Worker):
    """Has so much work left."""

    def __init__(self, left: float) -> None:
        self._event = os.eventfd(0)
        self._left = left

    def fileno(self) -> int:
        return self._event

    def progress(self) -> None:
        if self._left:
            self._left -= 1
            self.steps += 1

    def arm(self) -> bool:
        return not self._left

    def drop_strays(self) -> None:
        pass

    def close(self) -> None:
        os.close(self._event)


@pytest.fixture
def event(epoll: AdaptiveEpoll) -> Iterator[int]:
    """A descriptor that `epoll` reports at once: most waits are short, and the next one polls without sleep."""
    made = os.eventfd(1)
    epoll.register(made, select.EPOLLIN)
    yield made
    os.close(made)


def reported(epoll: AdaptiveEpoll, descriptors: set[int]) -> set[int]:
    """Which of the descriptors are reported, in a great many waits at most."""
    seen: set[int] = set()
    for _ in range(10_000):
        seen.update(descriptor for descriptor, _ in epoll.poll(1.0))
        if descriptors <= seen:
            break
    return seen


def test_a_spinning_epoll_reports_a_worker_that_has_progressed(epoll: AdaptiveEpoll, event: int) -> None:
    with Busy(1) as worker:
        epoll.drive(worker)
        assert worker.fileno() in reported(epoll, {worker.fileno()})
        assert worker.steps == 1
        epoll.stop_driving(worker)
        assert epoll.poll(1.0) == [(event, select.EPOLLIN)]


def test_a_busy_worker_does_not_hide_the_descriptors(epoll: AdaptiveEpoll, event: int) -> None:
    with Busy(float("inf")) as worker:
        epoll.drive(worker)
        both = {worker.fileno(), event}
        assert reported(epoll, both) == both
        epoll.stop_driving(worker)
