"""The steps of a shutdown, in the log: what is done, what it waits for, and how long it took."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TypeVar

from dray.clock import Stopwatch

_LOG = logging.getLogger("dray.runtime.shutdown")
_Opened = TypeVar("_Opened")


class ShutdownStep:
    """One step.

    Args:
        what: is done, e.g. ``"unregister"``.
        waits_for: whom or what it waits for.
        bound: seconds that it takes at most.
    """

    def __init__(self, what: str, waits_for: str, bound: float) -> None:
        self._what = what
        self._waits_for = waits_for
        self._bound = bound
        self._began: Stopwatch | None = None

    def begin(self) -> None:
        """Log that the step begins."""
        self._began = Stopwatch()
        _LOG.info("shutdown: %s, waiting for %s, at most %.1f s", self._what, self._waits_for, self._bound)

    def end(self) -> None:
        """Log how long it took, if it has begun."""
        if self._began is not None:
            _LOG.info("shutdown: %s took %.2f s", self._what, self._began.elapsed)


@contextmanager
def shutdown_step(what: str, waits_for: str, bound: float) -> Iterator[None]:
    """The block is a step of the shutdown; parameters as for `ShutdownStep`."""
    step = ShutdownStep(what, waits_for, bound)
    step.begin()
    try:
        yield
    finally:
        step.end()


def closed_by_step(stack: ExitStack, opened: AbstractContextManager[_Opened], step: ShutdownStep) -> _Opened:
    """Enter `opened` in `stack`, whose end closes it as a step of the shutdown."""
    stack.callback(step.end)
    entered = stack.enter_context(opened)
    stack.callback(step.begin)
    return entered
