"""Time: a `Clock` that tests can replace, `Deadline` limits every wait, and `Stopwatch` measures."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Protocol


class Clock(Protocol):
    """A source of monotonic seconds."""

    def now(self) -> float:
        """Seconds on a clock that never goes back."""
        ...


class MonotonicClock:
    """The machine's monotonic clock."""

    __slots__ = ()

    def now(self) -> float:
        return time.monotonic()


MONOTONIC: Clock = MonotonicClock()


class Stopwatch:
    """Measures the time since it was made.

    Args:
        clock: where the time comes from.
    """

    __slots__ = ("_clock", "_started")

    def __init__(self, clock: Clock = MONOTONIC) -> None:
        self._clock = clock
        self._started = clock.now()

    @property
    def elapsed(self) -> float:
        """Seconds since this stopwatch was made."""
        return self._clock.now() - self._started


class Deadline:
    """A point in time that an operation and all its parts must not exceed.

    One deadline is made where the operation starts and is passed down. No part makes a later one.
    """

    __slots__ = ("_clock", "_started", "at")

    def __init__(self, at: float, clock: Clock = MONOTONIC, started: float | None = None) -> None:
        self._clock = clock
        self._started = clock.now() if started is None else started
        self.at = at

    @classmethod
    def after(cls, seconds: float | None, clock: Clock = MONOTONIC) -> Deadline:
        """The deadline `seconds` from now; ``None`` means no limit."""
        now = clock.now()
        return cls(math.inf if seconds is None else now + seconds, clock, now)

    def now(self) -> float:
        """The time on this deadline's clock."""
        return self._clock.now()

    @property
    def remaining(self) -> float:
        """Seconds left, never negative; ``inf`` without a limit."""
        return max(0.0, self.at - self._clock.now())

    @property
    def elapsed(self) -> float:
        """Seconds since this deadline was made."""
        return self._clock.now() - self._started

    @property
    def expired(self) -> bool:
        return self._clock.now() >= self.at

    @property
    def timeout(self) -> float | None:
        """The remaining seconds as `threading` and `select` take them: ``None`` for no limit."""
        return None if self.at == math.inf else self.remaining

    def fraction(self, part: float, now: float | None = None, most: float = math.inf) -> Deadline:
        """A deadline after `part` (0 … 1) of the remaining time, and at most `most` seconds from now.

        `now` is the time on this clock, if the caller has it already.
        """
        if self.at == most == math.inf:
            return self
        if now is None:
            now = self._clock.now()
        return Deadline(now + min(max(0.0, self.at - now) * part, most), self._clock, now)

    def capped_at(self, seconds: float) -> Deadline:
        """The earlier of this deadline and `seconds` from now."""
        now = self._clock.now()
        return Deadline(min(self.at, now + seconds), self._clock, now)

    def __repr__(self) -> str:
        return f"<Deadline {self.remaining:.3f} s left>"


MIN_RETRY_PAUSE = 0.05
MAX_RETRY_PAUSE = 0.5


def retry_pauses() -> Iterator[float]:
    """The seconds before each further attempt of a call that may succeed later; they double, up to a limit."""
    pause = MIN_RETRY_PAUSE
    while True:
        yield pause
        pause = min(2 * pause, MAX_RETRY_PAUSE)
