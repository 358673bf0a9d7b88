import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable

import pytest
from forked_child import run_in_child

from dray.forking import SignalHandlers, not_inherited, parent_only
from dray.jobs.process import SignalInbox
from dray.jobs.replica.user_code import call_user

FORKS_AND_ENDS = """
import multiprocessing, os, signal, threading, time
from dray.jobs.process import begin_process, stop_on_signals
begin_process("x")
stop_on_signals(lambda number: os.write(1, f"the parent stops for {number.name}".encode()) and os._exit(7))
context = multiprocessing.get_context("fork")

def codes(fork, number=signal.SIGTERM):
    for _ in range(40):
        child = fork()
        os.kill(child, number)  # perhaps before it has given up what it inherits
        yield os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def forked():
    child = context.Process(target=time.sleep, args=(600,))
    child.start()
    return child.pid

def forked_by_a_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(forked()))
    thread.start()
    thread.join()
    return found[0]

print(set(codes(forked)), set(codes(forked_by_a_thread)))
print(set(codes(forked, signal.SIGUSR1)), flush=True)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(600)
"""


def ended_with(program: str) -> tuple[int, str, str]:
    environment = {**os.environ, "DRAY_SUPERVISOR_PID": str(os.getpid())}
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=environment, check=False
    )
    return ended.returncode, ended.stdout, ended.stderr


def test_signal_ends_a_forked_child_at_any_moment_and_reaches_the_replica_only_if_that_is_meant() -> None:
    code, text, errors = ended_with(FORKS_AND_ENDS)
    assert (code, text) == (7, "{-15} {-15}\n{-10}\nthe parent stops for SIGTERM"), errors


def test_exception_that_ends_a_forked_child_is_not_an_error_of_drays_own() -> None:
    program = (
        "import os\nfrom dray.jobs.process import begin_process\nbegin_process('x')\n"
        "child = os.fork()\n"
        "if child == 0:\n    raise ValueError('the environment broke')\n"
        "os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    code, _, errors = ended_with(program)
    assert code == 1
    assert "ValueError: the environment broke" in errors
    assert "CRITICAL" not in errors


def test_signal_to_a_forked_child_of_the_supervisor_is_no_signal_to_the_supervisor() -> None:
    with SignalInbox((signal.SIGTERM,)) as inbox:
        assert run_in_child(lambda: os.kill(os.getpid(), signal.SIGTERM)) == f"status {int(signal.SIGTERM)}"
        assert inbox.receive() == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert inbox.receive() == [signal.SIGTERM]


def test_handler_that_user_code_has_set_stays_and_children_have_it() -> None:
    seen: list[int] = []

    def check() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [signal.SIGTERM]

    reader, writer = socket.socketpair()
    with reader, writer:
        writer.setblocking(False)
        before = signal.getsignal(signal.SIGTERM)
        handlers = SignalHandlers((signal.SIGTERM, signal.SIGUSR2), writer)
        own = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
        try:
            assert run_in_child(check) == ""
            handlers.restore()
            assert signal.getsignal(signal.SIGTERM) not in (own, before)
        finally:
            signal.signal(signal.SIGTERM, before)
        assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL


def test_forked_child_does_not_keep_a_connection_of_its_parent_open() -> None:
    ours, peer = socket.socketpair()
    not_inherited(ours)
    waiting, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writing)
        os.read(waiting, 1)
        os._exit(0)
    with peer:
        ours.close()
        peer.settimeout(10)
        assert peer.recv(1) == b""
    os.close(writing)
    os.close(waiting)
    assert os.waitpid(child, 0)[1] == 0


def test_number_of_a_descriptor_that_was_given_up_is_not_that_of_another_file() -> None:
    ours, peer = map(not_inherited, socket.socketpair())
    closed = not_inherited(socket.socket())
    closed.close()

    def check() -> None:
        opened = os.open(__file__, os.O_RDONLY)
        for each in (ours, peer, closed):
            each.close()
        assert os.read(opened, 6) == b"import"

    with ours, peer:
        assert run_in_child(check) == ""
        ours.send(b"still there")
        assert peer.recv(100) == b"still there"


def exits(code: object) -> Callable[[], None]:
    def leave() -> None:
        raise SystemExit(code)

    return leave


def raises() -> None:
    raise ValueError("the environment broke")


@pytest.mark.parametrize(
    ("ending", "code"), [(lambda: None, 0), (raises, 1), (exits(None), 0), (exits(5), 5), (exits("text"), 1)]
)
def test_child_that_user_code_forks_and_does_not_end_never_comes_back_to_the_replica(
    ending: Callable[[], None], code: int
) -> None:
    class Worker:
        def rollout(self) -> int:
            child = os.fork()
            if child == 0:
                ending()
            return child

    pid = os.getpid()
    child = call_user(Worker(), "rollout")
    if os.getpid() != pid:
        os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code


def test_block_that_nothing_is_forked_in_is_left_as_any_other() -> None:
    with parent_only():
        pass
    with pytest.raises(ValueError, match="broke"), parent_only():
        raises()
