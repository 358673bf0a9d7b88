"""The states of a run on Slurm, and the record of a run in its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Final

from dray.errors import ConfigError
from dray.jobs.exit_codes import COMES_AGAIN, ExitCode
from dray.jobs.files import read_own_file, write_json
from dray.jobs.folder import JobFolder
from dray.jobs.slurm.plan import attempt_name

# --- run states --------------------------------------------------------------------------------------------------

# A run consists of parts, and a part of attempts. A part ends with the allocation: at the time limit, or because a
# node was lost or Slurm revoked the nodes. An attempt ends when its processes end; a failed one is retried.


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


TRANSITIONS: Final[Mapping[RunState, Mapping[RunEvent, RunState]]] = MappingProxyType(
    {
        RunState.SUBMITTED: MappingProxyType(
            {
                RunEvent.BEGIN: RunState.RUNNING,
                RunEvent.FINISH: RunState.FINISHED,
                RunEvent.CANCEL: RunState.CANCELLED,
                RunEvent.RESUME: RunState.SUBMITTED,
            }
        ),
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
        RunState.RETRYING: MappingProxyType(
            {
                RunEvent.BEGIN: RunState.RUNNING,
                RunEvent.FINISH: RunState.FINISHED,
                RunEvent.CANCEL: RunState.CANCELLED,
                RunEvent.RESUME: RunState.SUBMITTED,
            }
        ),
        RunState.REQUEUED: MappingProxyType(
            {
                RunEvent.BEGIN: RunState.RUNNING,
                RunEvent.FINISH: RunState.FINISHED,
                RunEvent.CANCEL: RunState.CANCELLED,
                RunEvent.RESUME: RunState.SUBMITTED,
            }
        ),
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
    exit_code: int,
    *,
    finished: bool,
    signal: str,
    nodes_lost: bool,
    progressed: bool,
    remaining_retries: int,
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
    return (
        RunEvent.REQUEUE if nodes_lost or signal == "USR1" or exit_code == ExitCode.TIME_LIMIT else RunEvent.FAIL
    )


def diagram() -> str:
    """`TRANSITIONS` as a mermaid state diagram."""
    lines = ["stateDiagram-v2", f"    [*] --> {RunState.SUBMITTED.name}: submit"]
    for state, events in TRANSITIONS.items():
        following: dict[RunState, list[str]] = {}
        for event, target in events.items():
            following.setdefault(target, []).append(event.value)
        lines += [f"    {state.name} --> {target.name}: {', '.join(each)}" for target, each in following.items()]
    lines += [f"    {state.name} --> [*]" for state in RunState if state.is_final]
    return "\n".join(lines)


# --- run record --------------------------------------------------------------------------------------------------

# `slurm.json` in the folder of a run:
#
# ```
# state               one of `RunState`
# part, attempt       the newest; 0, 0 before the first
# remaining_retries   attempts that may still fail; reset after a part that ended at its time limit
# job_id              Slurm's number of the job, once the first part has begun
# step                step of the checkpoint from which the part began
# began               when the newest attempt began
# ends                of each attempt: part, attempt, job_id, began, ended, exit_code (none if it was lost), reason
# ```

FILE_NAME = "slurm.json"
_NEW_PART = frozenset((RunState.SUBMITTED, RunState.REQUEUED, RunState.CANCELLED))


@dataclass(frozen=True, slots=True)
class AttemptEnd:
    """How one attempt ended."""

    part: int
    attempt: int
    job_id: str
    began: str
    ended: str
    exit_code: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The content of `slurm.json`, immutable: methods that change it return a new record."""

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
            began=now(),
        )

    def end(self, event: RunEvent, retries: int, exit_code: int | None, reason: str) -> RunRecord:
        """The record after the newest attempt ended by `event`; a time limit resets the retries to `retries`."""
        used = event in (RunEvent.FAIL, RunEvent.REQUEUE)
        ending = AttemptEnd(self.part, self.attempt, self.job_id, self.began, now(), exit_code, reason)
        return replace(
            self,
            state=after(self.state, event),
            remaining_retries=retries if event is RunEvent.TIME_LIMIT else self.remaining_retries - used,
            ends=(*self.ends, ending),
        )

    def apply(self, event: RunEvent) -> RunRecord:
        """The record after an event between two attempts."""
        return replace(self, state=after(self.state, event))

    def resume(self, retries: int) -> RunRecord:
        """The record after another submission of the run."""
        return replace(self, state=after(self.state, RunEvent.RESUME), remaining_retries=retries)


def now() -> str:
    """The present time in UTC, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
