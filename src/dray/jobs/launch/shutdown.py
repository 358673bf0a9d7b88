"""How the processes of a job are brought to an end, and how the job has ended.

There is one deadline for all processes, and ever firmer means.

Rollout replicas get a part of the deadline (`ROLLOUT_SHARE`): should one of them be what the policy waits for, its
end leaves the policy time to write a checkpoint.

| part of the deadline | in order | interrupted |
|---|---|---|
| at once | the controller has notified them | SIGTERM |
| 40 % | SIGTERM | |
| 70 % | the stacks of all threads into the log | the same |
| 80 % | SIGKILL to the process group | the same |
"""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import assert_never

from pydantic import ValidationError

from dray.clock import MONOTONIC, Clock
from dray.errors import ConfigError
from dray.files import read_own_file
from dray.jobs.controller.state import FINISHED_OUTCOMES, final_phase
from dray.jobs.exit_codes import USER_CODES, ExitCode
from dray.jobs.folder import JobFolder
from dray.jobs.messages.models import MemberState, OutcomeReport, Phase, Status
from dray.jobs.replica.checkpoint import CheckpointState, find_checkpoint

# --- escalation --------------------------------------------------------------------------------------------------

ROLLOUT_SHARE = 0.55


class KillStage(Enum):
    """What is done to a child that is still there; each once, in this order."""

    TERMINATE = 0.4
    DUMP_STACKS = 0.7
    KILL = 0.8


class ShutdownEscalation:
    """Which means are due, as time goes by.

    Args:
        bound: seconds within which everything must have ended.
        at_once: ask at once, instead of leaving it to the controller first.
    """

    def __init__(self, bound: float, *, at_once: bool, clock: Clock = MONOTONIC) -> None:
        self._clock = clock
        self._began = clock.now()
        self._bound = bound
        self._due = {stage: stage.value * bound for stage in KillStage}
        if at_once:
            self._due[KillStage.TERMINATE] = 0.0

    def due_stages(self) -> list[KillStage]:
        """The stages whose time has come since the last call."""
        elapsed = self._clock.now() - self._began
        due = [stage for stage, at in self._due.items() if elapsed >= at]
        for stage in due:
            del self._due[stage]
        return due

    def hurry(self) -> None:
        """Kill now, unless that has been done."""
        if KillStage.KILL in self._due:
            self._due = {KillStage.KILL: 0.0}

    @property
    def seconds_to_next(self) -> float:
        """Seconds until `due_stages` has something; ``inf`` when everything was done."""
        elapsed = self._clock.now() - self._began
        return max(0.0, min(self._due.values(), default=math.inf) - elapsed)

    @property
    def has_ended(self) -> bool:
        """True when even those that were killed should long have ended."""
        return not self._due and self._clock.now() - self._began >= 2 * self._bound


# --- ending ------------------------------------------------------------------------------------------------------

# The work is finished if one of these states it, whatever signal ended a process afterwards: the status that the
# controller wrote, and the checkpoint, which the policy writes before it notifies the controller.

_LOG = logging.getLogger("dray.jobs.launch.shutdown")
TIME_LIMIT_SIGNAL = signal.SIGUSR2
"""Notifies the supervisor of a job on Slurm that the time limit is near."""


@dataclass(frozen=True, slots=True)
class Ending:
    """The job's last status with its outcome, as far as they are known, and what `dray run` reports about it."""

    status: Status | None
    exit_code: int
    reason: str

    @property
    def complete(self) -> bool:
        """Whether the status has the last figures of all replicas: the controller was there until they ended."""
        status = self.status
        return (
            status is not None
            and status.phase.is_final
            and all(member.state is not MemberState.ACTIVE for member in status.members)
        )


def recorded_status(folder: JobFolder) -> Status | None:
    """What the controller wrote when the outcome was decided, and again when the phase was final."""
    try:
        return Status.model_validate_json(read_own_file(folder.outcome, "the outcome"))
    except FileNotFoundError:
        return None
    except (ConfigError, ValidationError) as error:
        _LOG.error("the controller's last status cannot be used: %s", error)
        return None


