"""The process on the first node of a job: its supervisor, with controller, Redis and the replicas of its node.

``python -m dray.jobs.slurm.head PLAN PART ATTEMPT``

It is what `dray run` is on one machine, and resumes from the checkpoint in the run's folder if there is one. Its
exit codes are the same. SIGUSR2 means that the time limit is near: it ends the job as SIGTERM does, with a code of
its own.
"""

from __future__ import annotations

import logging
import os
import select
import selectors
import signal
import socket
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from dray.clock import MONOTONIC, Deadline
from dray.errors import ConfigError
from dray.files import write_json
from dray.jobs.config import JobConfig
from dray.jobs.exit_codes import ExitCode
from dray.jobs.folder import JobFolder, JobSpec
from dray.jobs.job_file import JobDraft
from dray.jobs.launch.display import Display
from dray.jobs.launch.output import open_output, resume_line
from dray.jobs.launch.preparation import check_entry_points
from dray.jobs.launch.processes import EndRequest, HostListener, JobPlacement, JobProcess, replica_name
from dray.jobs.launch.shutdown import stopped_early
from dray.jobs.launch.supervisor import supervise
from dray.jobs.messages.auth import ConnectionInfo, NodeListener
from dray.jobs.messages.channel import MessageChannel
from dray.jobs.messages.models import (
    ChannelMessage,
    HeadAddress,
    HeirFigures,
    KillReplica,
    ReplicaEnded,
    ReplicasRunning,
    ReplicaStarted,
    Role,
    SendSignal,
    Shutdown,
    StartReplica,
)
from dray.jobs.process import LOOPBACK, SignalInbox, adopt_orphans, log_to_stderr
from dray.jobs.queue import RedisAddress
from dray.jobs.slurm.placement import Interface, Placement, boot_id, choose_interface, environment, placements
from dray.jobs.slurm.plan import NODE_VARIABLE, Plan, Task, run_task
from dray.name_resolution import is_loopback
from dray.resources import Closing
from dray.transport.lanes import LANES

_LOG = logging.getLogger("dray.jobs.slurm.head")

# --- the other nodes ---------------------------------------------------------------------------------------------


class RemoteReplica(JobProcess):
    """A replica on another node.

    Attributes:
        reported_code: the exit code that its node has reported.
    """

    def __init__(self, name: str, role: Role, pid: int, log: Path, host: RemoteHost) -> None:
        self.name = name
        self.role = role
        self.pid = pid
        self.log = log
        self.exit_code: int | None = None
        self.reported_code: int | None = None
        self._host = host
        self._reason = ""
        self.note_running()

    @property
    def ending(self) -> str:
        return self._reason or super().ending

    def signal(self, number: signal.Signals) -> None:
        if self.reported_code is None:
            self._host.post(SendSignal(name=self.name, number=number))

    def kill_group(self) -> None:
        if self.reported_code is None:
            self._host.post(KillReplica(name=self.name))

    def note_running(self) -> None:
        self._seen = MONOTONIC.now()

    def note_end(self, report: ReplicaEnded) -> None:
        if self.reported_code is not None:
            return
        self.reported_code = report.code
        if report.request:
            number = signal.Signals(report.request)
            if EndRequest(number, "").explains(report.code):
                self._reason = f"its node {self._host.node} was asked to end and sent it {number.name}"

    def note_lost(self) -> None:
        """Its node is gone, and the process with it, or about to be."""
        if self.reported_code is None:
            self.reported_code, self._reason = -signal.SIGKILL, f"its node {self._host.node} is gone"


