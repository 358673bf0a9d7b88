"""One run of the benchmarks: measure or load, then show and write what was asked for."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from benchmarks.comparison import changes_sheet, compare
from benchmarks.figures import Row
from benchmarks.machine import busy, machine, summary
from benchmarks.plan import QUICK, Plan, parse_sizes, parse_targets
from benchmarks.progress import ShownProgress
from benchmarks.results import Results, UnreadableResults
from benchmarks.scenario import Scenario, Skipped
from benchmarks.scenarios import SCENARIOS
from benchmarks.tables import detail_sheet, show, summary_sheet
from benchmarks.targets import NAMES


class WrongChoice(Exception):
    """An option asks for something that does not exist; the text names option and value."""


@dataclass(frozen=True, slots=True)
class Choices:
    """What the command line asks for; see `python -m benchmarks --help`."""

    quick: bool = False
    only: str | None = None
    sizes: str | None = None
    rounds: int | None = None
    operations: int | None = None
    idle_seconds: float | None = None
    memory_reads: int | None = None
    job_steps: int | None = None
    details: bool = False
    json_file: Path | None = None
    plot_file: Path | None = None
    against: Path | None = None
    load: Path | None = None
    docs: bool = False
    install_peers: bool = False


def run(choices: Choices) -> None:
    """Do what was chosen.

    Raises:
        WrongChoice: before anything is measured.
    """
    console, progress_console = Console(), Console(file=sys.stderr)
    plan = _plan(choices)
    try:
        before = Results.load(choices.against) if choices.against is not None else None
        results = Results.load(choices.load) if choices.load is not None else None
    except UnreadableResults as error:
        raise WrongChoice(str(error)) from error
    _check_plot(choices)
    if choices.install_peers:
        _install_peers(progress_console)
        return
    if results is None:
        results = measure(plan, progress_console)
        if choices.json_file is not None:
            results.save(choices.json_file)
    _show(results, plan, choices, console)
    if before is not None:
        changes = changes_sheet(compare(before.rows, results.rows))
        console.print(f"\n{changes.title}" if not changes.lines else "", highlight=False)
        show(console, changes)
    _write(results, choices, console)


def measure(plan: Plan, console: Console) -> Results:
    """Run the scenarios that the plan wants, and show their progress on `console`."""
    scenarios = [each for each in SCENARIOS if plan.wants(*each.targets)]
    rows: list[Row] = []
    skipped: list[Skipped] = []
    with ShownProgress(console, scenarios, plan) as progress:
        for scenario in scenarios:
            progress.begin(scenario)
            for found in scenario.run(plan, progress):
                if isinstance(found, Row):
                    rows.append(found)
                else:
                    skipped.append(found)
            progress.end()
    return Results(machine(), dataclasses.asdict(plan), tuple(rows), tuple(skipped))


def _plan(choices: Choices) -> Plan:
    plan = QUICK if choices.quick else Plan()
    try:
        return replace(
            plan,
            targets=parse_targets(choices.only, NAMES) if choices.only else plan.targets,
            sizes=parse_sizes(choices.sizes) if choices.sizes else plan.sizes,
            rounds=choices.rounds or plan.rounds,
            most_operations=choices.operations or plan.most_operations,
            idle_seconds=choices.idle_seconds or plan.idle_seconds,
            memory_reads=choices.memory_reads or plan.memory_reads,
            job_steps=choices.job_steps or plan.job_steps,
        )
    except ValueError as error:
        raise WrongChoice(str(error)) from error


def _check_plot(choices: Choices) -> None:
    from benchmarks import plot

    if (choices.plot_file is not None or choices.docs) and not plot.AVAILABLE:
        raise WrongChoice("a plot needs matplotlib: pip install 'dray-rl[demo]'")


def _install_peers(console: Console) -> None:
    from benchmarks.peers.environments import install

    failed = install(lambda line: console.print(line, highlight=False, soft_wrap=True))
    for environment, why in failed.items():
        console.print(f"{environment} could not be installed: {why}", highlight=False, soft_wrap=True)


def _show(results: Results, plan: Plan, choices: Choices, console: Console) -> None:
    scenarios: Sequence[Scenario] = SCENARIOS if choices.details else ()
    for scenario in scenarios:
        show(console, detail_sheet(scenario.title, (row for row in results.rows if row.scenario == scenario.name)))
    for left_out in results.skipped:
        console.print(f"skipped: {left_out.what}: {left_out.why}", highlight=False, soft_wrap=True, markup=False)
    show(console, summary_sheet(results.rows, plan.targets))
    console.print(summary(results.machine), style="dim", highlight=False, soft_wrap=True)
    if busy(results.machine):
        console.print(f"busy with other work (load {results.machine['load']}): trust no verdict", style="yellow")


def _write(results: Results, choices: Choices, console: Console) -> None:
    from benchmarks import pages, plot

    places = [path for path in (choices.plot_file, pages.PLOT if choices.docs else None) if path is not None]
    for path in places:
        if not plot.draw(results, path):
            console.print(f"nothing to draw for {path}", highlight=False)
    if choices.docs:
        pages.write(results, pages.PAGE)
