"""Telling producers, in the background, which of their payloads are done with, until they answer or are lost."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

from dray.clock import MONOTONIC, Deadline
from dray.errors import DrayError
from dray.prefetch import Free, Freeing, Pause
from dray.prefetch.freeing import MOST_UNDER_WAY
from dray.protocol import PayloadRef

_LOG = logging.getLogger("dray.runtime.free_payloads")
_PAUSE = 2.0


class PayloadFreeing:
    """A payload that was committed is freed whatever its producer does at the moment.

    A producer that is stopped holds nobody up: it is asked again every few seconds, from threads of their own.
    What waits is bounded by the slots of the producers' rings.

    Args:
        consume: frees payloads of one producer within so many seconds, as `PayloadClient.consume`.
        attempt: seconds that one request may take.
    """

    def __init__(self, consume: Callable[[Iterable[PayloadRef], float], object], attempt: float) -> None:
        self._consume = consume
        self._attempt = attempt
        self._state = Freeing(most_tries=sys.maxsize, pause=_PAUSE)
        self._changed = threading.Condition()
        self._until: Deadline | None = None
        self.given_up = 0
        self._threads = [
            threading.Thread(target=self._run, name=f"freeing-{index}", daemon=True)
            for index in range(MOST_UNDER_WAY)
        ]
        for thread in self._threads:
            thread.start()

    def add(self, references: Iterable[PayloadRef]) -> None:
        """Free these too."""
        with self._changed:
            self._state.add(references)
            self._changed.notify_all()

    def waiting(self) -> list[PayloadRef]:
        """Those whose producers have not answered yet."""
        with self._changed:
            return self._state.waiting()

    def __len__(self) -> int:
        """How many payloads wait to be freed."""
        with self._changed:
            return len(self._state)

    @property
    def unfreed(self) -> int:
        """How many payloads were not freed so far: those that wait, and those that were given up."""
        with self._changed:
            return len(self._state) + self.given_up

    def close(self, timeout: float = 1.0) -> None:
        """Ask every producer that has not answered once more, for at most `timeout` seconds in all.

        A request under way may outlast this: it ends with what `consume` goes through, for which `join` waits.
        """
        with self._changed:
            if self._until is None:
                self._until = Deadline.after(timeout)
                self._state.hurry()
            until = self._until
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(until.remaining)
        left = self.unfreed
        if left:
            _LOG.warning("%d payloads were not freed: their producers did not answer", left)

    def join(self) -> None:
        """Wait for requests that were under way at `close`; they must have been told to end."""
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        while (free := self._next()) is not None:
            error: DrayError | None = None
            try:
                bound = self._attempt if self._until is None else min(self._attempt, self._until.remaining)
                self._consume(free.refs, bound)
            except DrayError as failed:
                error = failed
                _LOG.info("%d payloads are not freed yet: %s", len(free.refs), failed)
            with self._changed:
                self.given_up += self._state.ended(free, error, MONOTONIC.now())
                self._changed.notify_all()

    def _next(self) -> Free | None:
        """What to do next; None when nothing is left to do for this thread."""
        with self._changed:
            while True:
                if self._until is not None and self._until.expired:
                    return None
                action = self._state.next(MONOTONIC.now())
                if isinstance(action, Free):
                    return action
                if self._until is not None:
                    return None
                self._changed.wait(action.until - MONOTONIC.now() if isinstance(action, Pause) else None)
