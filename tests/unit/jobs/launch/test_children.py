import os
import signal
from pathlib import Path

from waiting import ends_within

from dray.jobs.launch.processes import Child
from dray.jobs.process import child_pids


def child(tmp_path: Path, program: str) -> Child:
    (tmp_path / "child_program.py").write_text(program)
    sys_path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(tmp_path)
    try:
        return Child("child", "child_program", [], tmp_path / "child.log")
    finally:
        if sys_path is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = sys_path


def test_exit_code_and_output_are_kept(tmp_path: Path) -> None:
    started = child(
        tmp_path, "import os, sys\nprint(os.environ['DRAY_SUPERVISOR_PID'], os.getpgrp())\nsys.exit(5)\n"
    )
    assert started.pid in child_pids()
    assert started.collect(20.0) == 5
    assert started.collect() == 5
    assert (tmp_path / "child.log").read_text().split() == [str(os.getpid()), str(started.pid)]
    assert started.pid not in child_pids()
    started.signal(signal.SIGTERM)
    started.kill_group()


def test_what_is_left_of_its_group_is_killed_with_it(tmp_path: Path) -> None:
    program = (
        "import os, subprocess, sys\n"
        "left = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(left.pid, flush=True)\n"
        "os._exit(0)\n"
    )
    started = child(tmp_path, program)
    assert started.collect(20.0) == 0
    grandchild = int((tmp_path / "child.log").read_text())
    assert ends_within(20.0, grandchild)


def test_child_is_unseen_while_it_is_stopped(tmp_path: Path) -> None:
    started = child(tmp_path, "import time; time.sleep(600)")
    assert started.seconds_unseen() == 0.0
    started.signal(signal.SIGSTOP)
    os.waitid(os.P_PID, started.pid, os.WSTOPPED)
    first = started.seconds_unseen()
    assert started.seconds_unseen() > first > 0.0
    started.signal(signal.SIGCONT)
    os.waitid(os.P_PID, started.pid, os.WCONTINUED)
    assert started.seconds_unseen() == 0.0
    started.kill_group()
    assert started.collect(20.0) == -signal.SIGKILL
    assert started.seconds_unseen() > 0.0


def test_killed_child_reports_its_signal(tmp_path: Path) -> None:
    started = child(tmp_path, "import time; time.sleep(600)")
    assert started.collect(0.05) is None
    started.kill_group()
    assert started.collect(20.0) == -signal.SIGKILL
