import os
import signal
import subprocess
import sys

from dray.jobs.process import child_pids, is_running, kill_orphans

# A child in a session of its own, which has a child that becomes an orphan at once, in another session.
FORKING = """
import os, sys, time
import psutil
from dray.jobs.process import kill_descendants
from dray.jobs.process import adopt_orphans

def running():
    found = psutil.Process().children(recursive=True)
    return [each for each in found if each.status() != psutil.STATUS_ZOMBIE]

adopt_orphans()
reader, writer = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        if os.fork() == 0:
            os.setsid()
            os.write(writer, b"daemon")
            time.sleep(600)
        os._exit(0)
    time.sleep(600)
print(os.read(reader, 100), len(running()) >= 2)
kill_descendants(5.0)
print("left:", len(running()), flush=True)
"""


# A child that is killed leaves two to this process: one that runs, and one that has ended and was not waited for.
LEAVING = """
import os, signal, time
from dray.jobs.process import child_pids, kill_orphans
from dray.jobs.process import adopt_orphans

adopt_orphans()
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    ended = os.fork()
    if ended == 0:
        os._exit(0)
    os.waitid(os.P_PID, ended, os.WEXITED | os.WNOWAIT)
    if os.fork() == 0:
        time.sleep(600)
    os.write(writer, b"x")
    time.sleep(600)
os.read(reader, 1)
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
print(len(child_pids()), kill_orphans((), 5.0), child_pids(), kill_orphans((), 5.0), flush=True)
"""


def test_z9_orphans_that_had_ended_already_are_collected_and_not_counted_as_killed() -> None:
    finished = subprocess.run([sys.executable, "-c", LEAVING], capture_output=True, text=True, timeout=30)
    assert finished.stdout == "2 1 set() 0\n", finished.stderr


def test_process_that_is_stopped_does_not_run() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as child:
        assert is_running(child.pid)
        for number, runs in ((signal.SIGSTOP, False), (signal.SIGCONT, True), (signal.SIGKILL, False)):
            child.send_signal(number)
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WSTOPPED | os.WCONTINUED | os.WNOWAIT)
            assert is_running(child.pid) is runs
    assert not is_running(child.pid)


def test_sessions_and_daemons_below_a_process_are_killed() -> None:
    finished = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, text=True, timeout=30)
    assert finished.stdout == "b'daemon' True\nleft: 0\n", finished.stderr


def test_children_are_found_and_own_ones_are_not_orphans() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert process.pid in child_pids()
        assert kill_orphans(child_pids(), 1.0) == 0
        process.communicate(b"\n", timeout=10)
    assert process.pid not in child_pids()
