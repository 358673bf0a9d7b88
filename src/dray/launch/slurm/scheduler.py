"""Slurm's commands for one job: submit it, look at it, cancel it. Each is bounded."""

from __future__ import annotations

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
