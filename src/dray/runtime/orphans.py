"""Payloads in a ring that nobody will ask for: which are known to be, and not only on their way to be freed.

The stream no longer lists a payload from its commit on, and a moment later it is freed. One that is still READY,
and
not listed, some seconds after it was first seen so is an orphan: whoever was to free it is gone. No I/O.
"""

from __future__ import annotations

from collections.abc import Collection


class OrphanWatch:
    """Sequence numbers that were found READY and not listed.

    Args:
        patience: seconds until such a payload counts as an orphan.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._since: dict[int, float] = {}

    def orphans(self, unlisted: Collection[int], now: float) -> list[int]:
        """Those of `unlisted`, all that there are now, which have been so for long enough."""
        self._since = {sequence: self._since.get(sequence, now) for sequence in unlisted}
        return [sequence for sequence, since in self._since.items() if now - since >= self._patience]

    def __len__(self) -> int:
        return len(self._since)
