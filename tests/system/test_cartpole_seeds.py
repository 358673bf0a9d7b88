"""CartPole is solved whatever the seed: ten others than the one in the job file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("gymnasium")

JOB = Path(__file__).parents[2] / "examples" / "cartpole" / "job.toml"
BOUND = 600.0


@pytest.mark.endurance
@pytest.mark.timeout(BOUND + 30)
@pytest.mark.parametrize("seed", range(2, 12))
def test_cartpole_is_solved_with_another_seed(tmp_path: Path, seed: int) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-m", "dray.cli.app", "run", str(JOB), "--output", str(output)]
    ended = subprocess.run([*command, "--set", f"job.seed={seed}"], capture_output=True, text=True, timeout=BOUND)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    assert summary["solved"]
    assert (summary["lost"], summary["stale"]) == (0, 0)
