"""The state of a run on Slurm, its record in the folder, and the commands by which the batch script changes it.

``begin PLAN`` prints ``start PART ATTEMPT``, or ``done``, ``failed`` or ``cancelled`` if nothing is to be run.
``end PLAN --exit-code N`` prints ``again`` (another attempt in this job), ``requeue``, ``done``, ``failed`` or
``cancelled``.

A run consists of parts, and a part of attempts. A part ends with the allocation: at the time limit, or because a
node was lost or Slurm revoked the nodes. An attempt ends when its processes end; a failed one is retried.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Final

from dray.errors import ConfigError, DrayError, error_lines
from dray.files import open_own_folder, read_own_file, write_json
from dray.jobs.exit_codes import COMES_AGAIN, ExitCode, meaning
from dray.jobs.folder import JobFolder
from dray.jobs.launch.output import KEY, attempt_folder, lock_folder
from dray.jobs.launch.shutdown import finished_checkpoint
from dray.jobs.replica.checkpoint import find_checkpoint
from dray.jobs.slurm.plan import Plan, attempt_name

# --- states ------------------------------------------------------------------------------------------------------


class RunState(StrEnum):
    """The state of a run."""

    SUBMITTED = "submitted"  # Slurm has a job for it, or will soon have; nothing has run
    RUNNING = "running"  # an attempt is running, or ended without recording its end
    RETRYING = "retrying"  # an attempt has failed; the next begins in the same allocation
    REQUEUED = "requeued"  # waits for Slurm to allocate nodes for the next part
    FINISHED = "finished"  # solved, or all steps done; never runs again
    FAILED = "failed"  # no retries are left
    CANCELLED = "cancelled"  # by its user, or Slurm revoked the nodes

    @property
    def is_final(self) -> bool:
        """Whether the run stays in this state unless it is submitted again or Slurm requeues its job."""
        return self in (RunState.FINISHED, RunState.FAILED, RunState.CANCELLED)


class RunEvent(StrEnum):
    """What changes the state of a run."""

    BEGIN = "begin"  # the batch script starts an attempt
    FINISH = "finish"  # the work is done, according to the head's exit code or the checkpoint
    TIME_LIMIT = "time limit"  # the attempt ended with a new checkpoint shortly before the limit
    FAIL = "fail"  # any other end, if a retry and all nodes are left
    REQUEUE = "requeue"  # any other end, if a retry is left and a node was lost or the limit reached
    GIVE_UP = "give up"  # any other end, if no retry is left or a retry would end in the same way
    CANCEL = "cancel"  # scancel
    RESUME = "resume"  # submitted again, with all retries


_BETWEEN_ATTEMPTS: Final[Mapping[RunEvent, RunState]] = MappingProxyType(
    {
        RunEvent.BEGIN: RunState.RUNNING,
        RunEvent.FINISH: RunState.FINISHED,
        RunEvent.CANCEL: RunState.CANCELLED,
        RunEvent.RESUME: RunState.SUBMITTED,
    }
)

TRANSITIONS: Final[Mapping[RunState, Mapping[RunEvent, RunState]]] = MappingProxyType(
    {
        RunState.SUBMITTED: _BETWEEN_ATTEMPTS,
        RunState.RUNNING: MappingProxyType(
            {
                RunEvent.FINISH: RunState.FINISHED,
                RunEvent.TIME_LIMIT: RunState.REQUEUED,
                RunEvent.FAIL: RunState.RETRYING,
                RunEvent.REQUEUE: RunState.REQUEUED,
                RunEvent.GIVE_UP: RunState.FAILED,
                RunEvent.CANCEL: RunState.CANCELLED,
            }
        ),
        RunState.RETRYING: _BETWEEN_ATTEMPTS,
        RunState.REQUEUED: _BETWEEN_ATTEMPTS,
        RunState.FINISHED: MappingProxyType({}),
        RunState.FAILED: MappingProxyType({RunEvent.RESUME: RunState.SUBMITTED}),
        # Slurm restarts a cancelled job only after preemption, which a job cannot distinguish from scancel.
        RunState.CANCELLED: MappingProxyType(
            {
                RunEvent.BEGIN: RunState.RUNNING,
                RunEvent.FINISH: RunState.FINISHED,
                RunEvent.RESUME: RunState.SUBMITTED,
            }
        ),
    }
)


class IllegalRunTransition(RuntimeError):
    """An event occurred in a state that has no transition for it; the state is unchanged."""


def after(state: RunState, event: RunEvent) -> RunState:
    """The state after an event.

    Raises:
        IllegalRunTransition: `state` has no transition for `event`.
    """
    following = TRANSITIONS[state].get(event)
    if following is None:
        raise IllegalRunTransition(f"{event.value!r} in state {state.value!r}")
    return following


def event_of_end(
    exit_code: int, *, finished: bool, signal: str, nodes_lost: bool, progressed: bool, remaining_retries: int
) -> RunEvent:
    """The event that the end of an attempt is for the run.

    Args:
        exit_code: exit code of the head process, as the shell reports it.
        finished: according to the checkpoint, the work is done, whatever failed afterwards.
        signal: the signal that the batch script received: ``"TERM"``, ``"USR1"`` or empty.
        nodes_lost: the job no longer has all its nodes.
        progressed: the checkpoint is of a later step than the one from which the part began. A part without
            progress counts as failed, because the next one would make none either.
    """
    if finished or exit_code == ExitCode.OK:
        return RunEvent.FINISH
    if signal == "TERM":
        return RunEvent.CANCEL
    if exit_code == ExitCode.TIME_LIMIT and progressed:
        return RunEvent.TIME_LIMIT
    if remaining_retries == 0 or exit_code in COMES_AGAIN:
        return RunEvent.GIVE_UP
    ends_part = nodes_lost or signal == "USR1" or exit_code == ExitCode.TIME_LIMIT
    return RunEvent.REQUEUE if ends_part else RunEvent.FAIL


# --- record ------------------------------------------------------------------------------------------------------

FILE_NAME = "slurm.json"
_NEW_PART = frozenset((RunState.SUBMITTED, RunState.REQUEUED, RunState.CANCELLED))


@dataclass(frozen=True, slots=True)
class AttemptEnd:
    """How one attempt ended; `exit_code` is None if it was lost."""

    part: int
    attempt: int
    job_id: str
    began: str
    ended: str
    exit_code: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The content of `slurm.json`, immutable: methods that change it return a new record.

    Attributes:
        remaining_retries: attempts that may still fail; reset after a part that ended at its time limit.
        part, attempt: the newest; 0, 0 before the first.
        job_id: Slurm's number of the job, once the first part has begun.
        step: step of the checkpoint from which the part began.
        began: when the newest attempt began.
    """

    state: RunState
    remaining_retries: int
    part: int = 0
    attempt: int = 0
    job_id: str = ""
    step: int = 0
    began: str = ""
    ends: Sequence[AttemptEnd] = ()

    @classmethod
    def read(cls, run_folder: Path) -> RunRecord:
        """The record in a run's folder.

        Raises:
            ConfigError: there is none, or it is damaged.
        """
        path = run_folder / FILE_NAME
        try:
            document = json.loads(read_own_file(path, FILE_NAME))
            ends = tuple(AttemptEnd(**end) for end in document["ends"])
            return cls(**{**document, "state": RunState(document["state"]), "ends": ends})
        except FileNotFoundError as error:
            allowed, problem = "must be the folder of a submitted run", f"{run_folder} cannot be used"
            raise ConfigError("run folder", str(run_folder), allowed, problem) from error
        except ConfigError:
            raise
        except (ValueError, TypeError, KeyError) as error:
            allowed, problem = f"must be a record of this version ({error})", f"at {path} cannot be used"
            raise ConfigError(FILE_NAME, str(path), allowed, problem) from error

    def write(self, run_folder: Path) -> None:
        """Replace the record in the run's folder atomically."""
        write_json(run_folder / FILE_NAME, asdict(self))

    def folder(self, run_folder: Path) -> JobFolder:
        """The run's folder, with the logs of the newest attempt."""
        return JobFolder(run_folder, attempt_name(self.part, self.attempt) if self.part else None)

    def begin(self, job_id: str, step: int) -> RunRecord:
        """The record after the start of an attempt in the Slurm job `job_id`, from a checkpoint of `step`."""
        new_part = self.state in _NEW_PART
        return replace(
            self,
            state=after(self.state, RunEvent.BEGIN),
            part=self.part + 1 if new_part else self.part,
            attempt=1 if new_part else self.attempt + 1,
            job_id=job_id,
            step=step if new_part else self.step,
            began=_now(),
        )

    def end(self, event: RunEvent, exit_code: int | None, reason: str) -> RunRecord:
        """The record after the newest attempt ended by `event`."""
        used = event in (RunEvent.FAIL, RunEvent.REQUEUE)
        ending = AttemptEnd(self.part, self.attempt, self.job_id, self.began, _now(), exit_code, reason)
        return replace(
            self,
            state=after(self.state, event),
            remaining_retries=self.remaining_retries - used,
            ends=(*self.ends, ending),
        )

    def apply(self, event: RunEvent) -> RunRecord:
        """The record after an event between two attempts."""
        return replace(self, state=after(self.state, event))


