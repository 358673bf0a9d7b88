from pathlib import Path

import pytest
from example_runs import run_example, steps_of, summary_of
from optional import require

require("torch", "gymnasium")


@pytest.mark.parametrize("transfer", ["reference", pytest.param("inline", marks=pytest.mark.endurance)])
def test_cartpole_job_trains_for_a_few_steps(tmp_path: Path, transfer: str) -> None:
    settings = ["job.max_steps=3", f"job.transfer={transfer}"]
    output = tmp_path / "out"
    ended = run_example("cartpole", output, *settings, bound=110)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "not solved within 3 steps" in ended.stdout
    steps = steps_of(output)
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert all(8 <= step["metrics"]["mean_return"] <= 500 for step in steps)
    summary = summary_of(output)
    assert (summary["payloads"], summary["lost"], summary["stale"]) == (48, 0, 0)
    assert (output / "checkpoint" / "trainer" / "trainer.pt").exists()
