"""How a process of a job begins and ends: with its supervisor, with signals, stack dumps, a log and its children.

No process outlives its job. The kernel signals a child whose supervisor has died (`PR_SET_PDEATHSIG`), and a
thread that watches the supervisor then kills everything below the child, and its process group. The child adopts
what its own children leave behind (`PR_SET_CHILD_SUBREAPER`), so that a session or a daemon of an environment does
not get away. When the child itself is killed, the supervisor adopts them.

What user code forks is no process of the job: it handles signals and uncaught exceptions as Python does.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from types import TracebackType
from typing import IO, TYPE_CHECKING, NoReturn, TypeVar

import psutil

from dray.clock import MONOTONIC, Deadline, Stopwatch
from dray.forking import SignalHandlers, call_in_children, not_inherited
from dray.jobs.exit_codes import ExitCode
from dray.jobs.standard_streams import flush_streams
from dray.resources import Closing, raise_descriptor_limit
from dray.system_calls import needed
from dray.text import PrintableFormatter

# --- process -----------------------------------------------------------------------------------------------------

if TYPE_CHECKING:  # a process without the extra "jobs" prints that it lacks it
    from dray.jobs.config import LogLevel

PARENT_VARIABLE = "DRAY_SUPERVISOR_PID"
"""Environment variable in which the supervisor gives its children its pid."""

DUMP_SIGNAL = signal.SIGUSR1
"""Makes a process of the job write the stacks of all its threads to its log."""

_LAST_BOUND = 3.0
_OTHERS_WRITE = 0o022
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LOG = logging.getLogger("dray.jobs.process")


class StopFlag:
    """Whether, why and with which exit code a process should end. The first reason stands.

    Attributes:
        disposable: true while the process has nothing to lose, and may be ended without being asked.
    """

    def __init__(self) -> None:
        self.disposable = True
        self.event = threading.Event()
        self.reason = ""
        self.exit_code: int | None = None
        self._set_at: float | None = None
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []

    @property
    def is_set(self) -> bool:
        return self.event.is_set()

    def set(self, reason: str, exit_code: int | None = None) -> None:
        """Ask the process to end. `exit_code` ``None`` means that this is no failure."""
        with self._lock:
            if self.event.is_set():
                return
            self.reason = reason
            self.exit_code = exit_code
            self._set_at = MONOTONIC.now()
            self.event.set()
            callbacks = self._callbacks
        _LOG.info("stopping: %s", reason)
        for callback in callbacks:
            callback()

    @property
    def since(self) -> float:
        """Seconds since the flag was set; 0 before."""
        with self._lock:
            return 0.0 if self._set_at is None else MONOTONIC.now() - self._set_at

    def on_set(self, callback: Callable[[], None]) -> None:
        """Call `callback` once when the flag is set, in the thread that sets it; now, if it is set."""
        with self._lock:
            if not self.event.is_set():
                self._callbacks.append(callback)
                return
        callback()


def begin_process(name: str) -> None:
    """To be called first in a process that the supervisor started; exits if the supervisor is gone already."""
    faulthandler.enable()
    dump_stacks_on_signal()
    # Another user who could write to a file of the job, such as a checkpoint, could run code in the next run.
    os.umask(os.umask(_OTHERS_WRITE) | _OTHERS_WRITE)
    log_to_stderr(name, logging.INFO)
    raise_descriptor_limit()
    logging.getLogger("httpcore").setLevel(logging.WARNING)
    exit_with_own_code_on_crash()
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is not None:
        _bind_to_parent(int(parent))


def dump_stacks_on_signal() -> None:
    """Write the stacks of all threads to stderr at `DUMP_SIGNAL`; a forked child does not."""
    faulthandler.register(DUMP_SIGNAL, all_threads=True, chain=False)
    call_in_children(_forget_dump_signal)


def log_to_stderr(name: str, level: int) -> None:
    """What is logged from `level` on goes to stderr, which is the process's log; `name` is that of the process."""
    logging.basicConfig(level=level, handlers=[printable_handler(f"%(asctime)s {name} ")])


def printable_handler(prefix: str = "", stream: IO[str] | None = None) -> logging.Handler:
    """A handler that writes records to `stream`, by default stderr, with `prefix` in the form of `logging`."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(PrintableFormatter(f"{prefix}%(levelname)s %(name)s: %(message)s"))
    return handler


def set_log_level(level: LogLevel) -> None:
    """Log from `level` on. "debug" adds the messages of dray; other libraries log from "info" on at most."""
    logging.getLogger("dray").setLevel(level.upper())
    logging.getLogger().setLevel("INFO" if level == "debug" else level.upper())


def stop_on_signals(on_stop: Callable[[signal.Signals], None]) -> None:
    """Call `on_stop` for SIGTERM and SIGINT, from a thread of its own, even while the main thread is in C code."""
    reader, writer = map(not_inherited, socket.socketpair())
    writer.setblocking(False)
    handlers = SignalHandlers((signal.SIGTERM, signal.SIGINT), writer)

    def watch() -> None:
        while True:
            for byte in reader.recv(64):
                if byte in handlers.numbers:
                    on_stop(signal.Signals(byte))

    threading.Thread(target=watch, name="signals", daemon=True).start()


def finish_process() -> None:
    """The exit code is decided: signals from here on do not change it; what hangs is killed."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def leave(code: int) -> NoReturn:
    """Exit after the exit handlers, without tearing the interpreter down.

    Everything of dray is closed by now. To take the user's libraries apart takes seconds for some of them, and can
    run into threads of theirs.
    """
    atexit._run_exitfuncs()
    flush_streams()
    exit_at_once(code)


