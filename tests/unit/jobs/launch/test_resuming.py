"""What a run that did not finish prints about how it is resumed."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from dray.jobs.folder import JobFolder
from dray.jobs.launch.local import how_to_resume
from dray.jobs.launch.output import resume_line
from dray.jobs.replica.checkpoint import CheckpointState, save_checkpoint


def with_checkpoint(root: Path, step: int) -> JobFolder:
    folder = JobFolder(root)
    root.mkdir(parents=True)
    save_checkpoint(folder.checkpoint, CheckpointState(step, step, 8 * step), lambda _: None)
    return folder


def test_run_with_a_checkpoint_prints_the_command_and_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = with_checkpoint(tmp_path / "outputs" / "small" / "003", 120)
    assert how_to_resume(folder, tmp_path / "job.toml", 400) == (
        "resume with: dray run --resume job.toml --output outputs/small/003 (checkpoint of step 120)"
    )
    state = CheckpointState(120, 120, 960)
    assert resume_line(folder, state) == "resuming from checkpoint outputs/small/003/checkpoint, step 120"


def test_command_can_be_pasted_into_a_shell_whatever_the_folder_is_called(tmp_path: Path) -> None:
    root = tmp_path / "it's a folder; $HOME"
    line = how_to_resume(with_checkpoint(root, 5), root / "job.toml", 10)
    words = shlex.split(line.removeprefix("resume with: ").removesuffix(" (checkpoint of step 5)"))
    assert words == ["dray", "run", "--resume", str(root / "job.toml"), "--output", str(root)]


def test_command_can_be_pasted_into_a_shell_where_the_folder_is_not_utf_8(tmp_path: Path) -> None:
    root = tmp_path / "it's \udcff"
    line = how_to_resume(with_checkpoint(root, 5), tmp_path / "job.toml", 10)
    assert line.isprintable()
    word = line.partition("--output ")[2].removesuffix(" (checkpoint of step 5)")
    shown = subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True, timeout=30, check=True)
    assert shown.stdout == os.fsencode(root)


def test_run_without_a_checkpoint_prints_how_it_is_restarted(tmp_path: Path) -> None:
    (tmp_path / "options.json").write_text("")
    line = how_to_resume(JobFolder(tmp_path), tmp_path / "job.toml", 10)
    command = f"dray run --resume {tmp_path}/job.toml --output {tmp_path}"
    assert line == f"restart with: {command} (the run has no checkpoint)"


def test_run_that_started_nothing_reports_that_nothing_can_be_resumed(tmp_path: Path) -> None:
    assert (
        how_to_resume(JobFolder(tmp_path), tmp_path / "job.toml", 10) == "nothing to resume: the run had not begun"
    )


def test_run_whose_steps_are_done_names_the_key_that_ended_it(tmp_path: Path) -> None:
    line = how_to_resume(with_checkpoint(tmp_path / "out", 10), tmp_path / "job.toml", 10)
    assert line == "nothing to resume: the checkpoint is of step 10, the last one of job.max_steps"


def test_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    folder = with_checkpoint(tmp_path / "out", 3)
    (folder.checkpoint / "state.json").write_text("[]")
    line = how_to_resume(folder, tmp_path / "job.toml", 10)
    assert line.startswith("nothing to resume: ")
    assert os.fspath(folder.checkpoint) in line
