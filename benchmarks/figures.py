"""Medians, spreads and ratios of repeated rounds, and the rows that a report is made of."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

Sense = Literal["at most", "at least"]
Measure = Literal["time ratio", "rate ratio", "value"]
Unit = Literal["s", "B/s", "/s", "% of a core", "%", "B", "descriptors"]

RATES: frozenset[Unit] = frozenset({"B/s", "/s"})
"""Units of which more is better."""


@dataclass(frozen=True, slots=True)
class Figure:
    """What repeated rounds of one measurement gave.

    Attributes:
        rounds: one value for each round, in the row's unit; of many operations, their median.
        p99: the 99th percentile over the operations of all rounds, where there are such.
        operations: how many operations were measured in all.
    """

    rounds: tuple[float, ...]
    p99: float | None
    operations: int

    @classmethod
    def of(cls, blocks: Iterable[Sequence[float]]) -> Self:
        """From the operations of each round."""
        kept = list(blocks)
        everything = [value for block in kept for value in block]
        rounds = tuple(statistics.median(block) for block in kept)
        return cls(rounds, percentile(everything, 0.99), len(everything))

    @classmethod
    def of_p99(cls, blocks: Iterable[Sequence[float]]) -> Self:
        """The 99th percentile of each round."""
        kept = list(blocks)
        rounds = tuple(percentile(block, 0.99) for block in kept)
        return cls(rounds, None, sum(len(block) for block in kept))

    @property
    def p50(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.rounds)

    @property
    def low(self) -> float:
        return min(self.rounds)

    @property
    def high(self) -> float:
        return max(self.rounds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Between them lies the middle half of the rounds."""
        return percentile(self.rounds, 0.25), percentile(self.rounds, 0.75)

    def plus(self, other: Figure) -> Figure:
        """One after the other: round by round; there is no 99th percentile of that."""
        rounds = tuple(a + b for a, b in zip(self.rounds, other.rounds, strict=True))
        return Figure(rounds, None, min(self.operations, other.operations))

    def mapped(self, function: Callable[[float], float]) -> Figure:
        """`function` of each round, without the 99th percentile."""
        return Figure(tuple(map(function, self.rounds)), None, self.operations)

    def as_document(self) -> dict[str, Any]:
        """Plain JSON values."""
        low, high = self.quartiles
        return {
            "p50": self.p50,
            "quartiles": [low, high],
            "p99": self.p99,
            "operations": self.operations,
            "rounds": list(self.rounds),
        }

    @classmethod
    def from_document(cls, found: Mapping[str, Any]) -> Self:
        """What `as_document` wrote."""
        return cls(tuple(found["rounds"]), found["p99"], found["operations"])


@dataclass(frozen=True, slots=True)
class Ratio:
    """A result over its limit, each round against the same round."""

    rounds: tuple[float, ...]

    @classmethod
    def of(cls, above: Figure, below: Figure) -> Self:
        return cls(tuple(a / b for a, b in zip(above.rounds, below.rounds, strict=True)))

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def quartiles(self) -> tuple[float, float]:
        return percentile(self.rounds, 0.25), percentile(self.rounds, 0.75)


@dataclass(frozen=True, slots=True)
class Target:
    """One line of the performance targets, e.g. P2: a time ratio of at most 1.1."""

    name: str
    sense: Sense
    bound: float
    measure: Measure

    def met(self, value: float) -> bool:
        return value <= self.bound if self.sense == "at most" else value >= self.bound

    def margin(self, value: float) -> float:
        """How far `value` is on the right side of the bound, as a factor: 1 is on it, 2 twice as good."""
        return _over(self.bound, value) if self.sense == "at most" else _over(value, self.bound)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the report.

    Attributes:
        scenario: where it comes from.
        subject: what was measured.
        nbytes: payload size, None where there is none.
        figure: the result, in `unit`.
        unit: of the result and of the limit.
        limit_name: what the result is held against; empty for a limit itself.
        limit: its figure.
        target: the target, where there is one for this row.
        note: a remark.
        moves: each operation moves `nbytes` bytes, so that a time has a rate.
    """

    scenario: str
    subject: str
    nbytes: int | None
    figure: Figure
    unit: Unit = "s"
    limit_name: str = ""
    limit: Figure | None = None
    target: Target | None = None
    note: str = ""
    moves: bool = True

    @property
    def key(self) -> tuple[str, str, int | None]:
        """What names the row among those of a run."""
        return self.scenario, self.subject, self.nbytes

    @property
    def rate(self) -> float | None:
        """Bytes per second at the median."""
        if self.unit == "B/s":
            return self.figure.p50
        return self.nbytes / self.figure.p50 if self.nbytes and self.moves and self.unit == "s" else None

    @property
    def measure(self) -> Measure:
        """How the row is compared with its limit."""
        if self.target is not None and self.target.measure != "value":
            return self.target.measure
        return "rate ratio" if self.unit in RATES else "time ratio"

    @property
    def ratio(self) -> Ratio | None:
        """Against the limit: of times, or of rates where the target is one of rates."""
        if self.limit is None or not all(self.limit.rounds) or not all(self.figure.rounds):
            return None
        if (self.measure == "rate ratio") != (self.unit in RATES):
            return Ratio.of(self.limit, self.figure)
        return Ratio.of(self.figure, self.limit)

    @property
    def judged(self) -> float:
        """The number that the target is about."""
        ratio = self.ratio
        if ratio is None or (self.target is not None and self.target.measure == "value"):
            return self.figure.p50
        return ratio.median

    @property
    def reached(self) -> bool | None:
        """Whether the target is reached; None where there is none."""
        if self.target is None:
            return None
        if self.target.measure != "value" and self.ratio is None:
            return False  # nothing to compare it with was measured
        return self.target.met(self.judged)

    def as_document(self) -> dict[str, Any]:
        """Plain JSON values."""
        ratio, limit, target = self.ratio, self.limit, self.target
        return {
            "scenario": self.scenario,
            "subject": self.subject,
            "nbytes": self.nbytes,
            "unit": self.unit,
            **self.figure.as_document(),
            "bytes_per_second": self.rate,
            "limit": None if limit is None else {"name": self.limit_name, **limit.as_document()},
            "ratio": None
            if ratio is None
            else {"of": self.measure, "median": ratio.median, "quartiles": list(ratio.quartiles)},
            "target": None
            if target is None
            else {
                "name": target.name,
                "sense": target.sense,
                "bound": target.bound,
                "measure": target.measure,
                "reached": self.reached,
            },
            "note": self.note,
            "moves": self.moves,
        }

    @classmethod
    def from_document(cls, found: Mapping[str, Any]) -> Self:
        """What `as_document` wrote.

        Raises:
            KeyError: a key is missing.
        """
        limit, target = found["limit"], found["target"]
        return cls(
            scenario=found["scenario"],
            subject=found["subject"],
            nbytes=found["nbytes"],
            figure=Figure.from_document(found),
            unit=cast("Unit", found["unit"]),
            limit_name="" if limit is None else limit["name"],
            limit=None if limit is None else Figure.from_document(limit),
            target=None
            if target is None
            else Target(target["name"], target["sense"], target["bound"], target["measure"]),
            note=found["note"],
            moves=found["moves"],
        )


def percentile(values: Iterable[float], share: float) -> float:
    """The value below which `share` of the values lie, between neighbours in proportion."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def _over(above: float, below: float) -> float:
    return above / below if below else float("inf")
