"""How many replicas share a node, or how many nodes a replica has: arithmetic, no I/O.

The nodes of an allocation are counted from 0, those of the policy first:

```
  node                 0 … policy_nodes - 1        policy_nodes … policy_nodes + rollout_nodes - 1
  runs                 controller, Redis (on 0)    rollout replicas
                       policy replicas
```

A replica has whole nodes or an even part of one. With `rollout_nodes = 0` everything shares the policy's one node.
`placement` says where each replica is in a layout.
"""

from __future__ import annotations

from dataclasses import dataclass

from dray.config import JobConfig, SlurmTable
from dray.errors import ConfigError
from dray.launch.slurm.plan import RoleLayout
from dray.runtime.membership import Role


@dataclass(frozen=True, slots=True)
class Layout:
    """The nodes of a job."""

    policy: RoleLayout
    rollout: RoleLayout


def layout_of(config: JobConfig) -> Layout:
    """The layout that a job file asks for.

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
) -> Layout:
    """The layout of a job.

    Raises:
        ConfigError: the replicas do not fit the nodes, or the GPUs not the replicas; says what would.
    """
    if rollout_nodes == 0:
        return _on_one_node(policy_replicas, rollout_replicas, policy_nodes, gpus_per_node)
    return Layout(
        policy=_spread(Role.POLICY, policy_replicas, policy_nodes, gpus_per_node),
        rollout=_spread(Role.ROLLOUT, rollout_replicas, rollout_nodes, gpus_per_node),
    )


def rollout_nodes_of(nodes: int, policy_nodes: int) -> int:
    """How many of `nodes` are left for rollout replicas.

    Raises:
        ConfigError: not even the policy fits.
    """
    if nodes < policy_nodes:
        raise ConfigError("--nodes", nodes, f"must be at least slurm.policy_nodes, which is {policy_nodes}")
    return nodes - policy_nodes


def _on_one_node(policy_replicas: int, rollout_replicas: int, policy_nodes: int, gpus: int) -> Layout:
    if policy_nodes != 1:
        allowed = f"must be at least 1, as slurm.policy_nodes is {policy_nodes}: only one node is shared by both"
        raise ConfigError("slurm.rollout_nodes", 0, allowed)
    share = _share_of(gpus, policy_replicas + rollout_replicas)
    return Layout(RoleLayout(1, policy_replicas, share), RoleLayout(0, rollout_replicas, share))


def _spread(role: Role, replicas: int, nodes: int, gpus: int) -> RoleLayout:
    if replicas % nodes == 0:
        per_node = replicas // nodes
        return RoleLayout(nodes, per_node, _share_of(gpus, per_node))
    if nodes % replicas == 0:
        return RoleLayout(nodes, gpus_per_replica=gpus, nodes_per_replica=nodes // replicas)
    some = ", ".join(str(count) for count in range(1, replicas) if replicas % count == 0)
    what = f"{some} or a multiple of {replicas}"
    allowed = f"must be {what}, as {role.value}.replicas is {replicas}: a replica has whole nodes, or an even part"
    raise ConfigError(f"slurm.{role.value}_nodes", nodes, allowed)


def _share_of(gpus: int, replicas: int) -> int:
    if gpus % replicas:
        allowed = f"must be 0 or a multiple of {replicas}, the replicas that share a node"
        raise ConfigError("slurm.gpus_per_node", gpus, allowed)
    return gpus // replicas
