"""The `dray` command."""

from __future__ import annotations

import logging
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from dray.cli.bench import bench
from dray.cli.doctor import doctor
from dray.cli.job_options import Settings, read_job
from dray.cli.slurm import slurm
from dray.errors import ConfigError, DrayError, error_lines
from dray.runtime.exit_codes import ExitCode
from dray.runtime.process import exit_with_own_code_on_crash

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Payload transport for disaggregated reinforcement learning.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dray {version('dray')}")
        raise typer.Exit


@app.callback()
def common(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of the command as a whole."""


@app.command()
def run(
    job: Annotated[Path, typer.Argument(help="The job file, TOML.")],
    settings: Settings = None,
    output: Annotated[
        str | None, typer.Option(help="Output folder; by default a new one under outputs/<job name>/.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoint in the output folder.")
    ] = False,
) -> None:
    """Run a job on this machine and show its progress."""
    # Everything that a job needs is imported here, so that the other commands start fast.
    from dray.launch.local import run_job

    config = read_job(job, settings, output)
    raise typer.Exit(run_job(config, job.absolute(), resume=resume))


app.command()(doctor)
app.command()(bench)
app.add_typer(slurm, name="slurm")


def main() -> None:
    """The entry point of the `dray` command: errors of dray's own become lines and an exit code."""
    exit_with_own_code_on_crash()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    try:
        # Called as a `Typer`, it would put an exception hook of its own in the place of ours.
        typer.main.get_command(app)()
    except ConfigError as error:
        _fail(error, ExitCode.CONFIGURATION)
    except DrayError as error:
        _fail(error, ExitCode.FAILED)


def _fail(error: DrayError, code: ExitCode) -> None:
    for line in error_lines(error):
        print(line, file=sys.stderr)
    sys.exit(int(code))


if __name__ == "__main__":
    main()
