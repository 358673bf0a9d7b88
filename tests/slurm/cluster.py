"""A private Slurm cluster: slurmctld, three virtual nodes and munge, all on loopback in a temporary folder.

    with SlurmCluster.started() as cluster:
        job = cluster.submit(folder / "job.sh", "--nodes=2")
        cluster.wait_for_job(job, "RUNNING")
        cluster.kill_node("n2")
        assert cluster.wait_for_end(job)["JobState"] == "COMPLETED"

The machine's own Slurm and munge, if there are any, are not used. The daemons daemonize, so a test may kill and
revive nodes without leaving a child process behind.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
from slurm_conf import CREDENTIAL_SECONDS, KILL_WAIT, NODES, PARTITION, write_configuration
from waiting import wait_until
from watched_runs import BOUND, ends_of

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo", "scancel")
ENDED = frozenset(
    {
        "COMPLETED",
        "FAILED",
        "CANCELLED",
        "TIMEOUT",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "BOOT_FAIL",
        "DEADLINE",
        "PREEMPTED",
    }
)
"""States of a job that has ended."""

_COMMAND_BOUND = 30.0
_POLL_SECONDS = 0.1
# Variables of a surrounding job or the user, which would affect the commands for this cluster.
_FOREIGN = re.compile(r"(SLURM|SLURMD|SBATCH|SRUN|SALLOC|SCANCEL|SQUEUE|SINFO|MUNGE)_")


class ClusterFailed(Exception):
    """A Slurm command failed, or a job can no longer reach the awaited state."""


def missing_commands() -> list[str]:
    """The commands that a cluster needs and this machine does not have."""
    return [name for name in COMMANDS if _found(name) is None]


class SlurmCluster:
    """A running cluster with the nodes `nodes` in one partition."""

    nodes = NODES
    partition = PARTITION
    requeue_seconds = CREDENTIAL_SECONDS + 1.0
    kill_wait = float(KILL_WAIT)

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.configuration = write_configuration(folder)
        self.environment: Mapping[str, str] = {
            **{name: value for name, value in os.environ.items() if not _FOREIGN.match(name)},
            "PATH": os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin")),
            "SLURM_CONF": str(self.configuration),
        }
        """The environment of every command for this cluster."""

    # --- start and stop -----------------------------------------------------------------------------------------

    @classmethod
    @contextmanager
    def started(cls) -> Iterator[SlurmCluster]:
        """A cluster whose nodes are idle; its processes and files are removed afterwards."""
        # A short path, because sockets of munge and of job steps are in it.
        folder = Path(tempfile.mkdtemp(prefix="dray-slurm-", dir="/tmp"))
        folder.chmod(0o755)  # munge's clients reach the socket from outside
        cluster = cls(folder)
        try:
            cluster._start()
            yield cluster
        finally:
            cluster.stop()

    def _start(self) -> None:
        for name in ("munge", "state", "log", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True)
        munge = self.folder / "munge"
        (munge / "key").touch(mode=0o600)
        (munge / "key").write_bytes(os.urandom(128))
        files = {
            "key-file": "key",
            "socket": "socket",
            "pid-file": "munged.pid",
            "log-file": "log",
            "seed-file": "seed",
        }
        self.command("munged", "--force", *(f"--{option}={munge / name}" for option, name in files.items()))
        self.command("slurmctld", "-c")
        for node in self.nodes:
            self.command("slurmd", "-c", "-N", node)
        for node in self.nodes:
            self.wait_for_node(node, "IDLE")

    def stop(self) -> None:
        """End every job and daemon, within seconds, and remove the folder."""

        def ended() -> bool:
            left = [*self.daemons(), *self.processes()]
            _kill(left)
            return not left

        self.wait_until(ended, "the end of the daemons", 10.0)
        shutil.rmtree(self.folder)

    def daemons(self) -> list[psutil.Process]:
        files = [self.folder / f"{name}.pid" for name in ("slurmctld", *self.nodes, "munge/munged")]
        found = [daemon for file in files if (daemon := self._daemon(file)) is not None]
        return [process for daemon in found for process in (daemon, *_descendants(daemon))]

    def _daemon(self, pid_file: Path) -> psutil.Process | None:
        """The process that wrote `pid_file`, if it is still running and its number was not reused."""
        try:
            process = psutil.Process(int(pid_file.read_text()))
            ours = process.environ().get("SLURM_CONF") == str(self.configuration)
        except (FileNotFoundError, ValueError, psutil.Error):
            return None
        return process if ours and _runs(process) else None

    # --- commands -----------------------------------------------------------------------------------------------

    def command(self, *command: str | Path, check: bool = True) -> str:
        """The output of a command for this cluster.

        Raises:
            ClusterFailed: it exceeded its time limit, or its exit code is not 0 and `check` is set.
        """
        name, *rest = map(str, command)
        try:
            done = subprocess.run(
                [_found(name) or name, *rest],
                env=self.environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_COMMAND_BOUND,
            )
        except subprocess.TimeoutExpired as expired:
            raise ClusterFailed(f"{expired}\n{self.story()}") from None
        if check and done.returncode != 0:
            raise ClusterFailed(f"{name} ended with {done.returncode}: {done.stderr}{done.stdout}\n{self.story()}")
        return done.stdout

    def submit(self, script: Path, *options: str) -> int:
        """Submit a batch script with `sbatch`; its output goes to `<script>.out`. Returns the job's number."""
        output = f"--output={script}.out"
        return int(self.command("sbatch", "--parsable", f"--chdir={script.parent}", output, *options, script))

    # --- jobs ---------------------------------------------------------------------------------------------------

    def job(self, number: int) -> dict[str, str]:
        """Fields of `scontrol show job`: `JobState`, `Restarts`, `Reason`, `ExitCode`, `BatchHost`, `NodeList`."""
        return _fields(self.command("scontrol", "--oneliner", "show", "job", str(number)))

    def jobs(self) -> list[int]:
        """The numbers of the waiting and running jobs."""
        return [int(line) for line in self.command("squeue", "--noheader", "--format=%A").split()]

    def wait_for_job(self, number: int, *states: str, bound: float = BOUND, restarts: int = 0) -> dict[str, str]:
        """Wait until the job is in one of `states`, requeued at least `restarts` times; returns its fields.

        Raises:
            AssertionError: it is not in such a state within `bound` seconds.
            ClusterFailed: it has ended in another state.
        """
        found: dict[str, str] = {}

        def there() -> bool:
            nonlocal found
            found = self.job(number)
            state = found["JobState"]
            # A job that is being requeued is in such a state for a moment, but still in the queue.
            if state in ENDED and number in self.jobs():
                return False
            if state in states and int(found["Restarts"]) >= restarts:
                return True
            if state in ENDED:
                raise ClusterFailed(f"waiting for {states}, but it ended: {found}\n{self.story()}")
            return False

        self.wait_until(there, f"job {number} in {' or '.join(states)} (restarts ≥ {restarts})", bound)
        return found

    def wait_for_end(self, number: int, bound: float = BOUND) -> dict[str, str]:
        """Wait until the job has ended in any state; a requeued job has not ended."""
        return self.wait_for_job(number, *ENDED, bound=bound)

    def nodes_of(self, number: int) -> list[str]:
        """The names of the job's nodes, in Slurm's order; the batch script runs on the first."""
        return self.command("scontrol", "show", "hostnames", self.job(number)["NodeList"]).split()

    def cancel_all(self, bound: float = BOUND) -> None:
        """Cancel every job and wait until the nodes are free of them."""
        if jobs := self.jobs():
            self.command("scancel", *map(str, jobs), check=False)  # one may have ended meanwhile
        self.wait_until(lambda: not self.jobs(), "an empty queue", bound)

    # --- nodes --------------------------------------------------------------------------------------------------

    def node(self, name: str) -> dict[str, str]:
        """Fields of `scontrol show node`: `State` (`IDLE`, `ALLOCATED`, `DOWN`, with marks like `*`), `Reason`."""
        return _fields(self.command("scontrol", "--oneliner", "show", "node", name))

    def wait_for_node(self, name: str, state: str, bound: float = BOUND) -> None:
        """Wait until the node's state is `state`, without marks."""
        self.wait_until(lambda: self.node(name)["State"] == state, f"node {name} in {state}", bound)

    def processes(self, node: str | None = None) -> list[psutil.Process]:
        """The processes of jobs on `node`, or on all nodes: step daemons, batch scripts, tasks and descendants."""
        found: dict[int, psutil.Process] = {}
        for process in psutil.process_iter():
            if self._runs_on(process, node):
                found |= {each.pid: each for each in (process, *_descendants(process))}
        return [process for process in found.values() if _runs(process)]

    def kill_node(self, name: str, *, reported: bool = True, parents_first: bool = False) -> None:
        """Kill the node's slurmd and every job process on it with SIGKILL, as in a power failure.

        Args:
            reported: report to Slurm that the node is down; otherwise Slurm detects it after `NODE_TIMEOUT`.
            parents_first: kill one after the other, so that Slurm ends the steps that were started on the node.
        """
        daemon = self._daemon(self.folder / f"{name}.pid")
        assert daemon is not None, f"{name} has been killed already"
        _kill([daemon])

        def gone() -> bool:
            left = self.processes(name)
            # A helper process of srun cancels the step when its parent dies, so all processes are stopped first.
            # The kernel continues a stopped process that becomes an orphan, so the youngest is killed first.
            if not parents_first:
                _signal(left, signal.SIGSTOP)
            _kill(sorted(left, key=_started, reverse=not parents_first))
            return not left and not _runs(daemon)

        self.wait_until(gone, f"the death of {name}")
        if reported:
            self.command("scontrol", "update", f"nodename={name}", "state=down", "reason=killed")

    def revive_node(self, name: str) -> None:
        """Start the slurmd of a killed node again and wait until the node takes jobs."""
        self.command("slurmd", "-c", "-N", name)
        usable = ("IDLE", "MIXED", "ALLOCATED")

        def back() -> bool:
            state = self.node(name)["State"]
            if state.startswith("DOWN") and "*" not in state:  # it answers, but was reported as down
                self.command("scontrol", "update", f"nodename={name}", "state=resume", check=False)
            return state in usable

        self.wait_until(back, f"the return of {name}")

    def dead_nodes(self) -> list[str]:
        """The nodes whose slurmd does not run."""
        return [name for name in self.nodes if self._daemon(self.folder / f"{name}.pid") is None]

    def _runs_on(self, process: psutil.Process, node: str | None) -> bool:
        wanted = self.nodes if node is None else (node,)
        try:
            if process.name() == "slurmstepd":  # it overwrites its environment, but writes into the node's log
                logs = {str(self.folder / "log" / f"{name}.log") for name in wanted}
                return any(file.path in logs for file in process.open_files())
            environment = process.environ()
        except psutil.Error:  # ended, a zombie, or another user's
            return False
        ours = environment.get("SLURM_CONF") == str(self.configuration)
        return ours and environment.get("SLURMD_NODENAME") in wanted

    # --- waiting ------------------------------------------------------------------------------------------------

    def wait_until(self, condition: Callable[[], object], awaited: str, bound: float = BOUND) -> None:
        """Poll `condition` until it holds; the only place where the cluster is polled."""
        wait_until(condition, awaited, bound, pause=_POLL_SECONDS, story=self.story)

    def story(self) -> str:
        """The ends of the daemons' logs."""
        return ends_of((self.folder / "log").glob("*.log"), self.folder)


def _found(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


def _fields(line: str) -> dict[str, str]:
    """`Name=value` pairs; a value ends at its first blank."""
    return dict(part.split("=", 1) for part in line.split() if "=" in part)


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _started(process: psutil.Process) -> tuple[float, int]:
    """A sort key: the start time of a process, which psutil recorded when it found the process."""
    return process.create_time(), process.pid


def _kill(processes: list[psutil.Process]) -> None:
    _signal(processes, signal.SIGKILL)


def _signal(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue
