import json
import math
from pathlib import Path
from typing import Any

import pytest

from dray.jobs.config import JobConfig
from dray.jobs.folder import JobFolder
from dray.jobs.launch.heirs import total
from dray.jobs.launch.report import write_report
from dray.jobs.messages.models import HeirFigures, MemberState, MemberStatus, Phase, ProgressReport, Role, Status


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


def status_of(policy: ProgressReport) -> Status:
    """The last status of a job whose policy reports this."""
    member = MemberStatus(
        name="policy-0", role=Role.POLICY, state=MemberState.LEFT, reason="", pid=1, silence=0.0, progress=policy
    )
    return Status(job="small", phase=Phase.DONE, seconds=3.0, outcome=None, members=[member], work_items={})


def with_metrics(
    root: Path, steps: list[dict[str, float | None]], own: dict[str, float | None] | None = None
) -> JobFolder:
    """The output folder of a run with these metrics per step."""
    folder = JobFolder(root)
    lines = [
        {"step": step, "seconds": float(step), "bytes": 1000 * step, **(own or {}), "metrics": metrics}
        for step, metrics in enumerate(steps, 1)
    ]
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def report(
    root: Path,
    config: JobConfig,
    steps: list[dict[str, float | None]],
    status: Status | None = None,
    own: dict[str, float | None] | None = None,
) -> dict[str, Any]:
    """Write the report of a run with these metrics per step; returns the summary.

    Args:
        own: figures of dray in each line.
    """
    folder = with_metrics(root, steps, own)
    write_report(
        folder, config, status, seconds=3.0, exit_code=1, reason="not solved within 3 steps", first_step=0
    )
    summary: dict[str, Any] = json.loads(folder.summary.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    return summary


def test_summary_has_the_last_value_of_each_metric_whichever_step_it_is_of(tmp_path: Path) -> None:
    steps = [{"accuracy_before": 0.0, "loss": 3.0}, {"accuracy": 0.5, "loss": 2.0}, {"loss": 1.0}]
    summary = report(tmp_path, config_of(), steps)
    assert summary["metrics"] == {"accuracy": 0.5, "accuracy_before": 0.0, "loss": 1.0}


def test_summary_and_last_line_state_how_old_their_figures_are_when_the_controller_was_gone(
    tmp_path: Path,
) -> None:
    folder = JobFolder(tmp_path)

    def written(age: float | None) -> tuple[Any, str]:
        (line,) = write_report(
            folder, config_of(), None, seconds=3.0, exit_code=1, reason="it broke", first_step=0, age=age
        )
        return json.loads(folder.summary.read_text())["figures_age"], line

    age, line = written(2.312)
    assert age == 2.31
    assert line.endswith("(its figures may be 2.3 s old: the controller was gone before the end)")
    age, line = written(None)
    assert age is None
    assert "old" not in line


def test_summary_has_what_the_heirs_of_all_machines_have_kept(tmp_path: Path) -> None:
    first = HeirFigures(rings=1, payloads=5, bytes=500, consumed=4, left=1)
    second = HeirFigures(rings=2, payloads=3, bytes=300, consumed=1, dropped=2)
    folder = JobFolder(tmp_path)
    write_report(
        folder, config_of(), None, seconds=3.0, exit_code=0, reason="it was killed", first_step=0,
        heirs=total([first, second]),
    )  # fmt: skip
    kept = {"rings": 3, "payloads": 8, "bytes": 800, "consumed": 5, "dropped": 2, "left": 1}
    assert json.loads(folder.summary.read_text())["heirs"] == kept


def test_summary_is_strict_json_whatever_the_metrics_are(tmp_path: Path) -> None:
    summary = report(tmp_path, config_of(), [{"loss": float("nan"), "worst": float("-inf"), "best": 1.0}])
    assert summary["metrics"] == {"best": 1.0, "loss": None, "worst": None}


def test_summary_of_a_run_without_a_step_has_no_metrics(tmp_path: Path) -> None:
    assert report(tmp_path, config_of(), [])["metrics"] == {}


def test_metrics_of_the_trainer_change_no_figure_of_the_summary(tmp_path: Path) -> None:
    users = {"step": 99.0, "payloads": -1.0, "bytes": 1.0, "lost": 7.0, "lane": 1.0, "mean_return": 5.0}
    policy = ProgressReport(
        doing="",
        seconds=0.0,
        counters={"payloads": 8, "bytes": 100, "step": 1, "mean_return": 2.5, "read_seconds": 0.25},
        labels={"transfer": "reference+inline", "lane": "shm"},
    )
    plain, hostile = (
        report(tmp_path, config_of(), [metrics], status_of(policy.model_copy(update={"metrics": metrics})))
        for metrics in ({}, users)
    )
    assert hostile.pop("metrics") == users
    assert plain.pop("metrics") == {}
    assert hostile == plain
    assert (plain["payloads"], plain["bytes"], plain["lost"], plain["mean_return"]) == (8, 100, 0, 2.5)
    assert (plain["transfer"], plain["lane"], plain["read_seconds"]) == ("reference+inline", "shm", 0.25)
    assert plain["counters"]["policy-0"] == policy.counters


def test_summary_has_a_lane_and_a_mean_return_where_there_are_any(tmp_path: Path) -> None:
    policy = ProgressReport(doing="", seconds=0.0, counters={"payloads": 8}, labels={"transfer": "inline"})
    summary = report(tmp_path, config_of(), [{}], status_of(policy))
    assert summary["transfer"] == "inline"
    assert {"lane", "mean_return"} & summary.keys() == set()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_figure_that_is_not_finite_is_null_in_the_summary(tmp_path: Path, value: float) -> None:
    counters = dict.fromkeys(("mean_return", "payloads", "read_seconds", "staleness_max"), value)
    summary = report(
        tmp_path, config_of(), [{}], status_of(ProgressReport(doing="", seconds=0.0, counters=counters))
    )
    assert summary["mean_return"] is None
    assert (summary["payloads"], summary["read_seconds"], summary["staleness_max"]) == (0, 0.0, 0)
    assert summary["counters"]["policy-0"] == dict.fromkeys(counters)


@pytest.mark.parametrize(
    ("own", "steps"),
    [
        ({"mean_return": 0.5}, [{}, {"accuracy": 0.4}]),
        ({"mean_return": None}, [{"mean_return": None, "accuracy": None}, {"mean_return": 1.0}]),
        ({}, [{}, {}]),
    ],
    ids=["own", "not finite", "none"],
)
def test_plot_is_drawn_whatever_returns_there_are(
    tmp_path: Path, own: dict[str, float | None], steps: list[dict[str, float | None]]
) -> None:
    pytest.importorskip("matplotlib")
    report(tmp_path, config_of(), steps, own=own)
    assert (tmp_path / "returns.png").stat().st_size > 10_000


@pytest.mark.parametrize("metric", ["$\\frac$", "a$", "_x", "a\nb"])
def test_plot_shows_any_name_of_a_metric(tmp_path: Path, metric: str) -> None:
    pytest.importorskip("matplotlib")
    config = config_of()
    assert config.stop is not None
    stop = config.stop.model_copy(update={"metric": metric})
    report(tmp_path, config.model_copy(update={"stop": stop}), [{metric: 0.5}, {metric: 1.0}])
    assert (tmp_path / "returns.png").stat().st_size > 10_000


@pytest.mark.parametrize(("job", "name"), [({}, "returns.png"), ({"plot": "accuracy.png"}, "accuracy.png")])
def test_plot_has_the_name_that_the_job_gives_it(tmp_path: Path, job: dict[str, str], name: str) -> None:
    pytest.importorskip("matplotlib")
    report(tmp_path, config_of(**job), [{"mean_return": 0.5}, {"mean_return": 0.6, "accuracy": 0.4}])
    assert [path.name for path in tmp_path.glob("*.png")] == [name]
    assert (tmp_path / name).stat().st_size > 10_000


def test_plot_without_a_name_is_not_drawn(tmp_path: Path) -> None:
    report(tmp_path, config_of(plot=""), [{"mean_return": 0.5}])
    assert list(tmp_path.glob("*.png")) == []


@pytest.mark.parametrize(("name", "missing"), [("summary.json", "no summary"), ("returns.png", "no plot")])
def test_file_that_cannot_be_written_is_a_warning_and_not_the_end_of_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, missing: str
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / name).mkdir()
    (line,) = write_report(
        *(with_metrics(tmp_path, [{"mean_return": 0.5}]), config_of(), None),
        seconds=3.0, exit_code=1, reason="not solved within 3 steps", first_step=0,
    )  # fmt: skip
    assert "not solved within 3 steps, after 3.0 s; see " in line
    assert line.endswith(f" ({missing}: Is a directory)")
    assert missing in caplog.text
    others = {"summary.json", "returns.png"} - {name}
    assert all((tmp_path / other).is_file() for other in others)


def test_plot_that_its_library_cannot_draw_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = pytest.importorskip("matplotlib.figure")

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such font")

    monkeypatch.setattr(figure.Figure, "savefig", fail)
    summary = report(tmp_path, config_of(), [{"mean_return": 0.5}])
    assert summary["steps"] == 1
    assert "no such font" in caplog.text
    assert list(tmp_path.glob("*.png")) == []


def test_plot_replaces_a_symbolic_link_and_does_not_follow_it(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "victim").write_text("content")
    (tmp_path / "returns.png").symlink_to(tmp_path / "victim")
    report(tmp_path, config_of(), [{"mean_return": 0.5}])
    assert not (tmp_path / "returns.png").is_symlink()
    assert (tmp_path / "victim").read_text() == "content"
