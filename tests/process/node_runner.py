"""Runs a job on several "nodes" without Slurm: the processes of its nodes, as a batch script would start them."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest
from job_runner import CLASSES, JOB, STOP
from watched_runs import BOUND, WatchedRun, processes_where

from dray.clock import Deadline
from dray.jobs.config import SlurmTable
from dray.jobs.job_file import load_job
from dray.jobs.slurm.plan import Plan

SECRET = bytes.fromhex("5ec2e7" * 10) + b"xy"


class NodesRun(WatchedRun):
    """A run on nodes ``n1``, ``n2``, …, which are this machine; `start` begins an attempt of it."""

    def __init__(
        self,
        folder: Path,
        settings: Sequence[str],
        table: SlurmTable,
        job: str | None,
    ) -> None:
        if job is not None:
            (folder / "small.py").write_text(CLASSES)
            (folder / "job.toml").write_text(job)
        super().__init__(folder / "out")
        config = load_job(folder / "job.toml", ["job.lane=tcp", *settings]).model_copy(update={"slurm": table})
        plan = Plan(config, folder / "job.toml", self.output, SECRET)
        self.plan = plan.write()
        self.replicas = config.policy.replicas + config.rollout.replicas
        tag = secrets.token_hex(3)
        self.nodes = [f"n{number}-{tag}" for number in range(1, plan.node_count + 1)]
        self.tasks: dict[int, subprocess.Popen[bytes]] = {}
        self.attempt = ""

    def start(
        self, part: int = 1, attempt: int = 1, nodes: Sequence[int] | None = None, within: Sequence[str] = ()
    ) -> None:
        """Start the processes of `nodes` (counted from 1, default all) for an attempt; `within` becomes them."""
        self.attempt = f"{part:03d}.{attempt}"
        for number in range(1, len(self.nodes) + 1) if nodes is None else nodes:
            module = "dray.jobs.slurm.head" if number == 1 else "dray.jobs.slurm.node"
            self.log_folder.mkdir(parents=True, exist_ok=True)
            with (self.log_folder / f"n{number}.out").open("ab") as out:
                self.tasks[number] = subprocess.Popen(
                    [*within, sys.executable, "-m", module, str(self.plan), str(part), str(attempt)],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    env={
                        **os.environ,
                        "COLUMNS": "200",
                        "DRAY_NODES": " ".join(self.nodes),
                        "SLURMD_NODENAME": self.nodes[number - 1],
                    },
                    start_new_session=True,
                )

    @property
    def log_folder(self) -> Path:
        return self.output / "parts" / self.attempt / "logs"

    def end(self, bound: float = BOUND) -> list[int]:
        """Wait for the end and return the exit codes of all nodes; whatever is left of the job fails the test."""
        deadline = Deadline.after(bound)
        for number, task in self.tasks.items():
            try:
                task.wait(max(0.1, deadline.remaining))
            except subprocess.TimeoutExpired:
                self.dump_stacks()
                raise AssertionError(f"node {number} did not end within {bound} s\n{self.story()}") from None
        left = self.processes()
        assert not left, f"still there: {left}\n{self.story()}"
        assert not (self.output / ".run").exists()
        return [self.tasks[number].returncode for number in sorted(self.tasks)]

    def processes(self, name: str = "", node: int | None = None) -> list[psutil.Process]:
        """What runs of the job, or of one node; `name` is part of the command line."""

        def ours(process: psutil.Process) -> bool:
            environment = process.environ()
            here = node is None or environment.get("SLURMD_NODENAME") == self.nodes[node - 1]
            return here and environment.get("DRAY_NODES") == " ".join(self.nodes)

        return processes_where(ours, name)

    def wait_for_steps(self, count: int) -> None:
        """Wait until so many training steps are done, and every replica that was to start takes part."""
        self.wait_until(lambda: self.step() >= count, f"step {count}")
        controller = self.log_folder / "controller.log"
        self.wait_until(lambda: controller.read_text().count(" registered (pid ") >= self.replicas, "all replicas")

    def kill_node(self, number: int) -> None:
        """Everything of a node at once, as when its machine dies."""
        for process in self.processes(node=number):
            process.kill()
        self.tasks[number].wait()

    def log(self, name: str) -> str:
        """A log of the newest attempt."""
        return (self.log_folder / name).read_text()

    def logs(self) -> list[Path]:
        """Those of all attempts."""
        return list(self.output.glob("parts/*/logs/*"))


@contextmanager
def nodes_running(
    folder: Path,
    *settings: str,
    policy_nodes: int = 1,
    rollout_nodes: int = 2,
    interface: str | None = "lo",
    environment: Mapping[str, str] | None = None,
    job: str | None = JOB + STOP,
) -> Iterator[NodesRun]:
    """A run, of which no process runs afterwards; without a `job` it is that of the folder."""
    table = SlurmTable(
        policy_nodes=policy_nodes,
        rollout_nodes=rollout_nodes,
        interface=interface,
        environment=dict(environment or {}),
    )
    run = NodesRun(folder, settings, table, job)
    try:
        yield run
    finally:
        for task in run.tasks.values():
            if task.poll() is None:
                task.kill()
        for task in run.tasks.values():
            task.wait()
        run.kill_all()


class Machine:
    """A network namespace that is held by a process; its end is that of the namespace."""

    interface = "dray0"

    def __init__(self) -> None:
        self._holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "ip link set lo up && echo ready && exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self._holder.stdout is not None
        self.usable = self._holder.stdout.readline() == b"ready\n"

    @property
    def pid(self) -> int:
        return self._holder.pid

    @property
    def command(self) -> list[str]:
        """What goes before a command that is to run there."""
        return ["nsenter", f"--target={self.pid}", "--net"]

    def run(self, *command: str) -> bool:
        return subprocess.run([*self.command, *command], capture_output=True, timeout=10.0).returncode == 0

    def cut(self) -> None:
        """Take the cable away: nothing comes through any more, and no process is notified."""
        assert self.run("ip", "link", "set", self.interface, "down")

    def close(self) -> None:
        self._holder.communicate(timeout=10.0)


@contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """Two namespaces with a cable between them, whose ends have the same name; skips where that cannot be had."""
    missing = [tool for tool in ("unshare", "nsenter", "ip") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed")
    with ExitStack() as held:
        near, far = Machine(), Machine()
        held.callback(near.close)
        held.callback(far.close)
        name = Machine.interface
        laid = near.usable and far.usable
        laid = laid and near.run(
            "ip", "link", "add", name, "type", "veth", "peer", "name", name, "netns", str(far.pid)
        )
        for machine, address in ((near, "10.77.200.1/24"), (far, "10.77.200.2/24")):
            laid = laid and machine.run("ip", "address", "add", address, "dev", name)
            laid = laid and machine.run("ip", "link", "set", name, "up")
        if not laid:
            pytest.skip("network namespaces cannot be had here")
        yield near, far
