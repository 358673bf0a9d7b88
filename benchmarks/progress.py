"""What is shown while measurements run: bars on a terminal, a line for each step elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from benchmarks.plan import Plan
from benchmarks.scenario import Scenario


class ShownProgress:
    """Drawn at each step only: nothing runs beside the measurements."""

    def __init__(self, console: Console, scenarios: Sequence[Scenario], plan: Plan) -> None:
        self._console = console
        self._plan = plan
        columns = (
            TextColumn("{task.description:<31}"),
            BarColumn(bar_width=24),
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
            self._console.print(f"{self._current.title}: {doing}", highlight=False, soft_wrap=True)
            return
        task = self._tasks[self._current.name]
        self._bars.update(task, advance=1 if self._begun else 0, doing=doing, refresh=True)
        self._begun = True

    def end(self) -> None:
        """The scenario has ended."""
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
