"""`dray slurm`: everything that has to do with the scheduler Slurm."""

from __future__ import annotations

import typer

from dray.cli.slurm_ci import ci
from dray.cli.slurm_runs import status, submit

slurm = typer.Typer(no_args_is_help=True, help="Jobs and tests on a cluster that Slurm schedules.")
slurm.command()(submit)
slurm.command()(status)
slurm.command()(ci)
