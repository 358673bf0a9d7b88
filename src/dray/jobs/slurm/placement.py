"""Where each replica of a run has its place: its nodes, its GPUs, and the network interface that it uses there."""

from __future__ import annotations

import math
import socket
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from dray.errors import ConfigError
from dray.jobs.config import JobConfig, SlurmTable
from dray.jobs.launch.processes import replica_name
from dray.jobs.messages.models import Role
from dray.jobs.process import ADDRESS_VARIABLE, REPLICA_NODES_VARIABLE
from dray.name_resolution import is_loopback

# --- nodes and GPUs ----------------------------------------------------------------------------------------------

# The nodes of an allocation are counted from 0, those of the policy first:
#
# ```
#   node                 0 … policy_nodes - 1        policy_nodes … policy_nodes + rollout_nodes - 1
#   runs                 controller, Redis (on 0)    rollout replicas
#                        policy replicas
# ```
#
# A replica has whole nodes or an equal share of one. With `rollout_nodes = 0` all replicas share one node.

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
        return replica_name(self.role, self.index)

    @property
    def node(self) -> str:
        """The node on which its process runs."""
        return self.nodes[0]


def placements(config: JobConfig, nodes: Sequence[str]) -> list[Placement]:
    """The place of every replica, those of the policy first.

    Args:
        nodes: the names of the job's nodes, as many as `[slurm]` has, those of the policy first.

    Raises:
        ConfigError: the replicas cannot be spread evenly over the nodes, or the GPUs over the replicas.
    """
    table = config.slurm or SlurmTable()
    policy = [(Role.POLICY, index) for index in range(config.policy.replicas)]
    rollout = [(Role.ROLLOUT, index) for index in range(config.rollout.replicas)]
    if table.rollout_nodes == 0:
        if table.policy_nodes != 1:
            what = f"must be at least 1, as slurm.policy_nodes is {table.policy_nodes}"
            raise ConfigError("slurm.rollout_nodes", 0, f"{what}: both roles can share only one node")
        return _spread([*policy, *rollout], nodes, table.gpus_per_node)
    return [
        *_spread(policy, nodes[: table.policy_nodes], table.gpus_per_node),
        *_spread(rollout, nodes[table.policy_nodes :], table.gpus_per_node),
    ]


def _spread(replicas: Sequence[tuple[Role, int]], nodes: Sequence[str], gpus: int) -> list[Placement]:
    """The places of replicas that have these nodes for themselves."""
    count = len(replicas)
    share_node, span_nodes = max(1, count // len(nodes)), max(1, len(nodes) // count)
    if count * span_nodes != len(nodes) * share_node:
        name = replicas[0][0].value
        some = ", ".join(str(number) for number in range(1, count) if count % number == 0)
        what = f"must be {some} or a multiple of {count}, as {name}.replicas is {count}"
        allowed = f"{what}: a replica has whole nodes or an equal share"
        raise ConfigError(f"slurm.{name}_nodes", len(nodes), allowed)
    if gpus % share_node:
        allowed = f"must be 0 or a multiple of {share_node}, the number of replicas that share a node"
        raise ConfigError("slurm.gpus_per_node", gpus, allowed)
    share = gpus // share_node
    found = []
    for number, (role, index) in enumerate(replicas):
        place, beside = divmod(number, share_node)
        first, gpu = place * span_nodes, beside * share
        own = tuple(nodes[first : first + span_nodes])
        found.append(Placement(role, index, own, tuple(range(gpu, gpu + share))))
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


# --- network interface -------------------------------------------------------------------------------------------

_SYS = Path("/sys/class")
_ROUTES = Path("/proc/net/route")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Interface:
    """A network interface that is up, and its IPv4 address."""

    name: str
    address: str

    @property
    def is_loopback(self) -> bool:
        return is_loopback(self.address)


def choose_interface(configured: str | None) -> Interface:
    """The interface of this machine to use, and with it the address: see `select_interface`."""
    return select_interface(configured, interfaces(), rdma_interfaces(), default_route())


def select_interface(
    configured: str | None, available: Sequence[Interface], rdma: Collection[str], route: str | None
) -> Interface:
    """The configured interface; else one with an RDMA device, that of the default route, or any other.

    Loopback is used only if it is configured: no other machine reaches it.

    Args:
        available: the interfaces of the machine, in the kernel's order.
        rdma: names of the interfaces that have an RDMA device.
        route: the name of the default route's interface.

    Raises:
        ConfigError: there is none, or the `configured` one does not exist.
    """
    if configured is not None:
        for each in available:
            if each.name == configured:
                return each
        names = ", ".join(each.name for each in available) or "none"
        allowed = f"must be an interface that is up and has an IPv4 address; this node has: {names}"
        raise ConfigError("slurm.interface", configured, allowed)
    outside = [each for each in available if not each.is_loopback]
    if not outside:
        allowed = "must name an interface; this node has none but loopback that is up and has an IPv4 address"
        raise ConfigError("slurm.interface", None, allowed, "is not set")
    # min keeps the kernel's order among equals.
    return min(outside, key=lambda each: (each.name not in rdma, each.name != route))


def interfaces() -> list[Interface]:
    """The interfaces of this machine that are up and have an IPv4 address."""
    up = {name for name, state in psutil.net_if_stats().items() if "up" in state.flags.split(",")}
    found = []
    for name, addresses in psutil.net_if_addrs().items():
        address = next((each.address for each in addresses if each.family == socket.AF_INET), None)
        if name in up and address is not None:
            found.append(Interface(name, address))
    return found


def rdma_interfaces(sys: Path = _SYS) -> set[str]:
    """The names of the interfaces that have an RDMA device."""
    return {path.name for path in sys.glob("infiniband/*/device/net/*")}


def default_route(table: Path = _ROUTES) -> str | None:
    """The name of the default route's interface: that of the lowest metric, if there are several."""
    try:
        lines = table.read_text().splitlines()[1:]
    except OSError:
        return None
    best, name = math.inf, None
    for columns in map(str.split, lines):
        interface, destination, metric, mask = columns[0], columns[1], columns[6], columns[7]
        if int(destination, 16) == int(mask, 16) == 0 and int(metric) < best:
            best, name = int(metric), interface
    return name


def boot_id() -> str:
    """The kernel's identifier of this boot of this machine."""
    return _BOOT_ID.read_text().strip()
