"""Waits that begin with a few looks, and only where that has paid."""

import os
import select
import time
from collections.abc import Iterator
from typing import Any

import pytest

from dray.transport.spinning import MOST_LOOKS, SHORT_SECONDS, Spinning, SpinningEpoll

FOUND = [(7, select.POLLIN)]


class Poll:
    """Finds something in the call of the given number, or in the one that may wait; notes the time-outs."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.found_in = 0
        self.sleeps = 0.0

    def __call__(self, timeout: Any) -> list[tuple[int, int]]:
        self.asked.append(timeout)
        if timeout != 0 and self.sleeps:
            deadline = time.monotonic() + self.sleeps
            while time.monotonic() < deadline:
                pass
        return FOUND if timeout != 0 or len(self.asked) == self.found_in else []

    def forget(self) -> None:
        self.asked.clear()


@pytest.fixture
def poll() -> Poll:
    return Poll()


def test_the_first_wait_sleeps_at_once(poll: Poll) -> None:
    assert Spinning(poll)(5.0) == FOUND
    assert poll.asked == [5.0]


def test_after_a_short_wait_the_next_begins_with_looks_and_then_sleeps(poll: Poll) -> None:
    spinning = Spinning(poll)
    spinning(5.0)
    poll.forget()
    assert spinning(3.0) == FOUND
    assert poll.asked == [0] * MOST_LOOKS + [3.0]


def test_a_look_that_finds_something_ends_the_wait(poll: Poll) -> None:
    spinning = Spinning(poll)
    spinning(5.0)
    poll.forget()
    poll.found_in = 3
    assert spinning(None) == FOUND
    assert poll.asked == [0, 0, 0]


def test_a_wait_that_took_long_ends_the_habit(poll: Poll) -> None:
    spinning = Spinning(poll)
    spinning(5.0)
    poll.sleeps = 2 * SHORT_SECONDS
    spinning(5.0)
    poll.forget()
    spinning(5.0)
    assert poll.asked == [5.0]


def test_a_wait_of_no_time_is_one_look(poll: Poll) -> None:
    spinning = Spinning(poll)
    spinning(5.0)
    poll.forget()
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
