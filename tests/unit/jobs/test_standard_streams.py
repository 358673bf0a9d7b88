"""Processes whose standard streams are closed, full or gone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CLOSED = """
import os, sys
from dray.jobs.standard_streams import open_missing_streams
open_missing_streams()
with open("file", "w") as file:
    assert file.fileno() > 2
    print("to stdout"); print("to stderr", file=sys.stderr)
    os.write(1, b"to 1"); os.write(2, b"to 2")
    sys.stdout.fileno(), sys.stderr.fileno()
sys.exit(7)
"""

FLUSHED = """
import sys
from dray.jobs.standard_streams import flush_streams
print("lost")
print("lost", end="", file=sys.stderr)
flush_streams()
sys.exit(7)
"""


BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def exit_code(program: str, redirection: str, folder: Path) -> int:
    """The exit code of a program that a shell starts with a redirection."""
    command = ["sh", "-c", f'"$0" -c "$1" {redirection}; echo $? >code', sys.executable, program]
    subprocess.run(command, cwd=folder, env=BUFFERED, capture_output=True, timeout=60, check=True)
    return int((folder / "code").read_text())


@pytest.mark.parametrize("redirection", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_file_that_is_opened_is_never_taken_for_a_stream_that_was_closed(tmp_path: Path, redirection: str) -> None:
    assert exit_code(CLOSED, redirection, tmp_path) == 7
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize("redirection", [">/dev/full", ">/dev/full 2>&1"])
def test_stream_that_cannot_be_written_leaves_the_exit_code(tmp_path: Path, redirection: str) -> None:
    assert exit_code(FLUSHED, redirection, tmp_path) == 7


def test_pipe_without_a_reader_leaves_the_exit_code(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        command = [sys.executable, "-c", FLUSHED]
        ended = subprocess.run(command, env=BUFFERED, stdout=pipe, stderr=pipe, timeout=60, check=False)
    assert ended.returncode == 7
