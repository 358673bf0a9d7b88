"""What is known about a run on Slurm: `slurm.json` in its folder, small, and read by people as well.

```
state               one of `RunState`
part, attempt       the newest; 0, 0 before anything has run
remaining_retries   attempts that may still fail; all of them again after a part that ended at its time limit
job_id              of Slurm, once the run's first part has begun
step                of the checkpoint from which the part began
began               when the newest attempt began
ends                of each attempt: part, attempt, job_id, began, ended, exit_code (none if it was lost), reason
```
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from dray.errors import ConfigError
from dray.launch.slurm.command_line import attempt_name
from dray.launch.slurm.run_states import RunEvent, RunState, after
from dray.runtime.job import JobFolder, write_json
from dray.runtime.private_file import read_own_file

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
