"""The processes of a job and the hosts on which they run: how they start, and that they end with the job."""

from __future__ import annotations

import secrets
import selectors
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Protocol

from dray.clock import Deadline
from dray.jobs.config import JobConfig
from dray.jobs.controller.listener import advertise, token_from_file
from dray.jobs.descendants import child_pids, kill_orphans
from dray.jobs.exit_codes import NOT_RESTARTED
from dray.jobs.folder import JobFolder, JobSpec, RunOptions
from dray.jobs.launch.processes import Child, JobProcess, is_restarted
from dray.jobs.messages.models import Role
from dray.jobs.process import adopt_orphans
from dray.resources import Closing
from dray.text import path_of

# --- hosts -------------------------------------------------------------------------------------------------------

Environment = Callable[[str], Mapping[str, str]]
"""Returns the variables of a replica by its name."""

HOST_SHUTDOWN_TIMEOUT = 5.0
"""Seconds within which the other hosts must confirm that nothing of the job is left on them."""

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


class SupervisorHost(Host, Protocol):
    """The host of the supervisor itself."""

    def start(
        self, role: Role, index: int, *, restarts: int = 0, connections: Sequence[socket.socket] = ()
    ) -> JobProcess:
        """Start a replica.

        Args:
            restarts: of a policy rank: how often its group was restarted before.
            connections: of a policy rank: to all other ranks, in order, for the first one; else the one to it.
        """
        ...

    def start_controller(self, listener: socket.socket, token: str) -> JobProcess:
        """Start the controller on `listener`, which is bound: who connects from now on waits until it accepts."""
        ...

    def kill(self, processes: Iterable[JobProcess]) -> None:
        """Kill those that still run, and what is in their process groups, and collect them."""
        ...


class HostListener(Protocol):
    """Where the other hosts of a job connect."""

    def open(self, selector: selectors.BaseSelector, spec: JobSpec) -> None:
        """Accept connections: from here on the other hosts find what they need to start.

        Args:
            selector: gets keys that have a function to call as their data.
        """
        ...

    def apply_timeouts(self) -> None:
        """Reject connections whose time has passed."""
        ...

    def rank_connections(self) -> list[socket.socket] | None:
        """Connections to the ranks on other hosts, in order, now the caller's; None while one is missing."""
        ...

    def stop_accepting(self) -> None:
        """Accept no connection any more."""
        ...


class LocalHost:
    """This machine. To be used in the main thread.

    Children that the process has when this object is made are none of the job's. What a replica leaves behind,
    such as the environments of a killed one, becomes a child of this process, and is killed.

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
        """Those that were started; the newest of each name. Replicas come before the controller.

        Where several have ended, the ends of replicas are reported first: that of the controller ends the job.
        """
        return sorted(self._processes.values(), key=lambda child: child.role is None)

    def start(
        self, role: Role, index: int, *, restarts: int = 0, connections: Sequence[socket.socket] = ()
    ) -> Child:
        """Start a replica; see `SupervisorHost` for the arguments."""
        name, descriptors = replica_name(role, index), [each.fileno() for each in connections]
        rank = [str(restarts), *map(str, descriptors)] if role is Role.POLICY else []
        return self._add(
            Child(
                name,
                f"dray.jobs.replica.{role.value}",
                [str(self._folder.spec), str(index), *rank],
                self._folder.logs / f"{name}.log",
                role=role,
                pass_fds=descriptors,
                environment=self._environment(name),
            )
        )

    def start_controller(self, listener: socket.socket, token: str) -> Child:
        """Start the controller on `listener`."""
        advertise(self._folder, listener, token)
        with listener:
            return self._add(
                Child(
                    "controller",
                    "dray.jobs.controller.app",
                    [str(self._folder.spec), str(listener.fileno())],
                    self._folder.logs / "controller.log",
                    pass_fds=[listener.fileno()],
                )
            )

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

    def _add(self, child: Child) -> Child:
        self._processes[child.name] = child
        self._selector.register(child.pidfd, selectors.EVENT_READ)
        return child

    def _unregister(self, child: Child) -> None:
        if child.pidfd in self._selector.get_map():
            self._selector.unregister(child.pidfd)

    def _kill_orphans(self) -> int:
        known = self._not_ours | {child.pid for child in self.processes if child.running}
        return kill_orphans(known, _ORPHAN_TIMEOUT)


# --- placement ---------------------------------------------------------------------------------------------------


def _nothing(_: str) -> Mapping[str, str]:
    return {}


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
        token: of the controller, if the user has chosen one.
        options: what the run was started with; kept in its folder once it has begun.
        environment: the variables of a replica of this machine, by its name.
    """

    folder: JobFolder
    address: str
    ranks: int
    rollouts: range
    redis_host: str | None = None
    remote: Sequence[tuple[Host, Role, int]] = ()
    listener: HostListener | None = None
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)
    token: str | None = field(default=None, repr=False)
    options: RunOptions | None = None
    environment: Environment = _nothing


def on_this_machine(config: JobConfig, folder: JobFolder, options: RunOptions | None = None) -> JobPlacement:
    """Everything runs on this machine.

    Raises:
        ConfigError: the file of the controller's token cannot be used.
    """
    return JobPlacement(
        folder=folder,
        address=config.controller.host,
        ranks=config.policy.replicas,
        rollouts=range(config.rollout.replicas),
        token=chosen_token(config),
        options=options,
    )


def chosen_token(config: JobConfig) -> str | None:
    """The controller's token if the job file names a file for it.

    Raises:
        ConfigError: the file cannot be used.
    """
    path = config.controller.token_file
    return None if path is None else token_from_file(path_of(path))


# --- job processes -----------------------------------------------------------------------------------------------


