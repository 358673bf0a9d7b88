"""Counters that cost little and are always on."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class Counters:
    """Named counters of one component. Thread-safe.

    Args:
        names: counters that start at zero. Others begin when they are first increased.
    """

    __slots__ = ("_lock", "_values")

    def __init__(self, *names: str) -> None:
        self._lock = threading.Lock()
        self._values: defaultdict[str, float] = defaultdict(int, dict.fromkeys(names, 0))

    def add(self, name: str, amount: float = 1) -> None:
        """Increase `name` by `amount`."""
        with self._lock:
            self._values[name] += amount

    def add_all(self, amounts: Mapping[str, float]) -> None:
        """Increase several counters in one step."""
        with self._lock:
            values = self._values
            for name, amount in amounts.items():
                values[name] += amount

    def __getitem__(self, name: str) -> float:
        with self._lock:
            return self._values.get(name, 0)

    def snapshot(self) -> dict[str, float]:
        """Return the values of all counters, ready for logs, JSON and metrics."""
        with self._lock:
            return dict(self._values)

    def statistics(self, kind: Callable[..., T], **values: Any) -> T:
        """Return a `kind`, a dataclass whose fields are these counters and `values`."""
        return kind(**self.snapshot(), **values)
