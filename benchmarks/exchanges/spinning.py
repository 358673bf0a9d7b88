"""A loop of pure Python in one process, whose turns another process counts without disturbing it."""

from __future__ import annotations

import mmap
import os
import threading

_WORD_BYTES = 8
_STEPS = 100
"""Of one turn, which takes a few microseconds."""


class SharedCount:
    """A number that one process writes and others read: memory alone, no message.

    Args:
        descriptor: of a memfd of 8 bytes; None for a new one.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        if descriptor is None:
            descriptor = os.memfd_create("dray-bench")
            os.ftruncate(descriptor, _WORD_BYTES)
        self.descriptor = descriptor
        self.word = memoryview(mmap.mmap(descriptor, _WORD_BYTES)).cast("Q")

    @property
    def value(self) -> int:
        """The number as it is now."""
        return self.word[0]

    def close(self) -> None:
        """Close the descriptor. Twice is fine."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class Spinner:
    """A thread that runs pure Python and never waits, as an environment's loop does, between `spin` and `rest`.

    Args:
        turns: counts how often its loop went round; what else the process does takes turns away.
    """

    def __init__(self, turns: SharedCount) -> None:
        self._turns = turns
        self._spins = threading.Event()
        self._over = False
        self._thread = threading.Thread(target=self._run, name="busy")
        self._thread.start()

    def spin(self) -> None:
        """Begin."""
        self._spins.set()

    def rest(self) -> None:
        """Stop at the end of the current turn."""
        self._spins.clear()

    def close(self) -> None:
        """End the thread. Twice is fine."""
        self._over = True
        self._spins.set()
        self._thread.join()

    def _run(self) -> None:
        word, spins = self._turns.word, self._spins.is_set
        value = 0.0
        while self._spins.wait() and not self._over:
            while spins() and not self._over:
                for step in range(_STEPS):
                    value = 0.5 * value + step
                word[0] += 1
