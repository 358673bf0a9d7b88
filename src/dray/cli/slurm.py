"""`dray slurm`: everything that has to do with the scheduler Slurm."""

from __future__ import annotations

import select
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dray.cli.extras import require_extra
from dray.cli.job_options import LogLevelOption, Settings, read_job
from dray.errors import ConfigError
from dray.text import MAX_LINE, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

    from dray.jobs.slurm.status import RunView

# --- slurm runs --------------------------------------------------------------------------------------------------


def submit(
    job: Annotated[Path, typer.Argument(help="The job file, TOML, the same as for dray run.", show_default=False)],
    settings: Settings = None,
    log_level: LogLevelOption = None,
    output: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Output folder; by default a new one under outputs/<job name>/."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue a run that failed, was cancelled or lost, with the options that it was submitted with; "
            "options given now take their place.",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the batch script and submit nothing.")] = False,
    partition: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Partition; by default the one of slurm.partition, else Slurm's."),
    ] = None,
    account: Annotated[
        str | None, typer.Option(metavar="NAME", help="Account; by default that of slurm.account, else Slurm's.")
    ] = None,
    time: Annotated[
        str | None,
        typer.Option(metavar="HH:MM:SS", help="Time limit of one part; by default slurm.time, else 01:00:00."),
    ] = None,
    pre_timeout: Annotated[
        int | None,
        typer.Option(
            metavar="SECONDS",
            help="Seconds before the time limit at which a part writes a checkpoint and is requeued; by default "
            "slurm.pre_timeout, else 120.",
        ),
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Nodes in all; those that the policy does not take are for rollouts. By default "
            "slurm.policy_nodes and slurm.rollout_nodes.",
        ),
    ] = None,
    policy_nodes: Annotated[
        int | None, typer.Option(min=1, help="Nodes of the policy; by default slurm.policy_nodes, else 1.")
    ] = None,
    gpus_per_node: Annotated[
        int | None,
        typer.Option(
            min=0, help="GPUs of a node, divided among its replicas; by default slurm.gpus_per_node, else 0."
        ),
    ] = None,
    interface: Annotated[
        str | None, typer.Option(metavar="NAME", help="Network interface; by default one with RDMA.")
    ] = None,
    retries: Annotated[
        int | None,
        typer.Option(min=0, help="How often a failed attempt is repeated; by default slurm.retries, else 2."),
    ] = None,
    sbatch_arg: Annotated[
        list[str] | None, typer.Option(metavar="ARG", help='Handed to sbatch, e.g. "--qos=high".')
    ] = None,
    container: Annotated[
        str | None, typer.Option(metavar="IMAGE", help="Run in this image (pyxis and enroot).")
    ] = None,
    container_mount: Annotated[
        list[str] | None, typer.Option(metavar="FROM:TO", help="Besides the run's folder.")
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A variable of the job's environment.")
    ] = None,
    snapshot: Annotated[
        bool | None,
        typer.Option(
            "--snapshot/--no-snapshot",
            help="Run a copy of the code, made now; by default slurm.snapshot, else a copy.",
        ),
    ] = None,
) -> None:
    """Submit a job to Slurm, with what the table slurm of the job file says, and these options."""
    # Not needed to show the help of this or another command.
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
    table = dict(request.options.slurm)
    config = submission.with_options(request.config, table, table.pop("nodes", None))
    if not dry_run and (config.slurm is None or config.slurm.container_image is None):
        require_extra("jobs")  # the nodes run this very installation
    prepared = submission.prepare(config, job, resume=resume, make=not dry_run)
    place = prepared.plan.run_folder
    if prepared.record is None:
        typer.echo(f"finished already: nothing is left to do in {place}")
        raise typer.Exit(ExitCode.OK)
    if dry_run:
        typer.echo(prepared.script, nl=False)
        for line in prepared.layout_lines():
            typer.echo(line, err=True)
        return
    number = submission.submit(prepared, job, request.options)
    for line in request.lines:
        typer.echo(printable(line, MAX_LINE))
    typer.echo(f"submitted job {number}")
    for line in prepared.layout_lines():
        typer.echo(line)
    typer.echo(f"outputs: {place}")
    typer.echo(f"logs:    {place / 'latest' / 'logs'}, {place / f'slurm-{number}.out'}")
    typer.echo(f"state:   dray slurm status --watch {place}")


