"""The processes of a job and the hosts on which they run: how they start and end, and which are restarted."""

from __future__ import annotations

import abc
import os
import secrets
import selectors
import signal
import socket
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from dray.clock import MONOTONIC, Deadline
from dray.files import open_to_append
from dray.jobs.config import JobConfig
from dray.jobs.controller.listener import advertise
from dray.jobs.controller.state import THE_JOB_HAS
from dray.jobs.exit_codes import NOT_RESTARTED, USER_CODES, ExitCode, meaning
from dray.jobs.folder import JobFolder, JobSpec, RunOptions
from dray.jobs.messages.models import HeirFigures, MemberState, OutcomeKind, Role
from dray.jobs.process import PARENT_VARIABLE, ChildProcess, adopt_orphans, child_pids, is_running, kill_orphans
from dray.resources import Closing

# --- processes ---------------------------------------------------------------------------------------------------


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


# --- hosts -------------------------------------------------------------------------------------------------------

Environment = Callable[[str], Mapping[str, str]]
"""Returns the variables of a replica by its name."""

HOST_SHUTDOWN_TIMEOUT = 5.0
"""Seconds within which the other hosts must confirm that nothing of the job is left on them."""

_GROUP = "the policy group"
_KILL_TIMEOUT = 5.0
_ORPHAN_TIMEOUT = 1.0


def replica_name(role: Role, index: int) -> str:
    """The name of a replica, unique in the job."""
    return f"{role.value}-{index}"


class Host(Protocol):
    """A machine of a job: this one (`LocalHost`), or a node behind a message channel (`RemoteHost`)."""

    @property
    def lost(self) -> bool:
        """Whether the machine is gone: nothing can be started there any more."""
        ...

    @property
    def processes(self) -> Sequence[JobProcess]:
        """Those that were started there; the newest of each name."""
        ...

    def start(self, role: Role, index: int) -> object:
        """Start a replica there, as soon as the host is connected."""
        ...

    def collect(self) -> Iterator[JobProcess]:
        """The processes that have ended since the last call, each with its exit code, one by one."""
        ...

    def request_shutdown(self) -> None:
        """Have the host kill what is left there. Does not wait."""
        ...

    def close(self, deadline: Deadline) -> None:
        """Release the host; nothing of the job is left there unless the deadline has passed. Twice is fine."""
        ...


class HostListener:
    """Where the other hosts of a job connect; this one is for a job that has no others."""

    def open(self, selector: selectors.BaseSelector, spec: JobSpec) -> None:
        """Accept connections: from here on the other hosts find what they need to start. The keys of `selector`
        have a function to call as their data."""

    def apply_timeouts(self) -> None:
        """Reject connections whose time has passed."""

    def rank_connections(self) -> list[socket.socket] | None:
        """Connections to the ranks on other hosts, in order, now the caller's; None while one is missing."""
        return []

    def stop_accepting(self) -> None:
        """The job ends: hosts that are not connected are not needed any more."""

    def heir_figures(self) -> list[HeirFigures]:
        """What the agents of the other hosts have inherited, as each has reported last."""
        return []


