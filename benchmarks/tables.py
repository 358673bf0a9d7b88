"""The tables of a run: one line for each target, and every row behind them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.figures import Row
from benchmarks.targets import TARGETS, Named
from benchmarks.texts import (
    judged_text,
    ratio_text,
    size_text,
    spread_text,
    target_text,
    value_text,
)

_LEFT = frozenset({"what", "limit", "verdict", "target"})
_STYLES = {"reached": "green", "not reached": "red", "not measured": "yellow"}


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table as plain text cells; `tables` prints it, `pages` writes it."""

    title: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """As a table of Markdown."""
        lines = [self.columns, tuple("---" for _ in self.columns), *self.lines]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def summary_sheet(rows: Sequence[Row], only: Sequence[str] = ()) -> Sheet:
    """A line for each target and subject, with the row that is furthest from its target, or nearest to it."""
    lines: list[tuple[str, ...]] = []
    for named in TARGETS:
        judged = [row for row in rows if row.target is not None and row.target.name == named.name]
        if not judged and not only:
            lines.append((named.name, named.what, named.asked, "", "", "not measured"))
        for index, subject in enumerate(dict.fromkeys((row.subject, row.target) for row in judged)):
            same = [row for row in judged if (row.subject, row.target) == subject]
            lines.append(_summary_line(named, same, first=index == 0))
    return Sheet("Targets", ("target", "what", "asked for", "result", "limit", "verdict"), tuple(lines))


def _summary_line(named: Named, rows: Sequence[Row], *, first: bool) -> tuple[str, ...]:
    worst = min(rows, key=lambda row: row.target.margin(row.judged) if row.target else 0.0)
    reached = [row for row in rows if row.reached]
    assert worst.target is not None
    place = f" at {size_text(worst.nbytes)}" if worst.nbytes is not None and len(rows) > 1 else ""
    count = f" (reached at {len(reached)} of {len(rows)} sizes)" if 0 < len(reached) < len(rows) else ""
    sizes = f", {size_text(worst.nbytes)}" if worst.nbytes is not None and len(rows) == 1 else ""
    result = judged_text(worst) + place
    if worst.ratio is not None and worst.target.measure != "value":
        result += f", {value_text(worst.figure.p50, worst.unit)}"
    limit = f"{worst.limit_name}, {value_text(worst.limit.p50, worst.unit)}" if worst.limit is not None else ""
    verdict = "reached" if len(reached) == len(rows) else f"not reached{count}"
    subject = f"{worst.subject}{sizes}"
    return (named.name if first else "", subject, target_text(worst.target, worst.unit), result, limit, verdict)


def detail_sheet(title: str, rows: Iterable[Row]) -> Sheet:
    """Every row, with columns that are empty throughout left out."""
    columns = ("payload", "what", "p50", "spread", "p99", "rate", "limit", "ratio", "target", "verdict")
    lines = [_detail_line(row) for row in rows]
    kept = [index for index in range(len(columns)) if any(line[index] for line in lines)]
    return Sheet(
        title,
        tuple(columns[index] for index in kept),
        tuple(tuple(line[index] for index in kept) for line in lines),
    )


def _detail_line(row: Row) -> tuple[str, ...]:
    figure, limit = row.figure, row.limit
    verdict = {None: "", True: "reached", False: "not reached"}[row.reached]
    rate = row.rate if row.unit == "s" else None
    return (
        size_text(row.nbytes),
        f"{row.subject} ({row.note})" if row.note else row.subject,
        value_text(figure.p50, row.unit),
        spread_text(figure, row.unit),
        "" if figure.p99 is None else value_text(figure.p99, row.unit),
        "" if rate is None else value_text(rate, "B/s"),
        "" if limit is None else f"{value_text(limit.p50, row.unit)} {row.limit_name}",
        ratio_text(row),
        "" if row.target is None else f"{row.target.name} {target_text(row.target, row.unit)}",
        verdict,
    )


def show(console: Console, sheet: Sheet) -> None:
    """Print a table: rich on a terminal, columns of plain text elsewhere."""
    if not sheet.lines:
        return
    if not console.is_terminal:
        for line in _plain(sheet):
            console.print(line, highlight=False, soft_wrap=True, markup=False)
        return
    table = Table(title=sheet.title, title_justify="left")
    for column in sheet.columns:
        table.add_column(column, justify="left" if column in _LEFT else "right", overflow="fold")
    for index, cells in enumerate(sheet.lines):
        following = sheet.lines[index + 1] if index + 1 < len(sheet.lines) else cells
        ends = bool(following[0]) and following[0] != cells[0]
        table.add_row(*(Text(cell, _style(cell)) for cell in cells), end_section=ends)
    console.print(table)


def _style(cell: str) -> str:
    return next((style for word, style in _STYLES.items() if cell == word or cell.startswith(f"{word} (")), "")


def _plain(sheet: Sheet) -> Iterator[str]:
    widths = [max(len(cell) for cell in column) for column in zip(sheet.columns, *sheet.lines, strict=True)]
    yield f"\n{sheet.title}"
    for cells in (sheet.columns, *sheet.lines):
        yield "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
