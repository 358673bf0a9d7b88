"""The arithmetic of nodes, replicas and GPUs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dray.errors import ConfigError
from dray.launch.slurm.layout import Layout, make_layout, rollout_nodes_of
from dray.runtime.membership import Role


def layout_of(policy: tuple[int, int], rollout: tuple[int, int], gpus: int = 0) -> Layout:
    """Of (replicas, nodes) of each role."""
    return make_layout(
        policy_replicas=policy[0],
        policy_nodes=policy[1],
        rollout_replicas=rollout[0],
        rollout_nodes=rollout[1],
        gpus_per_node=gpus,
    )


def test_replicas_share_a_node_evenly() -> None:
    layout = layout_of((1, 1), (4, 2), gpus=4)
    assert [placement.nodes for placement in layout.placements()] == [(0,), (1,), (1,), (2,), (2,)]
    assert [placement.gpus for placement in layout.placements()] == [(0, 1, 2, 3), (0, 1), (2, 3), (0, 1), (2, 3)]
    assert layout.nodes == 3


def test_replica_spans_whole_nodes_and_runs_on_the_first() -> None:
    layout = layout_of((1, 2), (2, 4), gpus=8)
    assert [placement.nodes for placement in layout.placements()] == [(0, 1), (2, 3), (4, 5)]
    assert {placement.gpus for placement in layout.placements()} == {tuple(range(8))}
    assert [len(layout.on_node(node)) for node in range(6)] == [1, 0, 1, 0, 1, 0]


def test_without_rollout_nodes_everything_shares_the_node_of_the_policy() -> None:
    layout = layout_of((1, 1), (3, 0), gpus=8)
    assert layout.nodes == 1
    assert [(each.role, each.index, each.gpus) for each in layout.on_node(0)] == [
        (Role.POLICY, 0, (0, 1)),
        (Role.ROLLOUT, 0, (2, 3)),
        (Role.ROLLOUT, 1, (4, 5)),
        (Role.ROLLOUT, 2, (6, 7)),
    ]


def test_impossible_layout_says_which_node_counts_fit() -> None:
    with pytest.raises(ConfigError, match=r"must be 1, 2, 3 or a multiple of 6, as rollout\.replicas") as caught:
        layout_of((1, 1), (6, 4))
    assert (caught.value.key, caught.value.value) == ("slurm.rollout_nodes", 4)


def test_gpus_that_cannot_be_shared_evenly_are_refused() -> None:
    with pytest.raises(ConfigError, match="must be 0 or a multiple of 3, the replicas that share a node"):
        layout_of((1, 1), (3, 1), gpus=4)


def test_several_policy_nodes_are_not_shared_with_rollouts() -> None:
    with pytest.raises(ConfigError, match="only one node is shared by both"):
        layout_of((2, 2), (2, 0))


def test_number_of_all_nodes_leaves_the_rest_to_rollouts() -> None:
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
            layout_of((policy_nodes, policy_nodes), (replicas, nodes), gpus)
        return
    layout = layout_of((policy_nodes, policy_nodes), (replicas, nodes), gpus)
    used = [(node, gpu) for each in layout.placements() for node in each.nodes for gpu in each.gpus]
    assert sorted(used) == [(node, gpu) for node in range(layout.nodes) for gpu in range(gpus)]
    assert {node for each in layout.placements() for node in each.nodes} == set(range(policy_nodes + nodes))
    assert len(list(layout.placements())) == policy_nodes + replicas