def read_stopped_run(root: Path) -> RunRecord:
    """The record of a run that has no process; if the end of its last attempt is missing, it is added.

    It is missing if the node of the batch script was lost or the job was killed.
    """
    record = RunRecord.read(root)
    finished = finished_checkpoint(JobFolder(root)) is not None
    if record.state is not RunState.RUNNING:
        can_finish = finished and RunEvent.FINISH in TRANSITIONS[record.state]
        return record.apply(RunEvent.FINISH) if can_finish else record
    if finished:
        return record.end(RunEvent.FINISH, None, "finished (according to the checkpoint)")
    if cancel_marker(root).exists():
        return record.end(RunEvent.CANCEL, None, "cancelled")
    event = RunEvent.REQUEUE if record.remaining_retries else RunEvent.GIVE_UP
    return record.end(event, None, "lost: its node or its job ended before it could record its end")


def cancel_marker(run_folder: Path) -> Path:
    """The empty file that the batch script creates first of all when it receives SIGTERM."""
    return run_folder / ".slurm" / "cancelled"


def refuse_folder_in_use(root: Path, timeout: float = 0.0) -> None:
    """Wait at most `timeout` seconds until no head process has locked the folder (`open_output`).

    Raises:
        ConfigError: a head process still uses the folder, or another user may write to it.
    """
    descriptor = open_own_folder(root, KEY)
    try:
        lock_folder(descriptor, root, timeout)
    finally:
        os.close(descriptor)