def newest_status(*statuses: Status | None) -> Status | None:
    """The one of a job's statuses that was made last, if there is any."""
    return max((each for each in statuses if each is not None), key=lambda each: each.seconds, default=None)


def finished_checkpoint(folder: JobFolder) -> CheckpointState | None:
    """The state of the job's checkpoint if according to that the work is finished."""
    try:
        found = find_checkpoint(folder.checkpoint)
    except ConfigError as error:
        _LOG.error("%s", error)
        return None
    return found[1] if found is not None and found[1].outcome in ("solved", "finished") else None


def ending(
    job: str,
    status: Status | None,
    checkpoint: CheckpointState | None,
    signals: Sequence[signal.Signals],
    failure: str,
    *,
    controller_request: str = "",
    on_slurm: bool = False,
) -> Ending:
    """How the job ended.

    Args:
        status: the newest there is.
        checkpoint: of a finished job, if there is one.
        signals: that the supervisor was sent.
        failure: what it saw go wrong.
        controller_request: why the supervisor asked a controller without an outcome to end, if it did.
        on_slurm: whether the job is one of Slurm.
    """
    outcome = None if status is None else status.outcome
    asked = bool(controller_request) and not signals
    if status is not None and outcome is not None and outcome.kind == "interrupted" and asked:
        # That the controller "received SIGTERM" is what the supervisor did, and no reason.
        outcome = OutcomeReport(kind="failed", reason=controller_request)
        status = status.model_copy(update={"outcome": outcome, "phase": Phase.FAILED})
    if checkpoint is not None and (outcome is None or outcome.kind not in FINISHED_OUTCOMES):
        reason = f"{checkpoint.outcome} at step {checkpoint.step} (according to the checkpoint)"
        outcome = OutcomeReport.model_validate({"kind": checkpoint.outcome, "reason": reason})
        known = status or Status(
            job=job, phase=Phase.DRAINING, seconds=0.0, outcome=None, members=[], work_items={}
        )
        phase = final_phase(outcome.kind) if known.phase.is_final else known.phase
        status = known.model_copy(update={"outcome": outcome, "phase": phase})
    if signals and (outcome is None or outcome.kind not in FINISHED_OUTCOMES):
        return Ending(status, 128 + signals[0], reason_of(signals[0], on_slurm=on_slurm))
    if outcome is None:
        return Ending(status, ExitCode.FAILED, failure or "the job ended without an outcome")
    return Ending(status, _exit_code_of(outcome), outcome.reason)


def reason_of(number: signal.Signals, *, on_slurm: bool) -> str:
    """Why a job ends that was sent this signal."""
    limit = on_slurm and number == TIME_LIMIT_SIGNAL
    return "the time limit is near" if limit else f"interrupted by {number.name}"


def stopped_early(
    folder: JobFolder | None, signals: Sequence[signal.Signals], show_line: Callable[[str], None]
) -> int:
    """Show in one line how a job ended that a signal stopped before it was started; returns the exit code.

    Args:
        folder: None if there is none yet.
    """
    on_slurm = folder is not None and folder.attempt is not None
    checkpoint = None if folder is None else finished_checkpoint(folder)
    found = ending("", None, checkpoint, signals, "", on_slurm=on_slurm)
    show_line(f"stopped: {found.reason} before anything was started")
    return found.exit_code


def _exit_code_of(outcome: OutcomeReport) -> ExitCode:
    """The exit code of a job that came to `outcome`, unless a signal ended it."""
    match outcome.kind:
        case "solved" | "finished":
            return ExitCode.OK
        case "max_steps" | "interrupted":
            return ExitCode.FAILED
        case "failed":
            return ExitCode(outcome.cause) if outcome.cause in USER_CODES else ExitCode.FAILED
        case _:
            assert_never(outcome.kind)