def status(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders of runs, or folders with such folders; by default outputs/."),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Repeat until every run has ended.")] = False,
    interval: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", min=0.1, help="Seconds between two queries with --watch; each asks Slurm once."
        ),
    ] = 10.0,
) -> None:
    """Show runs that were submitted: state, step, return, throughput, and the log of what failed."""
    from rich.console import Console
    from rich.live import Live

    console = Console()
    live = Live(console=console, auto_refresh=False) if watch and console.is_terminal else None
    with live or nullcontext():
        while True:
            views = _look(folders or [Path("outputs")])
            _show(views, console, live)
            if not watch or all(view.is_over for view in views):
                return
            select.select([], [], [], interval)


def _show(views: list[RunView], console: Console, live: Live | None) -> None:
    from dray.jobs.slurm.status import picture, plain_lines

    if live is not None:
        live.update(picture(views), refresh=True)
    elif not views:
        console.print("no runs that were submitted to Slurm are here")
    elif console.is_terminal:
        console.print(picture(views))
    else:
        for line in plain_lines(views):
            typer.echo(line)
        sys.stdout.flush()


def _look(places: list[Path]) -> list[RunView]:
    from dray.jobs.slurm.scheduler import known_jobs
    from dray.jobs.slurm.status import find_runs, view_run

    found = find_runs(places)
    jobs = known_jobs() if found else {}
    return [view_run(folder, jobs) for folder in found]


def _variables(given: list[str]) -> dict[str, str]:
    """``NAME=VALUE`` of each; the name is checked with the rest of [slurm].

    Raises:
        ConfigError: there is no ``=``.
    """
    found = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not equals:
            raise ConfigError("--env", each, "NAME=VALUE")
        found[name] = value
    return found


# --- slurm ci ----------------------------------------------------------------------------------------------------


def ci(
    suites: Annotated[
        list[str] | None,
        typer.Argument(help="Paths as for pytest, a process for each; by default every folder of tests/."),
    ] = None,
    project: Annotated[
        Path, typer.Option(metavar="FOLDER", exists=True, file_okay=False, help="The project that is tested.")
    ] = Path(),
    output_root: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Logs and reports go to a numbered folder in it.")
    ] = Path("outputs/ci"),
    partition: Annotated[str | None, typer.Option(metavar="NAME", help="By default Slurm's.")] = None,
    account: Annotated[str | None, typer.Option(metavar="NAME", help="By default Slurm's.")] = None,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs of the node.")] = 0,
    test_timeout: Annotated[
        str, typer.Option(metavar="HH:MM:SS", help="For all suites together; then stacks, then an end.")
    ] = "01:00:00",
    time: Annotated[
        str | None, typer.Option(metavar="HH:MM:SS", help="Limit of the job; by default 30 minutes more.")
    ] = None,
    scratch: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="On the node, may name $VARIABLES; by default TMPDIR there."),
    ] = None,
    container: Annotated[
        str | None, typer.Option(metavar="IMAGE", help="Run in this image (pyxis and enroot).")
    ] = None,
    container_mount: Annotated[
        list[str] | None, typer.Option(metavar="FROM:TO", help="Besides project, output and scratch.")
    ] = None,
    python: Annotated[
        str | None, typer.Option(metavar="PATH", help="By default this one; in a container python3.")
    ] = None,
    setup: Annotated[
        str | None, typer.Option(metavar="COMMAND", help="Runs in the project before the suites.")
    ] = None,
    pytest_arg: Annotated[list[str] | None, typer.Option(metavar="ARG", help="Handed to pytest.")] = None,
    extra_sbatch_arg: Annotated[
        list[str] | None, typer.Option(metavar="ARG", help='Handed to sbatch, e.g. "--qos=high".')
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the batch script and submit nothing.")] = False,
) -> None:
    """Run the project's tests on one exclusive node of a Slurm cluster and wait for them.

    The exit code is that of the first suite that did not pass; 5 if a suite, or everything, was skipped.
    """
    # Not needed to show the help of this or another command.
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
    raise typer.Exit(run(planned, _show_ci))


def _show_ci(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


# --- slurm -------------------------------------------------------------------------------------------------------

slurm = typer.Typer(no_args_is_help=True, help="Jobs and tests on a cluster that Slurm schedules.")
slurm.command()(submit)
slurm.command()(status)
slurm.command()(ci)
