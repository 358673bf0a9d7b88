"""``GET /metrics``: the job's state in the Prometheus text format.

The families are one table: what is exposed and its page follow from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dray.admission import ACCEPT_FAILURES, UNPROVEN_CLOSED
from dray.jobs.controller.state import Membership
from dray.jobs.messages.models import MemberState, Phase, Role

# --- figures -----------------------------------------------------------------------------------------------------

# The metric families of ``GET /metrics``, in one table: what is exposed and its page follow from it.
#
# Units are in the names, counters end in ``_total``, and every sample has the label ``job``. `FIGURES` are what
# the replicas report in heartbeats; the metrics of the user's trainer are all in `USER_METRIC`.


@dataclass(frozen=True, slots=True)
class Family:
    """One metric family.

    Attributes:
        name: as Prometheus shows it; that of a counter ends in ``_total``.
        labels: beside ``job``.
        help: one sentence.
    """

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Figure(Family):
    """A family with one sample for each replica of `role` that reports the figure `reported`."""

    role: Role = Role.POLICY
    reported: str = ""


def _policy(reported: str, name: str, words: str) -> Figure:
    return _figure(Role.POLICY, reported, name, words)


def _rollout(reported: str, name: str, words: str) -> Figure:
    return _figure(Role.ROLLOUT, reported, name, words)


def _figure(role: Role, reported: str, name: str, words: str) -> Figure:
    kind: Literal["counter", "gauge"] = "counter" if name.endswith("_total") else "gauge"
    return Figure(name, kind, words, ("replica",), role, reported)


PHASE = Family("dray_job_phase", "gauge", "1 for the phase of the job, 0 for the others.", ("phase",))
MEMBERS = Family("dray_members", "gauge", "Replicas by role and state.", ("role", "state"))
STALLED = Family("dray_stalled_seconds", "gauge", "The longest wait, if it exceeds timeouts.stall; otherwise 0.")
WORK_ITEMS = Family("dray_work_items", "gauge", "Work items that are not finished, by state.", ("state",))
NEXT_WORK_ITEM = Family("dray_next_work_item", "gauge", "Index of the first work item that was never given out.")
GIVEN_AGAIN = Family(
    "dray_work_items_given_again_total", "counter", "Work items of lost replicas that were released."
)
FAILED_ATTEMPTS = Family("dray_failed_attempts_total", "counter", "Rollouts that raised or took too long.")
GIVEN_UP = Family(
    "dray_work_items_given_up_total", "counter", "Work items of which rollout.max_attempts attempts failed."
)
OLDEST = Family(
    "dray_oldest_seconds",
    "gauge",
    "Age of the oldest payload, lease or unacknowledged reference.",
    ("replica", "kind"),
)
UNPROVEN = Family(
    "dray_unproven_connections_closed_total",
    "counter",
    "Connections to the controller that were closed because they had not shown the job's token.",
)
REFUSED = Family("dray_accept_failures_total", "counter", "Failures of the controller to accept a connection.")
USER_METRIC = Family(
    "dray_user_metric", "gauge", "Newest value of a metric that train_step returned.", ("replica", "name")
)
TRIMMED = Family(
    "dray_trimmed_entries", "gauge", "Entries of the newest report that were cut or dropped.", ("replica",)
)

FIGURES = (
    _policy("step", "dray_training_step", "Newest training step of the run."),
    _policy("payloads", "dray_trained_payloads_total", "Payloads trained on."),
    _policy("bytes", "dray_read_bytes_total", "Payload bytes read."),
    _policy("retries", "dray_read_retries_total", "Attempts to read a payload after a failed one."),
    _policy("waited_seconds", "dray_waited_seconds_total", "Time spent waiting for payloads."),
    _policy("read_seconds", "dray_read_seconds_total", "Time spent reading payloads."),
    _policy("train_seconds", "dray_train_seconds_total", "Time spent in training steps."),
    _policy("mean_return", "dray_mean_return", "Mean sum of rewards of the payloads of the newest step."),
    _policy("staleness", "dray_staleness_versions", "Mean age of the payloads of the newest step."),
    _policy("staleness_max", "dray_staleness_max_versions", "Highest age of a payload that was trained on."),
    _policy("stale", "dray_stale_payloads_total", "Payloads whose slot held a newer payload when they were read."),
    _policy("lost", "dray_lost_payloads_total", "Payloads that could not be read."),
    _policy("discarded", "dray_discarded_payloads_total", "Payloads discarded by this process."),
    _policy("too_old", "dray_too_old_payloads_total", "Payloads dropped because of policy.max_staleness."),
    _policy("dead_letters", "dray_dead_letters_total", "Payloads that this process saw given up."),
    _policy("unfreed", "dray_unfreed_payloads", "Payloads whose producer has not confirmed that they are freed."),
    _policy("payloads_read", "dray_rank_payloads_total", "Payloads read by a rank other than 0."),
    _policy("steps", "dray_rank_steps_total", "Training steps of a rank other than 0."),
    _policy("stream_published", "dray_stream_published_total", "Entries published to the stream of rollouts."),
    _policy("stream_duplicates", "dray_stream_duplicates_total", "Entries published a second time, and refused."),
    _policy("stream_trained", "dray_stream_trained_total", "Entries committed."),
    _policy("stream_discarded", "dray_stream_discarded_total", "Entries discarded."),
    _policy("stream_too_old", "dray_stream_too_old_total", "Entries dropped because of policy.max_staleness."),
    _policy("stream_repeated", "dray_stream_repeated_total", "Entries of payloads that were trained on before."),
    _policy("stream_trimmed", "dray_stream_trimmed_total", "Entries removed by another client of Redis."),
    _policy("stream_dead_letters", "dray_stream_dead_letters_total", "Entries given up after max_deliveries."),
    _policy("stream_rolled_back", "dray_stream_rolled_back_total", "Committed entries undone with their weights."),
    _policy("stream_backlog", "dray_stream_backlog_entries", "Entries in the stream."),
    _policy("stream_pending", "dray_stream_pending_entries", "Entries delivered and not committed."),
    _policy("stream_oldest_seconds", "dray_stream_oldest_seconds", "Age of the oldest entry in the stream."),
    _rollout("payloads", "dray_published_payloads_total", "Payloads handed on."),
    _rollout("bytes", "dray_published_bytes_total", "Payload bytes handed on."),
    _rollout("rollouts", "dray_rollouts_total", "Calls of the worker's rollout."),
    _rollout("rollout_seconds", "dray_rollout_seconds_total", "Time spent in the worker's rollout."),
    _rollout("reclaimed", "dray_reclaimed_payloads_total", "Payloads freed because the stream did not list them."),
    _rollout("abandoned", "dray_abandoned_payloads_total", "Payloads not consumed before the replica ended."),
    _rollout("weight_payloads", "dray_weights_loaded_total", "Weights fetched."),
    _rollout("weight_stale", "dray_weights_stale_total", "Weights that were replaced while they were fetched."),
    _rollout("weight_version", "dray_weight_version", "Version of the weights that act."),
)

FAMILIES = (
    PHASE, MEMBERS, STALLED, WORK_ITEMS, NEXT_WORK_ITEM, GIVEN_AGAIN, FAILED_ATTEMPTS, GIVEN_UP, OLDEST, UNPROVEN,
    REFUSED, USER_METRIC, TRIMMED,
    *FIGURES,
)  # fmt: skip


# --- controller metrics ------------------------------------------------------------------------------------------

_Samples = Iterable[tuple[tuple[str, ...], float]]
_UNFINISHED = ("held", "published", "waiting_again")


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
        work_items = self._work_items
        yield WORK_ITEMS, [((state,), work_items[state]) for state in _UNFINISHED]
        yield NEXT_WORK_ITEM, [((), work_items["next"])]
        yield GIVEN_AGAIN, [((), work_items["given_again"])]
        yield FAILED_ATTEMPTS, [((), work_items["failed_attempts"])]
        yield GIVEN_UP, [((), work_items["given_up"])]
        yield UNPROVEN, [((), self._connections[UNPROVEN_CLOSED])]
        yield REFUSED, [((), self._connections[ACCEPT_FAILURES])]
        active = [(name, report) for name, _, state, report in self._members if state is MemberState.ACTIVE]
        yield OLDEST, _of_each({name: report.ages for name, report in active})
        yield USER_METRIC, _of_each({name: report.metrics for name, _, _, report in self._members})
        yield TRIMMED, [((name,), report.trimmed) for name, _, _, report in self._members]


def _of_each(reports: Mapping[str, Mapping[str, float]]) -> _Samples:
    return [((replica, name), value) for replica, values in reports.items() for name, value in values.items()]
