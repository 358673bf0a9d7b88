"""Runs `dray run` on a small job without torch, as a user would, and looks at what it leaves on the machine."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

CLASSES = """
import json, os, signal, subprocess, sys, time
import numpy as np

class Worker:
    def setup(self, context):
        self.args, self.index, self.version = context.args, context.index, None
        if self.args.get("grandchild"):
            program = "import time; time.sleep(600)"
            subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
            subprocess.Popen([sys.executable, "-c", program])
    def load_weights(self, weights, version):
        assert float(weights["w"][0]) == version or self.args.get("restarts")
        self.version = version
    def rollout(self, prompt):
        time.sleep(self.args.get("pause", 0.0))
        if prompt.index >= self.args.get("raise_at", 1 << 60) and self.index in self.args.get("raising", [0, 1]):
            raise ValueError("the environment broke")
        return {"observations": np.full((8, 4), prompt.seed, np.float64), "rewards": np.ones(8, np.float32),
                "prompt": np.array(prompt.index), "version": np.array(self.version),
                "uid": np.frombuffer(os.urandom(8), np.uint64)}

class Trainer:
    def setup(self, context):
        self.steps, self.args, self.seen, self.uids, self.group = 0, context.args, [], [], context.group
        self.output = context.output
        if self.group.size > 1:
            self.shared = self.group.share("from rank 0" if self.group.rank == 0 else None)
            assert self.shared == "from rank 0"
    def train_step(self, trajectories):
        for each in trajectories:
            assert int(each.arrays["version"]) == each.weight_version
            age = self.steps - each.weight_version
            assert 0 <= age <= self.args.get("oldest", 1 << 60) or self.args.get("restarts")
        self.seen += [int(each.arrays["prompt"]) for each in trajectories]
        assert len(set(self.seen)) == len(self.seen) or self.args.get("repeats")
        self.uids += [int(each.arrays["uid"][0]) for each in trajectories]
        assert len(set(self.uids)) == len(self.uids), "a payload has contributed twice"
        if self.steps >= self.args.get("hang_at", 1 << 60):
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            time.sleep(600)
        if self.args.get("poison") in self.seen:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.args.get("pause", 0.01))
        self.steps += 1
        return {"score": float(self.steps)}
    def weights(self):
        return {"w": np.full(1000, self.steps, np.float32)}
    def save(self, folder):
        (folder / "trainer.json").write_text(json.dumps([self.steps, self.seen, self.uids]))
        marker = self.output / "died-before-a-commit"
        if self.args.get("die_before_commit") and not marker.exists():
            marker.touch()
            from dray.runtime.intake import Intake
            Intake.commit = lambda intake: os.kill(os.getpid(), signal.SIGKILL)
    def load(self, folder):
        self.steps, self.seen, self.uids = json.loads((folder / "trainer.json").read_text())
