"""The contract of everything that is timed between two processes, and the loop that times it."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from benchmarks.figures import Figure


class ByteExchange(Protocol):
    """One way in which bytes get from another process into this one, or a part of such a way.

    Attributes:
        name: as the report calls it.
    """

    name: str

    def open(self, nbytes: int, batch: int) -> None:
        """Get both ends ready for payloads of `nbytes` bytes, up to `batch` of them at a time."""
        ...

    def prepare(self, count: int) -> None:
        """Let the other process write `count` fresh payloads; not timed."""
        ...

    def once(self) -> None:
        """Get the next payload; timed."""
        ...

    def shut(self) -> None:
        """Undo `open`."""
        ...

    def close(self) -> None:
        """End the other process. Twice is fine."""
        ...


def measure(exchange: ByteExchange, operations: int, batch: int, *, whole: bool = False) -> list[float]:
    """Time `operations` operations, one by one; seconds each. With `whole` one operation gets a whole batch, and
    there is one time for each batch."""
    times: list[float] = []
    left = operations
    while left > 0:
        count = min(batch, left)
        left -= count
        exchange.prepare(count)
        times += timed(exchange.once, 1 if whole else count)
    return times


def timed(once: Callable[[], None], count: int) -> list[float]:
    """Time `count` calls, one by one; seconds each."""
    times = []
    now = time.perf_counter
    with _no_garbage_collection():
        for _ in range(count):
            began = now()
            once()
            times.append(now() - began)
    return times


def measure_in_turn(
    exchanges: Sequence[ByteExchange], rounds: int, operations: int, batch: int
) -> Iterator[dict[str, Figure] | None]:
    """Measure all exchanges, one block each per round, the first one of a round moving on by one.

    Yields None after every round, the warm-up included, and the figures by name at the end. The exchanges are
    open.
    """
    blocks: dict[str, list[list[float]]] = {exchange.name: [] for exchange in exchanges}
    for exchange in exchanges:
        measure(exchange, max(2, operations // 4), batch)
    yield None
    for index in range(rounds):
        first = index % len(exchanges)
        for exchange in [*exchanges[first:], *exchanges[:first]]:
            blocks[exchange.name].append(measure(exchange, operations, batch))
        yield None
    yield {name: Figure.of(found) for name, found in blocks.items()}


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """The benchmark's own garbage is not part of what is measured."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
