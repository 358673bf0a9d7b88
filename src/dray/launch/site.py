"""Where a job runs: what its supervisor has to know beside the configuration."""

from __future__ import annotations

import secrets
import selectors
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from dray.config import JobConfig
from dray.launch.children import JobProcess
from dray.launch.replicas import Environment
from dray.runtime.job import JobFolder, JobSpec


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
        environment: the variables of a replica of this machine, by its name.
    """

    folder: JobFolder
    host: str
    ranks: int
    rollouts: range
    redis_host: str | None = None
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)
    environment: Environment = _nothing
    elsewhere: Elsewhere = field(default_factory=Nowhere)


def this_machine(config: JobConfig, folder: JobFolder) -> Site:
    """Everything runs on this machine."""
    return Site(folder, config.controller.host, config.policy.replicas, range(config.rollout.replicas))
