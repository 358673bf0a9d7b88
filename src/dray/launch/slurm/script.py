"""The batch script of a run, from its template."""

from __future__ import annotations

import sys

from dray.config import SlurmTable
from dray.errors import ConfigError
from dray.launch.slurm.durations import parse_duration
from dray.launch.slurm.plan import Plan
from dray.launch.slurm.rendering import render

GUARD_INTERVAL = 15
"""Seconds between two looks at whether the node of the batch script is still one of the job's."""

END_MARGIN = 15
"""Seconds that the other nodes get beyond `timeouts.shutdown`, once the head has ended."""

_FORBIDDEN = frozenset("\\\"'")


def batch_script(plan: Plan) -> str:
    """The script, which needs nothing but itself: ``sbatch FILE`` submits it.

    Raises:
        ConfigError: the time limit leaves no time to run, or the folder's name cannot be written in the script.
    """
    table = plan.config.slurm or SlurmTable()
    _check_times(table, plan.config.timeouts.shutdown)
    folder = str(plan.run_folder)
    if not folder.isprintable() or _FORBIDDEN & set(folder):
        raise ConfigError("job.output", folder, "for Slurm, a folder without quotes and backslashes in its name")
    return render(
        "job.sh.j2",
        job_name=f"dray-{plan.config.job.name}",
        nodes=plan.node_count,
        policy_nodes=plan.policy.nodes,
        time=table.time,
        pre_timeout=table.pre_timeout,
        run_folder=folder,
        plan=plan.path,
        # Of an image nothing is known but that it has dray.
        python="python3" if table.container_image else sys.executable,
        partition=table.partition,
        account=table.account,
        gpus_per_node=table.gpus_per_node,
        sbatch_args=table.sbatch_args,
        container_image=table.container_image,
        container_mounts=[f"{folder}:{folder}", *table.container_mounts],
        environment=plan.environment,
        guard_interval=GUARD_INTERVAL,
        end_bound=int(plan.config.timeouts.shutdown) + END_MARGIN,
    )


def _check_times(table: SlurmTable, shutdown: float) -> None:
    limit = parse_duration("slurm.time", table.time)
    if not shutdown < table.pre_timeout:
        allowed = f"must be more than timeouts.shutdown, which is {shutdown:g}"
        raise ConfigError("slurm.pre_timeout", table.pre_timeout, allowed)
    if not table.pre_timeout < limit:
        allowed = f"must be less than slurm.time, which is {limit} s"
        raise ConfigError("slurm.pre_timeout", table.pre_timeout, allowed)
