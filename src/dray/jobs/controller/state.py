"""Who takes part in a job, and what that means for its phase: a state machine without I/O.

Every method is an event; it changes the state, and leaves lines in `notices`, which the controller logs.

The phases of a job and every transition between them:

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

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from dray.clock import MONOTONIC, Clock
from dray.jobs.config import MAX_ROLLOUT_REPLICAS
from dray.jobs.controller.work_queue import WorkQueue
from dray.jobs.exit_codes import COMES_AGAIN, NOT_RESTARTED, USER_CODES, ExitCode
from dray.jobs.messages.models import (
    FailedAttempt,
    MembershipError,
    MemberState,
    OutcomeKind,
    OutcomeReport,
    Phase,
    ProgressReport,
    Role,
)

# --- phases ------------------------------------------------------------------------------------------------------


class JobEvent(StrEnum):
    """What moves a job from one phase to another; in a phase that has no transition for it, it is a KeyError."""

    QUORUM = "quorum"  # a replica of every kind that the job needs has registered
    STOP = "stop"  # finished, interrupted, or unable to continue
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


FINISHED_OUTCOMES: frozenset[OutcomeKind] = frozenset(("solved", "finished", "max_steps"))
"""The work is at its end: these stand, whatever happens afterwards."""

LAST_LEFT: dict[OutcomeKind, JobEvent] = {
    "solved": JobEvent.LAST_LEFT_FINISHED,
    "finished": JobEvent.LAST_LEFT_FINISHED,
    "max_steps": JobEvent.LAST_LEFT_FAILED,
    "interrupted": JobEvent.LAST_LEFT_INTERRUPTED,
    "failed": JobEvent.LAST_LEFT_FAILED,
}
"""What it means, by outcome, that the last member has left."""

THE_JOB_HAS: dict[OutcomeKind, str] = {
    "solved": "been solved",
    "finished": "finished",
    "max_steps": "used up its steps",
    "interrupted": "been interrupted",
    "failed": "failed",
}
"""What completes "the job has …", by outcome."""

FIRST_POLICY = "policy-0"
"""The policy replica that leads its group."""


def final_phase(kind: OutcomeKind) -> Phase:
    """The phase in which a job with this outcome ends."""
    return TRANSITIONS[Phase.DRAINING, LAST_LEFT[kind]]


# --- members -----------------------------------------------------------------------------------------------------

_NO_REPORT = ProgressReport(doing="starting", seconds=0.0)


@dataclass(slots=True)
class Member:
    """One process of a replica. A restarted replica has the same name and another incarnation.

    `last_seen` is when its supervisor last knew that its process ran. Once it takes part no more, `reason` is the
    cause, `exit_code` that of its process if it is known, and `ended` the time.
    """

    name: str
    role: Role
    incarnation: str
    pid: int
    last_request: float
    last_seen: float = -math.inf
    state: MemberState = MemberState.ACTIVE
    reason: str = ""
    exit_code: int | None = None
    ended: float = 0.0
    progress: ProgressReport = _NO_REPORT


class Membership:
    """The members of one job, its phase and its outcome.

    Args:
        expected: how many replicas of each role the job starts.
        dead_after: seconds after which a member counts as dead that is silent and not seen to run.
        start_timeout: seconds within which the replicas must have registered, restarted ones as well.
        restartable: whether the supervisor starts the policy group again when one of it has died; then the job
            continues until `died` reports its end, or one has left with what comes again.
        rollout_restarts: how often the supervisor starts each rollout replica of the job again.
        max_failures: work items given up in a row after which the job fails.
    """

    def __init__(
        self,
        expected: Mapping[Role, int],
        work_items: WorkQueue,
        *,
        dead_after: float,
        start_timeout: float,
        restartable: bool = False,
        rollout_restarts: int = 0,
        max_failures: int = 16,
        clock: Clock = MONOTONIC,
    ) -> None:
        self._started = dict(expected)
        self._expected = dict(expected)
        self._dead_after = dead_after
        self._clock = clock
        self._start_bound: float | None = clock.now() + start_timeout
        self._start_timeout = start_timeout
        self._restartable = restartable
        self._restart_bound: float | None = None
        rollouts = range(expected.get(Role.ROLLOUT, 0))
        self._rollout_restarts = {f"{Role.ROLLOUT.value}-{index}": rollout_restarts for index in rollouts}
        self._returning: dict[str, float] = {}
        self._max_failures = max_failures
        self.phase = Phase.STARTING
        self.work_items = work_items
        self.members: dict[str, Member] = {}
        self.outcome: OutcomeReport | None = None
        self.notices: list[str] = []

    def active(self, role: Role | None = None) -> list[Member]:
        """The members that take part, of `role` or of all."""
        return [
            member
            for member in self.members.values()
            if member.state is MemberState.ACTIVE and role in (None, member.role)
        ]

    def missing(self) -> list[str]:
        """The names of the replicas that the job starts and that have never been members."""
        return [
            name
            for role, count in self._expected.items()
            for name in (f"{role.value}-{index}" for index in range(count))
            if name not in self.members
        ]

    def register(self, name: str, role: Role, incarnation: str, pid: int) -> None:
        """A replica has started. Registering again with the same incarnation changes nothing.

        Raises:
            MembershipError: the job takes no new members any more, or has no replica of this name and role.
        """
        self._check_name(name, role)
        known = self.members.get(name)
        if known is not None and known.incarnation == incarnation:
            self._require(name, incarnation)
            return
        if not self.phase.gives_work:
            assert self.outcome is not None
            raise MembershipError(
                f"the job has {THE_JOB_HAS[self.outcome.kind]} and takes no new members: {self.outcome.reason}"
            )
        if known is not None and known.state is MemberState.ACTIVE:
            self._end(known, MemberState.DEAD, "replaced by a new start of the same replica")
        self._returning.pop(name, None)
        self.members[name] = Member(name, role, incarnation, pid, self._clock.now())
        self.notices.append(f"{name} registered (pid {pid})")
        if len(self.active(Role.POLICY)) >= self._expected.get(Role.POLICY, 0):
            self._restart_bound = None
        if self.phase is Phase.STARTING and all(self.active(each) for each in self._expected):
            self._move(JobEvent.QUORUM)

    def note_request(self, name: str, incarnation: str, progress: ProgressReport | None = None) -> None:
        """A member has sent a request.

        Raises:
            MembershipError: it is not, or no longer, a member.
        """
        member = self._require(name, incarnation)
        member.last_request = self._clock.now()
        if progress is not None:
            if progress.trimmed and not member.progress.trimmed:
                self.notices.append(f"{name} reported more than fits: {progress.trimmed} entries were trimmed")
            member.progress = progress

    def seen(self, name: str, pid: int, seconds: float) -> None:
        """The process `pid` of a member was known to run, `seconds` ago: it is not dead, however silent it is.

        User code that holds the interpreter keeps heartbeats from being sent.
        """
        member = self.members.get(name)
        if member is not None and member.pid == pid:
            member.last_seen = max(member.last_seen, self._clock.now() - seconds)

    def left(
        self,
        name: str,
        incarnation: str,
        reason: str,
        published: Iterable[int] = (),
        *,
        failed: Iterable[FailedAttempt] = (),
        exit_code: int = 0,
    ) -> None:
        """A member ends in order, has `published` these work items, and has `failed` at others. Leaving twice
        changes nothing."""
        member = self.members.get(name)
        if member is None or member.incarnation != incarnation or member.state is not MemberState.ACTIVE:
            return
        self.work_items.published(name, published)
        self.failed(name, failed)
        if member.role is Role.POLICY and exit_code in COMES_AGAIN:
            self._restartable = False
        self._end(member, MemberState.LEFT, reason, exit_code)
        self._consequences()

    def died(
        self, name: str, role: Role, reason: str, *, pid: int = 0, final: bool = True, exit_code: int | None = None
    ) -> None:
        """The replica's process `pid`, 0 if that is not known, is gone, whether or not it ever registered. Unless
        `final`, its group is being restarted. A process that has registered since then stays a member.

        Raises:
            MembershipError: the job has no replica of this name and role.
        """
        self._check_name(name, role)
        if role is Role.POLICY and final:
            self._restartable = False
            self._restart_bound = None
        if final:
            self._returning.pop(name, None)
        member = self.members.get(name)
        if member is None:
            member = self.members[name] = Member(name, role, "", pid, self._clock.now())
        if member.state is MemberState.ACTIVE and pid in (0, member.pid):
            self._end(member, MemberState.DEAD, reason, exit_code, final=final)
        self._consequences()

    def failed(self, name: str, attempts: Iterable[FailedAttempt]) -> None:
        """These attempts of a replica have failed. Enough work items given up in a row end the job."""
        for each in attempts:
            if not self.work_items.failed(name, each.index, each.attempt):
                continue
            times = "1 attempt" if each.attempt == 1 else f"{each.attempt} attempts"
            self.notices.append(f"work item {each.index} is given up after {times}: {name}: {each.error}")
            count = self.work_items.given_up_in_a_row
            if count >= self._max_failures:
                what = f"{count} work items in a row were given up" if count > 1 else "a work item was given up"
                self.stop("failed", f"{what}: {name}: {each.error}", ExitCode.USER_CODE)

    def stop(self, kind: OutcomeKind, reason: str, cause: int | None = None) -> None:
        """Give out no more work and let the members leave. The first outcome stands."""
        if self.phase.gives_work:
            self.outcome = OutcomeReport(kind=kind, reason=reason, cause=cause)
            self.notices.append(f"job stops: {reason}")
            self._move(JobEvent.STOP)
        self._consequences()

    def reap(self) -> None:
        """Declare dead who sent no request and was not seen for too long, and who never came."""
        now = self._clock.now()
        for member in self.active():
            silence = now - max(member.last_request, member.last_seen)
            if silence >= self._dead_after:
                self._end(member, MemberState.DEAD, f"silent for {silence:.1f} s")
        if self._restart_bound is not None and now >= self._restart_bound:
            self._restart_bound = None
            self._restartable = False
        self._returning = {name: bound for name, bound in self._returning.items() if now < bound}
        if self._start_bound is not None and now >= self._start_bound:
            self._start_bound = None
            if self.phase is Phase.STARTING:
                self.stop("failed", f"not every replica registered within {self._start_timeout:g} s")
            for role in self._expected:
                self._expected[role] = min(self._expected[role], self._registered(role))
        self._consequences()

    def _check_name(self, name: str, role: Role) -> None:
        """Members are bounded: those that the job starts, and rollout replicas that are started by hand."""
        most = MAX_ROLLOUT_REPLICAS if role is Role.ROLLOUT else self._started[role]
        prefix, _, number = name.rpartition("-")
        if prefix != role.value or not number.isdecimal() or str(int(number)) != number or int(number) >= most:
            allowed = f"{role.value}-0 to {role.value}-{most - 1}"
            raise MembershipError(f"the job has no {role.value} replica {name}: it must be one of {allowed}")

    def _require(self, name: str, incarnation: str) -> Member:
        member = self.members.get(name)
        if member is None or member.incarnation != incarnation:
            raise MembershipError(f"{name} is not registered")
        if member.state is not MemberState.ACTIVE:
            raise MembershipError(f"{name} is {member.state.value}: {member.reason}")
        return member

    def _registered(self, role: Role) -> int:
        return sum(member.role is role for member in self.members.values())

    def _end(
        self, member: Member, state: MemberState, reason: str, exit_code: int | None = None, *, final: bool = False
    ) -> None:
        now = self._clock.now()
        member.state, member.reason, member.exit_code, member.ended = state, reason, exit_code, now
        self.notices.append(f"{member.name} {state.value}: {reason}")
        if member.role is Role.POLICY and self._restartable and self.phase.gives_work:
            self._restart_bound = now + self._start_timeout
        left = self._rollout_restarts.get(member.name, 0)
        if left and not final and self.phase.gives_work and exit_code not in NOT_RESTARTED:
            self._rollout_restarts[member.name] = left - 1
            self._returning[member.name] = now + self._start_timeout
        again = self.work_items.release(member.name)
        if again and self.phase.gives_work:
            self.notices.append(f"{len(again)} work items of {member.name} are given out again")

    def _consequences(self) -> None:
        """What follows from who is left. Until all expected replicas have come, absence means nothing."""
        for role, expected in self._expected.items():
            if not self.phase.gives_work or self._registered(role) < expected:
                continue
            left = len(self.active(role))
            if role is Role.POLICY and self._restart_bound is not None:
                continue
            if role is Role.ROLLOUT and self._returning:
                continue
            if left == 0:
                self._fail(f"no {role.value} replica is left", role)
            elif role is Role.POLICY and left < expected:
                self._fail(f"the policy group has lost {expected - left} of its {expected}", role)
        if self.phase is Phase.DRAINING and not self.active():
            assert self.outcome is not None
            self._move(LAST_LEFT[self.outcome.kind])

    def _fail(self, what: str, role: Role) -> None:
        """End the job as replicas of `role` have ended; the reason names the first real cause."""
        members = [each for each in self.members.values() if each.role is role]
        gone = [each for each in members if each.state is not MemberState.ACTIVE]
        cause = min(gone, key=lambda each: (_cause_rank(each.exit_code), each.ended), default=None)
        if cause is None:
            self.stop("failed", what)
        else:
            self.stop("failed", f"{what}: {cause.name}: {cause.reason}", cause.exit_code)

    def _move(self, event: JobEvent) -> None:
        before, self.phase = self.phase, TRANSITIONS[self.phase, event]
        self.notices.append(f"phase {before.value} -> {self.phase.value} ({event.value})")


_CONSEQUENCES = frozenset((ExitCode.OK, ExitCode.NOT_A_MEMBER, ExitCode.OLD_EPOCH, ExitCode.GROUP_LOST))
"""Of replicas that have ended because others had."""


def _cause_rank(exit_code: int | None) -> int:
    """How likely the end of a replica is what the others' ends follow from: lowest first."""
    if exit_code in USER_CODES:
        return 0
    return 2 if exit_code in _CONSEQUENCES else 1
