"""``python -m benchmarks``, in the repository's folder: measures dray on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.run import Choices, WrongChoice, run


def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="Measure fewer sizes, rounds and operations; takes minutes.")
    ] = False,
    only: Annotated[
        str | None, typer.Option(metavar="P1,P4", help="Measure only the rows of these targets. Default: all.")
    ] = None,
    sizes: Annotated[
        str | None, typer.Option(metavar="1KiB,1MiB", help="Measure only these payload sizes. Default: all.")
    ] = None,
    details: Annotated[bool, typer.Option("--details", help="Show all rows, not only the targets.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write all results to this file.")
    ] = None,
    plot_file: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE.png", help="Plot throughput over payload size into this file."),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Compare with the results in this file, written by --json.")
    ] = None,
    load: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Measure nothing; show the results in this file, written by --json."),
    ] = None,
    docs: Annotated[
        bool, typer.Option("--docs", help="Update docs/reference/performance.md and its plot.")
    ] = False,
    install_peers: Annotated[
        bool,
        typer.Option(
            "--install-peers", help="Create the environments for the compared libraries; measure nothing."
        ),
    ] = False,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Number of rounds. Default: 7, with --quick 3.")
    ] = None,
    operations: Annotated[
        int | None,
        typer.Option(
            min=4, help="Maximum number of operations of each kind in a round. Default: 1000, with --quick 200."
        ),
    ] = None,
    idle_seconds: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            metavar="SECONDS",
            help="Seconds for which idle connections are measured. Default: 10, with --quick 2.",
        ),
    ] = None,
    memory_reads: Annotated[
        int | None,
        typer.Option(
            min=100, help="Number of reads during which memory is measured. Default: 1000000, with --quick 20000."
        ),
    ] = None,
    job_steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps of the CartPole job. Default: until it is solved.")
    ] = None,
) -> None:
    """Measure dray, the limits of this machine, and other libraries for the same task.

    Results do not affect the exit code: it is 0 once everything was measured.
    """
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


if __name__ == "__main__":
    typer.run(bench)
