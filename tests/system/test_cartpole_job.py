import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("gymnasium")

JOB = Path(__file__).parents[2] / "examples" / "cartpole" / "job.toml"


@pytest.mark.parametrize("transfer", ["ucxx", "redis"])
def test_cartpole_job_trains_for_a_few_steps(tmp_path: Path, transfer: str) -> None:
    settings = ["job.max_steps=3", f"job.payload_transfer={transfer}"]
    options = [part for setting in settings for part in ("--set", setting)]
    output = tmp_path / "out"
    command = [sys.executable, "-m", "dray.cli.app", "run", str(JOB), "--output", str(output), *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "not solved within 3 steps" in ended.stdout
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert all(8 <= step["metrics"]["mean_return"] <= 500 for step in steps)
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["payloads"], summary["lost"], summary["stale"]) == (48, 0, 0)
    assert (output / "checkpoint" / "trainer" / "trainer.pt").exists()
