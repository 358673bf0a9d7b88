"""`Tasks`: calls of a consumer that wait for other hosts, in threads, so that the program does not wait for them.

Two kinds of call are made there:

- Reads. A call makes one attempt, which takes no longer than bytes travel. What takes longer is read in a thread,
  and this call or a later one gets it; no other consumer gets the payload meanwhile.
- Attempts to connect to an address, which may meet a host that does not answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from dray.resources import Closing

K = TypeVar("K")
T = TypeVar("T")


class Task(Generic[T]):
    """A call in a thread.

    Args:
        call: what is called.
        about: what it is about.

    Attributes:
        about: as given.
        done: `result` can be called.
    """

    def __init__(self, call: Callable[[], T], about: Any) -> None:
        self.about = about
        self.done = False
        self._calls = [call]
        self._results: list[T] = []
        self._error: BaseException | None = None
        self._dropped = False

    def run(self) -> None:
        """Call it."""
        try:
            self._results.append(self._calls.pop()())
        except BaseException as error:  # noqa: BLE001 - `result` raises it
            self._error = error
        if self._dropped:
            self.drop()
        self.done = True

    def drop(self) -> None:
        """The result is not needed any more."""
        self._dropped = True
        self._results.clear()
        self._error = None

    def result(self) -> T:
        """What the call has returned, or raised."""
        if self._error is not None:
            raise self._error
        return self._results[0]


class Tasks(Closing, Generic[K, T]):
    """Calls in threads, at most one for each key.

    Args:
        start: runs a function in a thread, and returns what waits for its end.
        notify: called in such a thread when its call has returned.
        limit: how many calls there can be at a time.

    Attributes:
        by_key: the calls whose results were not taken.
    """

    def __init__(
        self,
        start: Callable[[Callable[[], None]], Callable[[], None]],
        notify: Callable[[], None],
        limit: int,
    ) -> None:
        self.by_key: dict[K, Task[T]] = {}
        self._start = start
        self._notify = notify
        self._limit = limit
        self._joins: dict[Task[T], Callable[[], None]] = {}

    @property
    def full(self) -> bool:
        """Another one has to wait."""
        return len(self.by_key) >= self._limit

    @property
    def ready(self) -> int:
        """How many are done."""
        return sum(each.done for each in self.by_key.values())

    def begin(self, key: K, call: Callable[[], T], about: Any = None) -> None:
        """Call it in a thread."""
        task = Task(call, about)

        def run() -> None:
            task.run()
            self._notify()

        self._join_done()
        self._joins[task] = self._start(run)
        self.by_key[key] = task  # last: what is here will be done

    def pop_done(self) -> tuple[K, Task[T]] | None:
        """One that is done; it is removed here."""
        for key, task in self.by_key.items():
            if task.done:
                del self.by_key[key]
                self._join_done()
                return key, task
        return None

    def drop(self, key: K) -> None:
        """Forget a call, whose thread may continue."""
        task = self.by_key.pop(key, None)
        if task is not None:
            task.drop()

    def _join_done(self) -> None:
        for each in [each for each in self._joins if each.done]:
            self._joins.pop(each)()

    def close(self) -> None:
        """Wait for the threads, whose waits have been ended. Twice is fine."""
        while self._joins:
            self._joins.popitem()[1]()
