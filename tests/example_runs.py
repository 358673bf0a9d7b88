"""Running an example's job as a user does, and reading what it leaves."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[1] / "examples"


def run_example(name: str, output: Path, *settings: str, bound: float) -> subprocess.CompletedProcess[str]:
    """``dray run`` of the example, with `settings` such as ``job.seed=3``, for at most `bound` seconds."""
    options = [part for setting in settings for part in ("--set", setting)]
    job = EXAMPLES / name / "job.toml"
    command = [sys.executable, "-m", "dray.cli.app", "run", str(job), "--output", str(output), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=bound)


def summary_of(output: Path) -> dict[str, Any]:
    """What `summary.json` contains."""
    summary: dict[str, Any] = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    return summary


def steps_of(output: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
