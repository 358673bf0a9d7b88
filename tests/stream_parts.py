"""What `Delivery` needs, made by hand: a ring whose payloads a test finishes, and consumers that keep a record."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import cast

from simulation import ManualClock

from dray.protocol.streams import Given, Returned
from dray.ring.shared_words import SharedWords
from dray.ring.stream_words import StreamWords
from dray.streams.delivery import Delivery, Recipient

SLOTS = 64


class FakeRing:
    """A `RingView`.

    Attributes:
        finished: (sequence, reader) of the payloads that are consumed or gone.
        at_barrier: called at each barrier.
        barriers: how many there were.
        barriers_fail: they fail.
    """

    def __init__(self) -> None:
        self.finished: set[tuple[int, int]] = set()
        self.barriers = 0
        self.barriers_fail = False
        self.at_barrier: Callable[[], None] = lambda: None

    def has_finished(self, slot: int, sequence: int, reader: int) -> bool:
        return (sequence, reader) in self.finished

    def barrier(self) -> bool:
        self.barriers += 1
        self.at_barrier()
        return not self.barriers_fail


class ConsumerEnd:
    """A consumer of the tests, and the connection to it.

    Attributes:
        announced: what it was given, in order.
        lost: what it was notified that it has lost.
        ended: the payloads that are lost, once the stream has ended.
        aborted: the producer has aborted the connection.
        words: what it shares with the producer, for a consumer on the same host.
    """

    def __init__(self, delivery: Delivery, reader: int = 0, *, direct: bool = False, pid: int = 7) -> None:
        self.announced: list[Given] = []
        self.lost: list[Given] = []
        self.ended: int | None = None
        self.aborted = False
        self.words: StreamWords | None = None
        if direct:
            memory = types.SimpleNamespace(
                words=memoryview(bytearray(8 * StreamWords.count(SLOTS))).cast("Q"), close=lambda: None
            )
            self.words = StreamWords(cast(SharedWords, memory), SLOTS)
        self.recipient: Recipient = delivery.subscribe(reader, self, pid=pid, words=self.words)
        self.total = 0

    # --- what `Delivery` calls --------------------------------------------------------------------------------

    def announce(self, given: Given) -> None:
        assert self.ended is None
        self.announced.append(given)

    def take_back(self, slot: int, sequence: int, number: int) -> None:
        (taken,) = (each for each in self.announced if each.number == number)
        assert (taken.slot, taken.sequence) == (slot, sequence)
        self.lost.append(taken)

    def end(self, lost: int) -> None:
        assert self.ended is None
        self.ended = lost

    def abort(self) -> None:
        self.aborted = True

    # --- what a consumer does ---------------------------------------------------------------------------------

    @property
    def sequences(self) -> list[int]:
        """The payloads that it was given, in order."""
        return [each.sequence for each in self.announced]

    def raise_credit(self, more: int) -> None:
        """Take so many more payloads. With words, the producer is not woken."""
        self.total += more
        if self.words is None:
            self.recipient.set_credit(self.total)
        else:
            self.words.credit = self.total

    def begin(self, given: Given) -> bool:
        """Have the program get a payload; False if it was taken back."""
        if self.words is not None:
            return self.words.begin(given.slot, given.number)
        self.recipient.begin(given.slot, given.sequence, given.number)
        return True

    def give_back(self, given: Given, begun: bool = False) -> None:
        self.recipient.take_back(Returned(given.slot, given.sequence, given.number, begun))


class Stream:
    """A `Delivery` with a ring and a clock of its own."""

    def __init__(self, groups: int = 1, max_deliveries: int | None = None) -> None:
        self.ring = FakeRing()
        self.clock = ManualClock()
        self.delivery = Delivery(groups, self.ring, max_deliveries=max_deliveries, clock=self.clock)

    def add(self, *sequences: int) -> None:
        """Put payloads; each has a slot of its own."""
        for sequence in sequences:
            self.delivery.add(sequence % SLOTS, sequence, 100 + sequence)

    def consumer(self, credit: int = 0, reader: int = 0, *, direct: bool = False, pid: int = 7) -> ConsumerEnd:
        """A consumer that has subscribed and has raised its credit."""
        made = ConsumerEnd(self.delivery, reader, direct=direct, pid=pid)
        if credit:
            made.raise_credit(credit)
        made.recipient.start()
        return made

    def finish(self, *sequences: int, reader: int = 0) -> None:
        """The group consumes payloads."""
        self.ring.finished.update((sequence, reader) for sequence in sequences)

    def later(self, seconds: float) -> None:
        """Time passes, and the server looks."""
        self.clock.advance(seconds)
        self.delivery.serve()
