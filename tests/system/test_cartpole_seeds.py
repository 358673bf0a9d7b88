"""CartPole is solved whatever the seed: ten others than the one in the job file."""

from pathlib import Path

import pytest
from example_runs import run_example, summary_of
from optional import require

require("torch", "gymnasium")

BOUND = 600.0


@pytest.mark.endurance
@pytest.mark.timeout(BOUND + 30)
@pytest.mark.parametrize("seed", range(2, 12))
def test_cartpole_is_solved_with_another_seed(tmp_path: Path, seed: int) -> None:
    output = tmp_path / "out"
    ended = run_example("cartpole", output, f"job.seed={seed}", bound=BOUND)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    summary = summary_of(output)
    assert summary["solved"]
    assert (summary["lost"], summary["stale"]) == (0, 0)
