import json
import logging
import math
import time

import pytest

from dray.jobs.controller.app import MAX_BODY
from dray.jobs.messages.models import (
    MAX_FIGURES,
    MAX_LABELS,
    MAX_METRIC_NAME,
    MAX_METRICS,
    MAX_REPORTED,
    MAX_WARNING,
    MAX_WARNINGS,
    Heartbeat,
    ProgressReport,
)
from dray.jobs.replica.heartbeat import Activity


def test_wait_continues_while_it_is_the_same_and_begins_anew_otherwise() -> None:
    activity = Activity()
    activity.waits("8 of 8 payloads", "the rollout replicas")
    time.sleep(0.03)
    activity.waits("8 of 8 payloads", "the rollout replicas")
    report = activity.report()
    assert (report.doing, report.waits_for) == ("waiting for 8 of 8 payloads", "the rollout replicas")
    assert report.seconds >= 0.03
    activity.waits("5 of 8 payloads", "the rollout replicas")
    assert activity.report().seconds < report.seconds
    activity.doing("generating")
    assert (activity.report().doing, activity.report().waits_for) == ("generating", "")


def test_ages_are_asked_for_when_reported() -> None:
    activity, ages = Activity(), {"payload": 1.0, "lease": None}
    assert activity.report().ages == {}
    activity.show_ages(lambda: ages)  # type: ignore[arg-type,return-value]
    assert activity.report().ages == {"payload": 1.0}
    ages["payload"] = 2.0
    assert activity.report().ages == {"payload": 2.0}


def test_gauges_are_asked_for_when_reported_and_are_among_the_counters() -> None:
    activity, gauges = Activity(), {"ring_slots": 16.0, "ring_used_slots": 1.0}
    activity.counters.add("payloads", 8)
    activity.show_gauges(lambda: gauges)
    gauges["ring_used_slots"] = 2.0
    assert activity.report().counters == {"payloads": 8, "ring_slots": 16.0, "ring_used_slots": 2.0}


def test_metrics_of_the_trainer_are_kept_apart_from_drays_own_figures() -> None:
    activity = Activity()
    activity.counters.add("payloads", 8)
    activity.show("step", 3)
    activity.show("lane", "shm")
    before = activity.report()
    activity.show_metrics({"step": 999.0, "payloads": -1.0, "lane": 2.0, "counters": math.nan})
    after = activity.report()
    assert (after.counters, after.labels) == (before.counters, before.labels)
    assert after.metrics == pytest.approx(
        {"step": 999.0, "payloads": -1.0, "lane": 2.0, "counters": math.nan}, nan_ok=True
    )


def test_value_of_a_metric_stays_until_there_is_a_newer_one() -> None:
    activity = Activity()
    activity.show_metrics({"accuracy": 0.5, "loss": 2.0})
    activity.show_metrics({"loss": 1.0})
    assert activity.report().metrics == {"accuracy": 0.5, "loss": 1.0}


def test_report_of_anything_is_bounded_and_states_how_much_was_trimmed() -> None:
    activity = Activity()
    activity.doing("x" * 1000)
    for number in range(MAX_FIGURES):
        activity.counters.add(f"counter {number}")
    activity.show("a gauge too many", 1.0)
    activity.show("n" * 1000, "a label")
    for number in range(MAX_LABELS + 4):
        activity.show(f"label {number}", "y" * 1000)
    report = activity.report()
    assert (len(report.counters), len(report.labels)) == (MAX_FIGURES, MAX_LABELS)
    longest = max(map(len, [*report.counters, *report.labels]))
    assert (len(report.doing), longest, max(map(len, report.labels.values()))) == (200, 100, 200)
    # What it does, a gauge, five labels, the name of one label, the texts of all others that are left.
    assert report.trimmed == 1 + 1 + 5 + 1 + (MAX_LABELS - 1)
    assert Activity().report().trimmed == 0


def test_largest_heartbeat_fits_what_the_controller_accepts() -> None:
    activity, wide = Activity(), "\U0001f600"
    for number in range(2 * MAX_FIGURES):
        activity.counters.add(f"{number}{wide * 200}", 1 / 3)
        activity.show(f"{number}{wide * 200}", wide * 1000)
        activity.warn(wide * 1000)
        activity.waits(wide * 1000, wide * 1000)
    activity.show_metrics({f"{number}{wide * 1000}": 1 / 3 for number in range(2 * MAX_METRICS)})
    heartbeat = Heartbeat(
        name="policy-0", incarnation="a" * 64, progress=activity.report(), finished=[2**63 - 1] * MAX_REPORTED
    )
    assert len(heartbeat.model_dump_json().encode()) < MAX_BODY


def test_report_of_any_metrics_is_bounded_and_strict_json() -> None:
    activity = Activity()
    activity.show_metrics({"oldest": 1.0, "\ud800": math.inf, "long" * 1000: math.nan})
    activity.show_metrics({f"loss_{number}": 1.0 for number in range(MAX_METRICS - 1)})
    text = activity.report().model_dump_json()
    json.loads(text, parse_constant=pytest.fail)
    names = list(ProgressReport.model_validate_json(text).metrics)
    assert len(names) == MAX_METRICS
    assert "oldest" not in names
    assert names[-1] == f"loss_{MAX_METRICS - 2}"
    assert max(map(len, names)) == MAX_METRIC_NAME


def test_warning_is_logged_and_reported_up_to_a_number(caplog: pytest.LogCaptureFixture) -> None:
    activity = Activity()
    with caplog.at_level(logging.WARNING):
        for number in range(MAX_WARNINGS + 5):
            activity.warn(f"{number}: \x1b[2J\n" + "x" * 1000)
    assert len(caplog.records) == MAX_WARNINGS + 5
    assert caplog.records[-1].getMessage().startswith(f"{MAX_WARNINGS + 4}: \\x1b[2J xxx")
    warnings = activity.report().warnings
    assert len(warnings) == MAX_WARNINGS
    assert all(each.isprintable() and len(each) <= MAX_WARNING for each in warnings)


def test_count_is_a_whole_number_whatever_was_reported() -> None:
    report = ProgressReport(doing="", seconds=0.0, counters={"a": 3.0, "b": math.nan, "c": math.inf})
    assert [report.count(name) for name in "abcd"] == [3, 0, 0, 0]
