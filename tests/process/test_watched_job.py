"""A running job as its user sees it from outside: its page's examples, its logs, and how it is resumed."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from job_runner import JobRun, job_settings, running

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "runtime.md"


def examples(language: str) -> list[str]:
    """The examples of a language in the section on running jobs."""
    section = PAGE.read_text(encoding="utf-8").split("\n## Reach a running job\n")[1].split("\n## ")[0]
    found = re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)
    assert found
    return found


def printed(command: Sequence[str], folder: Path) -> str:
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout


def command_lines(job: JobRun) -> list[str]:
    return [" ".join(process.cmdline()) for process in job.processes()]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_z12_running_job_is_reached_logs_at_its_level_and_prints_how_it_is_resumed(tmp_path: Path) -> None:
    token_file = tmp_path / "token"
    settings = job_settings(
        "stop.at_least=1e9", "policy.checkpoint_every=5", f'controller.token_file="{token_file}"', "job.seed=7"
    )
    with running(tmp_path, *settings, "--log-level", "warning") as job:
        job.wait_for_checkpoint()
        token = token_file.read_text().strip()

        (shell,) = examples("sh")
        answers = printed(["bash", "-euo", "pipefail", "-c", shell], job.output)
        assert '"phase":"running"' in answers
        assert "# TYPE dray" in answers
        assert '"openapi":' in answers
        (program,) = examples("python")
        assert "running ['" in printed([sys.executable, "-c", program], job.output)
        shown = json.loads(printed([sys.executable, "-m", "dray.cli.app", "status", "out", "--json"], tmp_path))
        assert (shown["job"], shown["phase"]) == ("small", "running")
        assert json.loads((job.output / ".run" / "controller.json").read_text())["token"] == token
        assert [line for line in command_lines(job) if token in line] == []

        job.process.send_signal(signal.SIGINT)
        assert job.end() == 130, job.story()
        step = job.checkpoint()["step"]
        line = f"resume with: dray run --resume job.toml --output out (checkpoint of step {step})\n"
        assert job.text.endswith(line), job.story()
    assert len(job.logs()) == 5
    written = [job.text, *(log.read_text() for log in job.logs())]
    assert [text for text in written if token in text or " INFO " in text] == []

    with running(tmp_path, "--resume", *job_settings(f"stop.at_least={step + 1}")) as job:
        assert job.end() == 0, job.story()
        kept = f'policy.checkpoint_every=5, controller.token_file="{token_file}", job.seed=7, job.log_level='
        assert job.lines[:2] == [
            f"resuming from checkpoint out/checkpoint, step {step}",
            f"options kept from the start of the run: {kept}warning",
        ]
        assert "resume with" not in job.text
    assert token_file.read_text().strip() == token
    assert [log for log in job.logs() if " INFO " in log.read_text()] == []
    assert (job.output / "options.json").stat().st_mode & 0o777 == 0o600


def test_z12_file_of_the_token_that_others_can_read_is_refused_before_anything_starts(tmp_path: Path) -> None:
    token_file = tmp_path / "token"
    token_file.write_text("0123456789abcdef")
    token_file.chmod(0o644)
    with running(tmp_path, *job_settings(f'controller.token_file="{token_file}"')) as job:
        assert job.end() == 2
        assert "a file for its owner only, mode 600; its mode is 644" in job.text
    assert not job.output.exists()


def test_z10_job_that_is_interrupted_before_its_first_checkpoint_reports_that_nothing_can_be_resumed(
    tmp_path: Path,
) -> None:
    with running(tmp_path) as job:
        job.wait_until((job.output / ".run").exists, "the folder of the run")
        job.process.send_signal(signal.SIGINT)
        assert job.end() == 130, job.story()
        # The folder exists while the job is checked, and afterwards.
        endings = (
            "interrupted by SIGINT before anything was started\n",
            "nothing to resume: the run had not begun\n",
        )
        assert job.text.endswith(endings)
