"""The programs of docs/how-to/torchrl.md run as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from optional import require

require("torch", "torchrl", "tensordict")

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "how-to" / "torchrl.md"
SECONDS = 300

pytestmark = [pytest.mark.integration, pytest.mark.timeout(SECONDS + 30)]


def outputs(folder: Path, *names: str) -> list[str]:
    """The last lines that the programs print, which run at the same time."""
    text = PAGE.read_text(encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "DRAY_SCOPE": str(folder)}
    running = []
    for name in names:
        found = re.search(rf"^<!-- integration: torchrl/{name} -->\n```python\n(.*?)^```$", text, re.M | re.S)
        assert found is not None, name
        (folder / name).write_text(found[1], encoding="utf-8")
        command = [sys.executable, "-W", "ignore", name]
        running.append(subprocess.Popen(command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE))
    try:
        found_lines = [each.communicate(timeout=SECONDS)[0].splitlines()[-1:] for each in running]
    finally:
        for each in running:
            each.kill()
            each.wait()
    assert [each.returncode for each in running] == [0] * len(names)
    return [line for lines in found_lines for line in lines]


def test_the_program_that_synchronises_weights_runs(tmp_path: Path) -> None:
    assert outputs(tmp_path, "weights.py") == ["done"]


def test_the_programs_that_exchange_rollouts_and_weights_run(tmp_path: Path) -> None:
    assert outputs(tmp_path, "train.py", "rollout.py") == ["trained 10", "collected"]
