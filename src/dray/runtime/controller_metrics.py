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
    TRIMMED,
    UNPROVEN,
    USER_METRIC,
    Family,
    Figure,
)
from dray.runtime.lifecycle import Phase
from dray.runtime.membership import Membership, MemberState

_Samples = Iterable[tuple[tuple[str, ...], float]]
_UNSETTLED = ("held", "published", "waiting_again")


MEDIA_TYPE = CONTENT_TYPE_LATEST
"""Of the text."""


class JobMetrics(Collector):
    """The job at one moment. Making it is quick; `text` may take long, and any thread may ask for it.

    Args:
        job: the job's name.
        stalled: seconds of the longest wait that is too long.
        connections: counts of those to the controller that have not shown the token.
    """

    def __init__(self, job: str, membership: Membership, stalled: float, connections: Mapping[str, float]) -> None:
        self._job = job
        self._phase = membership.phase
        self._prompts = membership.prompts.statistics()
        self._stalled = stalled
        self._connections = connections
        # A report is replaced by the next one, and never changed.
        self._members = [(each.name, each.role, each.state, each.progress) for each in membership.members.values()]

    def text(self) -> bytes:
        """The job in the Prometheus text format."""
        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry)

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
        for name, role, _, progress in self._members:
            value = progress.counters.get(figure.reported)
            if role is figure.role and value is not None:
                yield (name,), value

    def _samples(self) -> Iterator[tuple[Family, _Samples]]:
        """Those of every family that is no `Figure`."""
        yield PHASE, [((phase.value,), float(phase is self._phase)) for phase in Phase]
        counted = [(role, state) for _, role, state, _ in self._members]
        roles = sorted({role for role, _ in counted})
        yield (
            MEMBERS,
            [((role.value, state.value), counted.count((role, state))) for role in roles for state in MemberState],
        )
        yield STALLED, [((), self._stalled)]
        prompts = self._prompts
        yield PROMPTS, [((state,), prompts[state]) for state in _UNSETTLED]
        yield NEXT_PROMPT, [((), prompts["next"])]
        yield GIVEN_AGAIN, [((), prompts["given_again"])]
        yield UNPROVEN, [((), self._connections[UNPROVEN_CLOSED])]
        yield REFUSED, [((), self._connections[ACCEPT_FAILURES])]
        active = [(name, report) for name, _, state, report in self._members if state is MemberState.ACTIVE]
        yield OLDEST, _of_each({name: report.ages for name, report in active})
        yield USER_METRIC, _of_each({name: report.metrics for name, _, _, report in self._members})
        yield TRIMMED, [((name,), report.trimmed) for name, _, _, report in self._members]


def _of_each(reports: Mapping[str, Mapping[str, float]]) -> _Samples:
    return [((replica, name), value) for replica, values in reports.items() for name, value in values.items()]
