import json
from pathlib import Path
from typing import Any

import pytest

from dray.config import JobConfig
from dray.runtime.job import JobFolder
from dray.runtime.report import write_report


@pytest.fixture(scope="module", autouse=True)
def fonts(tmp_path_factory: pytest.TempPathFactory) -> None:
    """matplotlib keeps the files of its fonts open from the first plot on: no leak of the test that draws it."""
    report(tmp_path_factory.mktemp("first"), config_of(), [{"mean_return": 0.5}])


def config_of(**job: Any) -> JobConfig:
    return JobConfig.model_validate(
        {
            "job": {"name": "small", "max_steps": 3, **job},
            "rollout": {"worker": "job.py:Worker"},
            "policy": {"trainer": "job.py:Trainer", "batch_size": 4},
            "stop": {"metric": "accuracy", "at_least": 0.9},
        }
    )


def report(root: Path, config: JobConfig, steps: list[dict[str, float]]) -> dict[str, Any]:
    """Write the report of a run with these metrics per step; returns the summary."""
    folder = JobFolder(root)
    lines = [
        {"step": step, "seconds": float(step), "bytes": 1000 * step, "metrics": metrics}
        for step, metrics in enumerate(steps, 1)
    ]
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    write_report(folder, config, None, seconds=3.0, exit_code=1, reason="not solved within 3 steps", first_step=0)
    summary: dict[str, Any] = json.loads(folder.summary.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    return summary


def test_summary_has_the_last_value_of_each_metric_whichever_step_it_is_of(tmp_path: Path) -> None:
    steps = [{"accuracy_before": 0.0, "loss": 3.0}, {"accuracy": 0.5, "loss": 2.0}, {"loss": 1.0}]
    summary = report(tmp_path, config_of(), steps)
    assert summary["metrics"] == {"accuracy": 0.5, "accuracy_before": 0.0, "loss": 1.0}


def test_summary_is_strict_json_whatever_the_metrics_are(tmp_path: Path) -> None:
    summary = report(tmp_path, config_of(), [{"loss": float("nan"), "worst": float("-inf"), "best": 1.0}])
    assert summary["metrics"] == {"best": 1.0, "loss": None, "worst": None}


def test_summary_of_a_run_without_a_step_has_no_metrics(tmp_path: Path) -> None:
    assert report(tmp_path, config_of(), [])["metrics"] == {}


@pytest.mark.parametrize(("job", "name"), [({}, "returns.png"), ({"plot": "accuracy.png"}, "accuracy.png")])
def test_plot_has_the_name_that_the_job_gives_it(tmp_path: Path, job: dict[str, str], name: str) -> None:
    pytest.importorskip("matplotlib")
    report(tmp_path, config_of(**job), [{"mean_return": 0.5}, {"mean_return": 0.6, "accuracy": 0.4}])
    assert [path.name for path in tmp_path.glob("*.png")] == [name]
    assert (tmp_path / name).stat().st_size > 10_000
