from dataclasses import replace
from pathlib import Path

import pytest

from dray.errors import ConfigError
from dray.jobs.job_file import parse_job
from dray.jobs.messages.models import Role
from dray.jobs.slurm.network import Interface
from dray.jobs.slurm.placement import Placement, environment, placements
from dray.jobs.slurm.plan import Plan, RoleLayout

IB = Interface("ib0", "10.0.0.7")


def plan(policy: RoleLayout, rollout: RoleLayout, *, ranks: int = 1, rollouts: int = 2) -> Plan:
    config = parse_job(
        {
            "job": {"name": "small", "max_steps": 10},
            "rollout": {"worker": "small.py:Worker", "replicas": rollouts},
            "policy": {"trainer": "small.py:Trainer", "batch_size": 8, "replicas": ranks, "readers": ranks},
        }
    )
    return Plan(config, Path("job.toml"), Path("out"), b"s" * 32, policy, rollout, None, 2, {})


def shown(placed: list[Placement]) -> list[str]:
    return [f"{each.name} {'+'.join(each.nodes)} {','.join(map(str, each.gpus))}".strip() for each in placed]


def test_replicas_share_nodes_evenly_and_their_gpus_too() -> None:
    found = placements(plan(RoleLayout(1, 1, 8), RoleLayout(2, 2, 4), rollouts=4), ["a", "b", "c"])
    assert shown(found) == [
        "policy-0 a 0,1,2,3,4,5,6,7",
        "rollout-0 b 0,1,2,3", "rollout-1 b 4,5,6,7", "rollout-2 c 0,1,2,3", "rollout-3 c 4,5,6,7",
    ]  # fmt: skip


def test_replica_of_several_nodes_runs_on_its_first() -> None:
    found = placements(plan(RoleLayout(2), RoleLayout(4, 1, 2, 2), ranks=2), list("abcdef"))
    assert shown(found) == ["policy-0 a", "policy-1 b", "rollout-0 c+d 0,1", "rollout-1 e+f 0,1"]
    assert [each.node for each in found] == ["a", "b", "c", "e"]


def test_on_one_node_the_rollout_replicas_have_the_gpus_after_the_policys() -> None:
    found = placements(plan(RoleLayout(1, 2, 2), RoleLayout(0, 2, 1), ranks=2), ["a"])
    assert shown(found) == ["policy-0 a 0,1", "policy-1 a 2,3", "rollout-0 a 4", "rollout-1 a 5"]


@pytest.mark.parametrize("rollout", [RoleLayout(1), RoleLayout(2, 2), RoleLayout(3, 1, 0, 2)])
def test_layout_without_a_place_for_each_replica_is_refused(rollout: RoleLayout) -> None:
    nodes = [f"n{index}" for index in range(1 + rollout.nodes)]
    with pytest.raises(ConfigError, match=r"a place for each of 2 replicas"):
        placements(plan(RoleLayout(1), rollout), nodes)


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


def test_plan_of_a_replica_on_its_own_node_leaves_the_gpus_alone() -> None:
    layout = replace(RoleLayout(2), gpus_per_replica=0)
    placed = placements(plan(RoleLayout(1), layout), ["a", "b", "c"])
    assert ["CUDA_VISIBLE_DEVICES" in environment(each, IB, {}) for each in placed] == [False] * 3
