"""Medians, spreads and ratios of repeated rounds, and the rows that the report is made of."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Sense = Literal["at most", "at least"]
Measure = Literal["time ratio", "rate ratio", "value"]


@dataclass(frozen=True, slots=True)
class Figure:
    """What repeated rounds of one measurement gave.

    Attributes:
        rounds: the median of each round, in the row's unit.
        p99: the 99th percentile over the operations of all rounds.
        operations: how many operations were timed in all.
    """

    rounds: tuple[float, ...]
    p99: float | None
    operations: int

    @classmethod
    def of(cls, blocks: Iterable[Sequence[float]]) -> Figure:
        """From the operations of each round."""
        kept = list(blocks)
        everything = sorted(value for block in kept for value in block)
        p99 = everything[min(len(everything) - 1, int(0.99 * len(everything)))]
        return cls(tuple(statistics.median(block) for block in kept), p99, len(everything))

    @property
    def p50(self) -> float:
        """The median of the rounds' medians."""
        return statistics.median(self.rounds)

    @property
    def low(self) -> float:
        return min(self.rounds)

    @property
    def high(self) -> float:
        return max(self.rounds)

    def plus(self, other: Figure) -> Figure:
        """One after the other: round by round; there is no 99th percentile of that."""
        rounds = tuple(a + b for a, b in zip(self.rounds, other.rounds, strict=True))
        return Figure(rounds, None, min(self.operations, other.operations))


@dataclass(frozen=True, slots=True)
class Ratio:
    """A result over its limit, each round against the same round: the median, and the extremes."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, above: Figure, below: Figure) -> Ratio:
        each = [a / b for a, b in zip(above.rounds, below.rounds, strict=True)]
        return cls(statistics.median(each), min(each), max(each))


@dataclass(frozen=True, slots=True)
class Target:
    """One line of the performance targets, e.g. P2: a time ratio of at most 1.1."""

    name: str
    sense: Sense
    bound: float
    measure: Measure

    def __str__(self) -> str:
        sign = "≤" if self.sense == "at most" else "≥"
        return f"{self.name} {sign} {self.bound:g}"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the report.

    Attributes:
        scenario: where it comes from.
        subject: what was measured.
        nbytes: payload size, None where there is none.
        figure: the result, in `unit`.
        unit: ``"s"`` or ``"% of a core"``.
        limit_name: what the result is held against; empty for a limit itself.
        limit: its figure.
        target: the target, where there is one for this row.
        note: a remark.
        moves: each operation moves `nbytes` bytes, so that there is a rate.
    """

    scenario: str
    subject: str
    nbytes: int | None
    figure: Figure
    unit: str = "s"
    limit_name: str = ""
    limit: Figure | None = None
    target: Target | None = None
    note: str = ""
    moves: bool = True

    @property
    def rate(self) -> float | None:
        """Bytes per second at the median."""
        return self.nbytes / self.figure.p50 if self.nbytes and self.moves else None

    @property
    def measure(self) -> Measure:
        """How the row is compared with its limit."""
        return self.target.measure if self.target else "time ratio"

    @property
    def ratio(self) -> Ratio | None:
        """Against the limit: of times, or of rates where the target is one of rates."""
        if self.limit is None:
            return None
        if self.measure == "rate ratio":
            return Ratio.of(self.limit, self.figure)
        return Ratio.of(self.figure, self.limit)

    @property
    def reached(self) -> bool | None:
        """Whether the target is reached; None where there is none."""
        if self.target is None:
            return None
        ratio = self.ratio
        value = ratio.median if ratio is not None and self.measure != "value" else self.figure.p50
        return value <= self.target.bound if self.target.sense == "at most" else value >= self.target.bound

    def as_document(self) -> dict[str, Any]:
        """Plain JSON values."""
        figure, ratio, limit = self.figure, self.ratio, self.limit
        return {
            "scenario": self.scenario,
            "subject": self.subject,
            "nbytes": self.nbytes,
            "unit": self.unit,
            "p50": figure.p50,
            "p50_low": figure.low,
            "p50_high": figure.high,
            "p99": figure.p99,
            "operations": figure.operations,
            "rounds": list(figure.rounds),
            "bytes_per_second": self.rate,
            "limit": None if limit is None else {"name": self.limit_name, "p50": limit.p50, "p99": limit.p99},
            "ratio": None
            if ratio is None
            else {"of": self.measure, "median": ratio.median, "low": ratio.low, "high": ratio.high},
            "target": None
            if self.target is None
            else {
                "name": self.target.name,
                "measure": self.target.measure,
                "sense": self.target.sense,
                "bound": self.target.bound,
                "reached": self.reached,
            },
            "note": self.note,
        }
