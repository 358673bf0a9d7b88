"""Slurm as dray uses it: batch scripts and durations in its form, and its commands, each with a time limit."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dray.errors import ConfigError, DrayError

# --- scripts and durations ---------------------------------------------------------------------------------------

_DURATION = re.compile(r"(?:(?P<days>\d{1,4})-)?(?P<hours>\d{1,4}):(?P<minutes>[0-5]\d):(?P<seconds>[0-5]\d)")


def render(name: str, **values: Any) -> str:
    """The batch script rendered from the template `name` in the folder templates/.

    The filter ``sh`` quotes a value as one word of the shell; `#SBATCH` lines have the same quoting.

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
    environment.filters["sh"] = lambda value: shlex.quote(str(value))
    return environment.get_template(name).render(**values)


def parse_duration(key: str, text: str) -> int:
    """The seconds of a time ``"HH:MM:SS"`` or ``"D-HH:MM:SS"``.

    Raises:
        ConfigError: `text` does not have that form, or is 0; the error names `key`.
    """
    found = _DURATION.fullmatch(text)
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups()) if found else (0, 0, 0, 0)
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise ConfigError(key, text, 'must be a time above 0 as "HH:MM:SS" or "D-HH:MM:SS"')
    return total


def format_duration(seconds: int) -> str:
    """`seconds` in the form of Slurm's options, e.g. ``"01:30:00"`` or ``"1-00:00:00"``."""
    days, rest = divmod(seconds, 24 * 3600)
    clock = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}-{clock}" if days else clock


# --- commands ----------------------------------------------------------------------------------------------------

# Each raises `SlurmError` if Slurm refuses or does not answer.

COMMAND_SECONDS = 60.0
"""Time limit of a Slurm command; a busy slurmctld answers within seconds."""

ENDED_STATES = frozenset({
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED",
    "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT",
})  # fmt: skip
"""States of a job that has ended, unless it is being requeued."""


class SlurmError(DrayError):
    """A Slurm command failed, is not installed, or exceeded its time limit; the message has its output."""


@dataclass(frozen=True, slots=True)
class JobView:
    """A job as `scontrol show job` shows it.

    Attributes:
        number: the job id.
        state: Slurm's name of the state, e.g. ``"RUNNING"``.
        reason: the reason of the state, e.g. ``"Resources"``; ``"None"`` if there is none.
    """

    number: int
    state: str
    reason: str = "None"

    @property
    def ended(self) -> bool:
        return self.state in ENDED_STATES

    @classmethod
    def parse(cls, line: str) -> JobView:
        """The job in a line of ``scontrol --oneliner show job``."""
        fields = dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", line))
        return cls(int(fields["JobId"]), fields["JobState"], fields.get("Reason", "None"))


def submit(script: Path) -> int:
    """Submit a batch script that contains its options; returns the job's number."""
    printed = run_command("sbatch", "--parsable", str(script))
    return int(printed.strip().partition(";")[0])  # "number;cluster" where there are several clusters


def query_job(number: int) -> JobView:
    """The present state of a job; raises `SlurmError` also if Slurm has no such job."""
    return JobView.parse(run_command("scontrol", "--oneliner", "show", "job", str(number)))


def partition_nodes(partition: str | None) -> int | None:
    """The number of a partition's nodes, whatever their states are; None if it is not known.

    Args:
        partition: a name; several, separated by commas, for the largest of these; None for the default partition.
    """
    try:
        lines = run_command("sinfo", "--noheader", "--Node", "--format=%P|%N").splitlines()
    except SlurmError:  # sbatch will report what is wrong
        return None
    nodes: dict[str, set[str]] = {}
    for line in lines:
        name, node = line.split("|", 1)
        nodes.setdefault(name, set()).add(node)
    wanted = [each for each in nodes if each.endswith("*")] if partition is None else partition.split(",")
    sizes = {name.rstrip("*"): len(found) for name, found in nodes.items()}
    return max((sizes[name] for each in wanted if (name := each.rstrip("*")) in sizes), default=None)


def known_jobs() -> dict[str, str]:
    """The states of the user's jobs by number, with the reason of a waiting one, e.g. ``"pending (Priority)"``.

    They include jobs that ended less than `MinJobAge` (300 s by default) ago.
    """
    columns = ("--noheader", "--states=all", f"--user={os.getuid()}", "--format=%i|%T|%r")
    found = {}
    for line in run_command("squeue", *columns).splitlines():
        number, state, reason = line.split("|", 2)
        found[number] = state.lower() + (f" ({reason})" if state == "PENDING" and reason != "None" else "")
    return found


def has_ended(state: str) -> bool:
    """Whether a state from `known_jobs` is that of a job that has ended."""
    return state.upper() in ENDED_STATES


def cancel(number: int) -> None:
    """Cancel a job: Slurm sends it SIGTERM, later SIGKILL. A job that has ended is left as it is."""
    run_command("scancel", str(number))


def run_command(name: str, *arguments: str) -> str:
    """The output of a Slurm command.

    Raises:
        SlurmError: it is not installed, did not end within `COMMAND_SECONDS`, or its exit code is not 0.
    """
    try:
        done = subprocess.run(
            [name, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            start_new_session=True,  # Ctrl-C must not interrupt a submission half-way
        )
    except FileNotFoundError:
        raise SlurmError(f"{name} is not installed here; `dray slurm` needs Slurm's commands") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{name} did not end within {COMMAND_SECONDS:g} s") from None
    if done.returncode != 0:
        output = " ".join((done.stderr or done.stdout).split())
        raise SlurmError(f"{name} failed: {output or f'exit code {done.returncode}'}")
    return done.stdout
