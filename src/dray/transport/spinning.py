"""Waiting that begins with looks, where answers come faster than a thread falls asleep and wakes.

A thread that sleeps for a few microseconds wakes into cold caches, and on virtual machines waking it costs the one
who sends to it tens of microseconds: more than the sleep was worth. Looks are bounded in time, and only taken
while waits have been short: whoever is idle sleeps at once, without using any processor.

After the first look, and now and then, others may have the processor: the peer whose answer is awaited may have no
other to run on. A thread that does not get it back at once, and then finds nothing, knows that somebody else needs
it: some of its next waits sleep at once, the more of them, the more often that happens.
"""

from __future__ import annotations

import itertools
import os
import select
import time
from collections.abc import Callable
from typing import Any

SPIN_SECONDS = 300e-6
"""How long a thread looks before it sleeps. A look is one system call of about a microsecond, during which other
threads of its process may run."""

GIVE_WAY_EVERY = 16
"""Others may have the processor after the first of so many looks."""

SHORT_SECONDS = 3 * SPIN_SECONDS
"""A wait of at most this, looks included, has the next one begin with looks."""

SLOW_LOOK_SECONDS = 50e-6
"""A look that takes as long has waited for the interpreter or a processor. If the next one finds nothing, it was
not the peer who needed that."""

REST_GROWTH = 4
MOST_RESTED = 256
"""After looks that were slow for nothing, or longer than a short wait, one wait sleeps at once; after others so
many times as many and one, up to the most. Looks that find something halve them."""


class Spinning:
    """Calls `poll` like the methods of that name in `select`: with a time-out, and 0 for a look.

    Args:
        poll: what to call.
        now: the time in seconds.
        give_way: lets others have the processor.
    """

    __slots__ = ("_give_way", "_now", "_poll", "_rest", "_resting", "_soon")

    def __init__(
        self,
        poll: Callable[[Any], list[tuple[int, int]]],
        now: Callable[[], float] = time.monotonic,
        give_way: Callable[[], None] | None = None,
    ) -> None:
        self._poll = poll
        self._now = now
        self._give_way = give_way or os.sched_yield
        self._soon = False
        self._rest = 0
        self._resting = 0

    def __call__(self, timeout: Any) -> list[tuple[int, int]]:
        """What `poll` found, at the latest after the time-out, however long that takes with looks before."""
        poll = self._poll
        if timeout == 0:
            return poll(0)
        now = self._now
        began = now()
        if self._soon:
            found = self._look(began)
            if found:
                return found
        elif self._resting:
            self._resting -= 1
        found = poll(timeout)
        self._soon = not self._resting and now() - began <= SHORT_SECONDS
        return found

    def _look(self, began: float) -> list[tuple[int, int]]:
        """What looks have found; nothing once it is time to sleep."""
        poll, now = self._poll, self._now
        last, end, slow = began, began + SPIN_SECONDS, False
        for look in itertools.count():
            found = poll(0)
            if found and last - began <= SHORT_SECONDS:
                self._rest >>= 1
                break
            if slow:
                self._rest = self._resting = min(REST_GROWTH * self._rest + 1, MOST_RESTED)
                self._soon = False
                break
            if last > end:
                break
            if look % GIVE_WAY_EVERY == 0:
                self._give_way()
            looked = now()
            last, slow = looked, looked - last > SLOW_LOOK_SECONDS
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
