"""`dray logs` and `dray top` with real jobs, `dray top` on a pseudo-terminal."""

import codecs
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest
from job_runner import CLASSES, job_settings, running
from waiting import wait_until

from dray.clock import Deadline

DRAY = (sys.executable, "-m", "dray.cli.app")
BOUND = 60.0
PRINTED = "<script>\x1b[2J\x1b[31mred"
ESCAPED = "<script>\\x1b[2J\\x1b[31mred"
PRINTING = CLASSES.replace(
    "def rollout(self, work_item):", f"def rollout(self, work_item):\n        print({PRINTED!r}, flush=True)"
)


def dray(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*DRAY, *words], cwd=folder, capture_output=True, text=True, timeout=BOUND)


class Terminal:
    """A command on a pseudo-terminal of 80 columns and 24 lines, which does not control it."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.end, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.mode = termios.tcgetattr(inner)
        environment = {**os.environ, "TERM": "xterm-256color"}
        environment.pop("COLUMNS", None)
        self.process = subprocess.Popen(
            [*DRAY, *words],
            cwd=folder,
            stdin=inner,
            stdout=inner,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        self.inner: int | None = inner
        self.text = ""
        self.decode = codecs.getincrementaldecoder("utf-8")().decode

    def wait_for(self, words: str) -> None:
        """Read what is shown until `words` come."""
        deadline = Deadline.after(BOUND)
        while words not in self.text:
            assert select.select([self.end], [], [], deadline.remaining)[0], self.text
            self.text += self.decode(os.read(self.end, 65536))

    def wait(self) -> int:
        """The exit code, once all that is shown was read."""
        deadline = Deadline.after(BOUND)
        while self.process.poll() is None:
            assert not deadline.expired, self.text
            if select.select([self.end], [], [], 0.05)[0]:
                self.text += self.decode(os.read(self.end, 65536))
        while select.select([self.end], [], [], 0)[0]:
            self.text += self.decode(os.read(self.end, 65536))
        return self.process.returncode

    @property
    def plain(self) -> str:
        """What was shown so far, without colours and movements of the cursor."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.text)

    def errors(self) -> str:
        """What the command, which has ended, has written to stderr."""
        assert self.process.stderr is not None
        return self.process.stderr.read().decode()

    def close(self) -> None:
        """The terminal is gone. Twice is fine."""
        for descriptor in (self.inner, self.end):
            if descriptor is not None and descriptor >= 0:
                os.close(descriptor)
        self.inner, self.end = None, -1


@contextmanager
def on_terminal(folder: Path, *words: str) -> Iterator[Terminal]:
    terminal = Terminal(folder, *words)
    try:
        yield terminal
    finally:
        if terminal.process.poll() is None:
            terminal.process.kill()
        terminal.process.wait()
        assert terminal.process.stderr is not None
        terminal.process.stderr.close()
        terminal.close()


def until(words: str, stream: IO[str]) -> str:
    """What comes from `stream` until a line with `words`."""
    deadline, text = Deadline.after(BOUND), ""
    while words not in text:
        assert select.select([stream], [], [], deadline.remaining)[0], text
        line = stream.readline()
        assert line, text
        text += line
    return text


# --- dray logs ---------------------------------------------------------------------------------------------------


def test_logs_are_shown_of_a_running_job_followed_to_its_end_and_shown_of_an_ended_one(tmp_path: Path) -> None:
    settings = job_settings("stop.at_least=200")
    with running(tmp_path, *settings, classes=PRINTING) as job:
        job.wait_for("started controller")
        command = [*DRAY, "logs", "out", "--follow", "--lines", "5"]
        with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, bufsize=1) as following:
            assert following.stdout is not None
            text = until(f"rollout-0   {ESCAPED}\n", following.stdout)
            assert job.process.poll() is None, "new lines come while the job runs"
            shown = dray(tmp_path, "logs", "out", "rollout-0", "--lines", "3")
            assert (shown.returncode, len(shown.stdout.splitlines())) == (0, 3)
            assert {line.split()[0] for line in shown.stdout.splitlines()} == {"rollout-0"}
            rest, _ = following.communicate(timeout=BOUND)
        assert following.returncode == 0
        assert job.end() == 0, job.story()
        text += rest
    last = (job.output / "logs" / "supervisor.log").read_text().splitlines()[-1]
    assert text.splitlines()[-1] == f"supervisor  {last}"
    assert "\x1b" not in text
    ended = dray(tmp_path, "logs", "out", "--lines", "100000")
    names = {line.split()[0] for line in ended.stdout.splitlines() if not line.startswith(" ")}
    assert {"controller", "policy-0", "rollout-0", "rollout-1", "supervisor"} <= names
    times = re.findall(r"^\S+ +(\d{4}-\d\d-\d\d \S+) ", ended.stdout, re.MULTILINE)
    assert len(times) > 20
    assert times == sorted(times)


