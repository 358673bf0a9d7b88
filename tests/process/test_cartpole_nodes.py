"""CartPole with two policy replicas on two machines: network namespaces with a cable between them."""

import shutil
from pathlib import Path

import pytest
from node_runner import nodes_running, two_machines
from optional import require

require("torch", "gymnasium")
EXAMPLE = Path(__file__).parents[2] / "examples" / "cartpole"


@pytest.mark.endurance
def test_two_policy_replicas_average_their_gradients_between_machines(tmp_path: Path) -> None:
    folder = tmp_path / "cartpole"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    settings = ("job.max_steps=3", "policy.replicas=2", "policy.readers=2", "stop.at_least=1e9")
    with (
        two_machines() as (near, far),
        nodes_running(
            folder,
            *settings,
            policy_nodes=2,
            rollout_nodes=1,
            interface=near.interface,
            job=None,
        ) as run,
    ):
        run.start(nodes=[1, 3], within=near.command)
        run.start(nodes=[2], within=far.command)
        assert run.end(bound=100.0) == [1, 0, 0], run.story()  # not solved, which is what three steps can do
        assert run.step() == 3
        assert run.checkpoint()["ranks"] == 2
