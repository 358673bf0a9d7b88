"""The distribution of a run's replicas over nodes, and the environment variables of each replica. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dray.errors import ConfigError
from dray.jobs.config import JobConfig, SlurmTable
from dray.jobs.messages.models import Role
from dray.jobs.process import ADDRESS_VARIABLE, REPLICA_NODES_VARIABLE
from dray.jobs.slurm.network import Interface
from dray.jobs.slurm.plan import Plan, RoleLayout

# --- layout ------------------------------------------------------------------------------------------------------

# The nodes of an allocation are counted from 0, those of the policy first:
#
# ```
#   node                 0 … policy_nodes - 1        policy_nodes … policy_nodes + rollout_nodes - 1
#   runs                 controller, Redis (on 0)    rollout replicas
#                        policy replicas
# ```
#
# A replica has whole nodes or an equal share of one. With `rollout_nodes = 0` all replicas share one node.


@dataclass(frozen=True, slots=True)
class NodeLayout:
    """How the replicas of both roles are spread over the nodes of a job."""

    policy: RoleLayout
    rollout: RoleLayout


def configured_layout(config: JobConfig) -> NodeLayout:
    """The layout that a job file configures.

    Raises:
        ConfigError: see `make_layout`.
    """
    table = config.slurm or SlurmTable()
    return make_layout(
        policy_replicas=config.policy.replicas,
        rollout_replicas=config.rollout.replicas,
        policy_nodes=table.policy_nodes,
        rollout_nodes=table.rollout_nodes,
        gpus_per_node=table.gpus_per_node,
    )


def make_layout(
    *, policy_replicas: int, rollout_replicas: int, policy_nodes: int, rollout_nodes: int, gpus_per_node: int
) -> NodeLayout:
    """The layout of a job.

    Raises:
        ConfigError: the replicas cannot be spread evenly over the nodes, or the GPUs over the replicas.
    """
    if rollout_nodes == 0:
        return _on_one_node(policy_replicas, rollout_replicas, policy_nodes, gpus_per_node)
    return NodeLayout(
        policy=_spread(Role.POLICY, policy_replicas, policy_nodes, gpus_per_node),
        rollout=_spread(Role.ROLLOUT, rollout_replicas, rollout_nodes, gpus_per_node),
    )


def rollout_nodes_of(nodes: int, policy_nodes: int) -> int:
    """The number of `nodes` that are left for rollout replicas.

    Raises:
        ConfigError: there are fewer nodes than the policy has.
    """
    if nodes < policy_nodes:
        raise ConfigError("--nodes", nodes, f"must be at least slurm.policy_nodes, which is {policy_nodes}")
    return nodes - policy_nodes


def _on_one_node(policy_replicas: int, rollout_replicas: int, policy_nodes: int, gpus: int) -> NodeLayout:
    if policy_nodes != 1:
        allowed = (
            f"must be at least 1, as slurm.policy_nodes is {policy_nodes}: both roles can share only one node"
        )
        raise ConfigError("slurm.rollout_nodes", 0, allowed)
    share = _share_of(gpus, policy_replicas + rollout_replicas)
    return NodeLayout(RoleLayout(1, policy_replicas, share), RoleLayout(0, rollout_replicas, share))


def _spread(role: Role, replicas: int, nodes: int, gpus: int) -> RoleLayout:
    if replicas % nodes == 0:
        per_node = replicas // nodes
        return RoleLayout(nodes, per_node, _share_of(gpus, per_node))
    if nodes % replicas == 0:
        return RoleLayout(nodes, gpus_per_replica=gpus, nodes_per_replica=nodes // replicas)
    some = ", ".join(str(count) for count in range(1, replicas) if replicas % count == 0)
    what = f"{some} or a multiple of {replicas}"
    allowed = (
        f"must be {what}, as {role.value}.replicas is {replicas}: a replica has whole nodes or an equal share"
    )
    raise ConfigError(f"slurm.{role.value}_nodes", nodes, allowed)


def _share_of(gpus: int, replicas: int) -> int:
    if gpus % replicas:
        allowed = f"must be 0 or a multiple of {replicas}, the number of replicas that share a node"
        raise ConfigError("slurm.gpus_per_node", gpus, allowed)
    return gpus // replicas


# --- placement ---------------------------------------------------------------------------------------------------

DEVICES_VARIABLE = "CUDA_VISIBLE_DEVICES"
_INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Variables of the collective libraries, which would otherwise choose an interface themselves."""


@dataclass(frozen=True, slots=True)
class Placement:
    """The place of one replica.

    Attributes:
        nodes: the names of its nodes; its process runs on the first.
        gpus: the numbers of its GPUs, the same on each of its nodes.
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
        """The node on which its process runs."""
        return self.nodes[0]


def placements(plan: Plan, nodes: Sequence[str]) -> list[Placement]:
    """The place of every replica, those of the policy first.

    Args:
        nodes: the names of the job's nodes, those of the policy first.

    Raises:
        ConfigError: the plan's layout does not have a place for every replica.
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
        allowed = f"must be a layout with a place for each of {count} replicas on {len(nodes)} nodes"
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
    """The environment variables of a replica's process that depend on its place.

    Args:
        interface: the network interface of its node.
        inherited: the variables of the process that starts it.

    Raises:
        ConfigError: the node has fewer GPUs than the plan.
    """
    variables = {ADDRESS_VARIABLE: interface.address, REPLICA_NODES_VARIABLE: " ".join(placed.nodes)}
    variables |= {name: interface.name for name in _INTERFACE_VARIABLES if name not in inherited}
    if placed.gpus:
        # Slurm may have given only some of the node's GPUs to the task.
        given = inherited.get(DEVICES_VARIABLE)
        devices = [str(gpu) for gpu in range(placed.gpus[-1] + 1)] if given is None else given.split(",")
        if len(devices) <= placed.gpus[-1]:
            allowed = f"must have at least {placed.gpus[-1] + 1} devices on {placed.node} (slurm.gpus_per_node)"
            raise ConfigError(DEVICES_VARIABLE, given, allowed)
        variables[DEVICES_VARIABLE] = ",".join(devices[gpu] for gpu in placed.gpus)
    return variables
