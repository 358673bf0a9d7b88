"""`dray slurm`: jobs and tests on a Slurm cluster."""

from __future__ import annotations

import select
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dray.cli.extras import require_extra
from dray.cli.job_options import JobArgument, LogLevelOption, OutputOption, Settings, read_job
from dray.errors import ConfigError
from dray.text import MAX_LINE, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

    from dray.jobs.slurm.status import RunView

# --- slurm runs --------------------------------------------------------------------------------------------------


def submit(
    job: JobArgument,
    settings: Settings = None,
    log_level: LogLevelOption = None,
    output: OutputOption = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Resume a run that failed, was cancelled or lost, with the options that it was submitted with; "
            "options given now override them.",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the batch script and submit nothing.")] = False,
    partition: Annotated[
        str | None, typer.Option(metavar="NAME", help="Partition. Default: slurm.partition, else Slurm's default.")
    ] = None,
    account: Annotated[
        str | None, typer.Option(metavar="NAME", help="Account. Default: slurm.account, else Slurm's default.")
    ] = None,
    time: Annotated[
        str | None,
        typer.Option(
            metavar="HH:MM:SS", help="Time limit of each part of the run. Default: slurm.time, else 01:00:00."
        ),
    ] = None,
    pre_timeout: Annotated[
        int | None,
        typer.Option(
            metavar="SECONDS",
            help="Seconds before the time limit at which a part writes a checkpoint and is requeued. Default: "
            "slurm.pre_timeout, else 120.",
        ),
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Total number of nodes, those of the policy included; the others are for rollouts. Default: "
            "slurm.policy_nodes plus slurm.rollout_nodes.",
        ),
    ] = None,
    policy_nodes: Annotated[
        int | None, typer.Option(min=1, help="Nodes of the policy. Default: slurm.policy_nodes, else 1.")
    ] = None,
    gpus_per_node: Annotated[
        int | None,
        typer.Option(
            min=0, help="GPUs of each node, divided among its replicas. Default: slurm.gpus_per_node, else 0."
        ),
    ] = None,
    interface: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Network interface between nodes. Default: slurm.interface, else one with RDMA, else that of the "
            "default route.",
        ),
    ] = None,
    retries: Annotated[
        int | None,
        typer.Option(min=0, help="How many failed attempts are retried. Default: slurm.retries, else 2."),
    ] = None,
    sbatch_arg: Annotated[
        list[str] | None,
        typer.Option(metavar="ARG", help='Additional option of sbatch, for example "--qos=high". Repeatable.'),
    ] = None,
    container: Annotated[
        str | None,
        typer.Option(
            metavar="IMAGE",
            help="Container image of the job (pyxis and enroot). Default: slurm.container_image, else none.",
        ),
    ] = None,
    container_mount: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FROM:TO", help="Additional mount of the container, besides the run folder. Repeatable."
        ),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Environment variable of the job's processes. Repeatable."),
    ] = None,
    snapshot: Annotated[
        bool | None,
        typer.Option(
            "--snapshot/--no-snapshot",
            help="Run a copy of the code, made at submission. Default: slurm.snapshot, else a copy.",
        ),
    ] = None,
) -> None:
    """Submit a job to Slurm, with the table slurm of the job file and these options."""
    # Imported here, so that the help is shown fast.
    from dray.jobs.exit_codes import ExitCode
    from dray.jobs.slurm import submit as submission

    options = {
        "partition": partition,
        "account": account,
        "time": time,
        "pre_timeout": pre_timeout,
        "policy_nodes": policy_nodes,
        "gpus_per_node": gpus_per_node,
        "interface": interface,
        "retries": retries,
        "sbatch_args": sbatch_arg,
        "container_image": container,
        "container_mounts": container_mount,
        "environment": _variables(env or []),
        "snapshot": snapshot,
        "nodes": nodes,
    }
    request = read_job(job, settings, output, log_level, options)
    if resume:
        request = request.resumed(submission.run_folder(request.config, resume=True))
    config = submission.with_options(request.config, request.options.slurm)
    if not dry_run and (config.slurm is None or config.slurm.container_image is None):
        require_extra("jobs")  # the nodes run this installation
    prepared = submission.prepare(config, job, resume=resume, make=not dry_run)
    place = prepared.plan.run_folder
    if prepared.record is None:
        typer.echo(f"run in {place} has already finished: no job was submitted")
        raise typer.Exit(ExitCode.OK)
    if dry_run:
        typer.echo(prepared.script, nl=False)
        for line in prepared.layout:
            typer.echo(line, err=True)
        return
    number = submission.submit(prepared, job, request.options)
    for line in request.lines:
        typer.echo(printable(line, MAX_LINE))
    typer.echo(f"submitted job {number}")
    for line in prepared.layout:
        typer.echo(line)
    typer.echo(f"outputs: {place}")
    typer.echo(f"logs:    {place / 'latest' / 'logs'}, {place / f'slurm-{number}.out'}")
    typer.echo(f"state:   dray slurm status --watch {place}")


