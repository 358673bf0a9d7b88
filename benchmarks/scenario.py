"""The contract of a scenario."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from benchmarks.figures import Row
from benchmarks.plan import Plan


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something that could not be measured here, and why."""

    what: str
    why: str


class Progress(Protocol):
    """Where a scenario reports how far it is."""

    def step(self, doing: str) -> None:
        """One of the scenario's steps begins: `doing` is what it does."""
        ...


@dataclass(frozen=True, slots=True)
class Scenario:
    """A group of rows that are measured together.

    Attributes:
        name: in the results.
        title: for the report.
        targets: which targets its rows are about.
        steps: how many steps its progress has.
        run: measures, and yields rows, or what had to be skipped.
    """

    name: str
    title: str
    targets: tuple[str, ...]
    steps: Callable[[Plan], int]
    run: Callable[[Plan, Progress], Iterator[Row | Skipped]] = field(repr=False)


UCX_MISSING = "the ucxx package is not installed: pip install 'dray-rl[ucxx]'"
