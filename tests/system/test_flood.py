"""CartPole is learnt while strangers keep connections to every listening socket of the job."""

import faulthandler
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.endurance
@pytest.mark.timeout(1200)
def test_cartpole_is_solved_within_bounds_while_strangers_flood_the_job(tmp_path: Path) -> None:
    faulthandler.cancel_dump_traceback_later()  # it is meant to take longer than pytest waits with its stacks
    figures = tmp_path / "flood.json"
    command = [sys.executable, "-m", "soak.flood", "--seconds", "60", "--json", str(figures)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout
    jobs = json.loads(figures.read_text())
    assert sum(each["seconds"] for each in jobs) >= 60
    kinds = {kind for each in jobs for kind in each["connections"]}
    assert kinds >= {"controller, tcp and ucx", "payload servers, unix", "payload servers, tcp and ucx"}
    assert all(done["opened"] > 2048 for each in jobs for done in each["connections"].values())
