"""The process on the first node of a job: its supervisor, with controller, Redis and the replicas of its node.

``python -m dray.jobs.slurm.head PLAN PART ATTEMPT``

It is what `dray run` is on one machine, and goes on from the checkpoint in the run's folder if there is one. Its
exit codes are the same. SIGUSR2 tells it that the time limit is near: it ends the job as SIGTERM does, with a code
of its own.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import socket
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from dray.clock import MONOTONIC, Deadline
from dray.errors import ConfigError
from dray.jobs.config import JobConfig
from dray.jobs.exit_codes import ExitCode, meaning
from dray.jobs.files import write_json
from dray.jobs.folder import JobFolder, JobSpec
from dray.jobs.job_file import JobDraft
from dray.jobs.launch.display import Display
from dray.jobs.launch.job_processes import Elsewhere, Nowhere, Site, chosen_token
from dray.jobs.launch.output import open_output, resume_line
from dray.jobs.launch.preparation import check_entry_points
from dray.jobs.launch.processes import EndRequest, JobProcess
from dray.jobs.launch.shutdown import stopped_early
from dray.jobs.launch.supervisor import supervise
from dray.jobs.messages.auth import ConnectionInfo, NodeListener
from dray.jobs.messages.channel import MessageChannel
from dray.jobs.messages.models import (
    KillReplica,
    ReplicaEnded,
    ReplicasRunning,
    ReplicasStarted,
    Role,
    SendSignal,
    Shutdown,
)
from dray.jobs.process import LOOPBACK, SignalInbox, adopt_orphans, log_to_stderr
from dray.jobs.queue import RedisAddress
from dray.jobs.slurm.network import Interface, boot_id, choose_interface
from dray.jobs.slurm.placement import Placement, environment, placements
from dray.jobs.slurm.plan import NODE_VARIABLE, Plan, Task, run_task
from dray.name_resolution import is_loopback
from dray.transport.lanes import LANES

# --- remote ------------------------------------------------------------------------------------------------------

SHUTDOWN_TIMEOUT = 5.0
"""Seconds that the head waits for the other nodes when the job is over."""

_LOG = logging.getLogger("dray.jobs.slurm.head")


class RemoteReplica:
    """A replica on another node; see `dray.jobs.launch.processes.JobProcess`."""

    def __init__(self, placed: Placement, pid: int, log: Path, channel: MessageChannel) -> None:
        self.name = placed.name
        self.role = placed.role
        self.pid = pid
        self.log = log
        self.exit_code: int | None = None
        self._node = placed.node
        self._channel = channel
        self._code: int | None = None
        self._with_node = False
        self._request: EndRequest | None = None
        self._seen = MONOTONIC.now()

    @property
    def running(self) -> bool:
        return self.exit_code is None

    @property
    def ending(self) -> str:
        if self._with_node:
            return f"its node {self._node} is gone"
        if self._request is not None:
            return f"{self._request.why} and sent it {self._request.number.name}"
        return "it runs" if self.exit_code is None else meaning(self.exit_code)

    def seconds_unseen(self) -> float:
        """Seconds since its node last said that the process runs."""
        return MONOTONIC.now() - self._seen

    def seen(self) -> None:
        """Its node says that the process runs."""
        self._seen = MONOTONIC.now()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process; one that has ended gets none."""
        if self._code is None:
            self._channel.post(SendSignal(name=self.name, number=number))

    def kill_group(self) -> None:
        """Kill the process and every other one in its group."""
        if self._code is None:
            self._channel.post(KillReplica(name=self.name))

    def collect(self) -> int | None:
        """The exit code, once its node has told it or is gone."""
        self.exit_code = self._code
        return self.exit_code

    def ended(self, said: ReplicaEnded) -> None:
        """Its node says how it ended."""
        if self._code is None:
            self._code = said.code
            if said.request:
                request = EndRequest(signal.Signals(said.request), f"its node {self._node} was told to end")
                self._request = request if request.explains(said.code) else None

    def lost(self) -> None:
        """Its node is gone, and the process with it, or about to be."""
        if self._code is None:
            self._code, self._with_node = -signal.SIGKILL, True

    def __repr__(self) -> str:
        return f"<RemoteReplica {self.name} on {self._node} {'running' if self.running else self.exit_code}>"


