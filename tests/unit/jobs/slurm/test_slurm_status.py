"""The output of `dray slurm status`, from the files of a run and Slurm's queue."""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path

import pytest
from rich.console import Console

from dray.errors import ConfigError
from dray.jobs.job_file import parse_job
from dray.jobs.slurm.plan import Plan
from dray.jobs.slurm.run_state import RunEvent, RunRecord, RunState, cancel_marker
from dray.jobs.slurm.status import find_runs, plain_lines, read_progress, shown_state, status_table, view_run

JOB = {
    "job": {"name": "small", "max_steps": 100},
    "rollout": {"worker": "small.py:Worker"},
    "policy": {"trainer": "small.py:Trainer", "batch_size": 8},
}

USERS = {"step": 99.0, "seconds": 0.0, "bytes": 1.0, "mean_return": -1.0}
"""Metrics of the trainer, which are not shown."""


def make_run(folder: Path, record: RunRecord, job_id: str = "12") -> Path:
    Plan(parse_job(JOB), folder / "job.toml", folder, b"s" * 32).write()
    record.write(folder)
    (folder / ".slurm" / "job_id").write_text(f"{job_id}\n")
    return folder


def metrics(*lines: tuple[int, float, int, float]) -> str:
    """The lines of `metrics.jsonl` for tuples of (step, seconds, bytes, mean return)."""
    return "".join(
        json.dumps({"step": step, "seconds": seconds, "bytes": nbytes, "mean_return": mean, "metrics": USERS})
        + "\n"
        for step, seconds, nbytes, mean in lines
    )


def test_running_run_shows_its_progress(tmp_path: Path) -> None:
    record = RunRecord(RunState.SUBMITTED, 2).begin("12", 0).end(RunEvent.FAIL, 1, "it broke").begin("12", 0)
    folder = make_run(tmp_path / "run", record)
    (folder / "metrics.jsonl").write_text(metrics((1, 1.0, 0, 9.0), (2, 3.0, 5_000_000, 12.5)))
    view = view_run(folder, {"12": "running"})
    shown = ("12", os.path.relpath(folder), "running", "running", "1.2", "2/100", "12.5", "2.50", "1", "1")
    assert view.cells[0] == shown[0]
    assert view.cells[2:] == shown[2:]
    (remark,) = view.remarks
    assert remark.startswith("part 1, attempt 1 ended")
    assert remark.endswith("it broke")


def test_failed_run_shows_the_last_lines_of_its_head_process(tmp_path: Path) -> None:
    record = RunRecord(RunState.SUBMITTED, 0).begin("12", 0).end(RunEvent.GIVE_UP, 1, "it broke")
    folder = make_run(tmp_path / "run", record)
    logs = record.folder(folder).logs
    logs.mkdir(parents=True)
    (logs / "head.out").write_text("".join(f"line {number}\n" for number in range(20)))
    view = view_run(folder, {})
    assert view.state == "failed"
    assert view.remarks[1:] == tuple(f"head.out: line {number}" for number in range(12, 20))
    assert "head.out: line 19" in "\n".join(plain_lines([view]))


def test_table_has_a_row_for_each_run(tmp_path: Path) -> None:
    views = [
        view_run(make_run(tmp_path / name, RunRecord(RunState.SUBMITTED, 2), job_id), {"1": "pending (Priority)"})
        for name, job_id in (("a", "1"), ("b", "2"))
    ]
    console = Console(width=250, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    with console.file:
        console.print(status_table(views))
    shown = console.export_text()
    assert "pending (Priority)" in shown
    assert "submitted; Slurm no longer has its job" in shown


@pytest.mark.parametrize(
    ("state", "in_slurm", "cancelled", "shown"),
    [
        (RunState.RUNNING, "running", False, "running"),
        (RunState.RUNNING, "", False, "lost"),
        (RunState.RUNNING, "", True, "cancelled"),
        (RunState.REQUEUED, "pending", False, "requeued"),
        (RunState.REQUEUED, "", False, "requeued; Slurm no longer has its job"),
        (RunState.FINISHED, "", True, "finished"),
    ],
)
def test_shown_state_depends_on_the_job_in_slurm(
    state: RunState, in_slurm: str, cancelled: bool, shown: str
) -> None:
    assert shown_state(state, in_slurm, cancelled=cancelled) == shown


def test_cancelled_marker_counts_before_the_record_is_written(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", RunRecord(RunState.SUBMITTED, 2).begin("12", 0))
    assert view_run(folder, {}).state == "lost"
    cancel_marker(folder).touch()
    assert view_run(folder, {}).state == "cancelled"


def test_run_whose_job_was_cancelled_while_it_waited_is_cancelled(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", RunRecord(RunState.SUBMITTED, 2), "12")
    view = view_run(folder, {"12": "cancelled"})
    assert (view.state, view.in_slurm) == ("cancelled", "")


def test_throughput_is_that_of_the_newest_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        metrics((1, 90.0, 9_000_000, 1.0), (2, 91.0, 11_000_000, 2.0), (3, 92.0, 17_000_000, 3.0)) + '{"step": 4, '
    )
    progress = read_progress(path)
    assert (progress.step, progress.mean_return, progress.rate) == (3, 3.0, 4.0)


def test_progress_is_empty_before_the_first_step(tmp_path: Path) -> None:
    progress = read_progress(tmp_path / "metrics.jsonl")
    assert progress.step == 0
    assert math.isnan(progress.rate)
    assert progress.mean_return is None
    (tmp_path / "metrics.jsonl").write_text(metrics((1, 1.0, 10, 5.0)))
    assert math.isnan(read_progress(tmp_path / "metrics.jsonl").rate)


def test_runs_are_found_below_the_folder_that_is_named(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "outputs" / name, RunRecord(RunState.SUBMITTED, 2)) for name in ("a/001", "b/001")]
    assert find_runs([tmp_path / "outputs", runs[0]]) == runs
    assert find_runs([runs[1]]) == [runs[1]]
    with pytest.raises(ConfigError, match="must be a run folder"):
        find_runs([tmp_path / "none"])


def test_runs_of_other_users_are_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path / "run", RunRecord(RunState.SUBMITTED, 2))
    assert find_runs([tmp_path]) == [folder]
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    assert find_runs([tmp_path]) == []


def test_return_is_left_out_if_payloads_have_none_or_it_is_not_finite(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", RunRecord(RunState.SUBMITTED, 2)) / "metrics.jsonl"
    for mean in ({}, {"mean_return": None}):
        line = {"step": 4, "seconds": 1.0, "bytes": 0, **mean, "metrics": USERS}
        path.write_text(json.dumps(line) + "\n")
        assert view_run(path.parent, {}).cells[5:7] == ("4/100", "-")


def test_last_lines_of_a_log_change_nothing_on_the_terminal(tmp_path: Path) -> None:
    record = RunRecord(RunState.SUBMITTED, 0).begin("12", 0).end(RunEvent.GIVE_UP, 1, "it broke\x1b[2J")
    folder = make_run(tmp_path / "run", record)
    logs = record.folder(folder).logs
    logs.mkdir(parents=True)
    (logs / "head.out").write_text("[/red]\x1b[31m\x07\n")
    views = [view_run(folder, {})]
    console = Console(width=250, force_terminal=True, color_system=None, file=io.StringIO())
    console.print(status_table(views))
    assert isinstance(console.file, io.StringIO)
    for text in (console.file.getvalue(), "\n".join(plain_lines(views))):
        assert "head.out: [/red]\\x1b[31m\\x07" in text
        assert "it broke\\x1b[2J" in text
        assert "\x1b[31m" not in text
        assert "\x07" not in text
