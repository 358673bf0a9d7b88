"""``python -m benchmarks``: measure, and print a table."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.figures import Row
from benchmarks.plan import LANES, QUICK, Plan, parse_sizes
from benchmarks.report import ShownProgress, document, show
from benchmarks.scenario import Scenario, Skipped
from benchmarks.scenarios import SCENARIOS


def main(
    scenario: Annotated[
        list[str] | None,
        typer.Option(help=f"Only this one; may be repeated: {', '.join(s.name for s in SCENARIOS)}."),
    ] = None,
    lane: Annotated[list[str] | None, typer.Option(help="Only this lane; may be repeated: shm, tcp, ucx.")] = None,
    sizes: Annotated[str | None, typer.Option(help="Payload sizes, such as 1KiB,64KiB,1MiB.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A minute: fewer sizes, rounds and operations.")] = False,
    rounds: Annotated[int | None, typer.Option(min=1, help="How often everything is repeated.")] = None,
    operations: Annotated[
        int | None, typer.Option(min=4, help="At most that many operations of a kind in a round.")
    ] = None,
    idle_seconds: Annotated[
        float | None, typer.Option(min=0.1, help="How long idle connections are watched.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything to this file, too.")] = None,
) -> None:
    """Measure dray's lanes beside the bare means of this machine, in the same run."""
    plan = QUICK if quick else Plan()
    try:
        plan = replace(
            plan,
            sizes=parse_sizes(sizes) if sizes else plan.sizes,
            lanes=_chosen(lane, LANES, "lane"),
            rounds=rounds or plan.rounds,
            most_operations=operations or plan.most_operations,
            idle_seconds=idle_seconds or plan.idle_seconds,
        )
        names = _chosen(scenario, tuple(each.name for each in SCENARIOS), "scenario")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    chosen = [each for each in SCENARIOS if each.name in names]
    rows, skipped = _run(chosen, plan)
    console = Console()
    for each in chosen:
        show(console, each, [row for row in rows if row.scenario == each.name])
    for left_out in skipped:
        console.print(f"skipped: {left_out.what}: {left_out.why}", highlight=False)
    if json_file is not None:
        text = json.dumps(document(plan, rows, skipped), indent=1, ensure_ascii=False)
        json_file.write_text(text + "\n", encoding="utf-8")


def _run(scenarios: list[Scenario], plan: Plan) -> tuple[list[Row], list[Skipped]]:
    rows: list[Row] = []
    skipped: list[Skipped] = []
    with ShownProgress(Console(file=sys.stderr), scenarios, plan) as progress:
        for scenario in scenarios:
            progress.begin(scenario)
            for found in scenario.run(plan, progress):
                if isinstance(found, Row):
                    rows.append(found)
                else:
                    skipped.append(found)
            progress.end()
    return rows, skipped


def _chosen(wanted: list[str] | None, known: tuple[str, ...], what: str) -> tuple[str, ...]:
    for name in wanted or ():
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}; known are {', '.join(known)}")
    return tuple(name for name in known if not wanted or name in wanted)


if __name__ == "__main__":
    typer.run(main)
