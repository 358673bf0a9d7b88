"""`dray doctor` as a user runs it: in a process of its own, with real transfers."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

# Keeps `ucxx` from being found, as in an environment without it, and then runs the command.
WITHOUT_UCXX = """
import sys
from importlib.machinery import PathFinder

class WithoutUcxx(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "ucxx" else super().find_spec(name, path, target)

sys.meta_path[:] = [WithoutUcxx if finder is PathFinder else finder for finder in sys.meta_path]
from dray.cli.app import main
main()
"""

needs_ucxx = pytest.mark.skipif(importlib.util.find_spec("ucxx") is None, reason="ucxx is not installed")


def run_doctor(*arguments, start=("-m", "dray.cli.app"), **environment):
    return subprocess.run(
        [sys.executable, *start, "doctor", *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )


def report(*arguments, **options):
    done = run_doctor("--json", *arguments, **options)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.fixture(scope="module")
def here():
    return report()


def test_every_lane_of_this_machine_is_proved_by_a_transfer(here):
    code, found = here
    assert code == 0
    assert found["ok"]
    for lane in ("shm", "tcp"):
        assert found["lanes"][lane]["works"], found["lanes"][lane]
        assert found["lanes"][lane]["nbytes"] > 1 << 20
        assert found["lanes"][lane]["seconds"] > 0


@needs_ucxx
def test_the_ucx_lane_works_where_ucxx_is_installed(here):
    _, found = here
    assert found["lanes"]["ucx"]["works"], found["lanes"]["ucx"]


def test_without_ucxx_the_lane_is_missing_and_the_report_states_what_to_install():
    code, found = report(start=("-c", WITHOUT_UCXX))
    assert code == 0
    assert found["lanes"]["shm"]["works"]
    assert not found["lanes"]["ucx"]["works"]
    assert found["lanes"]["ucx"]["detail"] == "the ucxx package is not installed"
    assert "pip install 'dray-rl[ucxx]'" in found["lanes"]["ucx"]["remedy"]


def test_without_ucxx_requiring_the_lane_fails():
    done = run_doctor("--require", "ucx", start=("-c", WITHOUT_UCXX))
    assert done.returncode == 1
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("ucx: does not work")]
    assert "pip install" in line


@needs_ucxx
def test_ucx_that_may_not_use_a_needed_transport_is_reported_with_its_reason():
    code, found = report("--require", "ucx", UCX_TLS="self")
    assert code == 1
    assert not found["lanes"]["ucx"]["works"]
    assert "Unreachable" in found["lanes"]["ucx"]["detail"]
    assert "UCX_TLS" in found["lanes"]["ucx"]["remedy"]
    assert found["lanes"]["tcp"]["works"]


def test_a_runtime_directory_that_cannot_be_used_breaks_the_shm_lane_only(tmp_path):
    taken = tmp_path / "file"
    taken.touch()
    code, found = report(DRAY_RUNTIME_DIR=str(taken))
    assert code == 1
    assert str(taken) in found["lanes"]["shm"]["detail"]
    assert "DRAY_RUNTIME_DIR" in found["lanes"]["shm"]["remedy"]
    assert found["lanes"]["tcp"]["works"]


def test_plain_lines_where_there_is_no_terminal():
    done = run_doctor()
    assert done.returncode == 0
    printed = done.stdout.splitlines()
    assert printed[0].startswith("shm: works: ")
    assert any(line.startswith("redis server: ") for line in printed)
    assert not any("│" in line for line in printed)


@pytest.mark.parametrize("arguments", [("--require", "rdma"), ("--timeout", "0")])
def test_a_wrong_option_is_named_in_one_line(arguments):
    done = run_doctor(*arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert arguments[0] in line
    assert "is not allowed" in line