class OtherNodes:
    """The nodes beside the head's; see `dray.jobs.launch.job_processes.Elsewhere`. As a context manager it closes.

    Args:
        attempt: the name of the attempt, which connections must show.
        placed: the replicas on other nodes.
        host: the head's address.
        silence: seconds without an answer after which another machine counts as gone.
    """

    def __init__(
        self,
        folder: JobFolder,
        attempt: str,
        secret: bytes,
        placed: Iterable[Placement],
        host: str,
        silence: float,
    ) -> None:
        self._folder = folder
        self._attempt = attempt
        self._placed = {each.name: each for each in placed}
        self._ranks: dict[int, socket.socket | None] = {
            each.index: None for each in self._placed.values() if each.role is Role.POLICY
        }
        self._replicas: dict[str, RemoteReplica] = {}
        self._channels: dict[str, MessageChannel] = {}
        self._known: set[str] = set()
        self._selector: selectors.BaseSelector | None = None
        self._listener = NodeListener(host, secret, silence, self._refusal, self._welcome)

    @property
    def expected(self) -> int:
        """How many replicas run there."""
        return len(self._placed)

    @property
    def processes(self) -> Sequence[JobProcess]:
        """Those that have been started there."""
        return list(self._replicas.values())

    def open(self, selector: selectors.BaseSelector, spec: JobSpec) -> None:
        """Listen, and tell the other nodes where, in a file of the job's folder."""
        self._selector = selector
        host, port = self._listener.open(selector)
        address = {
            "host": host,
            "port": port,
            "attempt": self._attempt,
            "job_id": spec.job_id,
            "boot_id": boot_id(),
        }
        write_json(self._folder.head_address, address, mode=0o600)

    def look(self) -> None:
        """Drop connections that take too long to show what they are; note nodes that take no orders any more."""
        for node in [node for node, channel in self._channels.items() if channel.lost]:
            self._lose(node)
        self._listener.apply_timeouts()

    def take_ranks(self) -> list[socket.socket] | None:
        """See `dray.jobs.launch.job_processes.Elsewhere`."""
        connected = [self._ranks[rank] for rank in sorted(self._ranks)]
        taken = [each for each in connected if each is not None]
        if len(taken) < len(connected):
            return None
        self._ranks = {}
        return taken

    def refuse(self) -> None:
        """See `dray.jobs.launch.job_processes.Elsewhere`."""
        self._listener.close()

    def close(self) -> None:
        """Say goodbye, and wait until the other nodes have ended what was left there."""
        self.refuse()
        deadline = Deadline.after(SHUTDOWN_TIMEOUT)
        with selectors.DefaultSelector() as selector:
            for channel in self._channels.values():
                channel.post(Shutdown())
                channel.finish_sending()
                if not channel.lost:
                    selector.register(channel, selectors.EVENT_READ, channel)
            while selector.get_map() and not deadline.expired:
                for key, _ in selector.select(deadline.remaining):
                    channel = key.data
                    channel.poll()
                    if channel.lost:
                        selector.unregister(channel)
        left = [node for node, channel in self._channels.items() if not channel.lost]
        if left:
            _LOG.warning("did not confirm shutdown within %g s: %s", SHUTDOWN_TIMEOUT, ", ".join(left))
        for channel in self._channels.values():
            channel.close()
        self._channels = {}
        for connected in self._ranks.values():
            if connected is not None:
                connected.close()
        self._ranks = {}

    def __enter__(self) -> OtherNodes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- connections ------------------------------------------------------------------------------------------

    def _welcome(self, purpose: ConnectionInfo, connected: socket.socket) -> None:
        assert self._selector is not None
        if purpose.rank is not None:
            self._ranks[purpose.rank] = connected
            _LOG.info("node %s has connected policy-%d", purpose.node, purpose.rank)
            return
        self._known.add(purpose.node)
        channel = self._channels[purpose.node] = MessageChannel(connected, purpose.node)
        self._selector.register(channel, selectors.EVENT_READ, lambda: self._hear(purpose.node, channel))
        _LOG.info("node %s has connected", purpose.node)

    def _refusal(self, purpose: ConnectionInfo) -> str:
        """Why a connection for `purpose` is not wanted, or nothing."""
        if purpose.attempt != self._attempt:
            return f"it is from attempt {purpose.attempt}, and this one is {self._attempt}"
        if purpose.rank is not None:
            placed = self._placed.get(f"{Role.POLICY.value}-{purpose.rank}")
            wanted = placed is not None and placed.node == purpose.node and purpose.rank in self._ranks
            return "" if wanted and self._ranks[purpose.rank] is None else f"no rank {purpose.rank} is missing"
        if purpose.node not in {each.node for each in self._placed.values()}:
            return f"no replica runs on node {purpose.node}"
        return f"node {purpose.node} has been here before" if purpose.node in self._known else ""

    def _hear(self, node: str, channel: MessageChannel) -> None:
        for said in channel.poll():
            if isinstance(said, ReplicasStarted):
                for name, pid in said.pids.items():
                    if name in self._placed and self._placed[name].node == node:
                        log = self._folder.logs / f"{name}.log"
                        self._replicas[name] = RemoteReplica(self._placed[name], pid, log, channel)
            elif isinstance(said, ReplicasRunning):
                for name in said.names:
                    if name in self._replicas and self._placed[name].node == node:
                        self._replicas[name].seen()
            elif isinstance(said, ReplicaEnded) and said.name in self._replicas:
                self._replicas[said.name].ended(said)
        if channel.lost:
            self._lose(node)

    def _lose(self, node: str) -> None:
        """A node is gone."""
        assert self._selector is not None
        channel = self._channels.pop(node)
        self._selector.unregister(channel)
        channel.close()
        _LOG.info("node %s is gone", node)
        for name, replica in self._replicas.items():
            if self._placed[name].node == node:
                replica.lost()