def _now() -> str:
    """The present time in UTC, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


# --- commands of the batch script --------------------------------------------------------------------------------

LOCK_TIMEOUT = 120.0
"""Seconds to wait for the folder's lock, which a file system may keep after its node was lost."""

_ANSWERS = {
    RunState.RETRYING: "again",
    RunState.REQUEUED: "requeue",
    RunState.FINISHED: "done",
    RunState.FAILED: "failed",
    RunState.CANCELLED: "cancelled",
}


def begin(plan: Plan, job_id: str) -> str:
    """Record the start of an attempt, if one is to be run; returns the line for the batch script.

    Raises:
        ConfigError: another job is running this run.
    """
    root = plan.run_folder
    refuse_folder_in_use(root, LOCK_TIMEOUT)
    record = read_stopped_run(root)
    continues = not record.state.is_final or (record.state is RunState.CANCELLED and record.job_id == job_id)
    if not continues:
        record.write(root)
        return _ANSWERS[record.state]
    cancel_marker(root).unlink(missing_ok=True)
    record = record.begin(job_id, _checkpoint_step(root))
    attempt_folder(record.folder(root))
    record.write(root)
    return f"start {record.part} {record.attempt}"


def end(plan: Plan, exit_code: int, *, signal: str = "", nodes_lost: bool = False) -> str:
    """Record the end of the attempt; returns the word for the batch script. Arguments: see `event_of_end`."""
    root = plan.run_folder
    record = RunRecord.read(root)
    if record.state.is_final:  # cancelled after the run had ended
        return _ANSWERS[record.state]
    if record.state is not RunState.RUNNING:  # cancelled between two attempts
        record = record.apply(RunEvent.CANCEL)
    else:
        step = _checkpoint_step(root)
        event = event_of_end(
            exit_code,
            finished=finished_checkpoint(JobFolder(root)) is not None,
            signal=signal,
            nodes_lost=nodes_lost,
            progressed=step > record.step,
            # If all steps are done and the job is not solved, another attempt would have nothing to do.
            remaining_retries=record.remaining_retries if step < plan.config.job.max_steps else 0,
        )
        record = record.end(event, exit_code, _reason(root, record, event, exit_code))
        if event is RunEvent.TIME_LIMIT:
            record = replace(record, remaining_retries=plan.table.retries)
    record.write(root)
    return _ANSWERS[record.state]


def _checkpoint_step(root: Path) -> int:
    """The step of the newest checkpoint; 0 without one."""
    found = find_checkpoint(JobFolder(root).checkpoint)
    return 0 if found is None else found[1].step


def _reason(root: Path, record: RunRecord, event: RunEvent, exit_code: int) -> str:
    """Why the attempt ended, for users: the reason that the head process wrote, if it wrote one."""
    if event is RunEvent.CANCEL:
        return "cancelled"
    if event is RunEvent.TIME_LIMIT:
        return "time limit near"
    folder = record.folder(root)
    summary, place = folder.summary, folder.logs.parent
    if summary.exists() and summary.stat().st_mtime >= place.stat().st_mtime:
        return str(json.loads(read_own_file(summary, KEY))["exit_reason"])
    status = 128 - exit_code if exit_code > 128 else exit_code
    return f"head process: {meaning(status)}; see {place.relative_to(root)}/logs/head.out"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the two commands; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m dray.jobs.slurm.run_state", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    to_begin, to_end = commands.add_parser("begin"), commands.add_parser("end")
    for command in (to_begin, to_end):
        command.add_argument("plan", type=Path)
    to_begin.add_argument("--job-id", required=True)
    to_end.add_argument("--exit-code", type=int, required=True)
    to_end.add_argument("--signal", default="", choices=["", "TERM", "USR1"])
    to_end.add_argument("--nodes-lost", action="store_true")
    given = parser.parse_args(arguments)
    try:
        plan = Plan.read(given.plan)
        if given.command == "begin":
            print(begin(plan, given.job_id))
        else:
            print(end(plan, given.exit_code, signal=given.signal, nodes_lost=given.nodes_lost))
    except DrayError as error:
        print(*error_lines(error), sep="\n", file=sys.stderr)
        return ExitCode.CONFIGURATION
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
