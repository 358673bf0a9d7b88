import os
import signal
import subprocess
import sys

from dray.jobs.process import SignalInbox

PROGRAM = """
import os, signal
from dray.jobs.process import SignalInbox
with SignalInbox() as inbox:
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
    print(*(number.name for number in inbox.receive()))
"""


def caught(ignored: str) -> list[str]:
    """The signals that a process collects which a shell has started with these signals ignored."""
    command = ["sh", "-c", f'trap "" {ignored}; exec "$0" -c "$1"', sys.executable, PROGRAM]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split()


def test_signals_that_are_ignored_when_a_process_starts_stay_ignored() -> None:
    assert caught("HUP") == ["SIGINT", "SIGTERM"]  # as under nohup
    assert caught("INT HUP") == ["SIGTERM"]  # as in the background of a script
    assert caught("USR1") == ["SIGHUP", "SIGINT", "SIGTERM"]


def test_signal_that_is_ignored_is_so_afterwards_too() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with SignalInbox() as inbox:
            os.kill(os.getpid(), signal.SIGHUP)
            assert inbox.receive() == []
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
