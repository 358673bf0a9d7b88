"""Waiting that begins with looks, where answers come faster than a thread falls asleep and wakes.

A thread that sleeps for a few microseconds wakes into cold caches, and on virtual machines waking it costs the one
who sends to it tens of microseconds: more than the sleep was worth. Looks are bounded in time, and only taken
while waits have been short: whoever is idle sleeps at once, without using any processor.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from typing import Any

SPIN_SECONDS = 300e-6
"""How long a thread looks before it sleeps. A look is one system call of about a microsecond, during which other
threads of its process may run."""

SHORT_SECONDS = 3 * SPIN_SECONDS
"""A wait of at most this, looks included, has the next one begin with looks."""

SLOW_LOOK_SECONDS = 50e-6
"""A look that takes as long has waited for the interpreter or a processor, which others need: the last one."""


class Spinning:
    """Calls `poll` like the methods of that name in `select`: with a time-out, and 0 for a look.

    Args:
        poll: what to call.
        now: the time in seconds.
    """

    __slots__ = ("_now", "_poll", "_soon")

    def __init__(
        self,
        poll: Callable[[Any], list[tuple[int, int]]],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._poll = poll
        self._now = now
        self._soon = False

    def __call__(self, timeout: Any) -> list[tuple[int, int]]:
        """What `poll` found, at the latest after the time-out, however long that takes with looks before."""
        poll = self._poll
        if timeout == 0:
            return poll(0)
        now = self._now
        began = now()
        if self._soon:
            last, end = began, began + SPIN_SECONDS
            while True:
                found = poll(0)
                if found:
                    return found
                looked = now()
                if looked > end or looked - last > SLOW_LOOK_SECONDS:
                    break
                last = looked
        found = poll(timeout)
        self._soon = now() - began <= SHORT_SECONDS
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
