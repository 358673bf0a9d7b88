import math

import pytest

from dray.jobs.controller.history import FIGURES, History, JobFigures
from dray.jobs.controller.state import FIRST_POLICY, Membership
from dray.jobs.controller.work_queue import WorkQueue
from dray.jobs.messages.models import ProgressReport, Role


def job() -> Membership:
    membership = Membership(
        {Role.ROLLOUT: 2, Role.POLICY: 1}, WorkQueue(8, 0), dead_after=10.0, start_timeout=10.0, restartable=True
    )
    membership.register(FIRST_POLICY, Role.POLICY, "a", 1)
    for index in range(2):
        membership.register(f"rollout-{index}", Role.ROLLOUT, "a", 2 + index)
    return membership


def report(membership: Membership, name: str, waits_for: str = "", **counters: float) -> None:
    progress = ProgressReport(doing="", seconds=1.0, counters=counters, waits_for=waits_for)
    membership.note_request(name, "a", progress)


def test_points_are_the_means_of_their_intervals_and_gaps_are_kept() -> None:
    history = History(["x", "y"], most=10)
    for seconds, x in ((0.2, 1.0), (0.8, 3.0), (1.5, 5.0), (4.0, None), (5.0, math.nan)):
        history.add(seconds, {"x": x})
    assert history.columns() == {
        "seconds": [0.0, 1.0, 4.0, 5.0],
        "x": [2.0, 5.0, None, None],
        "y": [None, None, None, None],
    }


def test_history_of_any_length_keeps_its_beginning_and_at_most_so_many_points() -> None:
    history = History(["x"], most=10)
    for second in range(1000):
        history.add(float(second), {"x": float(second)})
        columns = history.columns()
        assert len(columns["seconds"]) == len(columns["x"]) <= 10
    assert columns["seconds"] == [128.0 * index for index in range(8)]
    # Each point is the mean of all that it stands for, whatever the order in which points became one.
    assert columns["x"][:7] == pytest.approx([128 * index + 63.5 for index in range(7)], rel=1e-4)


def test_figures_of_a_job_without_a_step_are_not_known() -> None:
    figures = JobFigures().sample(job(), 1.0)
    assert set(figures) == set(FIGURES)
    known = {name: value for name, value in figures.items() if value is not None}
    assert known == {"policy_waits": 0.0, "rollouts_wait": 0.0}


def test_rates_are_those_of_the_last_steps_and_fall_when_no_step_comes() -> None:
    membership, figures = job(), JobFigures()
    for step in range(1, 11):
        report(membership, FIRST_POLICY, step=step, payloads=8 * step, bytes=4e6 * step, waited_seconds=0.5 * step)
        found = figures.sample(membership, float(step))
    assert found["payloads_per_second"] == pytest.approx(8.0)
    assert found["megabytes_per_second"] == pytest.approx(4.0)
    assert found["policy_waits"] == pytest.approx(0.5)
    assert (figures.sample(membership, 100.0)["payloads_per_second"] or 0.0) < 1.0


def test_counter_that_the_first_report_did_not_have_began_with_zero() -> None:
    membership, figures = job(), JobFigures()
    report(membership, FIRST_POLICY, step=0)
    figures.sample(membership, 0.0)
    report(membership, FIRST_POLICY, step=1, payloads=16, waited_seconds=1.0)
    found = figures.sample(membership, 2.0)
    assert (found["payloads_per_second"], found["policy_waits"]) == (8.0, 0.5)


def test_policy_that_waits_for_long_waits_all_of_its_time() -> None:
    membership, figures = job(), JobFigures()
    for step in (1, 2):
        report(membership, FIRST_POLICY, step=step, waited_seconds=0.0)
        figures.sample(membership, float(step))
    report(membership, FIRST_POLICY, "the rollout replicas", step=2, waited_seconds=0.0)
    assert 0.9 < (figures.sample(membership, 100.0)["policy_waits"] or 0.0) <= 1.0


def test_policy_that_continues_from_an_earlier_step_begins_its_rates_anew() -> None:
    membership, figures = job(), JobFigures()
    for seconds, step in ((1.0, 10), (2.0, 11), (3.0, 5)):
        report(membership, FIRST_POLICY, step=step, payloads=step)
        found = figures.sample(membership, seconds)
    assert found["payloads_per_second"] is None


def test_metric_of_the_trainer_takes_the_place_of_the_mean_return() -> None:
    membership = job()
    own = ProgressReport(doing="", seconds=1.0, counters={"mean_return": 1.0})
    membership.note_request(FIRST_POLICY, "a", own)
    assert JobFigures().sample(membership, 1.0)["mean_return"] == 1.0
    membership.note_request(FIRST_POLICY, "a", own.model_copy(update={"metrics": {"mean_return": 2.0}}))
    assert JobFigures().sample(membership, 1.0)["mean_return"] == 2.0


def test_fill_of_the_rings_is_that_of_all_slots_and_waiting_replicas_are_counted() -> None:
    membership = job()
    report(membership, "rollout-0", "the policy", ring_slots=16, ring_used_slots=16)
    report(membership, "rollout-1", ring_slots=16, ring_used_slots=0)
    found = JobFigures().sample(membership, 1.0)
    assert (found["ring_fill"], found["rollouts_wait"]) == (0.5, 0.5)
