"""``GET /metrics``: the job's state in the Prometheus text format.

Units are in the names of the metric families, counters end in ``_total``, and every sample has the label ``job``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dray.admission import ACCEPT_FAILURES, UNPROVEN_CLOSED
from dray.jobs.controller.state import Membership
from dray.jobs.messages.models import MemberState, Phase, Role

# --- families ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Family:
    """One metric family.

    Attributes:
        help: one sentence.
        labels: beside ``job``.
        role: the family has a sample for each replica of this role that reports the figure `reported`.
    """

    name: str
    help: str
    labels: tuple[str, ...] = ()
    role: Role | None = None
    reported: str = ""

    @property
    def kind(self) -> str:
        return "counter" if self.name.endswith("_total") else "gauge"


_POLICY_FIGURES = (
    ("step", "dray_training_step", "Newest training step of the run."),
    ("payloads", "dray_trained_payloads_total", "Payloads trained on."),
    ("bytes", "dray_read_bytes_total", "Payload bytes read."),
    ("retries", "dray_read_retries_total", "Attempts to read a payload after a failed one."),
    ("waited_seconds", "dray_waited_seconds_total", "Time spent waiting for payloads."),
    ("read_seconds", "dray_read_seconds_total", "Time spent reading payloads."),
    ("train_seconds", "dray_train_seconds_total", "Time spent in training steps."),
    ("mean_return", "dray_mean_return", "Mean sum of rewards of the payloads of the newest step."),
    ("staleness", "dray_staleness_versions", "Mean age of the payloads of the newest step."),
    ("staleness_max", "dray_staleness_max_versions", "Highest age of a payload that was trained on."),
    ("stale", "dray_stale_payloads_total", "Payloads whose slot held a newer payload when they were read."),
    ("lost", "dray_lost_payloads_total", "Payloads that could not be read."),
    ("discarded", "dray_discarded_payloads_total", "Payloads discarded by this process."),
    ("too_old", "dray_too_old_payloads_total", "Payloads dropped because of policy.max_staleness."),
    ("dead_letters", "dray_dead_letters_total", "Payloads that this process saw given up."),
    ("unfreed", "dray_unfreed_payloads", "Payloads whose producer has not confirmed that they are freed."),
    ("payloads_read", "dray_rank_payloads_total", "Payloads read by a rank other than 0."),
    ("steps", "dray_rank_steps_total", "Training steps of a rank other than 0."),
    ("weights_published", "dray_weights_published_total", "Weights published."),
    ("stream_published", "dray_stream_published_total", "Entries published to the stream of rollouts."),
    ("stream_duplicates", "dray_stream_duplicates_total", "Entries published a second time, and refused."),
    ("stream_trained", "dray_stream_trained_total", "Entries committed."),
    ("stream_discarded", "dray_stream_discarded_total", "Entries discarded."),
    ("stream_too_old", "dray_stream_too_old_total", "Entries dropped because of policy.max_staleness."),
    ("stream_repeated", "dray_stream_repeated_total", "Entries of payloads that were trained on before."),
    ("stream_trimmed", "dray_stream_trimmed_total", "Entries removed by another client of Redis."),
    ("stream_dead_letters", "dray_stream_dead_letters_total", "Entries given up after max_deliveries."),
    ("stream_rolled_back", "dray_stream_rolled_back_total", "Committed entries undone with their weights."),
    ("stream_backlog", "dray_stream_backlog_entries", "Entries in the stream."),
    ("stream_pending", "dray_stream_pending_entries", "Entries delivered and not committed."),
    ("stream_oldest_seconds", "dray_stream_oldest_seconds", "Age of the oldest entry in the stream."),
)
_ROLLOUT_FIGURES = (
    ("payloads", "dray_published_payloads_total", "Payloads handed on."),
    ("bytes", "dray_published_bytes_total", "Payload bytes handed on."),
    ("rollouts", "dray_rollouts_total", "Calls of the worker's rollout."),
    ("rollout_seconds", "dray_rollout_seconds_total", "Time spent in the worker's rollout."),
    ("ring_slots", "dray_ring_slots", "Slots of the replica's ring."),
    ("ring_used_slots", "dray_ring_used_slots", "Slots of the replica's ring that are not free."),
    ("reclaimed", "dray_reclaimed_payloads_total", "Payloads freed because the stream did not list them."),
    ("abandoned", "dray_abandoned_payloads_total", "Payloads not consumed before the replica ended."),
    ("weight_payloads", "dray_weights_loaded_total", "Weights loaded."),
    ("weights_in_place", "dray_weights_in_place_total", "Weights loaded from shared memory, without a copy."),
    ("weight_deltas", "dray_weights_deltas_total", "Weights of which only what had changed has travelled."),
    ("weight_bytes", "dray_weights_bytes_total", "Bytes of the weights loaded."),
    ("weight_received_bytes", "dray_weights_received_bytes_total", "Bytes of weights that have travelled."),
    ("weight_stale", "dray_weights_stale_total", "Waits for newer weights that brought none in time."),
    ("weight_version", "dray_weight_version", "Version of the weights that act."),
)

FIGURES = tuple(
    Family(name, words, ("replica",), role, reported)
    for role, figures in ((Role.POLICY, _POLICY_FIGURES), (Role.ROLLOUT, _ROLLOUT_FIGURES))
    for reported, name, words in figures
)
"""What the replicas report in heartbeats; the metrics of the user's trainer are all in ``dray_user_metric``."""

