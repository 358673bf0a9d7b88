"""The states of a run on Slurm, and the record of them in its folder."""

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

# The states of a run on Slurm, and the table of what may happen in each. No I/O and no clock.
#
# A run consists of parts, and a part of attempts. A part ends with the allocation: at the time limit, or because a
# node was lost or Slurm took the nodes away. An attempt ends when its processes do; one that fails is made again.
# `TRANSITIONS` is the whole truth, and `diagram` draws it.


class RunState(StrEnum):
    """Where a run stands."""

    SUBMITTED = "submitted"  # Slurm has a job for it, or soon will; nothing has run
    RUNNING = "running"  # an attempt runs, or was cut off without a word
    RETRYING = "retrying"  # an attempt has failed; the next one begins in the same allocation
    REQUEUED = "requeued"  # waits for Slurm to allocate nodes for the next part
    FINISHED = "finished"  # solved, or all steps done; never run again
    FAILED = "failed"  # out of retries
    CANCELLED = "cancelled"  # by its user, or the nodes were taken away

    @property
    def is_final(self) -> bool:
        """Whether nothing more happens unless somebody asks for it."""
        return self in (RunState.FINISHED, RunState.FAILED, RunState.CANCELLED)


class RunEvent(StrEnum):
    """What moves a run from one state to another."""

    BEGIN = "begin"  # the batch script runs, and starts an attempt
    FINISH = "finish"  # the work is done, says the head's exit code or the checkpoint
    TIME_LIMIT = "time limit"  # ended in order, with a checkpoint, shortly before the limit
    FAIL = "fail"  # any other end, with a retry and all nodes left
    MOVE = "move"  # any other end, with a retry left; a node is gone, or the time is over
    GIVE_UP = "give up"  # any other end, without a retry left, or one that would come again
    CANCEL = "cancel"  # scancel
    RESUME = "resume"  # submitted again, with fresh retries


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
                RunEvent.MOVE: RunState.REQUEUED,
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
        # Slurm starts a cancelled job again only if it took the nodes away itself: preemption looks like scancel.
        RunState.CANCELLED: MappingProxyType(
            {
                RunEvent.BEGIN: RunState.RUNNING,
                RunEvent.FINISH: RunState.FINISHED,
                RunEvent.RESUME: RunState.SUBMITTED,
            }
        ),
    }
)


class IllegalTransition(RuntimeError):
    """An event came in a state that has no transition for it; the state is unchanged."""


def after(state: RunState, event: RunEvent) -> RunState:
    """The state that follows; an illegal event raises."""
    following = TRANSITIONS[state].get(event)
    if following is None:
        raise IllegalTransition(f"{event.value!r} in state {state.value!r}")
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
    """What the end of an attempt means for the run.

    Args:
        exit_code: of the head, as a shell sees it.
        finished: the checkpoint says that the work is done, which stands whoever was killed afterwards.
        signal: ``"TERM"`` or ``"USR1"`` if the batch script was sent that, else empty.
        nodes_lost: the allocation no longer has all its nodes.
        progressed: the checkpoint is of a later step than when the part began. A part that came no further would
            not do so the next time either: it counts as failed.
    """
    if finished or exit_code == ExitCode.OK:
        return RunEvent.FINISH
    if signal == "TERM":
        return RunEvent.CANCEL
    if exit_code == ExitCode.TIME_LIMIT and progressed:
        return RunEvent.TIME_LIMIT
    if remaining_retries == 0 or exit_code in COMES_AGAIN:
        return RunEvent.GIVE_UP
    return RunEvent.MOVE if nodes_lost or signal == "USR1" or exit_code == ExitCode.TIME_LIMIT else RunEvent.FAIL


def diagram() -> str:
    """The table as a mermaid state diagram."""
    lines = ["stateDiagram-v2", f"    [*] --> {RunState.SUBMITTED.name}: submit"]
    for state, events in TRANSITIONS.items():
        following: dict[RunState, list[str]] = {}
        for event, target in events.items():
            following.setdefault(target, []).append(event.value)
        lines += [f"    {state.name} --> {target.name}: {', '.join(each)}" for target, each in following.items()]
    lines += [f"    {state.name} --> [*]" for state in RunState if state.is_final]
    return "\n".join(lines)


# --- run record --------------------------------------------------------------------------------------------------

# What is known about a run on Slurm: `slurm.json` in its folder, small, and read by people as well.
#
# ```
# state               one of `RunState`
# part, attempt       the newest; 0, 0 before anything has run
# remaining_retries   attempts that may still fail; all of them again after a part that ended at its time limit
# job_id              of Slurm, once the run's first part has begun
# step                of the checkpoint from which the part began
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
    """See the module. Every method returns another record."""

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
        """Read what `write` wrote.

        Raises:
            ConfigError: it is not there, or damaged.
        """
        path = run_folder / FILE_NAME
        try:
            document = json.loads(read_own_file(path, FILE_NAME))
            ends = tuple(AttemptEnd(**end) for end in document["ends"])
            return cls(**{**document, "state": RunState(document["state"]), "ends": ends})
        except FileNotFoundError as error:
            allowed, problem = "must be that of a run that was submitted", f"{run_folder} cannot be used"
            raise ConfigError("run folder", str(run_folder), allowed, problem) from error
        except ConfigError:
            raise
        except (ValueError, TypeError, KeyError) as error:
            allowed, problem = f"must be a record of this version ({error})", f"at {path} cannot be used"
            raise ConfigError(FILE_NAME, str(path), allowed, problem) from error

    def write(self, run_folder: Path) -> None:
        """Write to the run's folder, whole or not at all."""
        write_json(run_folder / FILE_NAME, asdict(self))

    def folder(self, run_folder: Path) -> JobFolder:
        """The run's folder, with the logs of the newest attempt."""
        return JobFolder(run_folder, attempt_name(self.part, self.attempt) if self.part else None)

    def begin(self, job_id: str, step: int) -> RunRecord:
        """An attempt begins in the Slurm job `job_id`, from a checkpoint of `step`."""
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
        """The newest attempt has ended by `event`; of `retries` there are all again if a part ended in order."""
        used = event in (RunEvent.FAIL, RunEvent.MOVE)
        ending = AttemptEnd(self.part, self.attempt, self.job_id, self.began, now(), exit_code, reason)
        return replace(
            self,
            state=after(self.state, event),
            remaining_retries=retries if event is RunEvent.TIME_LIMIT else self.remaining_retries - used,
            ends=(*self.ends, ending),
        )

    def move(self, event: RunEvent) -> RunRecord:
        """Something has happened between attempts."""
        return replace(self, state=after(self.state, event))

    def resume(self, retries: int) -> RunRecord:
        """The run is submitted again."""
        return replace(self, state=after(self.state, RunEvent.RESUME), remaining_retries=retries)


def now() -> str:
    """The time of day, as ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
