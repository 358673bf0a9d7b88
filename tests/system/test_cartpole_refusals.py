"""CartPole is solved although its Redis server repeatedly refuses for three seconds."""

import subprocess
import sys
from pathlib import Path

import pytest
from optional import require

require("torch", "gymnasium")

BOUND = 900.0
SCRIPT = Path(__file__).parents[1] / "redis_refusals.py"


@pytest.mark.endurance
@pytest.mark.timeout(BOUND + 30)
def test_cartpole_is_solved_through_five_refusals_of_three_seconds() -> None:
    ended = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=BOUND)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "solved" in ended.stdout
    assert "5 refusals of 3 s: READONLY, NOREPLICAS, OOM, BUSY, MASTERDOWN; exit code 0" in ended.stdout
