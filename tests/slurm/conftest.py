"""One virtual cluster for the session; all nodes are idle before and after each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cluster import SlurmCluster, missing_commands


@pytest.fixture(scope="session")
def _running_cluster() -> Iterator[SlurmCluster]:
    if missing := missing_commands():
        pytest.skip(f"no Slurm on this machine: {', '.join(missing)} not found; `make test-slurm` installs it")
    with SlurmCluster.started() as cluster:
        yield cluster


@pytest.fixture
def cluster(_running_cluster: SlurmCluster) -> Iterator[SlurmCluster]:
    """The cluster; after the test, its jobs are cancelled and killed nodes revived."""
    yield _running_cluster
    _running_cluster.cancel_all()
    for name in _running_cluster.dead_nodes():
        _running_cluster.revive_node(name)
    for name in _running_cluster.nodes:
        _running_cluster.wait_for_node(name, "IDLE")
    left = _running_cluster.processes()
    assert not left, f"still running on the nodes after the end of all jobs: {left}"
