"""`dray slurm ci`: the project's tests on a node of the cluster."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


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
    from dray.launch.slurm.ci import Choices, plan, run

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
    raise typer.Exit(run(planned, _show))


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
