"""`GET /metrics`, read as Prometheus reads it."""

import math
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dray.admission import ACCEPT_FAILURES, UNPROVEN_CLOSED
from dray.jobs.controller.metrics import FAMILIES, FIGURES, JobMetrics
from dray.jobs.controller.state import Membership
from dray.jobs.controller.work_queue import WorkQueue
from dray.jobs.messages.models import ProgressReport, Role

CONNECTIONS = {UNPROVEN_CLOSED: 7, ACCEPT_FAILURES: 2}
HOSTILE = {
    "step": 999.0,
    "payloads": -1.0,
    "bytes": 7.0,
    "lane": 3.0,
    "a b": 1.0,
    "[red]": 2.0,
    'q"uo\\te\n': 4.0,
    "größe": 5.0,
    "loss": math.nan,
    "worst": -math.inf,
}


def report_of(**given: Any) -> ProgressReport:
    return ProgressReport(doing="training", seconds=0.0, **given)


def members(**progress: ProgressReport) -> Membership:
    """A membership with these replicas; ``policy_0`` stands for ``policy-0``."""
    membership = Membership({Role.ROLLOUT: 1, Role.POLICY: 1}, WorkQueue(4, 5), dead_after=3.0, start_timeout=3.0)
    for key, value in progress.items():
        name = key.replace("_", "-")
        membership.register(name, Role(name.partition("-")[0]), "a", 1)
        membership.note_request(name, "a", value)
    return membership


def read(membership: Membership, stalled: float = 0.0) -> dict[str, dict[frozenset[tuple[str, str]], float]]:
    """name of a sample → its labels → its value; no sample is there twice."""
    found: dict[str, dict[frozenset[tuple[str, str]], float]] = {}
    content = JobMetrics("small", membership, stalled, CONNECTIONS).text()
    for family in text_string_to_metric_families(content.decode()):
        for sample in family.samples:
            samples = found.setdefault(sample.name, {})
            labels = frozenset(sample.labels.items())
            assert labels not in samples
            samples[labels] = sample.value
    return found


def labels(**values: str) -> frozenset[tuple[str, str]]:
    return frozenset({"job": "small", **values}.items())


def test_every_family_is_declared_once_with_type_and_help() -> None:
    text = JobMetrics("small", members(), 0.0, CONNECTIONS).text().decode()
    parsed = list(text_string_to_metric_families(text))
    declared = [(each.name, each.type, each.documentation) for each in parsed]
    expected = [(each.name.removesuffix("_total"), each.kind, each.help) for each in FAMILIES]
    assert declared == expected
    assert len(set(declared)) == len(declared)
    for kind in ("HELP", "TYPE"):
        lines = [line.split()[2] for line in text.splitlines() if line.startswith(f"# {kind} ")]
        assert lines == [each.name for each in FAMILIES]


def test_names_of_counters_end_in_total_and_those_of_gauges_do_not() -> None:
    assert all(each.name.endswith("_total") == (each.kind == "counter") for each in FAMILIES)
    assert all(each.name.startswith("dray_") and each.help.endswith(".") for each in FAMILIES)
    assert len({each.name for each in FAMILIES}) == len(FAMILIES)
    assert len({(each.role, each.reported) for each in FIGURES}) == len(FIGURES)


def test_every_sample_names_the_job_and_figures_the_replica() -> None:
    report = report_of(counters={each.reported: 3.0 for each in FIGURES}, ages={"payload": 1.5}, metrics=HOSTILE)
    found = read(members(policy_0=report, rollout_0=report))
    assert all(("job", "small") in each for samples in found.values() for each in samples)
    assert set(found) == {each.name for each in FAMILIES}
    for figure in FIGURES:
        assert figure.role is not None
        assert found[figure.name] == {labels(replica=f"{figure.role.value}-0"): 3.0}


def test_job_is_described_by_its_phase_members_work_items_and_stall() -> None:
    membership = members(policy_0=report_of(), rollout_0=report_of(ages={"payload": 1.5}))
    membership.work_items.assign("rollout-0", 3)
    found = read(membership, stalled=31.5)
    assert found["dray_job_phase"][labels(phase="running")] == 1.0
    assert sum(found["dray_job_phase"].values()) == 1.0
    assert found["dray_members"][labels(role="rollout", state="active")] == 1.0
    assert found["dray_members"][labels(role="policy", state="dead")] == 0.0
    assert found["dray_stalled_seconds"] == {labels(): 31.5}
    assert found["dray_work_items"][labels(state="held")] == 3.0
    assert found["dray_next_work_item"] == {labels(): 8.0}
    assert found["dray_oldest_seconds"] == {labels(replica="rollout-0", kind="payload"): 1.5}
    assert found["dray_unproven_connections_closed_total"] == {labels(): 7.0}
    assert found["dray_accept_failures_total"] == {labels(): 2.0}
    membership.died("rollout-0", Role.ROLLOUT, "killed")
    assert read(membership)["dray_work_items_given_again_total"] == {labels(): 3.0}


def test_metrics_of_the_trainer_are_one_family_and_change_no_figure() -> None:
    figures = {"step": 4.0, "payloads": 32.0, "bytes": 1000.0}
    plain = read(members(policy_0=report_of(counters=figures)))
    found = read(members(policy_0=report_of(counters=figures, metrics=HOSTILE)))
    users = found.pop("dray_user_metric")
    assert found == plain
    assert {dict(each)["name"] for each in users} == set(HOSTILE)
    for name, value in HOSTILE.items():
        assert users[labels(replica="policy-0", name=name)] == pytest.approx(value, nan_ok=True)
