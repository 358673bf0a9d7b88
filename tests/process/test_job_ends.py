"""What a job and its processes end as, and what `dray run` prints and does then."""

import os
import re
import signal
from datetime import datetime
from pathlib import Path

import pytest
from job_runner import JobRun, job_settings, running

AGAIN = ("policy.args.restarts=true", "rollout.args.restarts=true", "policy.args.repeats=true")

# What starts a process of the job waits, before anything of dray is imported, until its FIFO is opened.
GATE = """
import sys
from pathlib import Path
for module in ("dray.jobs.controller.app", "dray.jobs.replica.policy"):
    gate = Path(__file__).parent / module
    if module in sys.orig_argv and gate.exists():
        gate.read_text()
"""


def hold_back(folder: Path, module: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let processes that run ``-m module`` begin when the FIFO that is returned has a writer."""
    gate = folder / "gates" / module
    gate.parent.mkdir()
    (gate.parent / "sitecustomize.py").write_text(GATE)
    os.mkfifo(gate)
    paths = [str(gate.parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    return gate


def reported_at(job: JobRun, words: str) -> datetime:
    """When the supervisor has logged the first line with `words`, which it shows before it logs it."""
    job.wait_until(lambda: words in job.log("supervisor"), f"{words!r} in the supervisor's log")
    line = next(line for line in job.log("supervisor").splitlines() if words in line)
    return datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f")


def test_z3_stall_clock_begins_with_the_controller_and_not_with_the_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = hold_back(tmp_path, "dray.jobs.controller.app", monkeypatch)
    os.mkfifo(tmp_path / "imports")
    (tmp_path / "slow.py").write_text(
        "import sys\n"
        "if 'dray.jobs.replica.entry_points' in sys.orig_argv:\n"
        f"    open({str(tmp_path / 'imports')!r}).read()\n"
        "from small import Worker\n"
    )
    settings = job_settings("rollout.worker=slow.py:Worker", "timeouts.stall=1.5", "job.max_steps=2")
    with running(tmp_path, *settings) as job:
        job.wait_for("importing slow.py:Worker and small.py:Trainer (2 s so far, at most 30 s)")
        assert "started controller" not in job.text
        (tmp_path / "imports").write_text("")
        job.wait_for("stall: dray run waits for the controller")
        gate.unlink()
        waited = float(re.findall(r"for its status, since ([\d.]+) s", job.text)[0])
        passed = reported_at(job, "stall:") - reported_at(job, "started controller")
        assert waited < passed.total_seconds() + 1.0, job.text


def test_z7_policy_that_leaves_by_an_exit_code_of_its_own_is_restarted(tmp_path: Path) -> None:
    (tmp_path / "leaving.py").write_text(
        "import os, sys, small\n"
        "class Trainer(small.Trainer):\n"
        "    def train_step(self, trajectories):\n"
        "        for name, leave in ('first', lambda: os._exit(5)), ('second', lambda: os._exit(7)):\n"
        "            if not (self.output / name).exists():\n"
        "                (self.output / name).touch()\n"
        "                leave()\n"
        "        return super().train_step(trajectories)\n"
    )
    settings = job_settings(*AGAIN, "policy.trainer=leaving.py:Trainer", "stop.at_least=3")
    with running(tmp_path, *settings) as job:
        assert job.end() == 0, job.story()
        assert "policy-0 ended early: exit code 5" in job.text
        assert "policy-0 ended early: exit code 7" in job.text
        assert "restarting the policy group (restart 2 of 3)" in job.text
        assert job.checkpoint()["step"] == 3


def test_z8_policy_of_a_job_that_has_failed_is_not_restarted_and_ends_as_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold_back(tmp_path, "dray.jobs.replica.policy", monkeypatch)
    for index in range(2):
        os.mkfifo(tmp_path / f"raise-{index}")
    (tmp_path / "raising.py").write_text(
        "import small\n"
        "class Worker(small.Worker):\n"
        "    def setup(self, context):\n"
        f"        open({str(tmp_path / 'raise-')!r} + str(context.index)).read()\n"
        "        raise ValueError('no environment')\n"
    )
    settings = job_settings("rollout.worker=raising.py:Worker", "policy.replicas=2", "policy.readers=2")
    with running(tmp_path, *settings) as job:
        job.wait_for("started controller and 4 replicas")
        # So that it learns at once that a policy replica is lost, and the job has failed before, as is recorded.
        job.process.send_signal(signal.SIGSTOP)
        lost = job.processes("dray.jobs.replica.policy")[0]
        for index in range(2):
            (tmp_path / f"raise-{index}").write_text("")
        job.wait_until(lambda: "final: failed" in job.log("controller"), "the job to fail")
        lost.kill()
        job.process.send_signal(signal.SIGCONT)
        assert job.end() != 0, job.story()
        assert "ended early: killed by signal 9" in job.text
        assert "restarting " not in job.text
        assert re.search(r"policy-\d ended as asked \(SIGTERM\): the job had failed\n", job.text), job.text
        assert "interrupted by SIGTERM" not in job.text
