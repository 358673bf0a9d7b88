"""Sandboxes that refuse system calls: each is named, with what must be allowed."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from job_runner import CLASSES, JOB

TESTS = Path(__file__).parents[1]

SERVE = """
import json, sys
from dray import *
from dray.system_calls import refused_calls
from forbidding import forbid

call, code, reads = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "reader"
ring = SharedRingBuffer(1, 64) if reads else None
server = PayloadServer(ring, lanes="shm") if reads else None
ref = server.put_bytes(b"payload") if reads else None
forbid(call, code=code)
try:
    if reads:
        PayloadClient().read_bytes(ref)
    else:
        PayloadServer(SharedRingBuffer(1, 64), lanes="shm")
except ConfigError as error:
    print(json.dumps([str(error), error.value, list(refused_calls())]))
"""

COMMAND = """
import sys
from forbidding import forbid
forbid(*sys.argv.pop(1).split(","))
from dray.cli.app import main
main()
"""


def run(script: str, *arguments: object, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )


@pytest.mark.parametrize(
    ("call", "code", "role"),
    [
        ("memfd_create", errno.EPERM, "server"),
        ("memfd_create", errno.ENOSYS, "server"),
        ("madvise", errno.EPERM, "server"),
        ("flock", errno.EPERM, "server"),
        ("madvise", errno.EPERM, "reader"),
    ],
)
def test_a_refused_system_call_is_a_config_error_that_names_it(call: str, code: int, role: str) -> None:
    done = run(SERVE, call, code, role)
    assert done.returncode == 0, done.stderr
    text, value, refused = json.loads(done.stdout)
    assert text.startswith(f"system call {call} is refused ({os.strerror(code)}): must be allowed by the sandbox")
    assert value == call
    assert refused == [call]


def test_doctor_names_the_system_calls_that_are_refused_and_what_must_allow_them() -> None:
    done = run(COMMAND, "memfd_create,flock", "doctor", "--timeout", "10")
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("shm: does not work: ") and "memfd_create is refused" in line for line in lines)
    assert "system calls: refused: memfd_create, flock" in lines
    (remark,) = [line for line in lines if line.startswith("remark: the system calls")]
    assert "must be allowed by the sandbox" in remark


def test_a_job_where_a_system_call_is_refused_ends_with_two_and_one_line(tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text(CLASSES)
    (tmp_path / "job.toml").write_text(JOB)
    for call in ("pidfd_open", "flock"):
        done = run(COMMAND, call, "run", "job.toml", "--output", "out", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"error: system call {call} is refused")
