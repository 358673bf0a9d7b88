from pathlib import Path

import pytest

from dray.errors import ConfigError
from dray.jobs.slurm.placement import Interface, default_route, interfaces, rdma_interfaces, select_interface

LO = Interface("lo", "127.0.0.1")
ETH = Interface("eth0", "10.0.0.5")
IB = Interface("ib0", "192.168.7.5")
DOCKER = Interface("docker0", "172.17.0.1")
ALL = [LO, DOCKER, ETH, IB]
ROUTES = """Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
wlan0\t00000000\t0100000A\t0003\t0\t0\t600\t00000000\t0\t0\t0
eth0\t00000000\t0100000A\t0003\t0\t0\t100\t00000000\t0\t0\t0
vpn0\t00000000\t0100000A\t0001\t0\t0\t50\t00000080\t0\t0\t0
"""


@pytest.mark.parametrize(
    ("configured", "rdma", "route", "expected"),
    [
        ("eth0", {"ib0"}, "docker0", ETH),
        ("lo", {"ib0"}, "eth0", LO),
        (None, {"ib0"}, "eth0", IB),
        (None, {"ib0", "eth0"}, "eth0", ETH),
        (None, set(), "eth0", ETH),
        (None, {"ib7"}, None, DOCKER),
    ],
)
def test_interface_is_the_configured_one_then_rdma_then_the_default_routes(
    configured: str | None, rdma: set[str], route: str | None, expected: Interface
) -> None:
    assert select_interface(configured, ALL, rdma, route) == expected


def test_loopback_is_used_only_if_it_is_named() -> None:
    with pytest.raises(ConfigError, match="this node has none but loopback"):
        select_interface(None, [LO], set(), "lo")


def test_configured_interface_that_a_node_lacks_is_an_error_that_names_those_it_has() -> None:
    with pytest.raises(ConfigError, match="this node has: lo, docker0, eth0, ib0"):
        select_interface("ib1", ALL, set(), None)


def test_interfaces_of_this_machine_are_found_with_their_addresses() -> None:
    assert LO in interfaces()


def test_rdma_interfaces_are_those_below_a_device(tmp_path: Path) -> None:
    assert rdma_interfaces(tmp_path) == set()
    for device, name in (("mlx5_0", "ib0"), ("mlx5_1", "ens3")):
        (tmp_path / "infiniband" / device / "device" / "net" / name).mkdir(parents=True)
    assert rdma_interfaces(tmp_path) == {"ib0", "ens3"}


def test_default_route_is_the_one_of_the_lowest_metric(tmp_path: Path) -> None:
    table = tmp_path / "route"
    assert default_route(table) is None
    table.write_text(ROUTES)
    assert default_route(table) == "eth0"
