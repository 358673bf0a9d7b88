"""The words that a producer shares with one consumer of its stream on the same host.

| words | written by | content |
|---|---|---|
| credit | consumer | how many payloads it may have been given so far |
| pending | producer | 1 while payloads wait for credit: a consumer that raises its credit rings the doorbell |
| given, one for each slot | producer | the number of the hand-out of the payload in that slot, or 0 |
| begun, one for each slot | consumer | the number of the hand-out that its program has got last |

Neither side waits for the other. The producer's barrier (`dray.ring.membarrier`) orders two pairs of accesses:

- The consumer stores *credit* and then loads *pending*; the producer stores *pending*, passes the barrier and then
  loads *credit*. So the producer sees the credit, or the consumer rings.
- The consumer stores *begun* and then loads *given*; a producer that takes a payload back clears *given*, passes
  the barrier and then loads *begun*. So the producer sees that the payload was begun, or the consumer sees that it
  was taken back. Both may see it: the producer then leaves the payload with the consumer, which returns it.

The memory belongs to one consumer: a faulty one can spoil nothing but its own share of the stream.
"""

from __future__ import annotations

from typing import Final

from dray.resources import Closing
from dray.ring.shared_words import SharedWords

CREDIT, PENDING, _FIRST = 0, 1, 2
MAX_CREDIT: Final = 1 << 32
"""A consumer's limit on what it may have unbegun is far below; larger words are a faulty consumer's."""


class StreamWords(Closing):
    """The words, at either side.

    Args:
        shared: the memory.
        slots: slots of the ring.
    """

    def __init__(self, shared: SharedWords, slots: int) -> None:
        self.shared = shared
        self._words = shared.words
        self._begun = _FIRST + slots

    @staticmethod
    def count(slots: int) -> int:
        """How many words there are."""
        return _FIRST + 2 * slots

    @property
    def credit(self) -> int:
        """The consumer's credit."""
        return self._words[CREDIT]

    @credit.setter
    def credit(self, total: int) -> None:
        self._words[CREDIT] = total

    @property
    def pending(self) -> bool:
        """Payloads wait for credit."""
        return self._words[PENDING] != 0

    @pending.setter
    def pending(self, value: bool) -> None:
        self._words[PENDING] = value

    def give(self, slot: int, number: int) -> None:
        """The producer: the payload in a slot is the consumer's; 0 takes it back."""
        self._words[_FIRST + slot] = number

    def has_begun(self, slot: int, number: int) -> bool:
        """The producer: the consumer's program got the payload of a hand-out."""
        return self._words[self._begun + slot] == number

    def begin(self, slot: int, number: int) -> bool:
        """The consumer: its program is about to get a payload; False if that was taken back."""
        self._words[self._begun + slot] = number
        return self._words[_FIRST + slot] == number

    def close(self) -> None:
        """Keep the memory no longer. Twice is fine."""
        self._words = memoryview(bytearray(8 * (2 * self._begun - _FIRST))).cast("Q")
        self.shared.close()
