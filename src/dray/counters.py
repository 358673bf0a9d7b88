"""Counters that cost little and are always on."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping


class Counters:
    """Named counters of one component, safe to use from any thread.

    A snapshot is a plain ``dict`` of non-negative integers and floats, ready for logs, JSON and metrics.
    """

    __slots__ = ("_lock", "_values")

    def __init__(self, *names: str) -> None:
        self._lock = threading.Lock()
        self._values: defaultdict[str, float] = defaultdict(int, dict.fromkeys(names, 0))

    def add(self, name: str, amount: float = 1) -> None:
        """Increase `name` by `amount`; a name that is new starts at zero."""
        with self._lock:
            self._values[name] += amount

    def add_all(self, amounts: Mapping[str, float]) -> None:
        """Increase several counters at once."""
        with self._lock:
            values = self._values
            for name, amount in amounts.items():
                values[name] += amount

    def __getitem__(self, name: str) -> float:
        with self._lock:
            return self._values.get(name, 0)

    def snapshot(self) -> dict[str, float]:
        """All counters as they are now."""
        with self._lock:
            return dict(self._values)
