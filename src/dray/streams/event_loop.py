"""`Readable`: a wait in an event loop that another thread may end, even by closing what is waited for."""

from __future__ import annotations

import contextlib
import math
import os

from dray.resources import Closing
from dray.ring.consumer_events import Descriptor


class Readable(Closing):
    """A wait for a descriptor in the running event loop.

    The loop watches a duplicate: the descriptor itself may be closed by another thread, and its number be used for
    something else.

    Args:
        descriptor: it is readable when there is something to do.
    """

    def __init__(self, descriptor: int) -> None:
        import asyncio  # not needed by programs without an event loop

        self._loop = asyncio.get_running_loop()
        self._waiter = self._loop.create_future()
        self._watched = Descriptor(os.dup, descriptor)
        self._loop.add_reader(self._watched.fileno(), self._wake)

    async def wait(self, timeout: float) -> None:
        """Until the descriptor is readable, `interrupt` was called, or the time has passed."""
        import asyncio

        await asyncio.wait((self._waiter,), timeout=None if timeout == math.inf else timeout)

    def interrupt(self) -> None:
        """End the wait, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._wake)

    def close(self) -> None:
        """Watch the descriptor no longer. Twice is fine."""
        if self._watched.fileno() >= 0:
            self._loop.remove_reader(self._watched.fileno())
            self._watched.close()
            self._waiter.cancel()

    def _wake(self) -> None:
        if not self._waiter.done():
            self._waiter.set_result(None)
