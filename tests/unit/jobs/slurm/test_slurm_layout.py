"""The distribution of replicas and GPUs over nodes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dray.errors import ConfigError
from dray.jobs.job_file import parse_job
from dray.jobs.slurm.placement import Placement, configured_layout, placements, rollout_nodes_of
from dray.jobs.slurm.plan import Plan


def placed(policy: tuple[int, int], rollout: tuple[int, int], gpus: int = 0) -> list[Placement]:
    """The places of replicas, from (replicas, nodes) of each role; the nodes are named 0, 1, …."""
    table = {"policy_nodes": policy[1], "rollout_nodes": rollout[1], "gpus_per_node": gpus}
    config = parse_job(
        {
            "job": {"name": "small", "max_steps": 10},
            "rollout": {"worker": "small.py:Worker", "replicas": rollout[0]},
            "policy": {"trainer": "small.py:Trainer", "batch_size": 12, "replicas": policy[0]},
            "slurm": table,
        }
    )
    layout = configured_layout(config)
    folder = Path("run")
    plan = Plan(config, folder / "job.toml", folder, b"", layout.policy, layout.rollout, None, 2, {})
    assert plan.node_count == policy[1] + rollout[1]
    return placements(plan, [str(node) for node in range(plan.node_count)])


def test_replicas_share_a_node_evenly() -> None:
    found = placed((1, 1), (4, 2), gpus=4)
    assert [each.nodes for each in found] == [("0",), ("1",), ("1",), ("2",), ("2",)]
    assert [each.gpus for each in found] == [(0, 1, 2, 3), (0, 1), (2, 3), (0, 1), (2, 3)]


def test_replica_spans_whole_nodes_and_runs_on_the_first() -> None:
    found = placed((1, 2), (2, 4), gpus=8)
    assert [each.nodes for each in found] == [("0", "1"), ("2", "3"), ("4", "5")]
    assert {each.gpus for each in found} == {tuple(range(8))}
    assert [each.node for each in found] == ["0", "2", "4"]


def test_without_rollout_nodes_everything_shares_the_node_of_the_policy() -> None:
    found = placed((1, 1), (3, 0), gpus=8)
    assert [(each.name, each.nodes, each.gpus) for each in found] == [
        ("policy-0", ("0",), (0, 1)),
        ("rollout-0", ("0",), (2, 3)),
        ("rollout-1", ("0",), (4, 5)),
        ("rollout-2", ("0",), (6, 7)),
    ]


def test_error_about_an_impossible_layout_names_possible_node_counts() -> None:
    with pytest.raises(ConfigError, match=r"must be 1, 2, 3 or a multiple of 6, as rollout\.replicas") as caught:
        placed((1, 1), (6, 4))
    assert (caught.value.key, caught.value.value) == ("slurm.rollout_nodes", 4)


def test_gpus_that_cannot_be_shared_evenly_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="must be 0 or a multiple of 3, the number of replicas that share a node"
    ):
        placed((1, 1), (3, 1), gpus=4)


def test_several_policy_nodes_are_not_shared_with_rollouts() -> None:
    with pytest.raises(ConfigError, match="both roles can share only one node"):
        placed((2, 2), (2, 0))


def test_nodes_beyond_those_of_the_policy_are_for_rollouts() -> None:
    assert rollout_nodes_of(5, 2) == 3
    assert rollout_nodes_of(1, 1) == 0
    with pytest.raises(ConfigError, match=r"must be at least slurm\.policy_nodes, which is 2"):
        rollout_nodes_of(1, 2)


@given(
    replicas=st.integers(1, 40),
    nodes=st.integers(1, 40),
    policy_nodes=st.integers(1, 3),
    gpus=st.sampled_from([0, 1, 2, 4, 8]),
)
def test_every_layout_uses_each_node_and_each_gpu_once(
    replicas: int, nodes: int, policy_nodes: int, gpus: int
) -> None:
    if (replicas % nodes and nodes % replicas) or gpus % max(1, replicas // nodes):
        with pytest.raises(ConfigError, match="must be"):
            placed((policy_nodes, policy_nodes), (replicas, nodes), gpus)
        return
    found = placed((policy_nodes, policy_nodes), (replicas, nodes), gpus)
    used = [(node, gpu) for each in found for node in each.nodes for gpu in each.gpus]
    names = [str(node) for node in range(policy_nodes + nodes)]
    assert sorted(used) == sorted((node, gpu) for node in names for gpu in range(gpus))
    assert {node for each in found for node in each.nodes} == set(names)
    assert len(found) == policy_nodes + replicas
