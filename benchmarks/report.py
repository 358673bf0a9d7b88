"""The table, the progress that is shown meanwhile, and the JSON document."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from benchmarks.figures import Row
from benchmarks.plan import Plan, size_name
from benchmarks.scenario import Scenario, Skipped

SCHEMA = 1
_PACKAGES = ("dray", "numpy", "ucxx-cu12", "ucxx-cu13", "libucx-cu12", "libucx-cu13")
_COLUMNS = ("payload", "what", "p50", "spread", "p99", "rate", "limit", "ratio", "target", "verdict")


class ShownProgress:
    """Bars on a terminal, a line for each step elsewhere; nothing runs beside the measurements."""

    def __init__(self, console: Console, scenarios: Sequence[Scenario], plan: Plan) -> None:
        self._console = console
        self._plan = plan
        columns = (
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[doing]}"),
        )
        self._bars = Bars(*columns, console=console, auto_refresh=False)
        self._tasks: dict[str, TaskID] = {}
        if console.is_terminal:
            for scenario in scenarios:
                total = scenario.steps(plan)
                self._tasks[scenario.name] = self._bars.add_task(
                    scenario.title, start=False, total=total, doing=""
                )
        self._current: Scenario | None = None
        self._begun = False

    def begin(self, scenario: Scenario) -> None:
        """The steps that follow are this scenario's."""
        self._current = scenario
        self._begun = False
        if self._tasks:
            self._bars.start_task(self._tasks[scenario.name])

    def step(self, doing: str) -> None:
        assert self._current is not None
        if not self._tasks:
            self._console.print(f"{self._current.title}: {doing}", highlight=False)
            return
        task = self._tasks[self._current.name]
        self._bars.update(task, advance=1 if self._begun else 0, doing=doing, refresh=True)
        self._begun = True

    def end(self) -> None:
        """The scenario is over."""
        assert self._current is not None
        if self._tasks:
            task = self._tasks[self._current.name]
            self._bars.update(task, completed=self._current.steps(self._plan), doing="", refresh=True)
            self._bars.stop_task(task)

    def __enter__(self) -> Self:
        if self._tasks:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tasks:
            self._bars.stop()


def show(console: Console, scenario: Scenario, rows: Sequence[Row]) -> None:
    """Print one scenario's table: rich on a terminal, columns of plain text elsewhere."""
    cells = [_cells(row) for row in rows]
    kept = [column for column in range(len(_COLUMNS)) if any(line[column] for line in cells)]
    if console.is_terminal:
        table = Table(title=scenario.title, title_justify="left")
        for column in kept:
            left = _COLUMNS[column] in ("what", "limit", "verdict")
            table.add_column(_COLUMNS[column], justify="left" if left else "right", overflow="fold")
        for index, row in enumerate(rows):
            new_size = index + 1 < len(rows) and rows[index + 1].nbytes != row.nbytes
            styled = list(_styled(cells[index], row))
            table.add_row(*(styled[column] for column in kept), end_section=new_size)
        console.print(table)
        return
    lines = [[line[column] for column in kept] for line in (_COLUMNS, *cells)]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    console.print(f"\n{scenario.title}", highlight=False)
    for line in lines:
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        console.print(text.rstrip(), highlight=False, soft_wrap=True)


def document(plan: Plan, rows: Sequence[Row], skipped: Sequence[Skipped]) -> dict[str, Any]:
    """Everything as plain JSON values; times in seconds, rates in bytes per second."""
    return {
        "schema": SCHEMA,
        "machine": machine(),
        "plan": dataclasses.asdict(plan),
        "rows": [row.as_document() for row in rows],
        "skipped": [dataclasses.asdict(each) for each in skipped],
    }


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": dict(_versions()),
    }


def seconds_text(seconds: float) -> str:
    """``12.3 µs``, ``4.56 ms``: three digits that count."""
    for unit, factor in (("ns", 1e9), ("µs", 1e6), ("ms", 1e3)):
        value = seconds * factor
        if value < 1000:
            return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"
    return f"{seconds:.2f} s"


def _cells(row: Row) -> tuple[str, ...]:
    figure, ratio, limit = row.figure, row.ratio, row.limit
    text = seconds_text if row.unit == "s" else _percent
    half = (figure.high - figure.low) / 2
    spread = f"± {100 * half / figure.p50:.0f} %" if figure.p50 and row.unit == "s" else f"± {text(half)}"
    verdict = {None: "", True: "reached", False: "not reached"}[row.reached]
    return (
        "" if row.nbytes is None else size_name(row.nbytes),
        f"{row.subject} ({row.note})" if row.note else row.subject,
        text(figure.p50),
        spread,
        "" if figure.p99 is None else text(figure.p99),
        "" if row.rate is None else f"{row.rate / 1e9:.3g} GB/s",
        "" if limit is None else f"{text(limit.p50)} {row.limit_name}",
        "" if ratio is None else f"{_kind(row)}{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})",
        _target_text(row),
        verdict,
    )


def _kind(row: Row) -> str:
    return "rate " if row.measure == "rate ratio" else "time "


def _target_text(row: Row) -> str:
    target = row.target
    if target is None:
        return ""
    sign = "≤" if target.sense == "at most" else "≥"
    if target.measure != "value":
        return f"{target.name} {sign} {target.bound:g}"
    return f"{target.name} {sign} {seconds_text(target.bound) if row.unit == 's' else _percent(target.bound)}"


def _styled(cells: tuple[str, ...], row: Row) -> Iterator[Text]:
    style = "" if row.target or row.limit else "dim"
    for cell in cells[:-1]:
        yield Text(cell, style)
    yield Text(cells[-1], {None: "", True: "green", False: "red"}[row.reached])


def _percent(value: float) -> str:
    return f"{value:.2f} %"


def _processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123  (a line at a time)
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _versions() -> Iterator[tuple[str, str]]:
    for name in _PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue
