"""What the controller shows of a job at one moment: its figures over time, its replicas, what it reported last."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice

from dray.clock import MONOTONIC
from dray.jobs.config import JobConfig
from dray.jobs.controller.history import FIGURES, History, JobFigures
from dray.jobs.controller.state import FIRST_POLICY, Member, Membership
from dray.jobs.log_files import LogLine
from dray.jobs.messages import view
from dray.jobs.messages.models import (
    MAX_WARNING,
    MAX_WARNINGS,
    MAX_WORDS,
    MemberState,
    Phase,
    ProgressReport,
    Role,
    Stall,
)
from dray.text import MAX_LINE, printable

SAMPLE_SECONDS = 1.0
"""Between two samples of the figures."""

_NO_PROGRESS = ProgressReport(doing="", seconds=0.0)


class JobViewer:
    """Follows one job, and answers with its view.

    Attributes:
        number: rises with every sample of the figures, and every change of the phase.
    """

    def __init__(self, config: JobConfig) -> None:
        self.number = 0
        self._config = config
        self._figures = JobFigures()
        self._history = History(tuple(FIGURES), view.MAX_POINTS)
        self._newest: dict[str, float | None] = dict.fromkeys(FIGURES)
        self._next_sample = 0.0
        self._shown: tuple[Phase, bool] = (Phase.STARTING, False)
        self._stalls: deque[str] = deque(maxlen=view.MAX_STALLS)

    def sample(self, membership: Membership, seconds: float) -> None:
        """Take the figures, if that is due `seconds` after the controller began."""
        if seconds < self._next_sample:
            return
        self._next_sample = seconds + 0.9 * SAMPLE_SECONDS  # the caller's interval is not exact
        found = self._figures.sample(membership, seconds)
        self._newest = {
            name: value if value is not None and math.isfinite(value) else None for name, value in found.items()
        }
        self._history.add(seconds, found)
        self.number += 1

    def note_phase(self, membership: Membership) -> None:
        """A new phase, or an outcome, is something new to show."""
        now = (membership.phase, membership.outcome is not None)
        if now != self._shown:
            self._shown = now
            self.number += 1

    def note_stall(self, line: str, seconds: float) -> None:
        """A stall was reported `seconds` after the controller began."""
        self._stalls.append(f"after {seconds:.0f} s: {printable(line, MAX_LINE)}")

    def view(
        self,
        membership: Membership,
        stall: Stall | None,
        seconds: float,
        *,
        log_lines: Sequence[LogLine],
        recording: str = "",
    ) -> view.JobView:
        """The job at this moment, `seconds` after the controller began."""
        members = list(membership.members.values())
        policy = membership.members.get(FIRST_POLICY)
        progress = _NO_PROGRESS if policy is None else policy.progress
        outcome = membership.outcome
        shown = _chosen(members, view.MAX_MEMBERS_SHOWN)
        return view.JobView(
            number=self.number,
            job=self._config.job.name,
            phase=membership.phase,
            seconds=seconds,
            outcome=None if outcome is None else outcome.model_copy(update={"reason": printable(outcome.reason)}),
            step=progress.count("step"),
            max_steps=self._config.job.max_steps,
            transfer=printable(progress.labels.get("transfer", "")),
            lane=printable(progress.labels.get("lane", "")),
            figures=self._newest,
            history=self._history.columns(),
            metrics={printable(name): progress.metrics[name] for name in _first(progress.metrics)},
            members=[_member_view(each) for each in shown],
            hidden_members=len(members) - len(shown),
            stall=None if stall is None else stall.model_copy(update={"line": printable(stall.line, MAX_LINE)}),
            recording=printable(recording, MAX_LINE),
            stalls=list(self._stalls),
            warnings=list(islice(_newest_warnings(members), view.MAX_WARNINGS_SHOWN))[::-1],
            log_lines=[(printable(each.name), printable(each.text, view.MAX_LOG_TEXT)) for each in log_lines],
        )


def _first(metrics: dict[str, float]) -> list[str]:
    return sorted(metrics)[: view.MAX_METRICS_SHOWN]


def _newest_warnings(members: Sequence[Member]) -> Iterator[str]:
    """The last warning of each replica, then the one before it of each, and so on."""
    for back in range(1, MAX_WARNINGS + 1):
        for each in members:
            if len(each.progress.warnings) >= back:
                yield f"{each.name}: {printable(each.progress.warnings[-back], MAX_WARNING)}"


def _chosen(members: Sequence[Member], most: int) -> list[Member]:
    """At most so many members, in order: those that ended, and those that do the same thing for longest."""
    chosen = sorted(members, key=lambda each: (each.state is MemberState.ACTIVE, -each.progress.seconds))[:most]
    return sorted(chosen, key=lambda each: (each.role is Role.ROLLOUT, len(each.name), each.name))


def _member_view(member: Member) -> view.MemberView:
    active, progress, now = member.state is MemberState.ACTIVE, member.progress, MONOTONIC.now()
    silence = now - member.last_request
    return view.MemberView(
        name=member.name,
        role=member.role,
        state=member.state,
        doing=printable(progress.doing if active else member.reason, MAX_WORDS),
        seconds=progress.seconds + silence if active else now - member.ended,
        silence=silence,
        waits_for=printable(progress.waits_for, MAX_WORDS) if active else "",
        payloads=progress.count("payloads"),
        ring_slots=progress.count("ring_slots"),
        ring_used_slots=progress.count("ring_used_slots"),
        ages={kind: age + silence for kind, age in progress.ages.items()} if active else {},
    )
