"""Child processes of the supervisor, watched through pidfds: a pid of ours is never another process's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from dray.clock import MONOTONIC
from dray.runtime.descendants import ends_within, is_running
from dray.runtime.exit_codes import USER_CODES, ExitCode, meaning
from dray.runtime.membership import THE_JOB_HAS, MemberState, OutcomeKind, Role
from dray.runtime.private_file import open_to_append
from dray.runtime.process import PARENT_VARIABLE
from dray.system_calls import needed


class JobProcess(Protocol):
    """A process of the job as the supervisor sees it: a child of its own, or one of another node."""

    @property
    def name(self) -> str:
        """Unique in the job, e.g. ``"rollout-0"``."""
        ...

    @property
    def role(self) -> Role | None:
        """For a replica."""
        ...

    @property
    def pid(self) -> int:
        """Its number on its machine."""
        ...

    @property
    def log(self) -> Path:
        """Where its output goes."""
        ...

    @property
    def running(self) -> bool:
        """Whether `collect` has not given an exit code yet."""
        ...

    @property
    def exit_code(self) -> int | None:
        """As `subprocess` gives it."""
        ...

    @property
    def ending(self) -> str:
        """How it ended, in one phrase."""
        ...

    def seconds_unseen(self) -> float:
        """Seconds since the process was last known to run; one that is stopped does not."""
        ...

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; one that has ended gets none."""
        ...

    def kill_group(self) -> None:
        """Kill the process and what is in its group."""
        ...

    def collect(self) -> int | None:
        """The exit code, once it has ended."""
        ...


@dataclass(frozen=True, slots=True)
class EndRequest:
    """The signal with which the supervisor has a process end, and why: what completes "because"."""

    number: signal.Signals
    why: str

    def explains(self, code: int) -> bool:
        """Whether a process that ends with exit code `code` does so on this request."""
        return code in (-self.number, 128 + self.number)


@dataclass(frozen=True, slots=True)
class ReplicaEnd:
    """Why the process of a replica has ended.

    Attributes:
        reason: one phrase.
        early: whether it ended by itself, and not because it was done or the job was over.
        killed: whether the supervisor has killed it.
    """

    reason: str
    early: bool
    killed: bool = False

    def line(self, name: str) -> str:
        """One sentence about the replica `name`."""
        return f"{name} ended early: {self.reason}" if self.early else f"{name} {self.reason}"


def replica_end(
    code: int,
    ending: str,
    request: EndRequest | None,
    member: tuple[MemberState, str] | None,
    outcome: OutcomeKind | None,
) -> ReplicaEnd:
    """Why the process of a replica has ended, put together from all that is known of it.

    Args:
        code: its exit code, as `subprocess` gives it.
        ending: what that says by itself, in one phrase.
        request: the last one that the supervisor has sent it.
        member: what the controller counts it as, and why, if it has registered.
        outcome: of the job, if that is over.
    """
    over = None if outcome is None else f"the job had {THE_JOB_HAS[outcome]}"
    state, reason = (None, "") if member is None else member
    if request is not None and request.explains(code):
        killed = request.number == signal.SIGKILL
        how = "was killed" if killed else f"ended as asked ({request.number.name})"
        return ReplicaEnd(f"{how}: {request.why}", early=False, killed=killed)
    if code in USER_CODES and reason:
        return ReplicaEnd(reason, early=True)
    if code == ExitCode.NOT_A_MEMBER and state is MemberState.DEAD:
        return ReplicaEnd(f"the controller had declared it dead ({reason})", early=True)
    if code == ExitCode.NOT_A_MEMBER and state is None and over is not None:
        return ReplicaEnd(f"tried to register after {over}, and ended", early=False)
    if code == ExitCode.CONTROLLER_LOST and over is not None:
        return ReplicaEnd(f"ended: {over} and the controller was gone", early=False)
    if code == ExitCode.OK or (code == ExitCode.FAILED and over is not None):
        if state is not MemberState.ACTIVE or over is not None:
            return ReplicaEnd(ending, early=False)
        return ReplicaEnd(f"its process left without unregistering (exit code {code})", early=True)
    return ReplicaEnd(ending, early=True)


class Child:
    """One process of the job, in a process group of its own, with a log file.

    Args:
        name: unique in the job, e.g. ``"rollout-0"``.
        module: what ``python -m`` runs.
        arguments: of the command line; never a secret.
        log: where its output goes; appended to.
        role: for a replica.
        environment: variables beside those of this process.

    To be made in the main thread: the kernel signals a child when the *thread* that started it ends.
    """

    def __init__(
        self,
        name: str,
        module: str,
        arguments: Sequence[str],
        log: Path,
        *,
        role: Role | None = None,
        pass_fds: Collection[int] = (),
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.name = name
        self.role = role
        self.log = log
        self.exit_code: int | None = None
        with os.fdopen(open_to_append(log, "job.output"), "ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                process_group=0,
                pass_fds=tuple(pass_fds),
                env={**os.environ, **environment, PARENT_VARIABLE: str(os.getpid()), "PYTHONUNBUFFERED": "1"},
            )
        self.pid = self._process.pid
        self._seen = MONOTONIC.now()
        try:
            with needed("pidfd_open"):
                self.pidfd = os.pidfd_open(self.pid)
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise

    @property
    def running(self) -> bool:
        return self.exit_code is None

    @property
    def ending(self) -> str:
        return "it runs" if self.exit_code is None else meaning(self.exit_code)

    def seconds_unseen(self) -> float:
        """Seconds since the process was last found to run; 0 unless it is stopped or has ended."""
        now = MONOTONIC.now()
        if self.running and is_running(self.pid):
            self._seen = now
        return now - self._seen

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process; one that has ended gets none."""
        if self.running:
            signal.pidfd_send_signal(self.pidfd, number)

    def kill_group(self) -> None:
        """Kill the process and every other one in its group."""
        if self.running:
            _kill_group(self.pid)

    def collect(self, timeout: float = 0.0) -> int | None:
        """The exit code if the process ends within `timeout` seconds, else None.

        What is left of its process group is killed.
        """
        if self.exit_code is None and ends_within(self.pidfd, timeout):
            # The group's number stays ours until the dead leader is waited for.
            _kill_group(self.pid)
            self.exit_code = self._process.wait()
            os.close(self.pidfd)
        return self.exit_code

    def __repr__(self) -> str:
        return f"<Child {self.name} pid {self.pid} {'running' if self.running else self.exit_code}>"


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
