"""The `dray` command."""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from typing import Annotated, NoReturn

import typer

from dray import __version__
from dray.cli.agent import agent
from dray.cli.doctor import doctor
from dray.cli.extras import remedy, require_extra
from dray.cli.job_options import JobArgument, LogLevelOption, OutputOption, Settings, read_job
from dray.cli.logs import logs
from dray.cli.new import new
from dray.cli.recordings import inspect, record, replay
from dray.cli.slurm import slurm
from dray.cli.status import status
from dray.cli.top import top
from dray.cli.trace import trace
from dray.errors import ConfigError, DrayError, MissingDependencyError, error_lines
from dray.jobs.exit_codes import ExitCode
from dray.jobs.folder import short_path
from dray.jobs.process import exit_with_own_code_on_crash, printable_handler
from dray.jobs.standard_streams import flush_streams, open_missing_streams
from dray.text import printable

# --- check -------------------------------------------------------------------------------------------------------


def check(job: JobArgument, settings: Settings = None, output: OutputOption = None) -> None:
    """Check a job without starting it, and print one line for each mistake, as `dray run` does.

    The command checks the job file, the classes that it names (imported in a separate process, for at most
    timeouts.start seconds), packages, the output folder, the controller's port and token file, memory for a ring,
    and a configured Redis server (for at most timeouts.redis seconds). It removes everything that it creates.

    Exit code 0: no mistakes were found; 2: stderr has one line for each mistake.
    """
    require_extra("jobs")
    # Imported here, so that the other commands start fast.
    from dray.jobs.launch.local import check_job

    request = read_job(job, settings, output, None)
    if code := check_job(request.draft, request.options.job_file):
        raise typer.Exit(code)
    shown = printable(short_path(job.absolute()))
    config = request.config
    redis = "" if config.redis.url is not None else "1 Redis server, "
    ranks = f"{config.policy.replicas} policy {'replica' if config.policy.replicas == 1 else 'replicas'}"
    processes = f"{redis}1 controller, {config.rollout.replicas} rollout and {ranks}"
    typer.echo(f"{shown}: no mistakes found; would start {processes}")


# --- app ---------------------------------------------------------------------------------------------------------

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Payload transport for disaggregated reinforcement learning, and jobs that use it. "
    "`dray new NAME` creates an example job.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dray {__version__}")
        raise typer.Exit


@app.callback()
def common(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """The options of `dray` itself."""


def run(
    job: JobArgument,
    settings: Settings = None,
    log_level: LogLevelOption = None,
    output: OutputOption = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue from the checkpoint in the output folder, with the options of the start of the run; "
            "options given now override them.",
        ),
    ] = False,
) -> None:
    """Check a job as `dray check` does, run it on this machine, and show its progress.

    Ctrl-C ends the job within timeouts.shutdown seconds (8 by default), with a checkpoint; a second one kills it.

    Exit code 0: solved, or all steps done; 1: not solved; 2: mistakes, and nothing was started; 10: the worker or
    trainer class raised; 17: it returned an unusable value; 130: Ctrl-C.
    """
    require_extra("jobs")
    # Imported here, so that the other commands start fast.
    from dray.jobs.launch.local import run_job
    from dray.jobs.launch.output import run_folder

    request = read_job(job, settings, output, log_level)
    if resume:
        request = request.resumed(run_folder(request.config, resume=True))
    raise typer.Exit(run_job(request.draft, request.options, resume=resume, lines=request.lines))


app.command()(new)
app.command()(check)
app.command()(run)
app.command()(status)
app.command()(logs)
app.command()(top)
app.command()(trace)
app.command()(record)
app.command()(replay)
app.command()(inspect)
app.command()(agent)
app.command()(doctor)
app.add_typer(slurm, name="slurm")


def main() -> None:
    """The entry point of the `dray` command. Prints a `DrayError` as lines on stderr and exits with its code.

    A package that is missing because an extra was not installed is reported in the same way. Standard streams that
    are closed or cannot be written change neither what the command does nor its exit code.
    """
    open_missing_streams()
    exit_with_own_code_on_crash()
    logging.basicConfig(level=logging.WARNING, handlers=[printable_handler()])
    try:
        # Calling the `Typer` itself would replace the exception hook installed above.
        typer.main.get_command(app)()
    except (ConfigError, MissingDependencyError) as error:
        _fail(error, ExitCode.CONFIGURATION)
    except DrayError as error:
        _fail(error, ExitCode.FAILED)
    except ModuleNotFoundError as error:
        line = remedy(error)
        if line is None:
            raise
        _fail(line, ExitCode.CONFIGURATION)
    finally:
        flush_streams()


def _fail(error: DrayError | str, code: ExitCode) -> NoReturn:
    with suppress(OSError):  # stderr cannot be written: the exit code has to do
        for line in [f"error: {error}"] if isinstance(error, str) else error_lines(error):
            print(line, file=sys.stderr)
    sys.exit(int(code))


if __name__ == "__main__":
    main()