"""

JOB = """
[job]
name = "small"
max_steps = 100000
[rollout]
worker = "small.py:Worker"
slots = 16
slot_bytes = 4096
[policy]
trainer = "small.py:Trainer"
batch_size = 8
[controller]
heartbeat_interval = 0.3
dead_after = 3.0
[timeouts]
start = 30
controller_lost = 3.0
shutdown = 6.0
"""

STOP = """
[stop]
metric = "score"
at_least = 20
"""

BOUND = 60.0


class JobRun:
    """A running or ended `dray run`."""

    def __init__(self, folder: Path, *options: str, stop_table: str = STOP) -> None:
        (folder / "small.py").write_text(CLASSES)
        (folder / "job.toml").write_text(JOB + stop_table)
        self.output = folder / "out"
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "dray.cli.app",
                "run",
                str(folder / "job.toml"),
                "--output",
                str(self.output),
                *options,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**os.environ, "COLUMNS": "200"},
            start_new_session=True,
        )
        self.pid = self.process.pid
        self.text = ""

    def wait_for(self, words: str) -> None:
        """Read what the job prints until `words` come."""
        deadline = time.monotonic() + BOUND
        while words not in self.text:
            assert select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0], (
                self.story()
            )
            assert self.process.stdout is not None
            chunk = os.read(self.process.stdout.fileno(), 65536).decode()
            assert chunk, self.story()
            self.text += chunk

    def wait_until(self, condition: Callable[[], bool], what: str, bound: float = BOUND) -> None:
        """Look until `condition` holds."""
        deadline = time.monotonic() + bound
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not within {bound} s\n{self.story()}"
            time.sleep(0.02)

    def wait_for_checkpoint(self) -> None:
        """Wait until there is one."""
        self.wait_until((self.output / "checkpoint" / "state.json").exists, "a checkpoint")

    def end(self, bound: float = BOUND) -> int:
        """Wait for the end and return the exit code; whatever is left of the job fails the test."""
        try:
            rest, _ = self.process.communicate(timeout=bound)
        except subprocess.TimeoutExpired:
            for process in self.processes():
                process.send_signal(signal.SIGUSR1)
            time.sleep(0.5)  # for the stacks to be in the logs of the story
            raise AssertionError(f"the job did not end within {bound} s\n{self.story()}") from None
        self.text += rest.decode()
        self.wait_until_gone(0.0)
        assert not (self.output / ".run").exists()
        return self.process.returncode

    def processes(self, name: str = "") -> list[psutil.Process]:
        """What runs of the job, grandchildren included; `name` is part of the command line."""
        found = []
        for process in psutil.process_iter():
            try:
                environment = process.environ()
                command = " ".join(process.cmdline())
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
            ours = environment.get("DRAY_SUPERVISOR_PID") == str(self.pid) or process.ppid() == self.pid
            if ours and name in command and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    def wait_until_gone(self, bound: float, name: str = "") -> None:
        """Nothing of the job runs any more within `bound` seconds."""
        deadline = time.monotonic() + bound
        while left := self.processes(name):
            assert time.monotonic() < deadline, f"still there: {left}\n{self.story()}"
            time.sleep(0.05)

    def summary(self) -> dict[str, Any]:
        return dict(json.loads((self.output / "summary.json").read_text()))

    def checkpoint(self) -> dict[str, Any]:
        return dict(json.loads((self.output / "checkpoint" / "state.json").read_text()))

    def steps(self) -> list[dict[str, Any]]:
        """The whole lines of `metrics.jsonl`, or one of step 0."""
        metrics = self.output / "metrics.jsonl"
        text = metrics.read_text() if metrics.exists() else ""
        return [json.loads(line) for line in text.split("\n")[:-1]] or [{"step": 0}]

    def contributed(self, rank: int = 0) -> list[int]:
        """What each payload that the weights of the checkpoint were trained on was given as its number."""
        folder = self.output / "checkpoint" / (f"trainer-{rank}" if rank else "trainer")
        steps, _, uids = json.loads((folder / "trainer.json").read_text())
        assert steps == self.checkpoint()["step"]
        return list(uids)

    def log(self, name: str) -> str:
        return (self.output / "logs" / f"{name}.log").read_text()

    def story(self) -> str:
        logs = sorted((self.output / "logs").glob("*.log")) if self.output.exists() else []
        return "\n".join([self.text, *(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in logs)])


@contextmanager
def running(folder: Path, *options: str, stop_table: str = STOP) -> Iterator[JobRun]:
    """A job, of which nothing runs afterwards."""
    job = JobRun(folder, *options, stop_table=stop_table)
    try:
        yield job
    finally:
        if job.process.poll() is None:
            job.process.kill()
        for process in job.processes():
            process.kill()
        job.process.wait()
        assert job.process.stdout is not None
        job.process.stdout.close()


def job_settings(*settings: str) -> list[str]:
    """Options of the command line for `settings`."""
    return [part for setting in settings for part in ("--set", setting)]
