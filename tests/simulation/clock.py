"""A clock that moves only when a test moves it."""

from __future__ import annotations


class ManualClock:
    """A `dray.clock.Clock` moved by hand.

    Args:
        now: where it starts, in seconds.
    """

    __slots__ = ("_now",)

    def __init__(self, now: float = 1000.0) -> None:
        self._now = now

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Let time pass; never backwards."""
        assert seconds >= 0
        self._now += seconds
