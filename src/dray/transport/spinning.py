"""Waiting that begins with a few looks, where answers come faster than a thread falls asleep and wakes.

A thread that sleeps for a few microseconds wakes into cold caches, which costs more than the sleep. Looks are
bounded in number, and only taken while waits have been short: whoever is idle sleeps at once, without using any
processor.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from typing import Any

MOST_LOOKS = 40
"""Looks before a thread sleeps; each is one system call, about a microsecond, in which other threads may run."""

SHORT_SECONDS = 100e-6
"""A sleep of at most this was not worth it: the next wait begins with looks."""


class Spinning:
    """Calls `poll` like the methods of that name in `select`: with a time-out, and 0 for a look.

    Args:
        poll: what to call.
    """

    __slots__ = ("_poll", "_soon")

    def __init__(self, poll: Callable[[Any], list[tuple[int, int]]]) -> None:
        self._poll = poll
        self._soon = False

    def __call__(self, timeout: Any) -> list[tuple[int, int]]:
        """What `poll` found, at the latest after the time-out, however long that takes with looks before."""
        poll = self._poll
        if timeout == 0:
            return poll(0)
        if self._soon:
            for _ in range(MOST_LOOKS):
                found = poll(0)
                if found:
                    return found
        began = time.monotonic()
        found = poll(timeout)
        self._soon = time.monotonic() - began < SHORT_SECONDS
        return found


class SpinningEpoll:
    """A `select.epoll` whose waits begin with looks."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self.register = self._epoll.register
        self.modify = self._epoll.modify
        self.unregister = self._epoll.unregister
        self.close = self._epoll.close
        self.poll = Spinning(self._epoll.poll)
