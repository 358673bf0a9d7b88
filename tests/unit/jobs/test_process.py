import os
import signal
import subprocess
import sys
import threading

import pytest

from dray.jobs.process import StopFlag


def test_first_reason_to_stop_stands_and_callbacks_run_once() -> None:
    stop, called = StopFlag(), []
    stop.on_set(lambda: called.append("before"))
    assert not stop.event.wait(0)
    stop.set("SIGTERM", 143)
    stop.set("the job has ended")
    stop.on_set(lambda: called.append("after"))
    assert (stop.reason, stop.exit_code, stop.is_set, called) == ("SIGTERM", 143, True, ["before", "after"])


def test_stop_wakes_waiters() -> None:
    stop = StopFlag()
    timer = threading.Timer(0.05, stop.set, ["enough"])
    timer.start()
    assert stop.event.wait(10)
    timer.join()


def run_child(program: str, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def test_signal_is_seen_while_the_main_thread_is_in_c_code() -> None:
    program = (
        "import hashlib, threading, os\n"
        "from dray.jobs.process import stop_on_signals\n"
        "stop_on_signals(lambda number: os.write(1, number.name.encode()) and os._exit(7))\n"
        "print('ready', flush=True)\n"
        "hashlib.pbkdf2_hmac('sha256', b'x', b'y', 1_000_000_000)\n"
    )
    with run_child(program) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGTERM)
        text, _ = child.communicate(timeout=20)
    assert (child.returncode, text) == (7, "SIGTERM")


def test_child_of_a_supervisor_that_is_gone_does_not_start() -> None:
    program = "from dray.jobs.process import begin_process; begin_process('x'); print('started')"
    with run_child(program, DRAY_SUPERVISOR_PID=str(os.getppid())) as child:
        text, errors = child.communicate(timeout=20)
    assert child.returncode == 1
    assert text == ""
    assert "is gone" in errors


def test_stacks_are_written_when_asked_for() -> None:
    program = (
        "import time\nfrom dray.jobs.process import begin_process\nbegin_process('x')\n"
        "def stuck():\n    print('ready', flush=True)\n    time.sleep(60)\nstuck()\n"
    )
    with run_child(program, DRAY_SUPERVISOR_PID=str(os.getpid())) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGUSR1)
        assert any("in stuck" in child.stderr.readline() for _ in range(40))
        child.kill()


def test_error_of_our_own_has_an_exit_code_of_its_own() -> None:
    program = "from dray.jobs.process import begin_process\nbegin_process('x')\nraise RuntimeError('impossible')"
    with run_child(program, DRAY_SUPERVISOR_PID=str(os.getpid())) as child:
        text, errors = child.communicate(timeout=20)
    assert (child.returncode, text) == (14, "")
    assert "RuntimeError: impossible" in errors


@pytest.mark.parametrize(
    ("level", "written"),
    [
        ("debug", ["dray debug", "dray info", "dray warning", "other info", "other warning"]),
        ("info", ["dray info", "dray warning", "other info", "other warning"]),
        ("warning", ["dray warning", "other warning"]),
        ("error", []),
    ],
)
def test_level_of_the_job_holds_for_dray_and_keeps_debug_messages_of_others_out(
    level: str, written: list[str]
) -> None:
    program = (
        "import logging\nfrom dray.jobs.process import begin_process, set_log_level\n"
        f"begin_process('x')\nset_log_level({level!r})\n"
        "for name in ('dray', 'other'):\n"
        "    logger = logging.getLogger(f'{name}.part')\n"
        "    for each in ('debug', 'info', 'warning'):\n"
        "        getattr(logger, each)(f'{name} {each}')\n"
    )
    with run_child(program) as child:
        _, errors = child.communicate(timeout=20)
    assert child.returncode == 0
    assert [line.partition(": ")[2] for line in errors.splitlines()] == written
