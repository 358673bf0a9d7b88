"""Chooses the network interface, and with it the address, that a node's processes use.

The order is: the configured interface; one with an RDMA device; that of the default route; any other that is up.
Only interfaces with an IPv4 address are used, and loopback only if it is configured: no other machine reaches it.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from dray.errors import ConfigError
from dray.name_resolution import is_loopback

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
    """The interface of this machine to use.

    Raises:
        ConfigError: there is none, or the `configured` one does not exist.
    """
    return select_interface(configured, interfaces(), rdma_interfaces(), default_route())


def select_interface(
    configured: str | None, available: Sequence[Interface], rdma: Collection[str], route: str | None
) -> Interface:
    """The decision of `choose_interface`, without I/O.

    Args:
        available: the interfaces of the machine, in the kernel's order.
        rdma: names of the interfaces that have an RDMA device.
        route: the name of the default route's interface.

    Raises:
        ConfigError: see `choose_interface`.
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
    found = {
        name: next((each.address for each in addresses if each.family == socket.AF_INET), None)
        for name, addresses in psutil.net_if_addrs().items()
    }
    return [Interface(name, address) for name, address in found.items() if name in up and address is not None]


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
