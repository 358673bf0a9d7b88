"""The processes of a job: how they are started, and that none of them outlives the supervisor."""

from __future__ import annotations

import secrets
import selectors
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from dray.jobs.config import JobConfig
from dray.jobs.controller.listener import advertise
from dray.jobs.descendants import kill_orphans
from dray.jobs.exit_codes import NOT_RESTARTED
from dray.jobs.folder import JobFolder, JobSpec
from dray.jobs.launch.processes import Child, Environment, JobProcess, PolicyGroup, start_rollout
from dray.jobs.launch.run_options import RunOptions
from dray.jobs.launch.token_file import token_from_file
from dray.jobs.messages.models import Role
from dray.text import path_of

# --- site --------------------------------------------------------------------------------------------------------


class Elsewhere(Protocol):
    """The other machines of a job, whose processes are not children of the supervisor."""

    @property
    def expected(self) -> int:
        """How many replicas run there."""
        ...

    @property
    def processes(self) -> Sequence[JobProcess]:
        """Those that have been started there."""
        ...

    def open(self, selector: selectors.BaseSelector, spec: JobSpec) -> None:
        """Let the other machines in: from here on they find what they need to start. What comes of them comes
        through `selector`, whose keys have something to call as their data."""
        ...

    def look(self) -> None:
        """Let time act on what is under way."""
        ...

    def take_ranks(self) -> list[socket.socket] | None:
        """Connections to the policy ranks there, in order, for the one who asks to keep; None while some are
        missing."""
        ...

    def refuse(self) -> None:
        """The job ends: let nobody in any more."""
        ...

    def close(self) -> None:
        """Let go of the other machines, which then end what is left there. Bounded; twice is fine."""
        ...


class Nowhere:
    """No other machines."""

    expected = 0
    processes: Sequence[JobProcess] = ()

    def open(self, selector: selectors.BaseSelector, spec: JobSpec) -> None:
        """See `Elsewhere`, as for the others."""

    def look(self) -> None:
        """Nothing is under way."""

    def take_ranks(self) -> list[socket.socket] | None:
        """There are none."""
        return []

    def refuse(self) -> None:
        """Nobody comes."""

    def close(self) -> None:
        """Nothing is held."""


def _nothing(_: str) -> Mapping[str, str]:
    return {}


@dataclass(frozen=True, slots=True)
class Site:
    """See the module.

    Attributes:
        host: where the controller listens.
        redis_host: where a Redis server that is started for the job listens for other machines; None: it does not.
        ranks: how many policy replicas, the first ones, run on this machine.
        rollouts: the numbers of the rollout replicas that run on this machine.
        secret: of the job.
        token: of the controller, if the user has chosen one.
        options: what the run was started with; kept in its folder once it has begun.
        environment: the variables of a replica of this machine, by its name.
    """

    folder: JobFolder
    host: str
    ranks: int
    rollouts: range
    redis_host: str | None = None
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)
    token: str | None = field(default=None, repr=False)
    options: RunOptions | None = None
    environment: Environment = _nothing
    elsewhere: Elsewhere = field(default_factory=Nowhere)


def this_machine(config: JobConfig, folder: JobFolder, options: RunOptions | None = None) -> Site:
    """Everything runs on this machine.

    Raises:
        ConfigError: the file of the controller's token cannot be used.
    """
    return Site(
        folder=folder,
        host=config.controller.host,
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


class RolloutRestarts:
    """How often each rollout replica was started again.

    Args:
        most: how often each of them may be.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._counts: dict[str, int] = {}

    def allowed(self, name: str, exit_code: int | None) -> bool:
        """Whether the replica is to be started again, now that it has ended with `exit_code`."""
        return exit_code not in NOT_RESTARTED and self._counts.get(name, 0) < self._most

    def count(self, name: str) -> str:
        """The replica is started again; returns a line that says so."""
        self._counts[name] = self._counts.get(name, 0) + 1
        return f"restarting {name} (restart {self._counts[name]} of {self._most})"


# --- job processes -----------------------------------------------------------------------------------------------


class Crew:
    """See the module. To be used in the main thread.

    Attributes:
        controller: once it was started.
        policy: the ranks of this machine.
    """

    def __init__(self, config: JobConfig, site: Site) -> None:
        self._site = site
        self._folder = site.folder
        self._elsewhere = site.elsewhere
        self._rollouts: list[Child] = []
        self._restarts = RolloutRestarts(config.rollout.restarts)
        self._strangers: frozenset[int] = frozenset()
        self.controller: Child | None = None
        self.policy = PolicyGroup(site.folder, site.ranks, config.policy.restarts, site.environment)

    @property
    def replicas(self) -> Sequence[JobProcess]:
        """Those that were started, of all machines."""
        return [*self.policy.children, *self._rollouts, *self._elsewhere.processes]

    @property
    def processes(self) -> Sequence[JobProcess]:
        """Replicas and controller."""
        return [*self.replicas, *([self.controller] if self.controller is not None else [])]

    @property
    def children(self) -> Sequence[Child]:
        """The processes of this machine."""
        return [each for each in self.processes if isinstance(each, Child)]

    def rollouts(self) -> Sequence[JobProcess]:
        """The rollout replicas."""
        return [each for each in self.replicas if each.role is Role.ROLLOUT]

    def others(self) -> Sequence[JobProcess]:
        """All processes but the rollout replicas."""
        return [each for each in self.processes if each.role is not Role.ROLLOUT]

    def start_controller(self, listener: socket.socket, token: str) -> None:
        """Start it on `listener`, which is bound: whoever connects from now on waits until it accepts."""
        advertise(self._folder, listener, token)
        self.controller = Child(
            "controller",
            "dray.jobs.controller.app",
            [str(self._folder.spec), str(listener.fileno())],
            self._folder.logs / "controller.log",
            pass_fds=[listener.fileno()],
        )
        listener.close()

    def start_policy(self) -> Sequence[Child]:
        """Start the policy, unless it was started or ranks of other machines are missing; returns what started."""
        if self.policy.children:
            return ()
        ranks = self._elsewhere.take_ranks()
        return () if ranks is None else self.policy.start(ranks)

    def start_rollouts(self) -> Sequence[Child]:
        """Start those of this machine."""
        for index in self._site.rollouts:
            self._rollouts.append(start_rollout(self._folder, index, self._site.environment))
        return self._rollouts

    def restarts_rollout(self, process: JobProcess) -> bool:
        """Whether a process that has ended is a rollout replica of this machine that is to be started again."""
        return process in self._rollouts and self._restarts.allowed(process.name, process.exit_code)

    def restart_rollout(self, process: JobProcess) -> tuple[Child, str]:
        """Start a rollout replica again; returns the new process, and a line about it."""
        place = next(place for place, each in enumerate(self._rollouts) if each is process)
        self._rollouts[place] = start_rollout(self._folder, self._site.rollouts[place], self._site.environment)
        return self._rollouts[place], self._restarts.count(process.name)

    def keep(self, pids: frozenset[int]) -> None:
        """Children of this process that are none of the job's, and not to be killed as orphans."""
        self._strangers = pids

    def kill_orphans(self) -> int:
        """What a replica leaves behind, the environments of a killed one say, is this process's now."""
        return kill_orphans(self._strangers | {child.pid for child in self.children if child.running}, 1.0)

    def kill_rest(self) -> None:
        """Nothing that was started outlives this, whatever happened."""
        for child in self.children:
            if child.running:
                child.kill_group()
                child.collect(5.0)
