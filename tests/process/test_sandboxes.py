"""Sandboxes that refuse system calls: each is named, with what must be allowed."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from isolation import run_isolated
from job_runner import CLASSES, JOB

from dray.transport.lanes.ucx_worker import UCXX_AVAILABLE

TESTS = Path(__file__).parents[1]

SERVE = """
import json, sys
from dray import *
from dray.errors import *
from dray.system_calls import refused_calls
from forbidding import forbid

call, code, reads = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "reader"
ring = SharedRingBuffer(1, 64) if reads else None
server = PayloadServer(ring, lane="shm") if reads else None
ref = server.put_bytes(b"payload") if reads else None
forbid(call, code=code)
try:
    if reads:
        PayloadClient().read_bytes(ref)
    else:
        PayloadServer(SharedRingBuffer(1, 64), lane="shm")
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


NO_IPV6 = """
import errno
from dray import *
from dray.errors import *
from forbidding import forbid
ring = SharedRingBuffer(1, 64)
forbid("socket", code=errno.EAFNOSUPPORT)
try:
    PayloadServer(ring, lane=("tcp",), host="::1")
except ConfigError as error:
    print(error)
"""


def test_an_ipv6_address_where_the_kernel_has_no_ipv6_is_a_config_error() -> None:
    done = run(NO_IPV6)
    assert done.stdout.startswith("host = '::1' is not allowed: an address of a kind that this machine's")


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
        assert done.returncode == 2
        assert "started" not in done.stdout
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"error: system call {call} is refused")


NO_SHARED_FOLDER = """
import dataclasses, json, logging
from dray import *
from dray.errors import *
from dray.clock import Deadline

lines = []
class Kept(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())
logging.getLogger("dray").addHandler(Kept())

found, secret = {}, bytes(32)
with (
    SharedRingBuffer(2, 64) as ring,
    PayloadServer(ring, threads=2, secret=secret) as server,
    PayloadClient(secret=secret) as client,
):
    lanes = [endpoint.partition(":")[0] for endpoint in server.endpoints]
    found["server"] = [lanes, lines.copy()]
    lines.clear()
    for _ in range(2):
        put = server.put_bytes(b"payload")
        endpoints = ("ucx:127.0.0.1:1", put.endpoints[-1])
        elsewhere = PayloadRef(put.producer, put.slot, put.sequence, put.nbytes, endpoints)
        assert bytes(client.read_bytes(elsewhere)) == b"payload"
    found["client"] = [dataclasses.asdict(client.statistics()), lines.copy()]
with SharedRingBuffer(1, 64) as ring:
    try:
        PayloadServer(ring, lane=("ucx",))
    except ConfigError as error:
        found["server of ucx"] = str(error)
with PayloadClient(lane="ucx") as client:
    try:
        client.read_bytes(elsewhere)
    except Unreachable as error:
        found["client of ucx"] = str(error)
print(json.dumps(found))
"""


@pytest.mark.skipif(not UCXX_AVAILABLE, reason="the ucxx package is not installed")
def test_without_a_shared_folder_auto_works_without_ucx_and_warns_once(tmp_path: Path) -> None:
    (line,) = run_isolated(NO_SHARED_FOLDER, tmp_path, setup="mount -t tmpfs -o ro none /dev/shm")
    found = json.loads(line)
    why = "UCX cannot be used on this machine: Shared memory error; it needs a /dev/shm that can be written to"
    lanes, lines = found["server"]
    assert lanes == ["unix", "unix", "tcp", "tcp"]
    assert lines == [f"serving without the ucx lane: {why}"]
    statistics, lines = found["client"]
    assert lines == [f"this client cannot use the ucx lane: {why}"]
    assert (statistics["reads_by_lane"], statistics["retries"], statistics["quarantined"]) == ({"tcp": 2}, 0, [])
    assert found["server of ucx"] == f"lane = ('ucx',) is not allowed: lanes that this machine can use ({why})"
    assert found["client of ucx"] == why