class RemoteHost:
    """A node beside the head's, behind a message channel: a `dray.jobs.launch.processes.Host`.

    Args:
        logs: folder with the logs of its replicas.

    Attributes:
        connected: whether the node has connected; it does so once.
        heirs: what its agent has inherited, as it has reported last.
    """

    def __init__(self, node: str, logs: Path) -> None:
        self.node = node
        self.connected = False
        self.heirs = HeirFigures()
        self._logs = logs
        self._roles: dict[str, Role] = {}
        self._replicas: dict[str, RemoteReplica] = {}
        self._channel: MessageChannel | None = None

    @property
    def processes(self) -> Sequence[JobProcess]:
        return list(self._replicas.values())

    def start(self, role: Role, index: int) -> None:
        name = replica_name(role, index)
        self._roles[name] = role
        self.post(StartReplica(name=name))

    def attach(self, channel: MessageChannel, selector: selectors.BaseSelector) -> None:
        """The node has connected."""
        self.connected, self._channel, self._selector = True, channel, selector
        selector.register(channel, selectors.EVENT_READ, self._receive)
        for name in self._roles:
            channel.post(StartReplica(name=name))

    @property
    def lost(self) -> bool:
        return self.connected and self._channel is None

    def post(self, message: ChannelMessage) -> None:
        """Send the node a message if it is connected."""
        if self._channel is not None:
            self._channel.post(message)

    def collect(self) -> Iterator[JobProcess]:
        if self._channel is not None and self._channel.lost:
            self._receive()
        for replica in list(self._replicas.values()):
            if replica.running and replica.reported_code is not None:
                replica.exit_code = replica.reported_code
                yield replica

    def request_shutdown(self) -> None:
        if self._channel is not None:
            self._channel.post(Shutdown())
            self._channel.finish_sending()

    def close(self, deadline: Deadline) -> None:
        if self._channel is None:
            return
        # The node confirms the shutdown by closing its connection.
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        self._receive_messages(self._channel)
        while not self._channel.lost and not deadline.expired:
            poll.poll(1000 * deadline.remaining)
            self._receive_messages(self._channel)
        if not self._channel.lost:
            _LOG.warning("node %s did not confirm shutdown within %.1f s", self.node, deadline.elapsed)
        self._detach()

    def _receive(self) -> None:
        assert self._channel is not None
        self._receive_messages(self._channel)
        if self._channel.lost:
            _LOG.info("node %s is gone", self.node)
            self._detach()
            for replica in self._replicas.values():
                replica.note_lost()

    def _receive_messages(self, channel: MessageChannel) -> None:
        for message in channel.poll():
            match message:
                case ReplicaStarted(name=name) if name in self._roles:
                    log = self._logs / f"{name}.log"
                    self._replicas[name] = RemoteReplica(name, self._roles[name], message.pid, log, self)
                case ReplicasRunning(names=names):
                    for name in names:
                        if name in self._replicas:
                            self._replicas[name].note_running()
                case ReplicaEnded(name=name) if name in self._replicas:
                    self._replicas[name].note_end(message)
                case HeirFigures():
                    self.heirs = message
                case _:  # a replica that is not placed there
                    _LOG.warning("node %s sent a message of no use: %r", self.node, message.what)

    def _detach(self) -> None:
        assert self._channel is not None
        self._selector.unregister(self._channel)
        self._channel.close()
        self._channel = None


class NodeConnections(HostListener, Closing):
    """Where the other nodes connect.

    Args:
        attempt: the name of the attempt, which connections must show.
        placed: the replicas on other nodes.
        address: the head's address.
        silence: seconds without an answer after which another machine counts as gone.

    Attributes:
        hosts: the other nodes, by name.
    """

    def __init__(
        self,
        folder: JobFolder,
        attempt: str,
        secret: bytes,
        placed: Iterable[Placement],
        address: str,
        silence: float,
    ) -> None:
        self._folder = folder
        self._attempt = attempt
        placed = list(placed)
        self.hosts = {each.node: RemoteHost(each.node, folder.logs) for each in placed}
        self._rank_nodes = {each.index: each.node for each in placed if each.role is Role.POLICY}
        self._ranks: dict[int, socket.socket] = {}
        self._selector: selectors.BaseSelector
        self._listener = NodeListener(address, secret, silence, self._reason_to_reject, self._on_accepted)

    def open(self, selector: selectors.BaseSelector, spec: JobSpec) -> None:
        """Listen, and write the address to a file of the job's folder, where the other nodes look for it."""
        self._selector = selector
        host, port = self._listener.open(selector)
        address = HeadAddress(host=host, port=port, attempt=self._attempt, job_id=spec.job_id, boot_id=boot_id())
        write_json(self._folder.head_address, address.model_dump(), mode=0o600)

    def apply_timeouts(self) -> None:
        self._listener.apply_timeouts()

    def rank_connections(self) -> list[socket.socket] | None:
        if len(self._ranks) < len(self._rank_nodes):
            return None
        found = [self._ranks[rank] for rank in sorted(self._ranks)]
        self._ranks, self._rank_nodes = {}, {}
        return found

    def stop_accepting(self) -> None:
        self._listener.close()

    def heir_figures(self) -> list[HeirFigures]:
        return [each.heirs for each in self.hosts.values()]

    def close(self) -> None:
        self._listener.close()
        # Those of ranks that were not handed on.
        for connected in self._ranks.values():
            connected.close()
        self._ranks = {}

    def _on_accepted(self, purpose: ConnectionInfo, connected: socket.socket) -> None:
        if purpose.rank is not None:
            self._ranks[purpose.rank] = connected
            _LOG.info("node %s has connected policy-%d", purpose.node, purpose.rank)
        else:
            channel = MessageChannel(connected, f"node {purpose.node}")
            self.hosts[purpose.node].attach(channel, self._selector)
            _LOG.info("node %s has connected", purpose.node)

    def _reason_to_reject(self, purpose: ConnectionInfo) -> str:
        if purpose.attempt != self._attempt:
            return f"it is from attempt {purpose.attempt}, and this one is {self._attempt}"
        if purpose.rank is not None:
            wanted = self._rank_nodes.get(purpose.rank) == purpose.node and purpose.rank not in self._ranks
            return "" if wanted else f"no rank {purpose.rank} is missing"
        if purpose.node not in self.hosts:
            return f"no replica runs on node {purpose.node}"
        return f"node {purpose.node} has connected before" if self.hosts[purpose.node].connected else ""