# --- head --------------------------------------------------------------------------------------------------------


def run_head(task: Task) -> int:
    """Run one attempt of a job to its end; returns the exit code.

    Raises:
        ConfigError: before anything was started.
    """
    log_to_stderr("head", logging.WARNING)
    if task.node != task.nodes[0]:
        raise ConfigError(NODE_VARIABLE, task.node, f"the first of the job's nodes, which is {task.nodes[0]}")
    config = attempt_config(task.plan)
    # A job on one node needs nobody to reach it.
    alone = len(task.nodes) == 1 and task.plan.interface is None
    interface = Interface("lo", LOOPBACK) if alone else choose_interface(task.plan.interface)
    if len(task.nodes) > 1:
        check_between_nodes(config, interface)
    with ExitStack() as opened:
        inbox = opened.enter_context(SignalInbox())
        title = f"dray: job {config.job.name}"
        display = opened.enter_context(Display(title, config.job.max_steps, timestamps=True))
        folder, state = opened.enter_context(open_output(config, resume=None, attempt=task.name))
        site = _site(task, config, folder, interface, opened)
        if state is not None and not state.outcome:
            display.say(resume_line(folder, state))
        display.say(f"node {task.node}, at {interface.address} on {interface.name}: attempt {task.name}")
        if state is None or not state.outcome:
            adopt_orphans()
            draft, file = JobDraft(config), task.plan.job_file
            signals = check_entry_points(draft, file, folder.run, inbox, say=display.say)
            if signals:
                ending = stopped_early(folder, config.job.name, signals)
                display.say(ending.reason)
                return ending.exit_code
        return supervise(config, task.plan.job_file, site, state, inbox, display)


def attempt_config(plan: Plan) -> JobConfig:
    """The configuration of the job in an attempt."""
    config = plan.config
    # A group of several nodes begins again in another attempt.
    restarts = config.policy.restarts if plan.policy.nodes == 1 else 0
    return config.model_copy(
        update={
            "job": config.job.model_copy(update={"output": str(plan.run_folder)}),
            "policy": config.policy.model_copy(update={"restarts": restarts}),
        }
    )


def check_between_nodes(config: JobConfig, interface: Interface) -> None:
    """Make sure that the configuration is one for several nodes.

    Raises:
        ConfigError: the lane, or a configured Redis server, is for one machine only.
    """
    lane = LANES.get(config.job.lane)
    if lane is not None and lane.local and config.job.payload_transfer == "ucxx":
        between = ", ".join(each.name for each in LANES.values() if not each.local)
        raise ConfigError("job.lane", lane.name, f'a lane between nodes: "auto" or one of {between}')
    if config.redis.url is None:
        return
    address = RedisAddress(config.redis.url)
    host = address.options().get("host")
    if host is None or (is_loopback(host) and not interface.is_loopback):
        raise ConfigError("redis.url", str(address), "the address of a server that every node of the job reaches")


def _site(task: Task, config: JobConfig, folder: JobFolder, interface: Interface, opened: ExitStack) -> Site:
    placed = placements(task.plan, task.nodes)
    here = {each.name: each for each in placed if each.node == task.node}
    away = [each for each in placed if each.node != task.node]
    elsewhere: Elsewhere = Nowhere()
    if away:
        silence = config.controller.dead_after
        elsewhere = opened.enter_context(
            OtherNodes(folder, task.name, task.plan.secret, away, interface.address, silence)
        )
    rollouts = [each.index for each in here.values() if each.role is Role.ROLLOUT]
    variables = {name: environment(each, interface, os.environ) for name, each in here.items()}
    return Site(
        folder=folder,
        host=interface.address,
        ranks=len(here) - len(rollouts),
        rollouts=range(len(rollouts)),
        redis_host=interface.address if away else None,
        secret=task.plan.secret,
        token=chosen_token(config),
        environment=variables.__getitem__,
        elsewhere=elsewhere,
    )


def main() -> int:
    """See the module."""
    return run_task(run_head, failed=ExitCode.FAILED)


if __name__ == "__main__":
    sys.exit(main())
