"""A run that `dray slurm submit` submits to the virtual cluster, and its files and processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from cluster import ClusterFailed, SlurmCluster
from watched_runs import WatchedRun, processes_where

from dray.jobs.slurm.run_state import RunRecord

CLASSES = '''
import json
import os
import time
import numpy as np


def write_environment(context):
    (context.output / f"{context.name}.environment").write_text(json.dumps(dict(os.environ)))


class Worker:
    def setup(self, context):
        write_environment(context)
        self.held_by = context.output / f"{context.name}-held"

    def load_weights(self, weights, version):
        pass

    def rollout(self, work_item):
        if self.held_by.exists():
            self.held_by.read_text()  # a pipe: reading ends when the test closes it
        return {"observations": np.full((8, 4), work_item.seed, np.float64), "rewards": np.ones(8, np.float32)}


class Trainer:
    """Slow until there is a file `go`, so that the job is still running when a test interferes."""

    def setup(self, context):
        write_environment(context)
        self.steps, self.args, self.output = 0, context.args, context.output

    def train_step(self, trajectories):
        if self.args.get("raises"):
            raise ValueError("the trainer broke")
        time.sleep(0.01 if (self.output / "go").exists() else 0.5)
        self.steps += 1
        return {"score": float(self.steps)}

    def weights(self):
        return {"w": np.full(1000, self.steps, np.float32)}

    def save(self, folder):
        (folder / "steps").write_text(str(self.steps))

    def load(self, folder):
        self.steps = int((folder / "steps").read_text())
'''

GOAL = 150
JOB = f"""
[job]
name = "small"
max_steps = 100000
lane = "tcp"
[rollout]
worker = "small.py:Worker"
slots = 16
slot_bytes = 4096
inline_bytes = 0
[policy]
trainer = "small.py:Trainer"
batch_size = 8
checkpoint_every = 5
[controller]
heartbeat_interval = 0.5
dead_after = 5.0
[stop]
metric = "score"
at_least = {GOAL}
[timeouts]
start = 60
shutdown = 6.0
controller_lost = 8.0
[slurm]
interface = "lo"
rollout_nodes = 2
time = "00:10:00"
pre_timeout = 20
"""

BOUND = 90.0


class SlurmRun(WatchedRun):
    """A run of `job_file`, by default of the small job above, in `folder`, which is created."""

    def __init__(self, cluster: SlurmCluster, folder: Path, job_file: Path | None = None) -> None:
        self.cluster = cluster
        self.environ = dict(cluster.environment)
        self.folder = folder
        super().__init__(folder / "outputs" / "a run")
        folder.mkdir(exist_ok=True)
        if job_file is None:
            job_file = folder / "job.toml"
            job_file.write_text(JOB)
            (folder / "small.py").write_text(CLASSES)
        self.job_file = job_file
        self.job = 0

    def dray(self, *arguments: str, check: bool = True) -> str:
        """The output of `dray slurm`."""
        done = subprocess.run(
            [sys.executable, "-m", "dray.cli.app", "slurm", *arguments],
            cwd=self.folder,
            env={**self.environ, "COLUMNS": "250"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=BOUND,
        )
        assert not check or done.returncode == 0, done.stderr + done.stdout
        return done.stdout + done.stderr

    def submit(self, *options: str) -> int:
        """Submit the run; returns Slurm's number of the job."""
        printed = self.dray("submit", str(self.job_file), "--output", str(self.output), *options)
        self.job = int(printed.split("submitted job ", 1)[1].split()[0])
        return self.job

    def go(self) -> None:
        """Make the remaining steps short."""
        (self.output / "go").touch()

    # --- files and processes ----------------------------------------------------------------------------------

    def record(self) -> RunRecord:
        return RunRecord.read(self.output)

    def ends(self) -> list[tuple[int, int, int | None]]:
        """Part, attempt and exit code of every attempt that has ended."""
        return [(end.part, end.attempt, end.exit_code) for end in self.record().ends]

    def steps(self) -> list[int]:
        """The step of every complete line of the metrics."""
        return [line["step"] for line in self.metrics()]

    def environment(self, replica: str) -> dict[str, str]:
        """The environment variables of the replica."""
        return dict(json.loads((self.output / f"{replica}.environment").read_text()))

    def checkpoint(self) -> dict[str, Any]:
        """The content of the checkpoint's file; step 0 before there is one."""
        there = (self.output / "checkpoint" / "state.json").exists()
        return super().checkpoint() if there else {"step": 0, "outcome": ""}

    def log(self, name: str, attempt: str = "") -> str:
        """A log of the attempt, such as ``"001.1"``; by default of the newest."""
        place = self.output / "parts" / attempt if attempt else self.output / "latest"
        return (place / "logs" / name).read_text()

    def logs(self) -> list[Path]:
        """The logs of the run, those of Slurm and the batch script included."""
        places = ("slurm-*.out", "slurm.json", "parts/*/logs/*")
        return [log for place in places for log in self.output.glob(place)]

    def processes(self, name: str = "dray") -> list[psutil.Process]:
        """The processes of this run on all nodes: those with its folder in the command line."""

        def ours(process: psutil.Process) -> bool:
            return process.pid != os.getpid() and str(self.output) in " ".join(process.cmdline())

        return processes_where(ours, name)

    # --- waiting ----------------------------------------------------------------------------------------------

    def wait_until(self, condition: Callable[[], object], awaited: str, bound: float = BOUND) -> None:
        """Wait until `condition` holds; it is an error if the job ends before."""

        def holds() -> object:
            return condition() or self.job not in self.cluster.jobs()

        try:
            self.cluster.wait_until(holds, awaited, bound)
        except (AssertionError, ClusterFailed) as error:
            raise AssertionError(f"{error}\n{self.story()}") from None
        assert condition(), f"the job ended without {awaited}\n{self.story()}"

    def wait_for_steps(self, count: int) -> None:
        """Wait until there are `count` lines of metrics."""
        self.wait_until(lambda: len(self.steps()) >= count, f"{count} steps")

    def wait_for_checkpoint(self) -> int:
        """Wait until there is one; returns its step."""
        self.wait_until(lambda: self.checkpoint()["step"] > 0, "a checkpoint")
        return int(self.checkpoint()["step"])

    def end(self, bound: float = BOUND) -> dict[str, str]:
        """Wait until the job and all processes of the run have ended; returns Slurm's fields of the job."""
        try:
            ended = self.cluster.wait_for_end(self.job, bound)
            self.cluster.wait_until(
                lambda: not self.cluster.processes(), "the end of all processes on the nodes", 10.0
            )
        except (AssertionError, ClusterFailed) as error:
            raise AssertionError(f"{error}\n{self.story()}") from None
        assert self.processes() == [], self.story()
        return ended
