"""The agent of a node beside the head's: starts the replicas of its node and ends them, on the head's commands.

``python -m dray.jobs.slurm.node PLAN PART ATTEMPT``

Nothing outlives its owner: when the head is gone, or a signal comes, the replicas are asked to end, and killed if
they do not within `timeouts.shutdown`; when this process is killed, the kernel notifies them.
"""

from __future__ import annotations

import logging
import math
import os
import selectors
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from dray.clock import Deadline, retry_pauses
from dray.errors import ConfigError, ControlPlaneError, TransportError
from dray.files import make_own_folders, read_private_file
from dray.jobs.exit_codes import ExitCode, meaning
from dray.jobs.folder import JobFolder, JobSpec
from dray.jobs.launch.heirs import rollout_heir
from dray.jobs.launch.output import KEY
from dray.jobs.launch.process_supervisor import ProcessSupervisor
from dray.jobs.launch.processes import JobProcess, LocalHost
from dray.jobs.launch.shutdown import KillStage, ShutdownEscalation
from dray.jobs.messages.auth import ConnectionInfo, connect
from dray.jobs.messages.channel import GroupLostError, MessageChannel
from dray.jobs.messages.models import (
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
from dray.jobs.process import SignalInbox, is_running, log_to_stderr, set_log_level
from dray.jobs.slurm.placement import Placement, boot_id, choose_interface, environment, placements
from dray.jobs.slurm.plan import Task, run_task
from dray.name_resolution import is_loopback

REPORT_INTERVAL = 1.0
"""Seconds between two reports to the head of which replicas run."""

_LOG = logging.getLogger("dray.jobs.slurm.node")


def read_head_address(path: Path, attempt: str) -> HeadAddress | None:
    """Where the head of this `attempt` listens, if it has written that.

    Raises:
        ConfigError: another user may have written it, or it is the loopback of another machine.
    """
    try:
        list(path.parent.iterdir())  # NFS may take a file for missing until its folder was listed
        found = HeadAddress.model_validate_json(read_private_file(path, "the head's address"))
    except (OSError, ValidationError):  # not yet, or no more, or of another version
        return None
    if found.attempt != attempt:
        return None
    if is_loopback(found.host) and found.boot_id != boot_id():
        allowed = "an interface that nodes reach each other by: the head listens on its own loopback"
        raise ConfigError("slurm.interface", found.host, allowed)
    return found


class NodeAgent(ProcessSupervisor):
    """Starts the replicas of a node on the head's commands, and ends them when the job ends or the head is gone.

    Args:
        placed: the replicas of this node.
        host: this machine.
        heir_figures: returns what the heir of its rollout replicas has inherited.
    """

    def __init__(
        self,
        task: Task,
        placed: Sequence[Placement],
        host: LocalHost,
        heir_figures: Callable[[], HeirFigures],
        *,
        selector: selectors.BaseSelector,
        inbox: SignalInbox,
    ) -> None:
        super().__init__(inbox, selector, [host], _LOG.error)
        self._task = task
        self._placed = {each.name: each for each in placed}
        self._host = host
        self._heir_figures = heir_figures
        self._heir_reported = HeirFigures()
        self._timeouts = task.plan.config.timeouts
        self._silence = task.plan.config.controller.dead_after
        self._folder = JobFolder(task.plan.run_folder, task.name)
        self._next_report = Deadline.after(0)
        self._dismissed = False

    def run(self) -> int:
        """Run until the head ends the job, or is gone, or a signal comes; returns the exit code.

        Raises:
            DrayError: the head cannot be found or reached.
        """
        found = self._connect_to_head()
        if found is None:
            return 128 + self.signals[0]
        self._address, connected = found
        with MessageChannel(connected, "the head") as self._channel:
            try:
                self._check_spec()
                self._selector.register(self._channel, selectors.EVENT_READ, self._receive)
                self.watch()
            finally:
                # The end of the connection confirms to the head that nothing is left here. Until then the head
                # reads, also after it has sent its last.
                self._host.close(Deadline.after(0))
                with suppress(GroupLostError):
                    self._report_heir()
        if self.signals:
            return 128 + self.signals[0]
        if self._dismissed:
            return ExitCode.OK
        _LOG.error("the head is gone")
        return ExitCode.CONTROLLER_LOST

    # --- start ------------------------------------------------------------------------------------------------

    def _connect_to_head(self) -> tuple[HeadAddress, socket.socket] | None:
        """The head's address and a connection to it; None when a signal came.

        Raises:
            ControlPlaneError: there was no head in time; see also `read_head_address` and `connect`.
        """
        # The head imports the user's classes before it listens; it has `timeouts.start` for that.
        deadline = Deadline.after(2 * self._timeouts.start)
        why: TransportError | None = None
        pauses = retry_pauses()
        while not deadline.expired:
            # A file system that nodes share reports no new files.
            address = read_head_address(self._folder.head_address, self._task.name)
            if address is not None:
                try:
                    return address, self._connect(address, None, deadline)
                except TransportError as error:  # the network may come up while tasks start
                    why = error
            elif why is not None:
                break  # it has taken its address back
            self._wait(min(next(pauses), deadline.remaining))
            if self.signals:
                return None
        what = f"it has not written {self._folder.head_address}" if why is None else str(why)
        raise ControlPlaneError(f"there is no head: {what}", elapsed=deadline.elapsed)

    def _connect(self, address: HeadAddress, rank: int | None, deadline: Deadline) -> socket.socket:
        purpose = ConnectionInfo(node=self._task.node, attempt=self._task.name, rank=rank)
        bound = deadline.capped_at(self._timeouts.http)
        return connect((address.host, address.port), self._task.plan.secret, purpose, bound, self._silence)

    def _check_spec(self) -> None:
        """Raise `ControlPlaneError` unless the description of the job is the head's; make the folder of logs."""
        try:
            spec = JobSpec.read(self._folder.spec)
        except OSError as error:
            raise ControlPlaneError(f"the head has taken {self._folder.spec} back: {error.strerror}") from error
        if spec.job_id != self._address.job_id:
            raise ControlPlaneError(f"{self._folder.spec} is of another attempt than the head's address")
        make_own_folders(self._folder.root, self._folder.logs, KEY)

    def _start(self, placed: Placement) -> None:
        """Start a replica and report its pid; a rank of the policy gets a connection to the head."""
        if placed.role is Role.ROLLOUT:
            child = self._host.start(placed.role, placed.index)
        else:
            with self._connect(self._address, placed.index, Deadline.after(self._timeouts.http)) as channel:
                child = self._host.start(placed.role, placed.index, connections=[channel])
        self._channel.post(ReplicaStarted(name=child.name, pid=child.pid))
        _LOG.info("started %s (pid %d)", child.name, child.pid)

    # --- watch ------------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        running = {each.name: each for each in self._host.processes if each.running}
        for message in self._channel.poll():
            match message:
                case StartReplica(name=name) if name in self._placed and not self._is_ending:
                    self._start(self._placed[name])
                    running = {each.name: each for each in self._host.processes if each.running}
                case SendSignal(name=name, number=number) if name in running:
                    running[name].signal(signal.Signals(number))
                case KillReplica(name=name) if name in running:
                    running[name].kill_group()
                case Shutdown():
                    self._dismissed = True
                case _:  # about a replica that has ended meanwhile
                    _LOG.info("nothing to do for %r", message)
        if self._channel.lost:
            self._selector.unregister(self._channel)

    @property
    def _job_has_ended(self) -> bool:
        return bool(self.signals) or self._dismissed or self._channel.lost

    def _is_needed(self) -> bool:
        return not self._job_has_ended or any(each.running for each in self.processes)

    def _seconds_to_next(self) -> float:
        return math.inf if self._channel.lost else self._next_report.remaining

    def _react(self) -> None:
        if not self._channel.lost and self._next_report.expired:
            # Those that are stopped do not run.
            self._next_report = Deadline.after(min(REPORT_INTERVAL, self._silence / 6))
            names = [each.name for each in self._host.processes if each.running and is_running(each.pid)]
            self._channel.post(ReplicasRunning(names=names))
            with suppress(GroupLostError):  # the end of the connection is noticed elsewhere
                self._report_heir()
        if self._job_has_ended and not self._is_ending:
            self._end()

    def _report_heir(self) -> None:
        """Report what was inherited, if that has changed."""
        if (figures := self._heir_figures()) != self._heir_reported:
            self._channel.send(figures)
            self._heir_reported = figures

    def _on_end(self, process: JobProcess) -> None:
        code = process.exit_code
        assert code is not None
        _LOG.info("%s ended with code %d (%s)", process.name, code, meaning(code))
        request = self.requests.get(process)
        number = 0 if request is None else request.number
        self._channel.post(ReplicaEnded(name=process.name, code=code, request=number))

    def _end(self) -> None:
        """Begin to end what is there: at once when the job has ended, else with time to end in order."""
        running = [child.name for child in self.processes if child.running]
        waiting = f"waiting for {', '.join(running)}" if running else "nothing runs"
        _LOG.info("ending: %s; %s", self._why_it_ends(KillStage.TERMINATE), waiting)
        escalation = ShutdownEscalation(self._timeouts.shutdown, at_once=True)
        if self._dismissed:
            escalation.hurry()
        self._escalations = [(lambda: self._host.processes, escalation)]

    def _why_it_ends(self, stage: KillStage) -> str:
        if self.signals:
            return f"the node received {self.signals[0].name}"
        return "the job has ended" if self._dismissed else "the head is gone"


def run_node(task: Task) -> int:
    """Carry out the head's commands for one node until the attempt has ended; returns the exit code.

    Raises:
        DrayError: the head cannot be found or reached.
    """
    log_to_stderr(f"node {task.node}", logging.INFO)
    set_log_level(task.plan.config.job.log_level)
    placed = [each for each in placements(task.plan.config, task.nodes) if each.node == task.node]
    if not placed:
        _LOG.info("no replica has its process on node %s", task.node)
        return ExitCode.OK
    interface = choose_interface(task.plan.table.interface)
    _LOG.info("at %s on %s", interface.address, interface.name)
    variables = {each.name: environment(each, interface, os.environ) for each in placed}
    folder = JobFolder(task.plan.run_folder, task.name)
    with (
        SignalInbox() as inbox,
        selectors.DefaultSelector() as selector,
        rollout_heir(task.plan.config, _LOG.warning) as heir,
    ):
        host = LocalHost(folder, lambda name: {**variables[name], **heir.variables}, selector, _LOG.info)
        return NodeAgent(task, placed, host, heir.figures, selector=selector, inbox=inbox).run()


def main() -> int:
    """See the module."""
    return run_task(run_node, failed=ExitCode.CONTROLLER_LOST)


if __name__ == "__main__":
    sys.exit(main())
