"""What one consumer holds and has ended: decides which deliveries are new. No I/O."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace

from dray.control.entry import Delivery


class DeliveryLedger:
    """The deliveries of one consumer, by identity; thread-safe.

    ::

        (unknown) ── hold ──► held ── end ──► ended ── `remembered` others ended later ──► (unknown)
                                └──── drop ──► (unknown)

    Args:
        remembered: how many ended identities are kept.
    """

    def __init__(self, remembered: int) -> None:
        self._remembered = remembered
        self._lock = threading.Lock()
        self._held: dict[str, Delivery] = {}
        self._since: dict[str, float] = {}
        self._ended: OrderedDict[str, None] = OrderedDict()

    def split_ended(self, deliveries: Iterable[Delivery]) -> tuple[list[Delivery], list[Delivery]]:
        """Those that were not ended before, and those that were."""
        current: list[Delivery] = []
        repeated: list[Delivery] = []
        with self._lock:
            for delivery in deliveries:
                (repeated if delivery.entry.identity in self._ended else current).append(delivery)
        return current, repeated

    def hold(self, deliveries: Iterable[Delivery], now: float = 0.0) -> list[Delivery]:
        """Hold `deliveries` since `now`; returns those that were not held already.

        One that is held and comes again under another id (published again after a restart) keeps the new id.
        """
        fresh: list[Delivery] = []
        with self._lock:
            for delivery in deliveries:
                identity = delivery.entry.identity
                held = self._held.get(identity)
                if held is None:
                    fresh.append(delivery)
                    self._since[identity] = now
                self._held[identity] = replace(held or delivery, entry_id=delivery.entry_id)
        return fresh

    def end(self, deliveries: Iterable[Delivery]) -> None:
        """These were trained on or discarded: recognise them if they come again."""
        self.remember(delivery.entry.identity for delivery in deliveries)

    def remember(self, identities: Iterable[str]) -> None:
        """As `end`, for what may never have been held here."""
        with self._lock:
            for identity in identities:
                self._let_go(identity)
                self._ended[identity] = None
            while len(self._ended) > self._remembered:
                self._ended.popitem(last=False)

    def drop(self, deliveries: Iterable[Delivery]) -> None:
        """These are another consumer's now."""
        with self._lock:
            for delivery in deliveries:
                self._let_go(delivery.entry.identity)

    def _let_go(self, identity: str) -> None:
        self._held.pop(identity, None)
        self._since.pop(identity, None)

    @property
    def oldest_since(self) -> float | None:
        """Since when that is held which has been held longest."""
        with self._lock:
            return next(iter(self._since.values()), None)

    def held_ids(self) -> set[str]:
        """Stream ids of what is held."""
        with self._lock:
            return {delivery.entry_id for delivery in self._held.values()}

    def __len__(self) -> int:
        """How many deliveries are held."""
        with self._lock:
            return len(self._held)
