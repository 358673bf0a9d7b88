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
from dray.launch.run_options import RunOptions
from dray.runtime.job import JobFolder, JobSpec
from dray.runtime.token_file import token_from_file
from dray.text import path_of


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
