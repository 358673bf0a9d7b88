"""CartPole with two policy replicas that average their gradients."""

from pathlib import Path

import pytest
from example_runs import run_example, steps_of, summary_of
from optional import require

require("torch", "gymnasium")


@pytest.mark.parametrize(("readers", "samples"), [(2, "all"), (1, "half")])
@pytest.mark.endurance
def test_two_policy_replicas_train_for_a_few_steps(tmp_path: Path, readers: int, samples: str) -> None:
    output = tmp_path / "out"
    settings = ["job.max_steps=3", "policy.replicas=2", f"policy.readers={readers}"]
    ended = run_example("cartpole", output, *settings, bound=110)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "not solved within 3 steps" in ended.stdout
    summary = summary_of(output)
    assert (summary["payloads"], summary["lost"], summary["delivery"]["trained"]) == (48, 0, 48)
    assert {"policy-0", "policy-1"} <= set(summary["replicas"])
    episodes = 16 if samples == "all" else 8
    assert all(8 * episodes <= step["metrics"]["samples"] for step in steps_of(output))
    saved = [output / "checkpoint" / folder / "trainer.pt" for folder in ("trainer", "trainer-1")]
    torch = pytest.importorskip("torch")
    first, second = (torch.load(path, weights_only=True)["actor"] for path in saved)
    # Each rank computed its own part of the gradients; what came of it is the same everywhere.
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.endurance
@pytest.mark.timeout(900)
@pytest.mark.parametrize("readers", [1, 2])
def test_two_policy_replicas_solve_cartpole(tmp_path: Path, readers: int) -> None:
    output = tmp_path / "out"
    settings = ["policy.replicas=2", f"policy.readers={readers}"]
    ended = run_example("cartpole", output, *settings, bound=850)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    summary = summary_of(output)
    assert summary["solved"]
    assert summary["metrics"]["evaluation_return"] >= 475
    assert (summary["lost"], summary["delivery"]["unfreed"]) == (0, 0)
    assert summary["delivery"]["trained"] == summary["payloads"] == 16 * summary["steps"]