def test_name_of_no_process_is_an_error_that_lists_those_that_exist(tmp_path: Path) -> None:
    logs = tmp_path / "out" / "logs"
    logs.mkdir(parents=True)
    for name in ("controller", "rollout-0"):
        (logs / f"{name}.log").write_text("x\n")
    wrong = dray(tmp_path, "logs", "out", "rollout-7")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "error: REPLICA = 'rollout-7' is not allowed: must be one of controller, rollout-0\n"
    nowhere = dray(tmp_path, "logs", "elsewhere")
    assert nowhere.returncode == 2
    assert "OUTPUT = 'elsewhere' is not allowed: must be the output folder of a job" in nowhere.stderr


def test_newest_run_is_shown_where_none_is_running_and_following_it_ends_at_once(tmp_path: Path) -> None:
    for number in (1, 2):
        logs = tmp_path / "outputs" / "small" / f"00{number}" / "logs"
        logs.mkdir(parents=True)
        (logs / "policy-0.log").write_text(f"run {number}\n")
        os.utime(logs, (number, number))
    shown = dray(tmp_path, "logs", "--follow")
    assert (shown.returncode, shown.stdout) == (0, "policy-0  run 2\n")


def test_logs_of_a_run_that_took_several_attempts_are_those_of_the_newest(tmp_path: Path) -> None:
    for attempt in ("1.1", "1.2"):
        logs = tmp_path / "out" / "parts" / attempt / "logs"
        logs.mkdir(parents=True)
        (logs / "policy-0.log").write_text(f"attempt {attempt}\n")
    (tmp_path / "out" / "latest").symlink_to("parts/1.2")
    shown = dray(tmp_path, "logs", "out", "policy-0")
    assert (shown.returncode, shown.stdout) == (0, "policy-0  attempt 1.2\n")


# --- dray top ----------------------------------------------------------------------------------------------------


def test_top_shows_a_job_and_ends_with_q_ctrl_c_and_the_job(tmp_path: Path) -> None:
    with running(tmp_path, *job_settings("stop.at_least=1e9", "rollout.args={pause=0.02}")) as job:
        job.wait_until(lambda: job.step() > 1, "training steps")
        with on_terminal(tmp_path, "top", "out") as terminal:
            terminal.wait_for("q or Ctrl-C ends dray top")
            terminal.wait_for("/16")
            os.write(terminal.end, b"q")
            assert (terminal.wait(), terminal.errors()) == (0, "")
            assert re.search(r"small: running for .* step \d+ of 100000", terminal.plain)
            assert re.search(r"ring fill +\d+ %", terminal.plain)
            assert terminal.inner is not None
            assert termios.tcgetattr(terminal.inner) == terminal.mode
        with on_terminal(tmp_path, "top", "out") as terminal:
            terminal.wait_for("q or Ctrl-C ends dray top")
            terminal.process.send_signal(signal.SIGINT)
            assert (terminal.wait(), terminal.errors()) == (0, "")
        once = dray(tmp_path, "top", "out", "--once")
        assert (once.returncode, once.stderr) == (0, "")
        assert once.stdout.startswith("small: running for ")
        assert "\x1b" not in once.stdout
        with on_terminal(tmp_path, "top", "out") as terminal:
            terminal.wait_for("q or Ctrl-C ends dray top")
            job.process.send_signal(signal.SIGINT)
            assert job.end() == 130, job.story()
            assert (terminal.wait(), terminal.errors()) == (0, "")
            assert re.search(r"job small has ended.*interrupted by SIGINT\s*$", terminal.plain), terminal.plain


def test_top_of_a_job_that_was_killed_reports_that_it_has_ended(tmp_path: Path) -> None:
    with running(tmp_path, *job_settings("stop.at_least=1e9")) as job:
        job.wait_until(lambda: job.step() > 1, "training steps")
        with on_terminal(tmp_path, "top", "out") as terminal:
            terminal.wait_for("q or Ctrl-C ends dray top")
            job.process.kill()
            assert (terminal.wait(), terminal.errors()) == (0, "")
            assert "has ended" in terminal.text


@pytest.mark.parametrize("without", [">file", ">&-"])
def test_top_without_a_terminal_is_an_error_that_names_the_other_way(tmp_path: Path, without: str) -> None:
    run = tmp_path / "out" / ".run"
    run.mkdir(parents=True)
    command = ["sh", "-c", f'exec "$@" {without}', "sh", *DRAY, "top", "out"]
    ended = subprocess.run(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, timeout=BOUND)
    assert ended.returncode == 2
    assert (
        ended.stderr
        == "error: standard output is no terminal: use a terminal, or `dray top --once` for one frame\n"
    )


def test_top_whose_terminal_is_gone_ends_without_a_traceback(tmp_path: Path) -> None:
    with running(tmp_path, *job_settings("stop.at_least=1e9")) as job:
        job.wait_until(lambda: job.step() > 1, "training steps")
        with on_terminal(tmp_path, "top", "out") as terminal:
            terminal.wait_for("q or Ctrl-C ends dray top")
            terminal.close()
            wait_until(lambda: terminal.process.poll() is not None, "the end of dray top", BOUND)
            assert terminal.process.returncode == 1
            assert terminal.errors() == ""
        assert job.process.poll() is None
