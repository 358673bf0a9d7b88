"""The processes of replicas: what they are called, what they are told, and where their output goes."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence

from dray.launch.children import Child
from dray.runtime.job import JobFolder
from dray.runtime.membership import Role

Environment = Callable[[str], Mapping[str, str]]
"""Gives the variables of a replica by its name."""


def start_rank(
    folder: JobFolder,
    rank: int,
    life: int,
    sockets: Sequence[socket.socket],
    environment: Environment,
) -> Child:
    """Start the process of one rank.

    Args:
        sockets: connections to all other ranks, in order, for the first one; for the others, the one to it.
    """
    name = f"{Role.POLICY.value}-{rank}"
    descriptors = [each.fileno() for each in sockets]
    return Child(
        name,
        f"dray.runtime.{Role.POLICY.value}",
        [str(folder.spec), str(rank), str(life), *map(str, descriptors)],
        folder.logs / f"{name}.log",
        role=Role.POLICY,
        pass_fds=descriptors,
        environment=environment(name),
    )


def start_rollout(folder: JobFolder, index: int, environment: Environment) -> Child:
    """Start the process of a rollout replica."""
    name = f"{Role.ROLLOUT.value}-{index}"
    return Child(
        name,
        f"dray.runtime.{Role.ROLLOUT.value}",
        [str(folder.spec), str(index)],
        folder.logs / f"{name}.log",
        role=Role.ROLLOUT,
        environment=environment(name),
    )
