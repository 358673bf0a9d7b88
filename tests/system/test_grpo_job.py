from pathlib import Path

import pytest
from example_runs import run_example, steps_of, summary_of
from optional import require

require("torch")

BOUND = 230.0


@pytest.mark.timeout(BOUND + 10)
def test_grpo_job_trains_for_a_few_steps(tmp_path: Path) -> None:
    settings = ["job.max_steps=3", "policy.batch_size=4", "policy.args.evaluate_every=3"]
    output = tmp_path / "out"
    ended = run_example("grpo", output, *settings, bound=BOUND)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "not solved within 3 steps" in ended.stdout
    steps = steps_of(output)
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert all(step["metrics"]["completions"] == 4 * 16 for step in steps)
    summary = summary_of(output)
    assert (summary["payloads"], summary["lost"], summary["stale"]) == (12, 0, 0)
    assert summary["metrics"]["accuracy_before"] <= 0.1
    assert 0 <= summary["metrics"]["accuracy"] <= 1
    assert any(count > 0 for count in summary["weight_payloads_fetched"].values())
    assert (output / "checkpoint" / "trainer" / "trainer.pt").exists()
    assert (output / "accuracy.png").exists()
