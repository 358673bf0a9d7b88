"""The figures of a job over time, in bounded memory. No I/O, and time comes from the caller.

A figure that is counted, such as bytes, is shown as a rate: over the last steps, at least `RATE_SECONDS`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dray.jobs.controller.state import FIRST_POLICY, Member, Membership
from dray.jobs.messages.models import MemberState, ProgressReport, Role

FIGURES = {
    "mean_return": "mean sum of rewards of the payloads of the newest step, or the trainer's metric of this name",
    "payloads_per_second": "payloads trained on",
    "megabytes_per_second": "payload bytes read by the policy",
    "staleness": "mean age of the payloads of the newest step, in versions of the weights",
    "ring_fill": "slots of all rings that are not free, as a share of all slots",
    "policy_waits": "share of its time for which the policy waits for payloads",
    "rollouts_wait": "share of the rollout replicas that wait",
}
"""Each figure, and what it is."""

RATE_SECONDS = 5.0
_NO_PROGRESS = ProgressReport(doing="", seconds=0.0)
_INTERVAL = 1.0
_ROLLOUTS = "the rollout replicas"  # what a policy waits for that waits for payloads


@dataclass(slots=True)
class _Bucket:
    """The mean of what was added in one interval."""

    seconds: float
    values: dict[str, tuple[float, int]]  # sum, and how many

    def add(self, name: str, total: float, count: int) -> None:
        before = self.values.get(name, (0.0, 0))
        self.values[name] = (before[0] + total, before[1] + count)

    def mean(self, name: str) -> float | None:
        total, count = self.values.get(name, (0.0, 0))
        return total / count if count else None


class History:
    """Figures over time. When there are too many points, the interval is doubled, and two points become one.

    Args:
        names: of the figures.
        most: points that are kept.
        interval: seconds between two points, in the beginning.
    """

    def __init__(self, names: Sequence[str], most: int, interval: float = _INTERVAL) -> None:
        self._names = tuple(names)
        self._most = most
        self._interval = interval
        self._buckets: deque[_Bucket] = deque()

    def add(self, seconds: float, values: Mapping[str, float | None]) -> None:
        """Add values of this moment; one that is None or not finite is not known. `seconds` do not go back."""
        bucket = self._bucket(seconds)
        for name in self._names:
            value = values.get(name)
            if value is not None and math.isfinite(value):
                bucket.add(name, value, 1)
        if len(self._buckets) > self._most:
            self._halve()

    def columns(self) -> dict[str, list[float | None]]:
        """The list `seconds`, and one for each figure."""
        return {
            "seconds": [round(each.seconds, 1) for each in self._buckets],
            **{name: [_short(each.mean(name)) for each in self._buckets] for name in self._names},
        }

    def _bucket(self, seconds: float) -> _Bucket:
        begin = math.floor(seconds / self._interval) * self._interval
        if not self._buckets or self._buckets[-1].seconds < begin:
            self._buckets.append(_Bucket(begin, {}))
        return self._buckets[-1]

    def _halve(self) -> None:
        buckets, self._buckets = self._buckets, deque()
        self._interval *= 2
        for each in buckets:
            bucket = self._bucket(each.seconds)
            for name, (total, count) in each.values.items():
                bucket.add(name, total, count)


class JobFigures:
    """The newest values of `FIGURES` of a job."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, ProgressReport]] = deque()

    def sample(self, membership: Membership, seconds: float) -> dict[str, float | None]:
        """The figures at this moment, `seconds` after the controller began; None is one that is not known."""
        policy = membership.members.get(FIRST_POLICY)
        self._follow(policy, seconds)
        rollouts = [each.progress for each in membership.active(Role.ROLLOUT)]
        slots = sum(each.counters.get("ring_slots", 0.0) for each in rollouts)
        used = sum(each.counters.get("ring_used_slots", 0.0) for each in rollouts)
        progress = _NO_PROGRESS if policy is None else policy.progress
        counters = progress.counters
        return {
            "mean_return": progress.metrics.get("mean_return", counters.get("mean_return")),
            "payloads_per_second": self._rate("payloads", seconds),
            "megabytes_per_second": self._rate("bytes", seconds, 1e-6),
            "staleness": counters.get("staleness"),
            "ring_fill": used / slots if slots else None,
            "policy_waits": self._policy_waits(policy, seconds),
            "rollouts_wait": sum(bool(each.waits_for) for each in rollouts) / len(rollouts) if rollouts else None,
        }

    def _follow(self, policy: Member | None, seconds: float) -> None:
        """Keep the reports with which a step ended, as far back as rates reach."""
        steps = self._steps
        if policy is None or policy.state is not MemberState.ACTIVE or "step" not in policy.progress.counters:
            steps.clear()
            return
        step = policy.progress.counters["step"]
        if steps and step < steps[-1][1].counters["step"]:
            steps.clear()  # the policy was restarted, and continues from an earlier step
        if not steps or step > steps[-1][1].counters["step"]:
            steps.append((seconds, policy.progress))
        while len(steps) > 2 and seconds - steps[1][0] >= RATE_SECONDS:
            steps.popleft()

    def _policy_waits(self, policy: Member | None, seconds: float) -> float | None:
        """The share of the time since the first of the last steps; a wait counts while it lasts, too."""
        if policy is None or policy.state is not MemberState.ACTIVE:
            return None
        waits = policy.progress.waits_for == _ROLLOUTS
        if len(self._steps) < 2:
            return float(waits)
        (begin, _), (end, _) = self._steps[0], self._steps[-1]
        ended = (self._rate("waited_seconds", seconds) or 0.0) * (seconds - begin)
        return min(1.0, (ended + (seconds - end if waits else 0.0)) / (seconds - begin))

    def _rate(self, name: str, seconds: float, factor: float = 1.0) -> float | None:
        if len(self._steps) < 2:
            return None
        (begin, first), (_, last) = self._steps[0], self._steps[-1]
        # A counter is reported once it is above 0.
        change = last.counters.get(name, 0.0) - first.counters.get(name, 0.0)
        return factor * change / (seconds - begin) if change >= 0 else None


def _short(value: float | None) -> float | None:
    """`value` with so many digits as a plot shows."""
    return None if value is None else float(f"{value:.5g}")
