"""Fault Y1: the user's worker forks, and its children are ended by signals."""

from pathlib import Path

import pytest
from job_runner import job_settings, running

pytest.importorskip("gymnasium")

FORKING = """
import multiprocessing, os, signal, time
import gymnasium, numpy as np
import small

def alarmed(number, frame):
    raise TimeoutError

class Worker(small.Worker):
    def setup(self, context):
        super().setup(context)
        self.context = multiprocessing.get_context("fork")
        self.make_environments()
    def make_environments(self):
        make = lambda: gymnasium.make("CartPole-v1")
        self.environments = gymnasium.vector.AsyncVectorEnv([make, make], context="fork")
        self.environments.reset(seed=0)
    def rollout(self, work_item):
        if work_item.index < 8:
            self.fork_and_end()
        if work_item.index == 4 and os.fork() == 0:
            raise ValueError("a child that no process ends")
        if work_item.index == 6:
            self.environments.close(terminate=True)
            self.make_environments()
        observations, *_ = self.environments.step(np.ones(2, np.int64))
        return {**super().rollout(work_item), "states": observations}
    def fork_and_end(self):
        with self.context.Pool(2) as pool:  # leaving the block terminates its processes
            assert pool.map(abs, [-1, 2]) == [1, 2]
        child = self.context.Process(target=time.sleep, args=(600,))
        child.start()
        child.terminate()
        child.join()
        assert child.exitcode == -signal.SIGTERM
        signal.signal(signal.SIGALRM, alarmed)
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        try:
            time.sleep(600)
        except TimeoutError:
            pass
"""


def test_job_is_solved_by_a_worker_with_a_pool_a_vector_environment_and_alarms(tmp_path: Path) -> None:
    (tmp_path / "forking.py").write_text(FORKING)
    with running(
        tmp_path, *job_settings("rollout.worker=forking.py:Worker", "rollout.replicas=1", "stop.at_least=2")
    ) as job:
        assert job.end() == 0, job.story()
        assert "ended early" not in job.text
        assert "solved" in job.text
        assert "a child that no process ends" in job.log("rollout-0")