class LocalHost:
    """This machine. To be used in the main thread.

    What a replica leaves behind, such as the environments of a killed one, becomes a child of this process, and is
    killed. Children that the process has when this object is made are none of the job's.

    Args:
        selector: wakes up when one of the processes has ended.
        report: is called with a line about what was killed.
    """

    def __init__(
        self,
        folder: JobFolder,
        environment: Environment,
        selector: selectors.BaseSelector,
        report: Callable[[str], None],
    ) -> None:
        self.lost = False
        self._folder = folder
        self._environment = environment
        self._selector = selector
        self._report = report
        self._processes: dict[str, Child] = {}
        self._not_ours = child_pids()
        adopt_orphans()

    @property
    def processes(self) -> Sequence[Child]:
        """Those that were started; the newest of each name. The controller comes last: its end ends the job."""
        return sorted(self._processes.values(), key=lambda child: child.role is None)

    def start(
        self, role: Role, index: int, *, restarts: int = 0, connections: Sequence[socket.socket] = ()
    ) -> Child:
        """Start a replica.

        Args:
            restarts: of a policy rank: how often its group was restarted before.
            connections: of a policy rank: to all other ranks, in order, for the first one; else the one to it.
        """
        name, descriptors = replica_name(role, index), [each.fileno() for each in connections]
        rank = [str(restarts), *map(str, descriptors)] if role is Role.POLICY else []
        module, environment = f"dray.jobs.replica.{role.value}", self._environment(name)
        return self._start(name, module, [str(index), *rank], descriptors, role=role, environment=environment)

    def start_controller(self, listener: socket.socket, token: str) -> Child:
        """Start the controller on `listener`, which is bound: what connects from now on waits until it accepts."""
        advertise(self._folder, listener, token)
        with listener:
            number = listener.fileno()
            return self._start("controller", "dray.jobs.controller.app", [str(number)], [number])

    def collect(self) -> Iterator[Child]:
        """The processes that have ended since the last call, each with its exit code, one by one."""
        for child in self.processes:
            if child.running and child.has_ended():
                self._unregister(child)
                child.collect()
                if killed := self._kill_orphans():
                    self._report(f"{killed} processes that {child.name} left behind were killed")
                yield child

    def kill(self, processes: Iterable[JobProcess]) -> None:
        """Kill those that still run, and what is in their process groups, and collect them."""
        names = {process.name for process in processes}
        left = [child for child in self.processes if child.name in names and child.running]
        for child in left:
            child.kill_group()
        for child in left:
            self._unregister(child)
            child.collect(_KILL_TIMEOUT)

    def request_shutdown(self) -> None:
        """`close` does all."""

    def close(self, deadline: Deadline) -> None:
        """Kill what is left. Twice is fine."""
        self.kill(self.processes)
        self._kill_orphans()

    def _start(
        self,
        name: str,
        module: str,
        arguments: Sequence[str],
        pass_fds: Collection[int],
        *,
        role: Role | None = None,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> Child:
        arguments, log = [str(self._folder.spec), *arguments], self._folder.logs / f"{name}.log"
        child = Child(name, module, arguments, log, role=role, pass_fds=pass_fds, environment=environment)
        self._processes[name] = child
        self._selector.register(child.pidfd, selectors.EVENT_READ)
        return child

    def _unregister(self, child: Child) -> None:
        if child.pidfd in self._selector.get_map():
            self._selector.unregister(child.pidfd)

    def _kill_orphans(self) -> int:
        known = self._not_ours | {child.pid for child in self.processes if child.running}
        return kill_orphans(known, _ORPHAN_TIMEOUT)


# --- placement ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class JobPlacement:
    """Where the processes of a job run, and what they are given.

    Attributes:
        address: where the controller listens.
        redis_host: where a Redis server that is started for the job listens for other machines; None: it does not.
        ranks: how many policy replicas, the first ones, run on this machine.
        rollouts: the numbers of the rollout replicas that run on this machine.
        remote: the replicas on other hosts.
        listener: where these hosts connect.
        secret: of the job.
        options: what the run was started with; kept in its folder once it has begun.
        environment: the variables of a replica of this machine, by its name.
    """

    folder: JobFolder
    address: str
    ranks: int
    rollouts: range
    redis_host: str | None = None
    remote: Sequence[tuple[Host, Role, int]] = ()
    listener: HostListener = field(default_factory=HostListener)
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)
    options: RunOptions | None = None
    environment: Environment = lambda _: {}


# --- job processes -----------------------------------------------------------------------------------------------


