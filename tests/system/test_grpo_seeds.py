"""GRPO learns to sort whatever the seed: five of five."""

from pathlib import Path

import pytest
from example_runs import run_example, summary_of
from optional import require

require("torch")

BOUND = 1200.0


@pytest.mark.endurance
@pytest.mark.timeout(BOUND + 30)
@pytest.mark.parametrize("seed", range(1, 6))
def test_digits_are_sorted_with_this_seed(tmp_path: Path, seed: int) -> None:
    output = tmp_path / "out"
    ended = run_example("grpo", output, f"job.seed={seed}", bound=BOUND)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    summary = summary_of(output)
    assert summary["solved"]
    assert summary["metrics"]["accuracy_before"] <= 0.1
    assert summary["metrics"]["accuracy"] >= 0.9
    assert (summary["lost"], summary["stale"]) == (0, 0)
