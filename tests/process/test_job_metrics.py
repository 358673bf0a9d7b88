"""What the metrics of a trainer do to a job: to its figures, its end and its files."""

import json
from pathlib import Path
from typing import Any

import pytest
from job_runner import CLASSES, STOP, job_settings, running

from dray.jobs.controller.metrics import FIGURES

HOSTILE = {
    "step": 999.0,
    "payloads": -1.0,
    "bytes": float("nan"),
    "lost": 77.0,
    "staleness": float("inf"),
    "lane": 3.0,
    "mean_return": 123.0,
    "[red]x[/blue]": 1.0,
    'a "b\\\n\x1b[2J': -float("inf"),
    "\ud800": 2.0,
}
RETURNED = 'return {"score": float(self.steps)}'
HOSTILE_CLASSES = "inf, nan = float('inf'), float('nan')\n" + CLASSES.replace(
    RETURNED, f"{RETURNED[:-1]}, **{HOSTILE!r}}}"
)


def strict(text: str) -> Any:
    return json.loads(text, parse_constant=pytest.fail)


def test_misspelt_stop_metric_ends_the_job_and_a_run_with_the_right_one_resumes_from_there(tmp_path: Path) -> None:
    settings = job_settings("job.transfer=inline", "job.max_steps=200")
    misspelt = STOP.replace('"score"', '"scoer"')
    with running(tmp_path, *settings, stop_table=misspelt, classes=HOSTILE_CLASSES) as job:
        assert job.end() == 1, job.story()
        summary = job.summary()
        assert (summary["steps"], summary["solved"]) == (1, False)
        reason = "stop.metric = 'scoer' is not allowed: it must be a metric that train_step returns; step 1"
        assert reason in job.text
        assert "(did you mean 'score'?)" in job.text
        assert reason in job.log("policy-0")
        assert summary["exit_reason"].startswith(reason)
        assert job.checkpoint()["step"] == 1, "the run with the right name resumes from here"

    with running(tmp_path, "--resume", *settings, classes=HOSTILE_CLASSES) as job:
        assert job.end() == 0, job.story()
        assert "solved: score 20 >= 20 at step 20" in job.text
        summary = strict((job.output / "summary.json").read_text())
        figures = ("steps", "payloads", "lost", "stale", "mean_return", "transfer")
        assert [summary[name] for name in figures] == [20, 20 * 8, 0, 0, 8.0, "inline"]
        assert "lane" not in summary
        assert summary["bytes"] == summary["counters"]["policy-0"]["bytes"] > 20 * 8 * 256
        assert summary["counters"]["policy-0"]["step"] == 20
        users = {"score": 20.0, **HOSTILE, "bytes": None, "staleness": None, 'a "b\\\n\x1b[2J': None}
        assert summary["metrics"] == users

        lines = [strict(line) for line in (job.output / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, 21))
        assert lines[-1]["metrics"] == users
        assert (lines[-1]["mean_return"], lines[-1]["payloads"]) == (8.0, 20 * 8)

        for warning in ("'bytes' of train_step is nan at step", "'staleness' of train_step is inf at step"):
            assert job.text.count(warning) == 1
            assert job.log("policy-0").count(warning) == 2, "once for each of the two runs"
        assert "\x1b[2J" not in job.text
        known = {(each.role.value, each.reported) for each in FIGURES}
        shown = {
            (name.partition("-")[0], counter)
            for name, counters in summary["counters"].items()
            for counter in counters
        }
        assert shown <= known
