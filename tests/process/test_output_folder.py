"""`dray run` and its output folder: whose it is, how it is made, and what a disk that is full does to a job."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from job_runner import CLASSES, JOB, STOP, job_settings, running
from writing import umask

SUMMARY_PAGE = Path(__file__).parents[2] / "docs" / "reference" / "runtime.md"


def lone_mount(*lines: str) -> list[str]:
    """A command line before another one, for which these lines of a shell have set up mounts of its own."""
    if os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0:
        pytest.skip("a mount of its own cannot be had")
    return ["unshare", "--mount", "sh", "-e", "-c", "\n".join((*lines, 'exec "$@"')), "sh"]


def run_command(folder: Path, *prefix: str) -> tuple[int, str]:
    """The exit code of `dray run` with the output folder ``out`` in `folder`, and the mistakes that it names."""
    (folder / "small.py").write_text(CLASSES)
    (folder / "job.toml").write_text(JOB)
    command = [*prefix, sys.executable, "-m", "dray.cli.app", "run", "job.toml", "--output", str(folder / "out")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


def test_a_run_records_its_command_its_configuration_with_defaults_and_the_versions_of_packages(
    tmp_path: Path,
) -> None:
    with running(tmp_path, *job_settings("job.max_steps=2", "rollout.slots=32")) as job:
        assert job.end() == 1, job.story()
        record = json.loads((job.output / "run.json").read_text())
        assert (job.output / "run.json").stat().st_mode & 0o777 == 0o600
        summary = job.summary()
    assert record["command"][-1] == "rollout.slots=32"
    assert record["job_file"] == str(tmp_path / "job.toml")
    assert record["config"]["rollout"]["slots"] == 32
    assert record["config"]["timeouts"]["read"] == 30.0
    assert "url" not in record["config"]["redis"]
    assert record["packages"]["numpy"] == np.__version__
    assert "pytest" not in record["packages"]
    assert datetime.fromisoformat(record["began"]) <= datetime.now(UTC)

    table = SUMMARY_PAGE.read_text(encoding="utf-8").split("### The summary\n")[1].split("\n### ")[0]
    documented = {
        name for row in re.findall(r"^\| (.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    assert documented - {"mean_return", "lane"} <= set(summary) <= documented, "every field is documented"
    for group in ("delivery", "work_items", "weights", "heirs"):
        (row,) = re.findall(rf"^\| `{group}` \| (.*)\|$", table, re.MULTILINE)
        assert set(summary[group]) <= set(re.findall(r"`(\w+)`", row))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_folder_of_another_user_is_refused_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    os.chown(tmp_path / "out", 12345, -1)
    code, printed = run_command(tmp_path)
    assert (code, len(printed.splitlines())) == (2, 1)
    assert f"job.output = '{tmp_path}/out'" in printed
    assert "its owner is 12345" in printed
    assert list((tmp_path / "out").iterdir()) == []


def test_folder_that_is_read_only_is_refused_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    mount = f'mount --bind "{tmp_path}/out" "{tmp_path}/out"', f'mount -o remount,ro,bind "{tmp_path}/out"'
    code, printed = run_command(tmp_path, *lone_mount(*mount))
    assert (code, len(printed.splitlines())) == (2, 1)
    assert (
        f"job.output = '{tmp_path}/out' is not allowed: must be a folder that can be written (Read-only" in printed
    )


def test_run_that_is_killed_before_its_first_checkpoint_is_restarted_and_no_other_user_may_write_to_any_of_it(
    tmp_path: Path,
) -> None:
    with umask(0):
        with running(tmp_path, *job_settings("policy.checkpoint_every=1000", "stop.at_least=1e9")) as job:
            job.wait_until(job.step, "a training step")
            # The policy first, which would write a checkpoint on losing the supervisor.
            job.process.send_signal(signal.SIGSTOP)
            job.only("dray.jobs.replica.policy").kill()
            job.process.kill()
            job.wait_until_gone(30)
        settings = job_settings("stop.at_least=5")
        with running(tmp_path, "--resume", *settings) as job:
            assert job.end() == 0, job.story()
            assert "no checkpoint in out: starting from the beginning" in job.text
            assert "options kept from the start of the run: policy.checkpoint_every=1000" in job.text
            assert (job.summary()["steps"], job.checkpoint()["step"]) == (5, 5)
    files = [path for path in job.output.rglob("*") if not path.is_symlink()]
    assert len(files) > 10
    assert [path for path in files if path.stat().st_mode & 0o022] == []


FILLING = """
import os, small
class Trainer(small.Trainer):
    def save(self, folder):
        super().save(folder)
        with open(self.output / "filler", "wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(bytes(4096))
            except OSError:
                filler.truncate(filler.tell() - 32768)
"""


@pytest.mark.endurance
def test_job_whose_disk_is_full_at_its_end_has_its_checkpoint_and_its_outcome_and_no_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name, text in (("small.py", CLASSES), ("filling.py", FILLING), ("job.toml", JOB + STOP)):
        (tmp_path / name).write_text(text)
    (tmp_path / "out").mkdir()
    (tmp_path / "kept").mkdir()
    options = job_settings("policy.trainer=filling.py:Trainer", "job.plot=returns.png", "stop.at_least=5")
    program = [sys.executable, "-m", "dray.cli.app", "run", "job.toml", "--output", "out", *options]
    end = f"timeout 50 {shlex.join(program)} || exit $?; rm out/filler; cp -r out/. kept"
    done = subprocess.run(
        [*lone_mount("mount -t tmpfs -o size=1m,mode=755 tmpfs out", end), "true"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("; see out (no plot: No space left on device)\n")
    assert "solved: score 5 >= 5 at step 5" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    kept = {path.name for path in (tmp_path / "kept").iterdir()}
    assert {"checkpoint", "metrics.jsonl", "summary.json", "logs"} <= kept
    assert not any("returns.png" in name for name in kept)