def exit_at_once(code: int) -> NoReturn:
    """Kill everything below this process and end it, without exit handlers: the supervisor may be gone."""
    kill_descendants(_LAST_BOUND)
    os._exit(code)


def exit_with_own_code_on_crash() -> None:
    """Let an uncaught exception end the process with `ExitCode.INTERNAL`: Python's 1 means "not finished"."""
    sys.excepthook = _crashed
    call_in_children(_forget_crash_code)


def _crashed(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    _LOG.critical("internal error", exc_info=(kind, error, trace))
    leave(ExitCode.SIGINT if issubclass(kind, KeyboardInterrupt) else ExitCode.INTERNAL)


def _forget_dump_signal() -> None:
    faulthandler.unregister(DUMP_SIGNAL)


def _forget_crash_code() -> None:
    if sys.excepthook is _crashed:
        sys.excepthook = sys.__excepthook__


def adopt_orphans() -> None:
    """Make this process the parent of grandchildren whose own parent ends (`PR_SET_CHILD_SUBREAPER`)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _bind_to_parent(parent: int) -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    adopt_orphans()
    try:
        descriptor = os.pidfd_open(parent)
    except ProcessLookupError:
        sys.exit(f"the supervisor (pid {parent}) is gone")
    if os.getppid() != parent:
        sys.exit(f"the supervisor (pid {parent}) is gone")

    def watch() -> None:
        ends_within(descriptor, None)
        kill_descendants(_LAST_BOUND)
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="supervisor-watch", daemon=True).start()


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


# --- signals -----------------------------------------------------------------------------------------------------

WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR2)
"""Each of them ends a job in order, with a checkpoint."""


class SignalInbox(Closing):
    """Until it is closed, signals that would end the process are collected instead. Main thread only.

    A signal that the process was started to ignore, as SIGHUP under ``nohup``, stays ignored.

    Args:
        watched: these signals.
    """

    def __init__(self, watched: Collection[signal.Signals] = WATCHED) -> None:
        self._watched = frozenset(each for each in watched if signal.getsignal(each) is not signal.SIG_IGN)
        self._reader, self._writer = map(not_inherited, socket.socketpair())
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._handlers = SignalHandlers(self._watched, self._writer)
        self._closed = False

    def fileno(self) -> int:
        """Readable when a signal has come."""
        return self._reader.fileno()

    def receive(self) -> list[signal.Signals]:
        """The watched signals that came since the last call."""
        try:
            content = self._reader.recv(256)
        except BlockingIOError:
            return []
        return [signal.Signals(byte) for byte in content if byte in self._watched]

    def close(self) -> None:
        """Restore the signal handlers of before. Twice is fine."""
        if not self._closed:
            self._closed = True
            self._handlers.restore()
            self._reader.close()
            self._writer.close()


# --- descendants -------------------------------------------------------------------------------------------------

# A pid may be reused as soon as its process was waited for. So a process is killed through a pidfd, and only if
# the pid still was that of the process that was found after the pidfd was opened.

_STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
_ENDED = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
"""States of a process that has ended, and that its parent has not waited for yet."""


def child_pids() -> set[int]:
    """The pids of this process's children, ended ones included."""
    return {child.pid for child in psutil.Process().children()}


def is_running(pid: int) -> bool:
    """Whether the process, a child of this one, has neither ended nor been stopped by a signal or a debugger."""
    try:
        return psutil.Process(pid).status() not in _ENDED + _STOPPED
    except psutil.NoSuchProcess:
        return False


def kill_descendants(timeout: float) -> None:
    """Kill every process below this one, and what they start meanwhile, within `timeout` seconds.

    Complete if this process adopts orphans: a process whose parent is killed first stays below this one.
    """
    deadline = Deadline.after(timeout)
    while (found := _descendants()) and not deadline.expired:
        _kill_and_wait(found, deadline)


def kill_orphans(known: Collection[int], timeout: float) -> int:
    """Kill and collect children that this process did not start but was given when their parents ended.

    Args:
        known: children that are not meant.
        timeout: seconds to wait for each round; killing one may orphan others.

    Returns:
        How many were alive and were killed; those that had ended already are collected, too, and not counted.
    """
    killed, all_ended = 0, True
    while all_ended and (orphans := [each for each in psutil.Process().children() if each.pid not in known]):
        alive = {each.pid for each in orphans if not _has_ended(each)}
        all_ended = _kill_and_wait(orphans, Deadline.after(timeout))
        for orphan in orphans:
            ended, status = os.waitpid(orphan.pid, os.WNOHANG)
            if ended in alive:
                killed += os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    return killed


def ends_within(pidfd: int, timeout: float | None) -> bool:
    """Whether the process of `pidfd` has ended or does so within `timeout` seconds."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(None if timeout is None else timeout * 1000))


def _descendants() -> list[psutil.Process]:
    return [each for each in psutil.Process().children(recursive=True) if not _has_ended(each)]


def _has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() in _ENDED
    except psutil.NoSuchProcess:
        return True


def _kill_and_wait(processes: Collection[psutil.Process], deadline: Deadline) -> bool:
    """Kill all of them first, so that none has the time to start another, then wait; True if all have ended."""
    killed = []
    with ExitStack() as opened:
        for process in processes:
            with suppress(ProcessLookupError):
                descriptor = os.pidfd_open(process.pid)
                opened.callback(os.close, descriptor)
                if process.is_running():
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                    killed.append(descriptor)
        return all(ends_within(descriptor, deadline.remaining) for descriptor in killed)


# --- child process -----------------------------------------------------------------------------------------------


class ChildProcess:
    """A child in a process group of its own, watched through a pidfd: its pid never means another process.

    Args:
        command: the program and its arguments; never a secret.
        output: descriptor of the file for its standard output and standard error.
        content: what it reads from its standard input, which then ends.
        pass_fds: descriptors that it inherits under the same numbers.
        environment: all of its variables; None: those of this process.

    Attributes:
        pidfd: readable once the process has ended; closed by `collect`.
        exit_code: as `subprocess` gives it; None until `collect` has found that the process has ended.

    To be made in the main thread: the kernel signals a child when the *thread* that started it ends.

    Raises:
        OSError: the program cannot be started.
        ConfigError: a sandbox refuses `pidfd_open`.
    """

    def __init__(
        self,
        command: Sequence[str],
        output: int,
        *,
        content: bytes = b"",
        pass_fds: Collection[int] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.exit_code: int | None = None
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE if content else subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            process_group=0,
            pass_fds=tuple(pass_fds),
            env=environment,
        )
        self.pid = self._process.pid
        try:
            with needed("pidfd_open"):
                self.pidfd = os.pidfd_open(self.pid)
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        finally:
            if self._process.stdin is not None:
                with suppress(BrokenPipeError), self._process.stdin as stdin:  # its end is noticed by its pidfd
                    stdin.write(content)

    @property
    def running(self) -> bool:
        """Whether `collect` has not given an exit code yet."""
        return self.exit_code is None

    def has_ended(self, timeout: float = 0.0) -> bool:
        """Whether the process has ended or does so within `timeout` seconds."""
        return not self.running or ends_within(self.pidfd, timeout)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process, unless it has ended."""
        if self.running:
            signal.pidfd_send_signal(self.pidfd, number)

    def kill_group(self) -> None:
        """Kill the process and every other one in its group."""
        # The group's number stays in use until the dead leader is waited for.
        if self.running:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def collect(self, timeout: float = 0.0) -> int | None:
        """The exit code if the process ends within `timeout` seconds, else None.

        What is left of its process group is killed.
        """
        if self.running and self.has_ended(timeout):
            self.kill_group()
            self.exit_code = self._process.wait()
            os.close(self.pidfd)
        return self.exit_code


# --- place -------------------------------------------------------------------------------------------------------

ADDRESS_VARIABLE = "DRAY_ADDRESS"
"""The address of this node that the job's other nodes reach."""

REPLICA_NODES_VARIABLE = "DRAY_REPLICA_NODES"
"""The names of all nodes that belong to the replica, separated by spaces; its process runs on the first."""

LOOPBACK = "127.0.0.1"


def own_address() -> str:
    """Where to listen, and what to advertise to the other processes of the job."""
    return os.environ.get(ADDRESS_VARIABLE, LOOPBACK)


def folder_is_local() -> bool:
    """Whether the job's folder is on this machine: Unix sockets in a folder that nodes share are no good."""
    return ADDRESS_VARIABLE not in os.environ


# --- shutdown steps ----------------------------------------------------------------------------------------------

_Opened = TypeVar("_Opened")


@contextmanager
def shutdown_step(what: str, waits_for: str, bound: float) -> Iterator[None]:
    """The block is a step of the shutdown: its begin and its end are logged.

    Args:
        what: is done, e.g. ``"unregister"``.
        waits_for: the component that it waits for.
        bound: seconds that it takes at most.
    """
    began = Stopwatch()
    _LOG.info("shutdown: %s, waiting for %s, at most %.1f s", what, waits_for, bound)
    try:
        yield
    finally:
        _LOG.info("shutdown: %s took %.2f s", what, began.elapsed)


@contextmanager
def closed_by_step(
    opened: AbstractContextManager[_Opened], what: str, waits_for: str, bound: float
) -> Iterator[_Opened]:
    """`opened`, whose end is a step of the shutdown; parameters as for `shutdown_step`."""
    with ExitStack() as step, opened as entered:
        try:
            yield entered
        finally:
            step.enter_context(shutdown_step(what, waits_for, bound))
