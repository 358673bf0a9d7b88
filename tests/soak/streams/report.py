"""The table and the JSON document at the end of a storm."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from soak.streams.storm import Outcome

MAX_SHOWN: Final = 12
_HELD: Final = {"memory": 48.0, "descriptors": 4.0, "sockets": 3.0, "threads": 2.0, "segments": 4.0}
"""What the steady ones may hold more in the last third of the rounds than in the first."""

_MIN_ROUNDS: Final = 6
_ZERO: Final = (
    "wrong payloads", "payloads never put", "redelivered without a reason", "redelivered without a mark",
    "acknowledged twice", "handed out after its acknowledgement", "used by two at once", "out of order",
    "lost at an orderly end", "never acknowledged",
)  # fmt: skip


@dataclass(slots=True)
class Report:
    """All rounds."""

    seed: int
    outcomes: list[Outcome] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self.problems += [f"round {outcome.plan.index}: {each}" for each in outcome.account.problems]

    def growth(self) -> list[str]:
        """What the steady ones hold at the end and did not hold before."""
        found = []
        third = len(self.outcomes) // 3
        if len(self.outcomes) < _MIN_ROUNDS:
            return []
        for index, who in enumerate(("producer", "consumer")):
            held = [outcome.footprints[index] for outcome in self.outcomes if len(outcome.footprints) > index]
            for name, most in _HELD.items():
                before = statistics.median(getattr(each, name) for each in held[:third])
                after = statistics.median(getattr(each, name) for each in held[-third:])
                if after > before + most:
                    found.append(f"the steady {who} holds more {name}: {before:g} at first, {after:g} at the end")
        return found

    @property
    def failed(self) -> bool:
        return bool(self.problems or self.growth())

    def counts(self) -> Counter[str]:
        """Over all rounds."""
        total: Counter[str] = Counter()
        for outcome in self.outcomes:
            total.update(outcome.account.counts)
            total.update(outcome.faults)
        return total

    def show(self, console: Console) -> None:
        """Print what was done and what it has shown."""
        table = Table("", "found", "must be", title=f"storm, seed {self.seed}, {len(self.outcomes)} rounds")
        table.columns[1].justify = table.columns[2].justify = "right"
        counts = self.counts()
        table.add_row("processes", f"{sum(outcome.processes for outcome in self.outcomes):,}")
        for name, count in counts.items():
            if name not in _ZERO:
                table.add_row(name, f"{count:,}")
        for name in _ZERO:
            table.add_row(name, f"{counts[name]:,}", "0", style="red" if counts[name] else "")
        growth = self.growth()
        others = len(self.problems) - sum(counts[name] for name in _ZERO)
        table.add_row("left behind, crashed, late or stuck", f"{others:,}", "0", style="red" if others else "")
        table.add_row("growing in the steady ones", f"{len(growth)}", "0", style="red" if growth else "")
        console.print(table)
        for problem in (*self.problems[:MAX_SHOWN], *growth):
            console.print(problem, style="red", highlight=False, markup=False, soft_wrap=True)
        if len(self.problems) > MAX_SHOWN:
            console.print(f"… and {len(self.problems) - MAX_SHOWN} more, in the JSON document", style="red")

    def document(self) -> dict[str, Any]:
        """Everything, in JSON's types."""
        return {
            "failed": self.failed,
            "seed": self.seed,
            "counts": dict(self.counts()),
            "problems": self.problems,
            "growth": self.growth(),
            "rounds": [
                {
                    "plan": asdict(outcome.plan) | {"way": outcome.plan.way.value},
                    "counts": dict(outcome.account.counts),
                    "faults": dict(outcome.faults),
                    "processes": outcome.processes,
                    "seconds": round(outcome.seconds, 2),
                    "footprints": [each._asdict() for each in outcome.footprints],
                }
                for outcome in self.outcomes
            ],
        }
