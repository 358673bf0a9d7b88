"""The table and the JSON document that a soak ends with, and whether it has failed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from soak import accounts
from soak.accounts import Account
from soak.leaks import HELD, Growth
from soak.plan import Plan
from soak.supervisor import History


class Row(NamedTuple):
    """One line of the table; `must` is what the value has to be, if anything."""

    what: str
    value: int | str
    must: int | None = None

    @property
    def bad(self) -> bool:
        return self.must is not None and self.value != self.must


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """Everything that a soak has found out."""

    plan: Plan
    history: History
    account: Account
    growths: list[Growth]

    @property
    def failed(self) -> bool:
        return any(row.bad for row in self.rows())

    def rows(self) -> Iterator[Row]:
        """The table."""
        found, history = self.account, self.history
        yield Row("payloads committed", found.committed)
        yield Row("  bytes", f"{found.bytes_committed / 2**20:,.0f} MiB")
        yield Row("delivered once", found.delivered_once)
        yield Row("delivered again", found.delivered_again)
        yield Row("  without a reason", found.unexplained, 0)
        yield Row("dropped by policy", found.dropped.total())
        yield from (Row(f"  {reason}", count) for reason, count in sorted(found.dropped.items()))
        yield Row("taken by a consumer that died", found.taken_by_dead_consumers)
        yield Row("lost with their dead producer", found.lost_with_producer)
        yield Row("wrong", found.wrong, 0)
        yield Row("unaccounted", found.unaccounted, 0)
        yield Row("left in the stream", "not drained" if history.backlog is None else history.backlog, 0)
        longest = max((wait.overrun for wait in found.waits), default=0.0)
        yield Row("waits beyond their deadline", found.overdue, 0)
        yield Row("  the longest, beyond it", f"{max(0.0, longest):.2f} s")
        yield Row("claims refused by a full ring", found.full)
        yield Row("reads that failed", found.failures.total())
        yield Row("commits refused", found.outcomes["refused"])
        yield Row("processes started", len(history.runs))
        yield from (Row(f"  {fault}", count) for fault, count in sorted(history.faults.items()))
        yield Row("crashed", len(found.crashed), 0)
        yield Row("processes left", len(history.processes_left), 0)
        yield Row("socket folders left", len(history.folders_left), 0)
        for held in HELD:
            yield Row(f"processes with growing {held}", sum(held in growth.leaks for growth in self.growths), 0)

    def show(self, console: Console) -> None:
        """Print the tables, what is wrong, and how to run the same plan again."""
        table = Table("", "found", "must be", title=f"soak, seed {self.plan.seed}, {self.plan.seconds:g} s")
        table.columns[1].justify = table.columns[2].justify = "right"
        for row in self.rows():
            value = f"{row.value:,}" if isinstance(row.value, int) else row.value
            table.add_row(
                row.what, value, "" if row.must is None else str(row.must), style="red" if row.bad else ""
            )
        console.print(table)
        waits = Table("call", "calls", "allowed s", "longest s", "beyond its deadline s", title="waits")
        for column in waits.columns[1:]:
            column.justify = "right"
        for wait in self.account.waits:
            beyond = f"{max(0.0, wait.overrun):.2f}"
            waits.add_row(wait.operation, f"{wait.calls:,}", f"{wait.limit:g}", f"{wait.longest:.2f}", beyond)
        console.print(waits)
        if self.growths:
            console.print(self._growth_table())
        for remark in (*self.account.crashed, *self.account.remarks[:40]):
            console.print(remark, style="red", highlight=False, soft_wrap=True)
        if len(self.account.remarks) > 40:
            console.print(f"… and {len(self.account.remarks) - 40} more remarks", style="red")
        minutes = self.plan.seconds / 60
        console.print(f"the same plan again: make soak MINUTES={minutes:g} SOAK_ARGS='--seed {self.plan.seed}'")

    def document(self) -> dict[str, Any]:
        """Everything, in JSON's types."""
        history = self.history
        return {
            "failed": self.failed,
            "rows": [row._asdict() for row in self.rows()],
            "account": accounts.document(self.account),
            "growths": [dataclasses.asdict(growth) for growth in self.growths],
            "faults": dict(history.faults),
            "log": history.log,
            "runs": [
                {
                    "name": run.name, "how": run.how, "code": run.code, "declared_dead": run.declared_dead,
                    "began": run.began, "ended": run.ended, "stops": run.stops, "spec": run.described,
                    "footprints": [each._asdict() for each in run.footprints],
                }
                for run in history.runs
            ],
            "plan": self.plan.document(),
        }  # fmt: skip

    def _growth_table(self) -> Table:
        table = Table("process", title="processes that ran throughout: in their second and in their last third")
        names = list(self.growths[0].before)
        for name in (*names, "MiB/min"):
            table.add_column(name, justify="right")
        for growth in self.growths:
            cells = [f"{growth.before[name]:g} → {growth.after[name]:g}" for name in names]
            table.add_row(growth.name, *cells, f"{growth.slope:+.2f}", style="red" if growth.leaks else "")
        return table
