"""What moved between two runs.

Where a row has a limit its ratio is compared, which the machine's own ups and downs leave alone; else the figure
itself. A change counts when the ranges of all rounds do not touch and the medians are more than `LEAST` apart: two
runs of the same code overlap. What was measured once only has no spread to go by: it moved if the verdict on its
target did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.figures import RATES, Row
from benchmarks.tables import Sheet
from benchmarks.texts import size_text, value_text

LEAST = 0.05
"""The smallest relative change that is reported."""

Verdict = Literal["better", "worse", "same", "new", "gone"]


@dataclass(frozen=True, slots=True)
class Change:
    """One row then and now.

    Attributes:
        factor: how many times better the row is now; 1 is the same. None where one side is missing.
    """

    before: Row | None
    after: Row | None
    verdict: Verdict
    factor: float | None = None


def compare(before: Sequence[Row], after: Sequence[Row]) -> list[Change]:
    """Every row of either run, in the order of the newer one."""
    old = {row.key: row for row in before}
    new = {row.key: row for row in after}
    changes = [_change(old[key], row) if key in old else Change(None, row, "new") for key, row in new.items()]
    return changes + [Change(row, None, "gone") for key, row in old.items() if key not in new]


def changes_sheet(changes: Sequence[Change]) -> Sheet:
    """What is better, worse or new, and in the title how much is neither."""
    lines = []
    for change in changes:
        row = change.after or change.before
        if row is None or change.verdict in ("same", "gone"):
            continue
        before = _row_text(change.before) if change.before is not None else ""
        after = _row_text(change.after) if change.after is not None else ""
        factor = "" if change.factor is None else f"{change.factor:.2f} ×"
        lines.append((size_text(row.nbytes), row.subject, before, after, factor, change.verdict))
    same = sum(change.verdict == "same" for change in changes)
    title = f"What moved ({same} rows did not, within their spread)"
    return Sheet(title, ("payload", "what", "before", "now", "better by", "verdict"), tuple(lines))


def _change(before: Row, after: Row) -> Change:
    old, new, more_is_better = _compared(before, after)
    factor = _middle(new) / _middle(old) if _middle(old) else 1.0
    factor = factor if more_is_better else 1 / factor if factor else 1.0
    apart = min(new) > max(old) or max(new) < min(old)
    if min(len(old), len(new)) < 2:
        apart = before.reached != after.reached
    if not apart or abs(factor - 1) < LEAST:
        return Change(before, after, "same", factor)
    return Change(before, after, "better" if factor > 1 else "worse", factor)


def _compared(before: Row, after: Row) -> tuple[Sequence[float], Sequence[float], bool]:
    """What of the rows is compared, round by round, and whether more of it is better."""
    old, new = before.ratio, after.ratio
    if old is None or new is None or before.limit_name != after.limit_name or before.measure != after.measure:
        return before.figure.rounds, after.figure.rounds, after.unit in RATES
    return old.rounds, new.rounds, after.measure == "rate ratio"


def _middle(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def _row_text(row: Row) -> str:
    ratio = row.ratio
    value = value_text(row.figure.p50, row.unit)
    if ratio is None:
        return f"{value} ({value_text(row.figure.low, row.unit)} to {value_text(row.figure.high, row.unit)})"
    return f"{value}, {ratio.median:.2f} × ({min(ratio.rounds):.2f} to {max(ratio.rounds):.2f})"
