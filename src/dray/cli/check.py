"""`dray check`: every mistake of a job, found without starting it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dray.cli.extras import require_extra
from dray.cli.job_options import Settings, read_job
from dray.config import JobConfig
from dray.runtime.job import short_path
from dray.text import printable


def check(
    job: Annotated[Path, typer.Argument(help="The job file, TOML.", show_default=False)],
    settings: Settings = None,
    output: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Output folder; by default a new one under outputs/<job name>/."),
    ] = None,
) -> None:
    """Check a job without starting it, and show every mistake at once: the same lines as `dray run`.

    Checked are the job file, the classes that it names (imported in a process of their own, for at most
    timeouts.start seconds), packages, the output folder, the controller's port and token file, memory for a ring,
    and a configured Redis server (for at most timeouts.redis seconds). Nothing that is made for a check stays.

    Exit code 0: no mistakes were found; 2: each mistake is a line on stderr.
    """
    require_extra("jobs")
    # What a job needs is imported here, so that the other commands start fast.
    from dray.launch.local import begin_checks, show_line, stop_checks
    from dray.launch.preparation import check_job

    begin_checks()
    request = read_job(job, settings, output, None)
    signals = check_job(request.draft, request.options.job_file, show_line)
    if signals:
        raise typer.Exit(stop_checks(request.draft, signals))
    shown = printable(short_path(job.absolute()))
    typer.echo(f"{shown}: no mistakes found; would start {started(request.config)}")


def started(config: JobConfig) -> str:
    """What a run of the job starts, in one phrase."""
    redis = "" if config.redis.url is not None else "1 Redis server, "
    rollouts, ranks = config.rollout.replicas, config.policy.replicas
    return f"{redis}1 controller, {rollouts} rollout and {ranks} policy {'replica' if ranks == 1 else 'replicas'}"
