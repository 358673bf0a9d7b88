"""Which member waits for which, when a wait has lasted too long: one line. No I/O and no clock.

A stall begins when a wait exceeds `timeouts.stall`. It is reported then, and whenever it has lasted twice as long
as at its last report; it ends when no member waits that long any more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dray.jobs.controller.state import Membership
from dray.jobs.messages.models import Phase, Stall

_AGES = {"payload": "payload", "lease": "lease", "reference": "unacknowledged reference"}
"""What replicas report the age of the oldest of, and its name in the line."""


@dataclass(frozen=True, slots=True)
class MemberActivity:
    """What a member does, for how many seconds.

    Attributes:
        whom: it waits for; empty while it works.
        silence: seconds since its last request.
    """

    who: str
    what: str
    whom: str
    seconds: float
    silence: float = 0.0

    @property
    def sentence(self) -> str:
        if self.whom:
            what = self.what.removeprefix("waiting for ")
            words = f"{self.who} waits for {self.whom}, for {what}, since {self.seconds:.1f} s"
        else:
            words = f"{self.who} is at {self.what!r} since {self.seconds:.1f} s"
        is_silent = self.silence > self.seconds / 2
        return f"{words} and silent since {self.silence:.1f} s" if is_silent else words


@dataclass(frozen=True, slots=True)
class JobSnapshot:
    """A job at one moment.

    Attributes:
        ages: kind → (seconds, whose) of the oldest there is.
    """

    activities: Sequence[MemberActivity]
    ages: Mapping[str, tuple[float, str]] = field(default_factory=dict)

    def longest_wait(self, after: float) -> float:
        """Seconds of the longest wait that exceeds `after`; 0 if none does. A silent replica counts as one."""
        waits = [each.seconds for each in self.activities if each.whom]
        silences = [each.silence for each in self.activities]
        longest = max([*waits, *silences], default=0.0)
        return longest if longest > after else 0.0

    def line(self, after: float) -> str:
        """Which member waits for which and for what, and how old the oldest payload and lease are."""
        shown = [each for each in self.activities if max(each.seconds, each.silence) > after]
        # Waits first, the longest first: what they wait for is often found behind them.
        shown.sort(key=lambda each: (not each.whom, -each.seconds, each.who))
        return "; ".join([*(each.sentence for each in shown), ", ".join(map(self._oldest, _AGES))])

    def _oldest(self, kind: str) -> str:
        if kind not in self.ages:
            return f"no {_AGES[kind]}"
        seconds, whose = self.ages[kind]
        return f"oldest {_AGES[kind]} {seconds:.1f} s ({whose})"


def job_snapshot(membership: Membership, now: float, elapsed: float) -> JobSnapshot:
    """The job at this moment.

    Args:
        now: on the clock of `membership`.
        elapsed: seconds since the controller began.
    """
    activities: list[MemberActivity] = []
    ages: dict[str, tuple[float, str]] = {}
    for member in membership.active():
        silence, progress = now - member.last_request, member.progress
        activities.append(
            MemberActivity(member.name, progress.doing, progress.waits_for, progress.seconds + silence, silence)
        )
        for kind, age in progress.ages.items():
            if kind not in ages or age + silence > ages[kind][0]:
                ages[kind] = (age + silence, member.name)
    missing = membership.missing() if membership.phase is Phase.STARTING else []
    if missing:
        activities.append(MemberActivity("the controller", "their registration", ", ".join(missing), elapsed))
    return JobSnapshot(activities, ages)


class StallWatch:
    """When a stall is to be reported.

    Args:
        after: seconds of waiting that are too long.

    Attributes:
        stall: what waits too long now; None while nothing does.
    """

    def __init__(self, after: float) -> None:
        self._after = after
        self._next = after
        self._reports = 0
        self.stall: Stall | None = None

    def update(self, job: JobSnapshot) -> bool:
        """Take in how things are; true if `stall` is to be reported now."""
        seconds = job.longest_wait(self._after)
        if not seconds:
            self.stall, self._next = None, self._after
            return False
        is_due = seconds > self._next
        if is_due:
            self._next = 2 * seconds
            self._reports += 1
        self.stall = Stall(line=job.line(self._after), seconds=seconds, reports=self._reports)
        return is_due