FAMILIES = (
    Family("dray_job_phase", "1 for the phase of the job, 0 for the others.", ("phase",)),
    Family("dray_members", "Replicas by role and state.", ("role", "state")),
    Family("dray_stalled_seconds", "The longest wait, if it exceeds timeouts.stall; otherwise 0."),
    Family("dray_work_items", "Work items that are not finished, by state.", ("state",)),
    Family("dray_next_work_item", "Index of the first work item that was never given out."),
    Family("dray_work_items_given_again_total", "Work items of lost replicas that were released."),
    Family("dray_failed_attempts_total", "Rollouts that raised or took too long."),
    Family("dray_work_items_given_up_total", "Work items of which rollout.max_attempts attempts failed."),
    Family(
        "dray_oldest_seconds", "Age of the oldest payload, lease or unacknowledged reference.", ("replica", "kind")
    ),
    Family(
        "dray_unproven_connections_closed_total",
        "Connections to the controller that were closed because they had not shown the job's token.",
    ),
    Family("dray_accept_failures_total", "Failures of the controller to accept a connection."),
    Family("dray_user_metric", "Newest value of a metric that train_step returned.", ("replica", "name")),
    Family("dray_trimmed_entries", "Entries of the newest report that were cut or dropped.", ("replica",)),
    *FIGURES,
)

# --- samples -----------------------------------------------------------------------------------------------------

MEDIA_TYPE = CONTENT_TYPE_LATEST
"""Of the text."""

_Samples = Iterable[tuple[tuple[str, ...], float]]


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
        self._work_items = membership.work_items.statistics()
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
        samples = self._samples()
        for family in FAMILIES:
            kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
            metric = kind(family.name, family.help, labels=("job", *family.labels))
            for values, value in samples[family.name] if family.role is None else self._figures(family):
                metric.add_metric([self._job, *values], value)
            yield metric

    def _figures(self, figure: Family) -> _Samples:
        for name, role, _, progress in self._members:
            value = progress.counters.get(figure.reported)
            if role is figure.role and value is not None:
                yield (name,), value

    def _samples(self) -> dict[str, _Samples]:
        """Those of every family that has no role."""
        counted = [(role, state) for _, role, state, _ in self._members]
        work_items = self._work_items
        reports = {name: report for name, _, _, report in self._members}
        active = {name: report.ages for name, _, state, report in self._members if state is MemberState.ACTIVE}
        return {
            "dray_job_phase": [((phase.value,), float(phase is self._phase)) for phase in Phase],
            "dray_members": [
                ((role.value, state.value), counted.count((role, state)))
                for role in sorted({role for role, _ in counted})
                for state in MemberState
            ],
            "dray_stalled_seconds": [((), self._stalled)],
            "dray_work_items": [((state,), work_items[state]) for state in ("held", "published", "waiting_again")],
            "dray_next_work_item": [((), work_items["next"])],
            "dray_work_items_given_again_total": [((), work_items["given_again"])],
            "dray_failed_attempts_total": [((), work_items["failed_attempts"])],
            "dray_work_items_given_up_total": [((), work_items["given_up"])],
            "dray_oldest_seconds": _of_each(active),
            "dray_unproven_connections_closed_total": [((), self._connections[UNPROVEN_CLOSED])],
            "dray_accept_failures_total": [((), self._connections[ACCEPT_FAILURES])],
            "dray_user_metric": _of_each({name: report.metrics for name, report in reports.items()}),
            "dray_trimmed_entries": [((name,), report.trimmed) for name, report in reports.items()],
        }


def _of_each(reports: Mapping[str, Mapping[Any, float]]) -> _Samples:
    return [((replica, name), value) for replica, values in reports.items() for name, value in values.items()]
