import subprocess
import sys
from importlib.metadata import version
from pathlib import Path


def dray(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "dray.cli.app", *arguments], capture_output=True, text=True, timeout=60
    )


def test_version_is_printed() -> None:
    ended = dray("--version")
    assert (ended.returncode, ended.stdout) == (0, f"dray {version('dray')}\n")


def test_wrong_usage_exits_with_two(tmp_path: Path) -> None:
    assert dray("run").returncode == 2
    assert dray("run", "job.toml", "--unknown").returncode == 2
    assert dray("jump").returncode == 2


def test_unreadable_job_file_is_one_line(tmp_path: Path) -> None:
    ended = dray("run", str(tmp_path / "job.toml"))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: job file = ")
    assert ended.stderr.count("\n") == 1


def test_error_of_our_own_is_not_taken_for_a_job_that_failed() -> None:
    program = (
        "import sys, dray.cli.app as app\n"
        "def load_job(*_): raise RuntimeError('impossible')\n"
        "app.load_job = load_job\n"
        "sys.argv = ['dray', 'run', 'job.toml']\n"
        "app.main()\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 14
    assert "RuntimeError: impossible" in ended.stderr
