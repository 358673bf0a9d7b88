"""`dray bench`: what dray costs on this machine. The benchmarks are part of the repository, not of the package."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dray.errors import ConfigError

CHECKOUT = Path(__file__).parents[3]
"""The repository's folder, where this module lies in a checkout."""


def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="Take minutes: fewer sizes, rounds and operations.")
    ] = False,
    only: Annotated[
        str | None, typer.Option(metavar="P1,P4", help="Only the rows of these targets; by default all.")
    ] = None,
    sizes: Annotated[
        str | None, typer.Option(metavar="1KiB,1MiB", help="Only these payload sizes; by default all.")
    ] = None,
    details: Annotated[bool, typer.Option("--details", help="Show every row, not only the targets.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write everything to this file, too.")
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw rate over payload size.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Show what moved since the run that wrote this file.")
    ] = None,
    load: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Measure nothing; take what --json wrote to this file.")
    ] = None,
    docs: Annotated[
        bool, typer.Option("--docs", help="Write figures and plot into docs/reference/performance.md and .png.")
    ] = False,
    install_peers: Annotated[
        bool, typer.Option("--install-peers", help="Make the environments that peers need, and measure nothing.")
    ] = False,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="How often everything is repeated; by default 7, with --quick 3.")
    ] = None,
    operations: Annotated[
        int | None,
        typer.Option(min=4, help="Limit of operations of a kind in a round; by default 1000, with --quick 200."),
    ] = None,
    idle_seconds: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            metavar="SECONDS",
            help="Seconds for which idle connections are watched; by default 10, with --quick 2.",
        ),
    ] = None,
    memory_reads: Annotated[
        int | None,
        typer.Option(min=100, help="Reads over which memory is watched; by default 1000000, with --quick 20000."),
    ] = None,
    job_steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps of the CartPole job; by default until it is solved.")
    ] = None,
) -> None:
    """Measure dray beside the limits of this machine and beside what people use instead.

    Works in a checkout of the repository. Nothing passes or fails: exit code 0 says that it was measured.
    """
    if not (CHECKOUT / "benchmarks" / "run.py").is_file():
        needs = "it needs a checkout of dray, where the folder benchmarks/ is"
        raise ConfigError("dray bench", None, needs, "cannot run in this installation")
    # The benchmarks import each other from the repository's folder, wherever the command is given.
    if str(CHECKOUT) not in sys.path:
        sys.path.insert(0, str(CHECKOUT))
    from benchmarks.run import Choices, WrongChoice, run

    try:
        run(
            Choices(
                quick=quick,
                only=only,
                sizes=sizes,
                rounds=rounds,
                operations=operations,
                idle_seconds=idle_seconds,
                memory_reads=memory_reads,
                job_steps=job_steps,
                details=details,
                json_file=json_file,
                plot_file=plot_file,
                against=against,
                load=load,
                docs=docs,
                install_peers=install_peers,
            )
        )
    except WrongChoice as error:
        raise typer.BadParameter(str(error)) from error
