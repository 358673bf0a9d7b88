"""The phases of a job and every transition between them. No I/O and no clock.

```
            QUORUM              STOP                LAST_LEFT_FINISHED
  STARTING ─────────► RUNNING ────────► DRAINING ─┬───────────────────────► DONE
      │                                   ▲       │ LAST_LEFT_INTERRUPTED
      │                                   │       ├───────────────────────► INTERRUPTED
      │                                   │       │ LAST_LEFT_FAILED
      └───────────────────────────────────┘       └───────────────────────► FAILED
                      STOP
```
"""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    """Where a job stands."""

    STARTING = "starting"  # not every kind of replica has registered
    RUNNING = "running"
    DRAINING = "draining"  # no new work; replicas finish what is in flight and leave
    DONE = "done"  # every member has left; the job was solved, or all its steps are done
    INTERRUPTED = "interrupted"  # every member has left, because a signal ended the job
    FAILED = "failed"  # every member has left; the job could not go on, or was not solved within its steps

    @property
    def is_final(self) -> bool:
        return self in (Phase.DONE, Phase.INTERRUPTED, Phase.FAILED)

    @property
    def gives_work(self) -> bool:
        return self in (Phase.STARTING, Phase.RUNNING)


class JobEvent(StrEnum):
    """What moves a job from one phase to another."""

    QUORUM = "quorum"  # a replica of every kind that the job needs has registered
    STOP = "stop"  # finished, interrupted, or unable to go on
    LAST_LEFT_FINISHED = "last left, finished"
    LAST_LEFT_INTERRUPTED = "last left, interrupted"
    LAST_LEFT_FAILED = "last left, failed"


TRANSITIONS: dict[tuple[Phase, JobEvent], Phase] = {
    (Phase.STARTING, JobEvent.QUORUM): Phase.RUNNING,
    (Phase.STARTING, JobEvent.STOP): Phase.DRAINING,
    (Phase.RUNNING, JobEvent.STOP): Phase.DRAINING,
    (Phase.DRAINING, JobEvent.LAST_LEFT_FINISHED): Phase.DONE,
    (Phase.DRAINING, JobEvent.LAST_LEFT_INTERRUPTED): Phase.INTERRUPTED,
    (Phase.DRAINING, JobEvent.LAST_LEFT_FAILED): Phase.FAILED,
}


class IllegalTransition(RuntimeError):
    """An event came in a phase that has no transition for it; the phase is unchanged."""


class Lifecycle:
    """The phase of one job."""

    def __init__(self) -> None:
        self.phase = Phase.STARTING

    def apply(self, event: JobEvent) -> Phase:
        """Move on by `event` and return the new phase; an illegal event raises and changes nothing."""
        following = TRANSITIONS.get((self.phase, event))
        if following is None:
            raise IllegalTransition(f"{event.value!r} in phase {self.phase.value!r}")
        self.phase = following
        return following

    def __repr__(self) -> str:
        return f"<Lifecycle {self.phase.value}>"
