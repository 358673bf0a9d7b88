import subprocess
import sys
from pathlib import Path

import pytest

from dray import __version__

JOB = """
[job]
name = "small"
max_steps = 10
[rollout]
worker = "small.py:Worker"
[policy]
trainer = "small.py:Trainer"
batch_size = 8
"""
COMMANDS_WITH_A_JOB_FILE = [["run"], ["check"], ["slurm", "submit", "--dry-run"]]


def dray(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "dray.cli.app", *arguments], capture_output=True, text=True, timeout=60
    )


def test_version_is_printed() -> None:
    ended = dray("--version")
    assert (ended.returncode, ended.stdout) == (0, f"dray {__version__}\n")


def test_wrong_usage_exits_with_two(tmp_path: Path) -> None:
    assert dray("run").returncode == 2
    assert dray("run", "job.toml", "--unknown").returncode == 2
    assert dray("jump").returncode == 2


@pytest.mark.parametrize("command", ["run", "check"])
def test_unreadable_job_file_is_one_line(tmp_path: Path, command: str) -> None:
    ended = dray(command, str(tmp_path / "job.toml"))
    assert (ended.returncode, ended.stdout) == (2, "")
    place = tmp_path / "job.toml"
    assert ended.stderr == f"error: job file {place} cannot be read: No such file or directory\n"


@pytest.mark.parametrize("command", ["run", "check"])
def test_broken_toml_is_one_line_that_names_the_line_of_the_file(tmp_path: Path, command: str) -> None:
    (tmp_path / "job.toml").write_text(JOB.replace("batch_size = 8", "batch_size = 8,"))
    ended = dray(command, str(tmp_path / "job.toml"))
    assert (ended.returncode, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"error: job file {tmp_path / 'job.toml'} cannot be read: must be TOML; ")
    assert "(at line 9, column 15)" in line


@pytest.mark.parametrize("command", ["run", "check"])
def test_every_mistake_of_a_job_file_is_a_line(tmp_path: Path, command: str) -> None:
    (tmp_path / "job.toml").write_text(JOB)
    ended = dray(command, str(tmp_path / "job.toml"), "--set", "job.sede=3", "--set", "job.lane=rdma")
    assert (ended.returncode, ended.stdout) == (2, "")
    # On a busy machine there are further lines, about slow imports.
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    keys = ["error: job.lane", "error: job.sede", "error: policy.trainer", "error: rollout.worker"]
    assert sorted(line.split(" = ")[0] for line in lines) == keys


@pytest.mark.parametrize("command", COMMANDS_WITH_A_JOB_FILE)
def test_output_that_is_no_folder_name_is_one_line(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "job.toml").write_text(JOB)
    ended = dray(*command, str(tmp_path / "job.toml"), "--output", "")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "error: --output = '' is not allowed: must be the name of a folder\n"


@pytest.mark.parametrize("command", COMMANDS_WITH_A_JOB_FILE)
def test_output_option_is_not_parsed_and_overrides_settings(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "job.toml").write_text(JOB)
    used = tmp_path / 'it\'s "odd" \\ \x7f, 100 %'
    used.mkdir()
    (used / "metrics.jsonl").touch()
    ended = dray(*command, str(tmp_path / "job.toml"), "--output", str(used), "--set", "job.output=another")
    assert ended.returncode == 2
    assert f"error: job.output = {str(used)!r} is not allowed: must be a folder without an" in ended.stderr


def test_internal_error_has_its_own_exit_code() -> None:
    program = (
        "import sys, dray.cli.app as app\n"
        "def read_job(*_): raise RuntimeError('impossible')\n"
        "app.read_job = read_job\n"
        "sys.argv = ['dray', 'run', 'job.toml']\n"
        "app.main()\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 14
    assert "RuntimeError: impossible" in ended.stderr
