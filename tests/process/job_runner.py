"""Runs `dray run` on a small job without torch, as a user would, and checks what it leaves on the machine."""

from __future__ import annotations

import codecs
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
from waiting import wait_until
from watched_runs import BOUND, WatchedRun, processes_where

from dray.clock import Deadline
from dray.jobs.process import DUMP_SIGNAL

CLASSES = """
import json, os, signal, subprocess, sys, time
import numpy as np

def fork_environment():
    # As vectorised environments and game servers do: a fork, a session of its own, and a daemon of that.
    if os.fork() == 0:
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(600)
            os._exit(0)
        time.sleep(600)
        os._exit(0)

class Worker:
    def setup(self, context):
        self.args, self.index, self.version = context.args, context.index, None
        self.hangs = context.output / f"{context.name}-hangs"
        if self.args.get("grandchild"):
            program = "import time; time.sleep(600)"
            subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
            subprocess.Popen([sys.executable, "-c", program])
        if self.args.get("forking"):
            fork_environment()
    def load_weights(self, weights, version):
        assert float(weights["w"][0]) == version or self.args.get("restarts")
        assert np.array_equal(weights["frozen"], np.arange(20_000, dtype=np.float32))
        self.version = version
    def rollout(self, work_item):
        time.sleep(self.args.get("pause", 0.0))
        if work_item.index >= self.args.get("hang_at", 1 << 60) and self.index in self.args.get("hanging", [0, 1]):
            self.hangs.touch()
            time.sleep(600)
        index = work_item.index
        if index >= self.args.get("raise_at", 1 << 60) and self.index in self.args.get("raising", [0, 1]):
            raise ValueError("the environment broke")
        return {"observations": np.full((8, 4), work_item.seed, np.float64), "rewards": np.ones(8, np.float32),
                "work_item": np.array(work_item.index), "version": np.array(self.version),
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
        self.seen += [int(each.arrays["work_item"]) for each in trajectories]
        assert len(set(self.seen)) == len(self.seen) or self.args.get("repeats")
        self.uids += [int(each.arrays["uid"][0]) for each in trajectories]
        assert len(set(self.uids)) == len(self.uids), "a payload has contributed twice"
        if self.steps >= self.args.get("hang_at", 1 << 60):
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            time.sleep(600)
        if self.args.get("poison") in self.seen:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.steps == self.args.get("held_at"):
            open(self.args["held_by"]).read()
        time.sleep(self.args.get("pause", 0.03))
        self.steps += 1
        return {"score": float(self.steps)}
    def weights(self):
        return {"w": np.full(1000, self.steps, np.float32), "frozen": np.arange(20_000, dtype=np.float32)}
    def save(self, folder):
        (self.output / "saving").touch()
        time.sleep(self.args.get("save_pause", 0.0))
        (folder / "trainer.json").write_text(json.dumps([self.steps, self.seen, self.uids]))
        marker = self.output / "died-before-a-commit"
        if self.args.get("die_before_commit") and not marker.exists():
            marker.touch()
            from dray.jobs.replica.delivery import Deliveries
            Deliveries.commit = lambda deliveries: os.kill(os.getpid(), signal.SIGKILL)
    def load(self, folder):
        self.steps, self.seen, self.uids = json.loads((folder / "trainer.json").read_text())
"""

LIMITED = (
    CLASSES
    + """
import resource
class Limited(Trainer):
    def train_step(self, trajectories):
        # From now on, a file of more than 64 KiB fails as on a full disk.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        return super().train_step(trajectories)
"""
)
"""With a trainer `Limited`."""

