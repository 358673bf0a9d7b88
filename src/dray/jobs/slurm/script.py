"""The batch script of a run, rendered from its template."""

from __future__ import annotations

import re
import shlex
import sys
from typing import Any

from dray.errors import ConfigError
from dray.jobs.config import SlurmTable
from dray.jobs.slurm.plan import Plan

# --- durations ---------------------------------------------------------------------------------------------------

_FORM = re.compile(r"(?:(?P<days>\d{1,4})-)?(?P<hours>\d{1,4}):(?P<minutes>[0-5]\d):(?P<seconds>[0-5]\d)")
ALLOWED = 'must be a time above 0 as "HH:MM:SS" or "D-HH:MM:SS"'


def parse_duration(key: str, text: str) -> int:
    """The seconds of a time ``"HH:MM:SS"`` or ``"D-HH:MM:SS"``.

    Raises:
        ConfigError: `text` does not have that form, or is 0; the error names `key`.
    """
    found = _FORM.fullmatch(text)
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups()) if found else (0, 0, 0, 0)
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise ConfigError(key, text, ALLOWED)
    return total


def format_duration(seconds: int) -> str:
    """`seconds` in the form of Slurm's options, e.g. ``"01:30:00"`` or ``"1-00:00:00"``."""
    days, rest = divmod(seconds, 24 * 3600)
    clock = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}-{clock}" if days else clock


# --- rendering ---------------------------------------------------------------------------------------------------


def render(name: str, **values: Any) -> str:
    """The batch script rendered from the template `name` in the folder templates/.

    Raises:
        ModuleNotFoundError: Jinja2 is not installed.
        jinja2.UndefinedError: `values` lacks a value of the template.
    """
    import jinja2  # here, because only the Slurm commands need it

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # it is a shell script
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["sh"] = shell_word
    return environment.get_template(name).render(**values)


def shell_word(value: object) -> str:
    """`value` quoted as one word of the shell; `#SBATCH` lines have the same quoting."""
    return shlex.quote(str(value))


# --- script ------------------------------------------------------------------------------------------------------

GUARD_INTERVAL = 15
"""Seconds between two checks that the batch script's node still belongs to the job."""

END_MARGIN = 15
"""Seconds that the other nodes have beyond `timeouts.shutdown` after the head process has ended."""

_FORBIDDEN = frozenset("\\\"'")


def batch_script(plan: Plan) -> str:
    """The complete batch script of a run: ``sbatch FILE`` submits it.

    Raises:
        ConfigError: the time limit leaves no time to run, or the folder's name contains quotes or backslashes.
    """
    table = plan.config.slurm or SlurmTable()
    _check_times(table, plan.config.timeouts.shutdown)
    folder = str(plan.run_folder)
    if not folder.isprintable() or _FORBIDDEN & set(folder):
        raise ConfigError(
            "job.output", folder, "must be, for Slurm, a folder without quotes and backslashes in its name"
        )
    return render(
        "job.sh.j2",
        job_name=f"dray-{plan.config.job.name}",
        nodes=plan.node_count,
        policy_nodes=plan.policy.nodes,
        time=table.time,
        pre_timeout=table.pre_timeout,
        run_folder=folder,
        plan=plan.path,
        # All that is known of an image is that its python3 has dray.
        python="python3" if table.container_image else sys.executable,
        partition=table.partition,
        account=table.account,
        gpus_per_node=table.gpus_per_node,
        sbatch_args=table.sbatch_args,
        container_image=table.container_image,
        container_mounts=[f"{folder}:{folder}", *table.container_mounts],
        environment=plan.environment,
        guard_interval=GUARD_INTERVAL,
        end_timeout=int(plan.config.timeouts.shutdown) + END_MARGIN,
    )


def _check_times(table: SlurmTable, shutdown: float) -> None:
    limit = parse_duration("slurm.time", table.time)
    if not shutdown < table.pre_timeout:
        allowed = f"must be more than timeouts.shutdown, which is {shutdown:g} s"
        raise ConfigError("slurm.pre_timeout", table.pre_timeout, allowed)
    if not table.pre_timeout < limit:
        allowed = f"must be less than slurm.time, which is {limit} s"
        raise ConfigError("slurm.pre_timeout", table.pre_timeout, allowed)
