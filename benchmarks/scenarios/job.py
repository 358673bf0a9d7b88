"""The CartPole job: time inside reads whose reference had been received, against its wall time: target P14."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.figures import Figure, Row, Target
from benchmarks.plan import Plan
from benchmarks.scenario import Progress, Scenario, Skipped

NAME = "job"
_ROOT = Path(__file__).parents[2]
_NEEDED = ("torch", "gymnasium", "fastapi", "uvicorn", "httpcore")
_SECONDS = 570.0


def run(plan: Plan, progress: Progress) -> Iterator[Row | Skipped]:
    """Run the job once and read what it has recorded."""
    progress.step("CartPole" if plan.job_steps is None else f"CartPole, {plan.job_steps} steps")
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        yield Skipped("the CartPole job", f"{', '.join(missing)}: pip install 'dray-rl[demo]'")
        return
    with tempfile.TemporaryDirectory(prefix="dray-bench-") as folder:
        output = Path(folder) / "job"
        bound = [] if plan.job_steps is None else ["--set", f"job.max_steps={plan.job_steps}"]
        command = [sys.executable, "-m", "dray.cli.app", "run", "examples/cartpole/job.toml"]
        try:
            done = subprocess.run(
                [*command, "--output", str(output), *bound],
                cwd=_ROOT,
                capture_output=True,
                text=True,
                timeout=_SECONDS,
            )
        except subprocess.TimeoutExpired:
            yield Skipped("the CartPole job", f"it did not end within {_SECONDS:.0f} s")
            return
        # 1 is a job that was not solved within its steps.
        if done.returncode not in (0, 1) or not (output / "summary.json").exists():
            yield Skipped("the CartPole job", f"exit code {done.returncode}: {done.stderr.strip()[-200:]}")
            return
        yield from rows(output)


def rows(output: Path) -> Iterator[Row]:
    """From the output folder of a job."""
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    loop = json.loads(lines[-1])["seconds"]
    target = Target("P14", "at most", 2.0, "value")
    travel = summary["transfer"] + (f" over {summary['lane']}" if "lane" in summary else "")
    note = f"{summary['payloads']} payloads by {travel}, {summary['steps']} steps"
    for of, seconds, judged in (("job's wall time", summary["seconds"], target), ("training loop", loop, None)):
        share = 100 * summary["read_seconds"] / seconds
        figure = Figure((share,), None, summary["payloads"])
        yield Row(NAME, f"inside reads, of the {of}", None, figure, "%", target=judged, note=note)


SCENARIO = Scenario(NAME, "The CartPole job", ("P14",), lambda _: 1, run)
