"""CartPole is solved under what systems and user code do to a job."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from optional import require

require("torch", "gymnasium")

BOUND = 600.0
CARTPOLE = Path(__file__).parents[2] / "examples" / "cartpole"

FORKING = """
import multiprocessing, signal, time
import gymnasium, numpy as np
from cartpole import CartPoleRollout

def alarmed(number, frame):
    raise TimeoutError

class Worker(CartPoleRollout):
    def setup(self, context):
        super().setup(context)
        self.make_environments()
    def make_environments(self):
        make = lambda: gymnasium.make("CartPole-v1")
        self.environments = gymnasium.vector.AsyncVectorEnv([make, make], context="fork")
        self.environments.reset(seed=0)
    def rollout(self, work_item):
        self.environments.step(np.ones(2, np.int64))
        if work_item.index % 8 == 0:
            self.environments.close(terminate=True)
            self.make_environments()
            with multiprocessing.get_context("fork").Pool(2) as pool:
                assert pool.map(abs, [-1, 2]) == [1, 2]
            signal.signal(signal.SIGALRM, alarmed)
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            try:
                time.sleep(600)
            except TimeoutError:
                pass
        return super().rollout(work_item)
"""


def check_solved(folder: Path, options: str = "", limits: str = "") -> None:
    """Run the job in a copy of the example's folder; `options` may redirect its standard streams."""
    command = f"exec {sys.executable} -m dray.cli.app run job.toml --output out --set job.plot= {options}"
    ended = subprocess.run(["bash", "-c", f"{limits} {command}"], cwd=folder, timeout=BOUND)
    log = "\n".join(each.read_text() for each in sorted((folder / "out" / "logs").glob("*.log")))
    assert ended.returncode == 0, log[-8000:]
    assert json.loads((folder / "out" / "summary.json").read_text())["solved"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CARTPOLE, tmp_path / "cartpole"))


@pytest.mark.endurance
@pytest.mark.timeout(BOUND + 30)
def test_cartpole_is_solved_by_a_worker_with_a_vector_environment_a_pool_and_alarms(folder: Path) -> None:
    (folder / "forking.py").write_text(FORKING)
    check_solved(folder, "--set rollout.worker=forking.py:Worker")


@pytest.mark.endurance
@pytest.mark.timeout(BOUND + 30)
def test_cartpole_is_solved_with_64_descriptors_for_each_process(folder: Path) -> None:
    check_solved(folder, "--set rollout.inline_bytes=0", limits="ulimit -Sn 64; ulimit -Hn 64;")


@pytest.mark.endurance
@pytest.mark.timeout(BOUND + 30)
@pytest.mark.parametrize("streams", [">&-", "2>&-", ">/dev/full"])
def test_cartpole_is_solved_whatever_happens_to_the_standard_streams(folder: Path, streams: str) -> None:
    check_solved(folder, streams)
