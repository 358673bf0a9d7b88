"""Slurm's commands to submit, query and cancel jobs, each with a time limit."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from dray.errors import DrayError

COMMAND_SECONDS = 60.0
"""Time limit of a Slurm command; a busy slurmctld answers within seconds."""

ENDED_STATES = frozenset(
    {
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "TIMEOUT",
    }
)
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
        exit_code: exit code of the batch script; 0 while it runs.
        signal: the signal that ended the batch script, or 0.
        restarts: how many times the job was requeued.
        nodes: Slurm's list of the job's nodes, e.g. ``"n[1-3]"``; ``""`` while it has none.
    """

    number: int
    state: str
    reason: str
    exit_code: int
    signal: int
    restarts: int
    nodes: str

    @property
    def ended(self) -> bool:
        """Whether the job has ended."""
        return self.state in ENDED_STATES

    @classmethod
    def parse(cls, line: str) -> JobView:
        """The job in a line of ``scontrol --oneliner show job``."""
        fields = dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", line))
        exit_code, _, signal = fields["ExitCode"].partition(":")
        nodes = fields.get("NodeList", "")
        return cls(
            number=int(fields["JobId"]),
            state=fields["JobState"],
            reason=fields.get("Reason", "None"),
            exit_code=int(exit_code),
            signal=int(signal or 0),
            restarts=int(fields.get("Restarts", 0)),
            nodes="" if nodes == "(null)" else nodes,
        )


def submit(script: Path) -> int:
    """Submit a batch script that contains its options; returns the job's number.

    Raises:
        SlurmError: Slurm rejected it; the message has the reason.
    """
    printed = run_command("sbatch", "--parsable", str(script))
    return int(printed.strip().partition(";")[0])  # "number;cluster" where there are several clusters


def query_job(number: int) -> JobView:
    """The present state of a job.

    Raises:
        SlurmError: Slurm has no such job, or does not answer.
    """
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

    Raises:
        SlurmError: Slurm does not answer.
    """
    columns = ("--noheader", "--states=all", f"--user={os.getuid()}", "--format=%i|%T|%r")
    found = {}
    for line in run_command("squeue", *columns).splitlines():
        number, state, reason = line.split("|", 2)
        found[number] = state.lower() + (f" ({reason})" if state == "PENDING" and reason != "None" else "")
    return found


def waiting_or_running() -> dict[str, str]:
    """Those of `known_jobs` that have not ended."""
    return {number: state for number, state in known_jobs().items() if not has_ended(state)}


def has_ended(state: str) -> bool:
    """Whether a state from `known_jobs` is that of a job that has ended."""
    return state.upper() in ENDED_STATES


def cancel(number: int) -> None:
    """Cancel a job: Slurm sends it SIGTERM, later SIGKILL. A job that has ended is left as it is.

    Raises:
        SlurmError: Slurm refused, or does not answer.
    """
    run_command("scancel", str(number))


def run_command(name: str, *arguments: str, seconds: float = COMMAND_SECONDS) -> str:
    """The output of a Slurm command.

    Raises:
        SlurmError: the command is not installed, did not end within `seconds`, or its exit code is not 0.
    """
    try:
        done = subprocess.run(
            [name, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            start_new_session=True,  # Ctrl-C must not interrupt a submission half-way
        )
    except FileNotFoundError:
        raise SlurmError(f"{name} is not installed here; `dray slurm` needs Slurm's commands") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{name} did not end within {seconds:g} s") from None
    if done.returncode != 0:
        output = " ".join((done.stderr or done.stdout).split())
        raise SlurmError(f"{name} failed: {output or f'exit code {done.returncode}'}")
    return done.stdout
