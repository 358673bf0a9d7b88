"""Which payloads of a work item are finished, for work items with several. No I/O."""

from __future__ import annotations

PayloadPart = tuple[int, int, int]
"""A payload by its place: the index of its work item, its number among the payloads of that, and how many these
are."""


class PartlyFinished:
    """The work items of which some payloads are finished, or whose number of payloads is known.

    A work item that is worked on again may have another number of payloads: the newest one counts.
    """

    def __init__(self) -> None:
        self._finished: dict[int, set[int]] = {}
        self._parts: dict[int, int] = {}

    def found(self, index: int, parts: int) -> None:
        """A payload of the work item says that there are `parts` of them."""
        self._parts[index] = parts

    def finish(self, payload: PayloadPart) -> bool:
        """A payload is finished; returns whether its whole work item is, which is forgotten then."""
        index, part, parts = payload
        self._parts[index] = parts
        finished = self._finished.setdefault(index, set())
        finished.add(part)
        if len(finished) < parts:
            return False
        self.forget(index)
        return True

    def forget(self, index: int) -> None:
        """The work item is finished, whatever is known of its payloads."""
        self._finished.pop(index, None)
        self._parts.pop(index, None)

    def remaining(self, index: int, otherwise: int) -> int:
        """How many payloads of the work item are not finished; `otherwise` if its number of payloads is not
        known."""
        if index not in self._parts:
            return otherwise
        return max(1, self._parts[index] - len(self._finished.get(index, ())))

    def finished(self) -> list[PayloadPart]:
        """The finished payloads of work items that are not finished as a whole."""
        return [
            (index, part, self._parts[index]) for index, found in self._finished.items() for part in sorted(found)
        ]
