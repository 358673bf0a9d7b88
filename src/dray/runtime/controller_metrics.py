"""The job's state in the Prometheus text format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dray.admission import ACCEPT_FAILURES, UNPROVEN_CLOSED
from dray.runtime.figures import (
    FAMILIES,
    GIVEN_AGAIN,
    MEMBERS,
    NEXT_PROMPT,
    OLDEST,
    PHASE,
    PROMPTS,
    REFUSED,
    STALLED,
    UNPROVEN,
    USER_METRIC,
    Family,
    Figure,
)
from dray.runtime.lifecycle import Phase
from dray.runtime.membership import Membership, MemberState

_Samples = Iterable[tuple[tuple[str, ...], float]]
_UNSETTLED = ("held", "published", "waiting_again")


def exposition(
    job: str, membership: Membership, stalled: float, connections: Mapping[str, float]
) -> tuple[bytes, str]:
    """The text, and its media type.

    Args:
        job: the job's name.
        stalled: seconds of the longest wait that is too long.
        connections: counts of those to the controller that have not shown the token.
    """
    registry = CollectorRegistry()
    registry.register(_Job(job, membership, stalled, connections))
    return generate_latest(registry), CONTENT_TYPE_LATEST


class _Job(Collector):
    def __init__(self, job: str, membership: Membership, stalled: float, connections: Mapping[str, float]) -> None:
        self._job = job
        self._membership = membership
        self._stalled = stalled
        self._connections = connections

    def collect(self) -> Iterator[Metric]:
        samples = dict(self._samples())
        for family in FAMILIES:
            yield self._filled(family, self._figures(family) if isinstance(family, Figure) else samples[family])

    def _filled(self, family: Family, samples: _Samples) -> Metric:
        kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
        metric = kind(family.name, family.help, labels=("job", *family.labels))
        for values, value in samples:
            metric.add_metric([self._job, *values], value)
        return metric

    def _figures(self, figure: Figure) -> _Samples:
        for member in self._membership.members.values():
            value = member.progress.counters.get(figure.reported)
            if member.role is figure.role and value is not None:
                yield (member.name,), value

    def _samples(self) -> Iterator[tuple[Family, _Samples]]:
        """Those of every family that is no `Figure`."""
        membership = self._membership
        members = membership.members.values()
        yield PHASE, [((phase.value,), float(phase is membership.phase)) for phase in Phase]
        roles = sorted({member.role for member in members})
        counted = [(each.role, each.state) for each in members]
        yield (
            MEMBERS,
            [((role.value, state.value), counted.count((role, state))) for role in roles for state in MemberState],
        )
        yield STALLED, [((), self._stalled)]
        prompts = membership.prompts.statistics()
        yield PROMPTS, [((state,), prompts[state]) for state in _UNSETTLED]
        yield NEXT_PROMPT, [((), prompts["next"])]
        yield GIVEN_AGAIN, [((), prompts["given_again"])]
        yield UNPROVEN, [((), self._connections[UNPROVEN_CLOSED])]
        yield REFUSED, [((), self._connections[ACCEPT_FAILURES])]
        yield OLDEST, _of_each({each.name: each.progress.ages for each in membership.active()})
        yield USER_METRIC, _of_each({each.name: each.progress.metrics for each in members})


def _of_each(reports: Mapping[str, Mapping[str, float]]) -> _Samples:
    return [((replica, name), value) for replica, values in reports.items() for name, value in values.items()]
