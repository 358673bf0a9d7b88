"""The processes of a job: how they are started, and that none of them outlives the supervisor."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from dray.config import JobConfig
from dray.launch.children import Child, JobProcess
from dray.launch.policy_group import PolicyGroup
from dray.launch.replicas import start_rollout
from dray.launch.site import Site
from dray.runtime.address import advertise
from dray.runtime.descendants import kill_orphans
from dray.runtime.membership import Role


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
            "dray.runtime.controller",
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
