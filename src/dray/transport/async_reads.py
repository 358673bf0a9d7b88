"""Reads for asyncio. Each waits in a thread of the client's own; what no task receives is released.

The default threads of the event loop stay free for the program: hanging reads could occupy all of them.
asyncio is imported by the first such read, so that `import dray` does not take longer for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from dray.clock import Deadline
from dray.errors import DrayError, TransportTimeout
from dray.payload import Values

if TYPE_CHECKING:
    import concurrent.futures

MAX_ASYNC_READS = 32
"""Threads of one client that wait for reads of asyncio."""


class HeldRead:
    """A received payload that is neither consumed nor released yet.

    Attributes:
        arrays: its arrays, or why it cannot be unpacked.
        end: consumes or releases it.
    """

    def __init__(self, arrays: Values | DrayError, end: Callable[[bool], None]) -> None:
        self.arrays = arrays
        self.end = end


class AsyncReads:
    """The threads in which the reads of one client wait; they start when they are needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads: concurrent.futures.ThreadPoolExecutor | None = None

    async def run(self, read: Callable[[], HeldRead], deadline: Deadline) -> HeldRead:
        """Run `read` in another thread; its result. If the task is cancelled, the result is released.

        Raises:
            TransportTimeout: no thread was free before the deadline.
        """
        import asyncio
        import concurrent.futures

        with self._lock:
            if self._threads is None:
                self._threads = concurrent.futures.ThreadPoolExecutor(MAX_ASYNC_READS, "dray-async-read")
            future = self._threads.submit(read)
        unread = False

        def give_up() -> None:
            nonlocal unread
            unread = future.cancel()

        timer = None
        if deadline.timeout is not None:
            timer = asyncio.get_running_loop().call_later(deadline.timeout, give_up)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError as error:
            future.add_done_callback(_release)
            task = asyncio.current_task()
            if unread and task is not None and not task.cancelling():
                message = f"no thread was free: {MAX_ASYNC_READS} reads are under way"
                raise TransportTimeout(message, elapsed=deadline.elapsed) from error
            raise
        except GeneratorExit:  # the task is destroyed with its event loop
            future.add_done_callback(_release)
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def close(self) -> None:
        """Wait for the reads under way, whose waits the client has ended, and end the threads. Twice is fine."""
        with self._lock:
            threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown()


def _release(future: concurrent.futures.Future[HeldRead]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().end(False)
