"""Child processes of the supervisor, watched through pidfds: a pid of ours is never another process's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from dray.runtime.descendants import ends_within
from dray.runtime.exit_codes import meaning
from dray.runtime.membership import Role
from dray.runtime.process import PARENT_VARIABLE


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

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; one that has ended gets none."""
        ...

    def kill_group(self) -> None:
        """Kill the process and what is in its group."""
        ...

    def collect(self) -> int | None:
        """The exit code, once it has ended."""
        ...


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
        with log.open("ab") as output:
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
        self.pidfd = os.pidfd_open(self.pid)

    @property
    def running(self) -> bool:
        return self.exit_code is None

    @property
    def ending(self) -> str:
        return "it runs" if self.exit_code is None else meaning(self.exit_code)

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
