"""On which node each replica runs, and what it is told about that. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dray.errors import ConfigError
from dray.launch.slurm.network import Interface
from dray.launch.slurm.plan import Plan, RoleLayout
from dray.runtime.membership import Role
from dray.runtime.place import ADDRESS_VARIABLE, REPLICA_NODES_VARIABLE

DEVICES_VARIABLE = "CUDA_VISIBLE_DEVICES"
_INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Collective libraries choose an interface by themselves, which need not be the one of the job."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one replica runs.

    Attributes:
        nodes: the names of its nodes; its process runs on the first.
        gpus: their numbers among those of each of its nodes.
    """

    role: Role
    index: int
    nodes: tuple[str, ...]
    gpus: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.role.value}-{self.index}"

    @property
    def node(self) -> str:
        """Where its process runs."""
        return self.nodes[0]


def placements(plan: Plan, nodes: Sequence[str]) -> list[Placement]:
    """The place of every replica, policy first.

    Args:
        nodes: the names of the job's nodes, those of the policy first.

    Raises:
        ConfigError: the plan does not say where each of the replicas runs.
    """
    policy, rollout = plan.policy, plan.rollout
    beside = policy.replicas_per_node * policy.gpus_per_replica if rollout.nodes == 0 else 0
    rest = nodes[policy.nodes :] if rollout.nodes else nodes[:1]
    return [
        *_of_role(Role.POLICY, policy, plan.config.policy.replicas, nodes[: policy.nodes], 0),
        *_of_role(Role.ROLLOUT, rollout, plan.config.rollout.replicas, rest, beside),
    ]


def _of_role(role: Role, layout: RoleLayout, count: int, nodes: Sequence[str], first_gpu: int) -> list[Placement]:
    if layout.nodes_per_replica > 1:
        fits = layout.replicas_per_node == 1 and count * layout.nodes_per_replica == len(nodes)
    else:
        fits = count == layout.replicas_per_node * len(nodes)
    if not fits:
        allowed = f"a layout with a place for each of {count} replicas on {len(nodes)} nodes"
        raise ConfigError(f"plan.{role.value}", layout, allowed)
    found = []
    for index in range(count):
        place, beside = divmod(index, layout.replicas_per_node)
        first = place * layout.nodes_per_replica
        gpu = first_gpu + beside * layout.gpus_per_replica
        own = tuple(nodes[first : first + layout.nodes_per_replica])
        found.append(Placement(role, index, own, tuple(range(gpu, gpu + layout.gpus_per_replica))))
    return found


def environment(placed: Placement, interface: Interface, inherited: Mapping[str, str]) -> dict[str, str]:
    """The variables of a replica's process that its place decides.

    Args:
        interface: of its node.
        inherited: the variables of the process that starts it.

    Raises:
        ConfigError: the node does not have as many GPUs as the plan says.
    """
    variables = {ADDRESS_VARIABLE: interface.address, REPLICA_NODES_VARIABLE: " ".join(placed.nodes)}
    variables |= {name: interface.name for name in _INTERFACE_VARIABLES if name not in inherited}
    if placed.gpus:
        # Slurm may have given the task some of the node's only.
        given = inherited.get(DEVICES_VARIABLE)
        devices = [str(gpu) for gpu in range(placed.gpus[-1] + 1)] if given is None else given.split(",")
        if len(devices) <= placed.gpus[-1]:
            allowed = f"at least {placed.gpus[-1] + 1} devices on {placed.node}, as slurm.gpus_per_node says"
            raise ConfigError(DEVICES_VARIABLE, given, allowed)
        variables[DEVICES_VARIABLE] = ",".join(devices[gpu] for gpu in placed.gpus)
    return variables
