"""When a training step solves a job, and when `stop.metric` is taken for a misspelling."""

import math

import pytest

from dray.errors import ConfigError
from dray.jobs.config import StopTable
from dray.jobs.replica.metrics import StopCondition, StopMetricError, listed, misspelling_of


def condition(metric: str = "score", at_least: float = 20.0, patience: int = 50) -> StopCondition:
    return StopCondition(StopTable(metric=metric, at_least=at_least), patience)


def test_step_solves_the_job_when_its_metric_reaches_the_value() -> None:
    judge = condition().judge
    assert judge(1, {"score": 19.9}, None) == ""
    assert judge(2, {"score": 20.0}, None) == "score 20 >= 20 at step 2"


def test_job_without_a_stop_table_is_never_solved() -> None:
    stop = StopCondition(None, 1)
    assert stop.judge(1, {"score": 1e9}, 1e9) == ""
    assert (stop.remark, stop.never_returned) == ("", "")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_value_that_is_not_finite_solves_nothing_and_counts_as_returned(value: float) -> None:
    stop = condition(patience=1)
    assert stop.judge(1, {"score": value}, None) == ""
    assert (stop.remark, stop.never_returned) == ("", "")


def test_mean_return_is_drays_own_figure_where_the_trainer_returns_no_such_metric() -> None:
    assert condition("mean_return").judge(1, {"loss": 0.1}, 25.0) == "mean_return 25 >= 20 at step 1"


def test_mean_return_of_the_trainer_permanently_replaces_drays_own() -> None:
    stop = condition("mean_return")
    assert stop.judge(1, {"mean_return": 1.0}, 25.0) == ""
    assert stop.judge(2, {}, 25.0) == "", "the trainer's comes now and then"
    assert stop.judge(3, {"mean_return": 21.0}, 0.0) == "mean_return 21 >= 20 at step 3"


@pytest.mark.parametrize("written", ["scoer", "Score", "sccore", "scores", "SCORE"])
def test_misspelt_metric_is_an_error_at_the_first_step_that_names_what_was_meant(written: str) -> None:
    with pytest.raises(StopMetricError) as caught:
        condition(written).judge(7, {"loss": 1.0, "score": 30.0}, None)
    error = caught.value
    assert isinstance(error, ConfigError)
    assert (error.key, error.value) == ("stop.metric", written)
    assert "step 7 returned 'loss', 'score' (did you mean 'score'?)" in str(error)


def test_misspelt_mean_return_is_an_error_as_well() -> None:
    with pytest.raises(StopMetricError, match=r"did you mean 'mean_return'"):
        condition("mean-return").judge(1, {}, 25.0)


@pytest.mark.parametrize(
    ("metric", "every_step"),
    [
        ("evaluation_return", {"mean_return": 9.0, "loss": 0.1}),
        ("accuracy", {"accuracy_before": 0.0, "loss": 0.1}),
        ("top_5", {"top_1": 0.3}),
    ],
)
def test_metric_that_comes_with_some_steps_only_is_waited_for(metric: str, every_step: dict[str, float]) -> None:
    stop = condition(metric, patience=10)
    for step in range(1, 10):
        assert stop.judge(step, every_step, None) == ""
        assert stop.remark == ""
    assert stop.judge(10, {**every_step, metric: 20.0}, None) == f"{metric} 20 >= 20 at step 10"
    assert (stop.remark, stop.never_returned) == ("", "")


def test_metric_that_was_returned_once_may_be_absent_beside_one_of_nearly_its_name() -> None:
    stop = condition("score")
    assert stop.judge(1, {"score": 1.0}, None) == ""
    assert stop.judge(2, {"scores": 30.0}, None) == ""


def test_metric_that_no_step_returns_is_remarked_once_and_at_the_end() -> None:
    stop = condition("quality", patience=3)
    remarks = []
    for step in range(1, 8):
        assert stop.judge(step, {"score": 1.0}, None) == ""
        remarks.append(stop.remark)
    (remark,) = filter(None, remarks)
    assert remark == remarks[2]
    assert "stop.metric = 'quality': no step up to 3 has returned this metric; step 3 returned 'score'" in remark
    assert stop.never_returned == "no step returned stop.metric = 'quality'"


def test_nothing_is_reported_at_the_end_of_a_process_that_did_no_step() -> None:
    assert condition("quality").never_returned == ""


@pytest.mark.parametrize(
    ("name", "known", "meant"),
    [
        ("accurazy", ["accuracy_before", "accuracy"], "accuracy"),
        ("eval/return", ["eval_return"], "eval_return"),
        ("return_10", ["return_100"], ""),
        ("Return_10", ["return_10"], "return_10"),
        ("x", [], ""),
        ("loss", ["train_step_seconds"], ""),
    ],
)
def test_misspelling_is_distinguished_from_another_metric(name: str, known: list[str], meant: str) -> None:
    assert misspelling_of(name, known) == meant


def test_list_of_names_is_printable_and_bounded() -> None:
    assert listed([]) == "no metrics"
    assert listed(["a\x1b\n", "b"]) == "'a\\x1b', 'b'"
    assert listed([f"m{number}" for number in range(12)]).endswith("'m9' and 2 more")
