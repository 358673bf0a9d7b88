"""How the payloads of a training step are dealt to the ranks of a policy group. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from dray.control import Delivery


@dataclass(slots=True)
class Batch:
    """The payloads of one step, in equal parts. All `readers` of a part get the same payloads in the same order.

    Rank r reads part r // readers, as reader r % readers.

    Args:
        size: payloads of all parts together.
        parts: how many there are.
    """

    size: int
    parts: int = 1
    waited: float = 0.0
    reading: float = 0.0
    _read: list[list[Delivery]] = field(init=False)

    def __post_init__(self) -> None:
        self._read = [[] for _ in range(self.parts)]

    @property
    def missing(self) -> int:
        """How many payloads are yet to be read."""
        return self.size - sum(map(len, self._read))

    @property
    def deliveries(self) -> list[Delivery]:
        """Everything that was read."""
        return [delivery for part in self._read for delivery in part]

    def part(self, index: int) -> list[Delivery]:
        """What was read of one part, in order."""
        return self._read[index]

    def deal(self, deliveries: Sequence[Delivery]) -> list[list[Delivery]]:
        """Which part each of `deliveries`, at most `missing` of them, is to be read for."""
        dealt: list[list[Delivery]] = [[] for _ in range(self.parts)]
        room = self.size // self.parts
        waiting = list(deliveries)
        for read, part in zip(self._read, dealt, strict=True):
            free = room - len(read)
            part += waiting[:free]
            del waiting[:free]
        return dealt

    def add(self, part: int, deliveries: Iterable[Delivery]) -> None:
        """These were read for `part`, by all its ranks."""
        self._read[part] += deliveries