JOB = """
[job]
name = "small"
max_steps = 100000
plot = ""
[rollout]
worker = "small.py:Worker"
slots = 16
slot_bytes = 4096
inline_bytes = 0
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


class JobRun(WatchedRun):
    """A running or ended `dray run`.

    Args:
        job: the job file without `stop_table`; None for one that the folder has already.
        prefix: a command that runs the one whose words follow it.
    """

    def __init__(
        self,
        folder: Path,
        *options: str,
        job: str | None = JOB,
        stop_table: str = STOP,
        classes: str = CLASSES,
        prefix: Sequence[str] = (),
    ) -> None:
        (folder / "small.py").write_text(classes)
        if job is not None:
            (folder / "job.toml").write_text(job + stop_table)
        super().__init__(folder / "out")
        self.process = subprocess.Popen(
            [
                *prefix,
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
        self.decode = codecs.getincrementaldecoder("utf-8")().decode

    def wait_for(self, words: str) -> None:
        """Read what the job prints until `words` come."""
        deadline = Deadline.after(BOUND)
        assert self.process.stdout is not None
        while words not in self.text:
            readable = select.select([self.process.stdout], [], [], deadline.remaining)[0]
            assert readable, f"{BOUND:g} s passed while waiting for {words!r}\n{self.story()}"
            assert self.take_in(), f"the job ended without printing {words!r}\n{self.story()}"

    def take_in(self) -> bool:
        """Add what was printed to the text; False if the job has closed its output."""
        assert self.process.stdout is not None
        chunk = os.read(self.process.stdout.fileno(), 65536)
        self.text += self.decode(chunk)
        return bool(chunk)

    def end(self, bound: float = BOUND) -> int:
        """Wait for the end and return the exit code; whatever is left of the job fails the test."""
        try:
            rest, _ = self.process.communicate(timeout=bound)
        except subprocess.TimeoutExpired:
            self.dump_stacks()
            raise AssertionError(f"the job did not end within {bound} s\n{self.story()}") from None
        self.text += self.decode(rest)
        self.wait_until_gone(0.0)
        assert not (self.output / ".run").exists()
        return self.process.returncode

    def dump_stacks(self) -> None:
        """Those of `dray run` as well, into the story."""
        self.process.send_signal(DUMP_SIGNAL)
        super().dump_stacks()
        assert self.process.stdout is not None
        while select.select([self.process.stdout], [], [], 0.2)[0]:
            if not self.take_in():
                return

    def processes(self, name: str = "") -> list[psutil.Process]:
        """What runs of the job, grandchildren included; `name` is part of the command line."""

        def ours(process: psutil.Process) -> bool:
            supervisor = process.environ().get("DRAY_SUPERVISOR_PID")
            return supervisor == str(self.pid) or process.ppid() == self.pid

        return processes_where(ours, name)

    def wait_until_gone(self, bound: float, name: str = "") -> None:
        """Nothing of the job runs any more within `bound` seconds."""

        def left() -> str:
            return f"still there: {self.processes(name)}\n{self.story()}"

        wait_until(lambda: not self.processes(name), "the end of processes", bound, pause=0.05, story=left)

    def contributed(self, rank: int = 0) -> list[int]:
        """What each payload that the weights of the checkpoint were trained on was given as its number."""
        folder = self.output / "checkpoint" / (f"trainer-{rank}" if rank else "trainer")
        steps, _, uids = json.loads((folder / "trainer.json").read_text())
        assert steps == self.checkpoint()["step"]
        return list(uids)

    def log(self, name: str) -> str:
        return (self.output / "logs" / f"{name}.log").read_text()

    def logs(self) -> list[Path]:
        return list(self.output.glob("logs/*.log"))

    @property
    def lines(self) -> list[str]:
        """What was shown, without the lines that come only where the import of the classes takes long."""
        return [line for line in self.text.splitlines() if not line.startswith("importing ")]

    def story(self) -> str:
        return f"{self.text}\n{super().story()}"


@contextmanager
def running(
    folder: Path,
    *options: str,
    job: str | None = JOB,
    stop_table: str = STOP,
    classes: str = CLASSES,
    prefix: Sequence[str] = (),
) -> Iterator[JobRun]:
    """A job, of which nothing runs afterwards."""
    run = JobRun(folder, *options, job=job, stop_table=stop_table, classes=classes, prefix=prefix)
    try:
        yield run
    finally:
        if run.process.poll() is None:
            run.process.kill()
        run.process.wait()
        run.kill_all()
        assert run.process.stdout is not None
        run.process.stdout.close()


def job_settings(*settings: str) -> list[str]:
    """Options of the command line for `settings`."""
    return [part for setting in settings for part in ("--set", setting)]