# --- head --------------------------------------------------------------------------------------------------------


def run_head(task: Task) -> int:
    """Run one attempt of a job to its end; returns the exit code.

    Raises:
        ConfigError: before anything was started.
    """
    log_to_stderr("head", logging.WARNING)
    if task.node != task.nodes[0]:
        raise ConfigError(NODE_VARIABLE, task.node, f"the first of the job's nodes, which is {task.nodes[0]}")
    config = _attempt_config(task.plan)
    # A job on one node is reached from that node only.
    alone = len(task.nodes) == 1 and task.plan.table.interface is None
    interface = Interface("lo", LOOPBACK) if alone else choose_interface(task.plan.table.interface)
    if len(task.nodes) > 1:
        _check_between_nodes(config, interface)
    with ExitStack() as opened:
        inbox = opened.enter_context(SignalInbox())
        title = f"dray: job {config.job.name}"
        display = opened.enter_context(Display(title, config.job.max_steps, timestamps=True))
        folder, state = opened.enter_context(open_output(config, resume=None, attempt=task.name))
        placement = _placement(task, config, folder, interface, opened)
        if state is not None and not state.outcome:
            display.show_line(resume_line(folder, state))
        display.show_line(f"node {task.node}, at {interface.address} on {interface.name}: attempt {task.name}")
        if state is None or not state.outcome:
            adopt_orphans()
            draft, file = JobDraft(config), task.plan.job_file
            signals = check_entry_points(draft, file, folder.run, inbox, show_line=display.show_line)
            if signals:
                return stopped_early(folder, signals, display.show_line)
        return supervise(config, task.plan.job_file, placement, state, inbox, display)


def _attempt_config(plan: Plan) -> JobConfig:
    job = plan.config.job.model_copy(update={"output": str(plan.run_folder)})
    policy = plan.config.policy
    if plan.table.policy_nodes > 1:  # a group of several nodes begins again in another attempt
        policy = policy.model_copy(update={"restarts": 0})
    return plan.config.model_copy(update={"job": job, "policy": policy})


def _check_between_nodes(config: JobConfig, interface: Interface) -> None:
    """Raise `ConfigError` if the lane, or a configured Redis server, is for one machine only."""
    lane = LANES.get(config.job.lane)
    if lane is not None and lane.local and config.job.transfer == "reference":
        between = ", ".join(each.name for each in LANES.values() if not each.local)
        raise ConfigError("job.lane", lane.name, f'a lane between nodes: "auto" or one of {between}')
    if config.redis.url is None:
        return
    address = RedisAddress(config.redis.url)
    host = address.options().get("host")
    if host is None or (is_loopback(host) and not interface.is_loopback):
        raise ConfigError("redis.url", str(address), "the address of a server that every node of the job reaches")


def _placement(
    task: Task, config: JobConfig, folder: JobFolder, interface: Interface, opened: ExitStack
) -> JobPlacement:
    secret, address = task.plan.secret, interface.address
    placed = placements(task.plan.config, task.nodes)
    here = {each.name: each for each in placed if each.node == task.node}
    away = [each for each in placed if each.node != task.node]
    nodes = None
    if away:
        connections = NodeConnections(folder, task.name, secret, away, address, config.controller.dead_after)
        nodes = opened.enter_context(connections)
    rollouts = [each.index for each in here.values() if each.role is Role.ROLLOUT]
    variables = {name: environment(each, interface, os.environ) for name, each in here.items()}
    return JobPlacement(
        folder=folder,
        address=address,
        ranks=len(here) - len(rollouts),
        rollouts=range(len(rollouts)),
        redis_host=None if nodes is None else address,
        remote=[] if nodes is None else [(nodes.hosts[each.node], each.role, each.index) for each in away],
        listener=nodes or HostListener(),
        secret=secret,
        environment=variables.__getitem__,
    )


def main() -> int:
    """See the module."""
    return run_task(run_head, failed=ExitCode.FAILED)


if __name__ == "__main__":
    sys.exit(main())
