"""Slurm's commands for one job: submit it, look at it, cancel it. Each is bounded."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from dray.errors import DrayError

COMMAND_SECONDS = 60.0
"""A command of Slurm that takes longer counts as failed; a busy slurmctld answers within seconds."""

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
"""States of a job that Slurm does nothing more for, unless it is being requeued."""


class SlurmError(DrayError):
    """A command of Slurm failed, is missing, or did not answer in time; the message has what it said."""


@dataclass(frozen=True, slots=True)
class JobView:
    """A job as `scontrol show job` shows it.

    Attributes:
        number: the job id.
        state: Slurm's word, e.g. ``"RUNNING"``.
        reason: why it waits or has ended so, e.g. ``"Resources"``; ``"None"`` if there is none.
        exit_code: of the batch script; 0 while it runs.
        signal: that ended the batch script, or 0.
        restarts: how often it was requeued.
        nodes: Slurm's list of its nodes, e.g. ``"n[1-3]"``; ``""`` while it has none.
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
        """Whether nothing of it runs any more."""
        return self.state in ENDED_STATES

    @classmethod
    def parse(cls, line: str) -> JobView:
        """A job from the one line that ``scontrol --oneliner show job`` prints for it."""
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
    """Submit a batch script that holds its own options; returns the job's number.

    Raises:
        SlurmError: Slurm did not take it; the message says why.
    """
    printed = run_command("sbatch", "--parsable", str(script))
    return int(printed.strip().partition(";")[0])  # "number;cluster" where there are several clusters


def look(number: int) -> JobView:
    """The job as it is now.

    Raises:
        SlurmError: Slurm does not know it, or cannot be asked.
    """
    return JobView.parse(run_command("scontrol", "--oneliner", "show", "job", str(number)))


def partition_nodes(partition: str | None) -> int | None:
    """How many nodes a partition has, in whatever state they are; None if Slurm does not say.

    Args:
        partition: one name, several with commas between them for the largest, or None for the default one.
    """
    try:
        lines = run_command("sinfo", "--noheader", "--Node", "--format=%P|%N").splitlines()
    except SlurmError:  # sbatch says what is wrong
        return None
    nodes: dict[str, set[str]] = {}
    for line in lines:
        name, node = line.split("|", 1)
        nodes.setdefault(name, set()).add(node)
    wanted = [each for each in nodes if each.endswith("*")] if partition is None else partition.split(",")
    sizes = {name.rstrip("*"): len(found) for name, found in nodes.items()}
    return max((sizes[name] for each in wanted if (name := each.rstrip("*")) in sizes), default=None)


def known_jobs() -> dict[str, str]:
    """The user's jobs by number, each with its state, and the reason if it waits, e.g. ``"pending (Priority)"``.

    A job that has ended is among them for as long as Slurm remembers it (`MinJobAge`, 300 s by default).

    Raises:
        SlurmError: Slurm cannot be asked.
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
    """Whether a state of `known_jobs` is one that Slurm does nothing more for."""
    return state.upper() in ENDED_STATES


def cancel(number: int) -> None:
    """Have the job ended: SIGTERM, later SIGKILL. One that has ended already stays as it is.

    Raises:
        SlurmError: Slurm refused, or cannot be asked.
    """
    run_command("scancel", str(number))


def run_command(name: str, *arguments: str, seconds: float = COMMAND_SECONDS) -> str:
    """What a command of Slurm prints.

    Raises:
        SlurmError: it is not installed, did not end within `seconds`, or ended with an exit code other than 0.
    """
    try:
        done = subprocess.run(
            [name, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            start_new_session=True,  # Ctrl-C is for the caller to handle: a submission is not to end half-way
        )
    except FileNotFoundError:
        raise SlurmError(f"{name} is not installed here; dray slurm works where Slurm's commands do") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{name} did not end within {seconds:g} s") from None
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split())
        raise SlurmError(f"{name} failed: {said or f'exit code {done.returncode}'}")
    return done.stdout