def status(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(help="Run folders, or folders that contain run folders. Default: outputs/."),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Repeat until Slurm has no job of the runs.")] = False,
    interval: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", min=0.1, help="Seconds between queries with --watch; each query runs squeue once."
        ),
    ] = 10.0,
) -> None:
    """Show submitted runs: state, step, return, throughput, and the end of a failed run's log."""
    from rich.console import Console
    from rich.live import Live

    console = Console()
    live = Live(console=console, auto_refresh=False) if watch and console.is_terminal else None
    with live or nullcontext():
        while True:
            views = _find_views(folders or [Path("outputs")])
            _show(views, console, live)
            if not watch or not any(view.in_slurm for view in views):
                return
            select.select([], [], [], interval)


def _show(views: list[RunView], console: Console, live: Live | None) -> None:
    from dray.jobs.slurm.status import plain_lines, status_table

    if live is not None:
        live.update(status_table(views), refresh=True)
    elif not views:
        console.print("found no runs that were submitted to Slurm")
    elif console.is_terminal:
        console.print(status_table(views))
    else:
        for line in plain_lines(views):
            typer.echo(line)


def _find_views(places: list[Path]) -> list[RunView]:
    from dray.jobs.slurm.scheduler import known_jobs
    from dray.jobs.slurm.status import find_runs, view_run

    found = find_runs(places)
    jobs = known_jobs() if found else {}
    return [view_run(folder, jobs) for folder in found]


def _variables(given: list[str]) -> dict[str, str]:
    """The variables given as ``NAME=VALUE``; their names are checked with the rest of [slurm].

    Raises:
        ConfigError: there is no ``=``.
    """
    found = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not equals:
            raise ConfigError("--env", each, "must be NAME=VALUE")
        found[name] = value
    return found


# --- slurm ci ----------------------------------------------------------------------------------------------------


def ci(
    suites: Annotated[
        list[str] | None,
        typer.Argument(
            help="Paths as for pytest, each run in a separate process. Default: each folder in tests/ with tests."
        ),
    ] = None,
    project: Annotated[
        Path, typer.Option(metavar="FOLDER", exists=True, file_okay=False, help="Folder of the project to test.")
    ] = Path(),
    output_root: Annotated[
        Path,
        typer.Option(metavar="FOLDER", help="Folder in which a numbered folder for logs and reports is created."),
    ] = Path("outputs/ci"),
    partition: Annotated[
        str | None, typer.Option(metavar="NAME", help="Partition. Default: Slurm's default.")
    ] = None,
    account: Annotated[str | None, typer.Option(metavar="NAME", help="Account. Default: Slurm's default.")] = None,
    gpus: Annotated[int, typer.Option(min=0, help="Number of GPUs of the node.")] = 0,
    test_timeout: Annotated[
        str,
        typer.Option(
            metavar="HH:MM:SS",
            help="Time limit for all suites. On expiry, stack traces are dumped and the run is killed.",
        ),
    ] = "01:00:00",
    time: Annotated[
        str | None,
        typer.Option(metavar="HH:MM:SS", help="Time limit of the job. Default: --test-timeout plus 30 minutes."),
    ] = None,
    scratch: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder of the node for temporary files; $NAME is replaced by the node's variable. Default: "
            "TMPDIR of the node, else /tmp.",
        ),
    ] = None,
    container: Annotated[
        str | None,
        typer.Option(metavar="IMAGE", help="Container image for the suites (pyxis and enroot). Default: none."),
    ] = None,
    container_mount: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FROM:TO",
            help="Additional mount of the container, besides project, output and scratch. Repeatable.",
        ),
    ] = None,
    python: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Python that runs pytest. Default: the one that runs dray; in a container python3.",
        ),
    ] = None,
    setup: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND", help="Shell command, run in the project before the suites. Default: none."
        ),
    ] = None,
    pytest_arg: Annotated[
        list[str] | None, typer.Option(metavar="ARG", help="Additional argument of pytest. Repeatable.")
    ] = None,
    extra_sbatch_arg: Annotated[
        list[str] | None,
        typer.Option(metavar="ARG", help='Additional option of sbatch, for example "--qos=high". Repeatable.'),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the batch script and submit nothing.")] = False,
) -> None:
    """Run the project's tests on one exclusive node of a Slurm cluster and wait until they have ended.

    The exit code is that of the first suite that did not pass; 5 if a suite was skipped or no test ran.
    """
    # Imported here, so that the help is shown fast.
    from dray.jobs.slurm.ci import Choices, plan, run

    planned = plan(
        Choices(
            project=project,
            python=python or ("python3" if container else sys.executable),
            suites=suites or (),
            output_root=output_root,
            partition=partition,
            account=account,
            gpus=gpus,
            test_timeout=test_timeout,
            time=time,
            scratch=scratch,
            setup=setup,
            container=container,
            container_mounts=container_mount or (),
            pytest_arguments=pytest_arg or (),
            extra_arguments=extra_sbatch_arg or (),
        ),
        make=not dry_run,
    )
    if dry_run:
        typer.echo(planned.script, nl=False)
        return
    raise typer.Exit(run(planned, _print_now))


def _print_now(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


# --- slurm -------------------------------------------------------------------------------------------------------

slurm = typer.Typer(no_args_is_help=True, help="Jobs and tests on a Slurm cluster.")
slurm.command()(submit)
slurm.command()(status)
slurm.command()(ci)
