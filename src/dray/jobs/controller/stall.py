"""Which member waits for which, when a wait has lasted too long: one line. No I/O and no clock.

A stall begins when a wait exceeds `timeouts.stall`. It is reported then, and whenever it has lasted twice as long
as at its last report; it ends when no member waits that long any more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dray.jobs.controller.state import Membership
from dray.jobs.messages.models import Phase

# --- stall -------------------------------------------------------------------------------------------------------

AGES = {"payload": "payload", "lease": "lease", "reference": "unacknowledged reference"}
"""What replicas report the age of the oldest of, and its name in the line."""

_WAITING = "waiting for "


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


@dataclass(frozen=True, slots=True)
class JobSnapshot:
    """A job at one moment.

    Attributes:
        ages: kind → (seconds, whose) of the oldest there is; kinds are those of `AGES`.
    """

    activities: Sequence[MemberActivity]
    ages: Mapping[str, tuple[float, str]] = field(default_factory=dict)


def longest_wait(facts: JobSnapshot, after: float) -> float:
    """Seconds of the longest wait that exceeds `after`; 0 if none does. A replica that is silent counts as one."""
    waits = [each.seconds for each in facts.activities if each.whom]
    silences = [each.silence for each in facts.activities]
    longest = max([*waits, *silences], default=0.0)
    return longest if longest > after else 0.0


def stall_line(facts: JobSnapshot, after: float) -> str:
    """One line: which member waits for which and for what, and how old the oldest payload and lease are."""
    shown = [each for each in facts.activities if max(each.seconds, each.silence) > after]
    # Waits first, the longest first: what they wait for is often found behind them.
    shown.sort(key=lambda each: (not each.whom, -each.seconds, each.who))
    return "; ".join([*map(_sentence, shown), _ages(facts.ages)])


def oldest(reports: Mapping[str, Mapping[str, float]]) -> dict[str, tuple[float, str]]:
    """The highest age of each kind, and whose it is, among what each replica reports."""
    found: dict[str, tuple[float, str]] = {}
    for name, ages in reports.items():
        for kind, seconds in ages.items():
            if kind in AGES and (kind not in found or seconds > found[kind][0]):
                found[kind] = (seconds, name)
    return found


class StallWatch:
    """When a stall is to be reported.

    Args:
        after: seconds of waiting that are too long.
    """

    def __init__(self, after: float) -> None:
        self._after = after
        self._next = after
        self.line = ""
        self.seconds = 0.0
        self.reports = 0

    def update(self, facts: JobSnapshot) -> bool:
        """Take in how things are; true if `line` is to be reported now. `line` is empty while nothing stalls."""
        self.seconds = longest_wait(facts, self._after)
        if not self.seconds:
            self.line, self._next = "", self._after
            return False
        self.line = stall_line(facts, self._after)
        if self.seconds <= self._next:
            return False
        self._next = 2 * self.seconds
        self.reports += 1
        return True


def _sentence(each: MemberActivity) -> str:
    if each.whom:
        words = (
            f"{each.who} waits for {each.whom}, for {each.what.removeprefix(_WAITING)}, since {each.seconds:.1f} s"
        )
    else:
        words = f"{each.who} is at {each.what!r} since {each.seconds:.1f} s"
    return f"{words} and silent since {each.silence:.1f} s" if each.silence > each.seconds / 2 else words


def _ages(ages: Mapping[str, tuple[float, str]]) -> str:
    parts = []
    for kind, name in AGES.items():
        parts.append(f"oldest {name} {ages[kind][0]:.1f} s ({ages[kind][1]})" if kind in ages else f"no {name}")
    return ", ".join(parts)


# --- stall -------------------------------------------------------------------------------------------------------


def job_snapshot(membership: Membership, now: float, elapsed: float) -> JobSnapshot:
    """The facts of this moment.

    Args:
        now: on the clock of `membership`.
        elapsed: seconds since the controller began.
    """
    active = membership.active()
    activities = [
        MemberActivity(
            member.name,
            member.progress.doing,
            member.progress.waits_for,
            member.progress.seconds + now - member.last_request,
            now - member.last_request,
        )
        for member in active
    ]
    missing = membership.missing() if membership.phase is Phase.STARTING else []
    if missing:
        activities.append(MemberActivity("the controller", "their registration", ", ".join(missing), elapsed))
    ages = {
        member.name: {kind: age + now - member.last_request for kind, age in member.progress.ages.items()}
        for member in active
    }
    return JobSnapshot(activities, oldest(ages))
