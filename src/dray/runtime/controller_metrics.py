"""The job's state in the Prometheus text format."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dray.runtime.lifecycle import Phase
from dray.runtime.membership import Membership, MemberState


def exposition(membership: Membership, stalled: float) -> tuple[bytes, str]:
    """The text, and its media type; `stalled` are the seconds of the longest wait that is too long."""
    registry = CollectorRegistry()
    registry.register(_Job(membership, stalled))
    return generate_latest(registry), CONTENT_TYPE_LATEST


class _Job(Collector):
    def __init__(self, membership: Membership, stalled: float) -> None:
        self._membership = membership
        self._stalled = stalled

    def collect(self) -> Iterator[Metric]:
        membership = self._membership
        phases = GaugeMetricFamily("dray_job_phase", "1 for the phase the job is in.", labels=["phase"])
        for phase in Phase:
            phases.add_metric([phase.value], float(phase is membership.phase))
        yield phases
        members = GaugeMetricFamily("dray_members", "Replicas by role and state.", labels=["role", "state"])
        for role in {member.role for member in membership.members.values()}:
            for state in MemberState:
                count = sum(each.role is role and each.state is state for each in membership.members.values())
                members.add_metric([role.value, state.value], count)
        yield members
        words = "Seconds of the longest wait, if it exceeds timeouts.stall."
        yield GaugeMetricFamily("dray_stalled_seconds", words, value=self._stalled)
        prompts = GaugeMetricFamily("dray_prompts", "Prompts by what became of them.", labels=["state"])
        for name, prompt_count in membership.prompts.statistics().items():
            prompts.add_metric([name], prompt_count)
        yield prompts
        counters = CounterMetricFamily("dray_replica", "Counters of the replicas.", labels=["replica", "counter"])
        for member in membership.members.values():
            for name, value in member.progress.counters.items():
                counters.add_metric([member.name, name], value)
        yield counters
        ages = GaugeMetricFamily(
            "dray_oldest_seconds", "Age of the oldest payload, lease or reference.", labels=["replica", "kind"]
        )
        for member in membership.active():
            for kind, age in member.progress.ages.items():
                ages.add_metric([member.name, kind], age)
        yield ages