class PolicyGroup:
    """The ranks of the policy on this machine: started together, and all of them again when one is lost.

    If a rank dies, the step is discarded, and what the others hold of it with it: so none of them continues. The
    restarted group begins a new epoch, resumes from the last checkpoint, and is given what was not committed.

    Args:
        ranks: how many of the ranks, the first ones, are processes of this machine.
        restarts: how often the group may be restarted; only where all ranks are on this machine.

    Attributes:
        children: the processes of the group.
        restarted: how often the group was restarted; -1 before it was started.
    """

    def __init__(self, host: SupervisorHost, ranks: int, restarts: int) -> None:
        self._host = host
        self._ranks = ranks
        self.restarts = restarts
        self.children: list[JobProcess] = []
        self.restarted = -1

    def start(self, remote: Sequence[socket.socket] = ()) -> None:
        """Start all ranks of this machine, each connected with the first one.

        Args:
            remote: connections to the ranks of other machines, in order; from here on the first rank has them.
        """
        self.restarted += 1
        with ExitStack() as ends:
            pairs = [socket.socketpair() for _ in range(1, self._ranks)]
            for end in (*(end for pair in pairs for end in pair), *remote):
                ends.enter_context(end)
            first, *others = ([*(pair[0] for pair in pairs), *remote], *([pair[1]] for pair in pairs))
            self.children = [
                self._host.start(Role.POLICY, rank, restarts=self.restarted, connections=connections)
                for rank, connections in enumerate([first, *others])
            ]

    def may_restart(self) -> bool:
        """Whether the group is to be restarted, now that one of its ranks has ended."""
        codes = [child.exit_code for child in self.children if child.exit_code is not None]
        return self.restarted < self.restarts and is_restarted(codes, self._ranks)

    def restart(self) -> None:
        """Kill the ranks that are left, and start all again."""
        self._host.kill(self.children)
        self.start()


class JobProcesses(Closing):
    """The processes of a job, on all of its hosts. To be used in the main thread.

    Attributes:
        controller: once it was started.
        policy: the ranks of this machine.
        remote: how many replicas other hosts start.
    """

    def __init__(self, config: JobConfig, placement: JobPlacement, local: SupervisorHost) -> None:
        self._placement = placement
        self._local = local
        self._others = list(dict.fromkeys(host for host, _, _ in placement.remote))
        self.hosts: Sequence[Host] = [*self._others, local]
        self.controller: JobProcess | None = None
        self.policy = PolicyGroup(local, placement.ranks, config.policy.restarts)
        self.remote = len(placement.remote)
        self._max_restarts = config.rollout.restarts
        self._restarts: Counter[str] = Counter()  # of each rollout replica

    @property
    def processes(self) -> Sequence[JobProcess]:
        """Those that were started, of all hosts."""
        return [process for host in self.hosts for process in host.processes]

    @property
    def replicas(self) -> Sequence[JobProcess]:
        """All processes but the controller."""
        return [each for each in self.processes if each.role is not None]

    def rollouts(self) -> Sequence[JobProcess]:
        """The rollout replicas."""
        return [each for each in self.processes if each.role is Role.ROLLOUT]

    def others(self) -> Sequence[JobProcess]:
        """All processes but the rollout replicas."""
        return [each for each in self.processes if each.role is not Role.ROLLOUT]

    def start_controller(self, listener: socket.socket, token: str) -> None:
        """Start the controller on `listener`."""
        self.controller = self._local.start_controller(listener, token)

    def start_replicas(self, selector: selectors.BaseSelector, spec: JobSpec) -> None:
        """Start the replicas of all hosts, each as soon as its host is connected.

        Args:
            selector: gets keys that have a function to call as their data.
        """
        if self._placement.listener is not None:
            self._placement.listener.open(selector, spec)
        for host, role, index in self._placement.remote:
            host.start(role, index)
        self.start_policy()
        for index in self._placement.rollouts:
            self._local.start(Role.ROLLOUT, index)

    def start_policy(self) -> None:
        """Start the ranks of this machine, unless they were started or ranks of other hosts are missing."""
        listener = self._placement.listener
        remote = [] if self.policy.children or listener is None else listener.rank_connections()
        if not self.policy.children and remote is not None:
            self.policy.start(remote)

    def may_restart(self, process: JobProcess) -> bool:
        """Whether a rollout replica that has ended is to be restarted."""
        return (
            process.role is Role.ROLLOUT
            and process.exit_code not in NOT_RESTARTED
            and self._restarts[process.name] < self._max_restarts
            and not self._host_of(process).lost
        )

    def restart(self, process: JobProcess) -> str:
        """Restart a rollout replica on its host; returns a line about it."""
        self._host_of(process).start(Role.ROLLOUT, int(process.name.rpartition("-")[2]))
        self._restarts[process.name] += 1
        return f"restarting {process.name} (restart {self._restarts[process.name]} of {self._max_restarts})"

    def _host_of(self, process: JobProcess) -> Host:
        return next(host for host in self.hosts if process in host.processes)

    def apply_timeouts(self) -> None:
        """Reject connections of other hosts whose time has passed."""
        if self._placement.listener is not None:
            self._placement.listener.apply_timeouts()

    def stop_accepting(self) -> None:
        """The job ends: hosts that are not connected are not needed any more."""
        if self._placement.listener is not None:
            self._placement.listener.stop_accepting()

    def close(self) -> None:
        """Have every host kill what is left there. Twice is fine."""
        self.stop_accepting()
        deadline = Deadline.after(HOST_SHUTDOWN_TIMEOUT)
        with ExitStack() as closing:
            closing.callback(self._local.close, deadline)
            for host in self._others:
                host.request_shutdown()
            for host in self._others:
                host.close(deadline)
