"""What a process on a node is told: ``PLAN PART ATTEMPT`` on the command line, and in the environment where it is.

Nothing secret is in either; the plan's file has that.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dray.errors import ConfigError
from dray.launch.slurm.plan import NODE_VARIABLE, NODES_VARIABLE, Plan


@dataclass(frozen=True, slots=True)
class Task:
    """What a process on a node was told when it was started.

    Attributes:
        nodes: the names of all nodes of the job, the policy's first.
        node: the name of the node on which the process runs.
    """

    plan: Plan
    part: int
    attempt: int
    nodes: tuple[str, ...]
    node: str

    @property
    def name(self) -> str:
        """Part and attempt, as the name of their folder has them."""
        return attempt_name(self.part, self.attempt)


def attempt_name(part: int, attempt: int) -> str:
    """The name of an attempt's folder, e.g. ``"003.1"``."""
    return f"{part:03d}.{attempt}"


def read_task(arguments: Sequence[str] = sys.argv, environment: Mapping[str, str] = os.environ) -> Task:
    """What this process was told.

    Raises:
        ConfigError: something is missing, or does not fit the plan.
    """
    if len(arguments) != 4 or not all(each.isdecimal() for each in arguments[2:]):
        raise ConfigError("command line", " ".join(arguments[1:]), "PLAN PART ATTEMPT")
    plan = Plan.read(Path(arguments[1]))
    nodes = tuple(environment.get(NODES_VARIABLE, "").split())
    if len(nodes) != plan.node_count or len(set(nodes)) != len(nodes):
        allowed = f"the names of {plan.node_count} nodes, separated by spaces, each once"
        raise ConfigError(NODES_VARIABLE, " ".join(nodes), allowed)
    node = environment.get(NODE_VARIABLE, "")
    if node not in nodes:
        raise ConfigError(NODE_VARIABLE, node, f"one of the job's nodes, which are {' '.join(nodes)}")
    return Task(plan, int(arguments[2]), int(arguments[3]), nodes, node)
