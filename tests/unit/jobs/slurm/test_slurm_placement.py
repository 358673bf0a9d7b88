"""The distribution of replicas and GPUs over nodes, and the environment of a replica."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dray.errors import ConfigError
from dray.jobs.job_file import parse_job
from dray.jobs.messages.models import Role
from dray.jobs.slurm.placement import Interface, Placement, environment, placements


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
    return placements(config, [str(node) for node in range(policy[1] + rollout[1])])


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


# --- environment ----------------------------------------------------------------------------------------------

IB = Interface("ib0", "10.0.0.7")


def test_environment_has_address_nodes_and_the_interface_for_collectives() -> None:
    found = environment(Placement(Role.POLICY, 0, ("a", "b"), ()), IB, {"NCCL_SOCKET_IFNAME": "eth1"})
    assert found == {"DRAY_ADDRESS": "10.0.0.7", "DRAY_REPLICA_NODES": "a b", "GLOO_SOCKET_IFNAME": "ib0"}


@pytest.mark.parametrize(
    ("given", "seen"), [(None, "2,3"), ("4,5,6,7", "6,7"), ("GPU-a,GPU-b,GPU-c,GPU-d", "GPU-c,GPU-d")]
)
def test_replica_sees_its_own_gpus_of_those_that_the_task_was_given(given: str | None, seen: str) -> None:
    inherited = {} if given is None else {"CUDA_VISIBLE_DEVICES": given}
    placed = Placement(Role.ROLLOUT, 1, ("a",), (2, 3))
    assert environment(placed, IB, inherited)["CUDA_VISIBLE_DEVICES"] == seen


def test_fewer_gpus_than_the_plan_has_are_an_error() -> None:
    placed = Placement(Role.ROLLOUT, 1, ("a",), (2, 3))
    with pytest.raises(ConfigError, match="at least 4 devices on a"):
        environment(placed, IB, {"CUDA_VISIBLE_DEVICES": "0,1"})


def test_without_gpus_the_variable_for_them_is_left_alone() -> None:
    assert ["CUDA_VISIBLE_DEVICES" in environment(each, IB, {}) for each in placed((1, 1), (2, 2))] == [False] * 3
