"""GRPO learns to sort whatever the seed: five of five."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

JOB = Path(__file__).parents[2] / "examples" / "grpo" / "job.toml"
BOUND = 1200.0


@pytest.mark.endurance
@pytest.mark.timeout(BOUND + 30)
@pytest.mark.parametrize("seed", range(1, 6))
def test_digits_are_sorted_with_this_seed(tmp_path: Path, seed: int) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-m", "dray.cli.app", "run", str(JOB), "--output", str(output)]
    ended = subprocess.run([*command, "--set", f"job.seed={seed}"], capture_output=True, text=True, timeout=BOUND)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    assert summary["solved"]
    assert summary["metrics"]["accuracy_before"] <= 0.1
    assert summary["metrics"]["accuracy"] >= 0.9
    assert (summary["lost"], summary["stale"]) == (0, 0)
