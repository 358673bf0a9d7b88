"""Payloads whose bytes come over a connection while the program does something else, or asks again.

A call with a time limit reads what it was given as far as its time allows. What it has no time for is read in a
thread, and a later call gets it: the producer is not asked twice, and nobody else gets the payload meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable

from dray.payload import Arrays
from dray.protocol import streams
from dray.resources import Closing
from dray.streams.source import Source


class Fetch:
    """One payload that is being read.

    Args:
        source, given: the payload.
        read: returns its arrays, or None if it is gone.

    Attributes:
        source, given: as given.
        done: `arrays` will not wait.
    """

    def __init__(self, source: Source, given: streams.Given, read: Callable[[], Arrays | None]) -> None:
        self.source = source
        self.given = given
        self.done = False
        self._read = read
        self._arrays: Arrays | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        """Read it."""
        try:
            self._arrays = self._read()
        except BaseException as error:  # noqa: BLE001 - `arrays` raises it
            self._error = error
        self.done = True

    def arrays(self) -> Arrays | None:
        """The arrays, once it is done; None if the payload is gone.

        Raises:
            TransportError: it could not be read.
            PayloadFormatError: its bytes are not arrays.
        """
        if self._error is not None:
            raise self._error
        return self._arrays


class Fetches(Closing):
    """The payloads of one consumer that are being read: at most one of each producer, so that they stay in order.

    Args:
        start: runs a function in a thread, and returns what waits for its end.
        notify: called in such a thread when a payload is there.
        limit: how many payloads there can be at a time.

    Attributes:
        by_source: what is being read.
    """

    def __init__(
        self,
        start: Callable[[Callable[[], None]], Callable[[], None]],
        notify: Callable[[], None],
        limit: int,
    ) -> None:
        self.by_source: dict[Source, Fetch] = {}
        self._start = start
        self._notify = notify
        self._limit = limit
        self._joins: dict[Fetch, Callable[[], None]] = {}

    @property
    def full(self) -> bool:
        """Another one has to wait."""
        return len(self.by_source) >= self._limit

    @property
    def ready(self) -> int:
        """How many are done."""
        return sum(each.done for each in self.by_source.values())

    def begin(self, source: Source, given: streams.Given) -> None:
        """Read a payload in a thread."""
        fetch = Fetch(source, given, source.reader(given))

        def run() -> None:
            fetch.run()
            self._notify()

        for each in [each for each in self._joins if each.done]:
            self._joins.pop(each)()
        self._joins[fetch] = self._start(run)
        self.by_source[source] = fetch  # last: what is here will be done

    def take(self) -> Fetch | None:
        """One that is done; it is removed here."""
        for fetch in self.by_source.values():
            if fetch.done:
                del self.by_source[fetch.source]
                return fetch
        return None

    def close(self) -> None:
        """Wait for the threads, whose reads the end of their client has ended. Twice is fine."""
        self.by_source.clear()
        while self._joins:
            self._joins.popitem()[1]()