class JobProcesses(Closing):
    """The processes of a job, on all of its hosts. To be used in the main thread.

    If a rank of the policy dies, the step is discarded, and what the others hold of it with it: so none of them
    continues, and the whole group is restarted. It begins a new epoch, resumes from the last checkpoint, and is
    given what was not committed. The group may be restarted only where all ranks are on this machine.

    Attributes:
        hosts: where they run; this machine is the last one.
        listener: where the other hosts connect.
        controller: once it was started.
    """

    def __init__(self, config: JobConfig, placement: JobPlacement, local: LocalHost) -> None:
        self._placement = placement
        self._local = local
        self._others = list(dict.fromkeys(host for host, _, _ in placement.remote))
        self.hosts: Sequence[Host] = [*self._others, local]
        self.listener = placement.listener
        self.controller: JobProcess | None = None
        self._ranks: list[Child] = []  # of this machine
        self._max_restarts = {Role.ROLLOUT: config.rollout.restarts, Role.POLICY: config.policy.restarts}
        self._restarts: Counter[str] = Counter()  # of each rollout replica, and of the group

    def start_controller(self, listener: socket.socket, token: str) -> None:
        """Start the controller on `listener`."""
        self.controller = self._local.start_controller(listener, token)

    def start_replicas(self, selector: selectors.BaseSelector, spec: JobSpec) -> None:
        """Start the replicas of every host, each as soon as that is connected; `selector` as in `HostListener`."""
        self.listener.open(selector, spec)
        for host, role, index in self._placement.remote:
            host.start(role, index)
        self.start_policy()
        for index in self._placement.rollouts:
            self._local.start(Role.ROLLOUT, index)

    def start_policy(self) -> None:
        """Start the ranks of this machine, unless they were started or ranks of other hosts are missing."""
        if not self._ranks and (remote := self.listener.rank_connections()) is not None:
            self._start_ranks(remote)

    def _start_ranks(self, remote: Sequence[socket.socket] = ()) -> None:
        """Start all ranks of this machine, each connected with the first one; that has the `remote` ones, too."""
        with ExitStack() as ends:
            pairs = [socket.socketpair() for _ in range(1, self._placement.ranks)]
            for end in (*(end for pair in pairs for end in pair), *remote):
                ends.enter_context(end)
            first, *others = ([*(pair[0] for pair in pairs), *remote], *([pair[1]] for pair in pairs))
            self._ranks = [
                self._local.start(Role.POLICY, rank, restarts=self._restarts[_GROUP], connections=connections)
                for rank, connections in enumerate([first, *others])
            ]

    def may_restart(self, process: JobProcess) -> bool:
        """Whether a replica that has ended, or the policy group that it belongs to, is to be restarted."""
        assert process.role is not None
        if self._restarts[_restarted(process)] >= self._max_restarts[process.role]:
            return False
        if process.role is Role.ROLLOUT:
            return process.exit_code not in NOT_RESTARTED and not self._host_of(process).lost
        codes = [rank.exit_code for rank in self._ranks if rank.exit_code is not None]
        return process in self._ranks and is_restarted(codes, self._placement.ranks)

    def restart(self, process: JobProcess) -> str:
        """Restart the replica on its host, or the policy group; returns a line about it."""
        assert process.role is not None
        name = _restarted(process)
        self._restarts[name] += 1
        if process.role is Role.ROLLOUT:
            self._host_of(process).start(Role.ROLLOUT, int(process.name.rpartition("-")[2]))
        else:
            self._local.kill(self._ranks)
            self._start_ranks()
        return f"restarting {name} (restart {self._restarts[name]} of {self._max_restarts[process.role]})"

    def _host_of(self, process: JobProcess) -> Host:
        return next(host for host in self.hosts if process in host.processes)

    def close(self) -> None:
        """Have every host kill what is left there. Twice is fine."""
        self.listener.stop_accepting()
        deadline = Deadline.after(HOST_SHUTDOWN_TIMEOUT)
        with ExitStack() as closing:
            closing.callback(self._local.close, deadline)
            for host in self._others:
                host.request_shutdown()
            for host in self._others:
                host.close(deadline)


def _restarted(replica: JobProcess) -> str:
    """The name of what is restarted when a replica has ended."""
    return _GROUP if replica.role is Role.POLICY else replica.name
