"""The check that fails a test for what it leaves behind (tests/conftest.py) finds each kind of leak."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

LEAKING_TESTS = """
import os, subprocess, sys, threading
from dray import SharedRingBuffer

kept = []

def test_clean():
    with SharedRingBuffer(1, 10):
        pass

def test_ending_thread():
    threading.Timer(0.2, lambda: None).start()

def test_caught_error_that_holds_a_socket_pair():
    import pytest, socket
    def fail(a, b):
        raise ValueError
    with pytest.raises(ValueError) as caught:
        with socket.socket() as a, socket.socket() as b:
            fail(a, b)

def test_thread():
    end = threading.Event()
    kept.append(end)
    threading.Thread(target=end.wait, name="left-behind", daemon=True).start()

def test_child():
    kept.append(subprocess.Popen(["sleep", "60"]))

def test_zombie():
    pid = os.posix_spawn("/bin/true", ["true"], {})
    kept.append(pid)

def test_descriptor():
    kept.append(os.open("/dev/null", os.O_RDONLY))

def test_segment():
    kept.append(SharedRingBuffer(1, 10))

def test_that_fails_is_not_blamed_twice():
    kept.append(os.open("/dev/null", os.O_RDONLY))
    assert False

def test_last():
    for each in kept:
        if isinstance(each, threading.Event):
            each.set()
        elif isinstance(each, subprocess.Popen):
            each.kill()
            each.wait()
"""


def test_every_kind_of_leak_fails_its_test_and_a_clean_test_passes(tmp_path: Path) -> None:
    tests = Path(__file__).parents[1]
    shutil.copy(tests / "conftest.py", tmp_path)
    (tmp_path / "conftest.py").write_text(
        (tmp_path / "conftest.py").read_text().replace("GRACE_SECONDS = 5.0", "GRACE_SECONDS = 0.5")
    )
    (tmp_path / "test_leaks.py").write_text(LEAKING_TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", "-q", "test_leaks.py"]
    environment = {**os.environ, "PYTHONPATH": str(tests)}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=90)
    summary = [line for line in ended.stdout.splitlines() if line.startswith(("PASSED", "FAILED", "ERROR"))]
    outcomes = {(line.split()[0], line.split("::")[1].split()[0]) for line in summary}
    passed = {name for outcome, name in outcomes if outcome == "PASSED"}
    leaked = {name for outcome, name in outcomes if outcome == "ERROR"}
    assert leaked == {"test_thread", "test_child", "test_zombie", "test_descriptor", "test_segment"}, ended.stdout
    assert {"test_clean", "test_ending_thread", "test_caught_error_that_holds_a_socket_pair"} <= passed
    assert ("FAILED", "test_that_fails_is_not_blamed_twice") in outcomes
    for words in ("thread left-behind", "sleep 60", "was not waited for", "/dev/null", "/memfd:dray"):
        assert words in ended.stdout
