"""A process of the job as its supervisor sees it, why it has ended, and whether that restarts the policy group."""

from __future__ import annotations

import abc
import os
import signal
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from dray.clock import MONOTONIC
from dray.jobs.controller.state import THE_JOB_HAS
from dray.jobs.descendants import is_running
from dray.jobs.exit_codes import NOT_RESTARTED, USER_CODES, ExitCode, meaning
from dray.jobs.files import open_to_append
from dray.jobs.messages.models import MemberState, OutcomeKind, Role
from dray.jobs.process import PARENT_VARIABLE, ChildProcess

# --- job processes -----------------------------------------------------------------------------------------------


class JobProcess(abc.ABC):
    """A process of the job as its supervisor sees it: a `Child`, or one of another node.

    Attributes:
        name: unique in the job, e.g. ``"rollout-0"``.
        role: of a replica; None for the controller.
        pid: its number on its machine.
        log: where its output goes.
        exit_code: as `subprocess` gives it; None until its host has collected it.
    """

    name: str
    role: Role | None
    pid: int
    log: Path
    exit_code: int | None
    _seen: float

    @property
    def running(self) -> bool:
        """Whether its host has not collected its exit code yet."""
        return self.exit_code is None

    @property
    def ending(self) -> str:
        """How it ended, in one phrase."""
        return "it runs" if self.exit_code is None else meaning(self.exit_code)

    def seconds_unseen(self) -> float:
        """Seconds since the process was last known to run; one that is stopped does not."""
        return MONOTONIC.now() - self._seen

    @abc.abstractmethod
    def signal(self, number: signal.Signals) -> None:
        """Send a signal, unless the process has ended."""

    @abc.abstractmethod
    def kill_group(self) -> None:
        """Kill the process and what is in its group."""

    def __repr__(self) -> str:
        state = "running" if self.running else self.exit_code
        return f"<{type(self).__name__} {self.name} pid {self.pid} {state}>"


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
        early: whether it ended by itself, and not because it was done or the job had ended.
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
        ending: the meaning of the exit code, in one phrase.
        request: the last one that the supervisor has sent it.
        member: what the controller counts it as, and why, if it has registered.
        outcome: of the job, if that has ended.
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


class Child(ChildProcess, JobProcess):
    """One process of the job on this machine, with a log file.

    Args:
        name: unique in the job, e.g. ``"rollout-0"``.
        module: what ``python -m`` runs.
        arguments: of the command line; never a secret.
        log: where its output goes; appended to.
        role: for a replica.
        environment: variables beside those of this process.
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
        with os.fdopen(open_to_append(log, "job.output"), "ab") as output:
            super().__init__(
                [sys.executable, "-m", module, *arguments],
                output.fileno(),
                pass_fds=pass_fds,
                environment={
                    **os.environ,
                    **environment,
                    PARENT_VARIABLE: str(os.getpid()),
                    "PYTHONUNBUFFERED": "1",
                },
            )
        self._seen = MONOTONIC.now()

    def seconds_unseen(self) -> float:
        """Seconds since the process was last found to run; 0 unless it is stopped or has ended."""
        if self.running and is_running(self.pid):
            self._seen = MONOTONIC.now()
            return 0.0
        return super().seconds_unseen()


def is_restarted(codes: Collection[int], replicas: int) -> bool:
    """Whether a policy group is restarted whose ranks ended with `codes`: by any code that does not forbid it.

    Args:
        codes: as `subprocess` gives them, of the ranks that have ended.
        replicas: how many ranks the group has.
    """
    # Alone, the class raises again. In a larger group it may have raised because another rank was gone.
    raises_again = replicas == 1 and ExitCode.USER_CODE in codes
    return bool(codes) and NOT_RESTARTED.isdisjoint(codes) and not raises_again
