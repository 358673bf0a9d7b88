"""Ctrl-C ends the checks of a job. A new user's whole path is walked in tests/system/test_packaging.py."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from new_user_path import BOUND
from waiting import ends_within

from dray.cli.new import create_job


@pytest.fixture
def dray() -> Sequence[str]:
    """The words of a command that is `dray`."""
    return sys.executable, "-m", "dray.cli.app"


@pytest.mark.parametrize("command", ["check", "run"])
def test_interrupt_ends_the_checks_of_a_job_and_leaves_nothing(
    dray: Sequence[str], tmp_path: Path, command: str
) -> None:
    create_job(tmp_path / "job")
    os.mkfifo(tmp_path / "pids")
    worker = tmp_path / "job" / "worker.py"
    # Written once the pipe is read; the import then waits until the process is ended.
    waiting = f"import os, signal\nopen({str(tmp_path / 'pids')!r}, 'w').write(str(os.getpid()))\nsignal.pause()\n"
    worker.write_text(waiting + worker.read_text())
    process = subprocess.Popen(
        [*dray, command, "job.toml"],
        cwd=tmp_path / "job",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        importing = int((tmp_path / "pids").read_text())
        process.send_signal(signal.SIGINT)
        shown, _ = process.communicate(timeout=BOUND)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert "stopped: interrupted by SIGINT before anything was started\n" in shown
    assert "Traceback" not in shown
    assert ends_within(BOUND, importing)
    assert not (tmp_path / "job" / "outputs").exists()
