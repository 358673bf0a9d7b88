"""The process on a node beside the head's: starts the replicas of its node, and does with them what the head says.

``python -m dray.jobs.slurm.node PLAN PART ATTEMPT``

Nothing outlives its owner: when the head is gone, or a signal comes, the replicas are asked to end, and killed if
they do not within `timeouts.shutdown`; when this process is killed, the kernel tells them.
"""

from __future__ import annotations

import json
import logging
import math
import os
import selectors
import signal
import socket
import sys
from contextlib import ExitStack
from pathlib import Path

from dray.clock import Deadline
from dray.errors import ConfigError, ControlPlaneError, TransportError
from dray.jobs.exit_codes import ExitCode, meaning
from dray.jobs.files import make_own_folders, read_private_file
from dray.jobs.folder import JobFolder, JobSpec
from dray.jobs.launch.output import KEY
from dray.jobs.launch.processes import Child, start_rank, start_rollout
from dray.jobs.launch.shutdown import KillStage, ShutdownEscalation
from dray.jobs.messages.auth import ConnectionInfo, connect
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
from dray.jobs.process import (
    DUMP_SIGNAL,
    SignalInbox,
    adopt_orphans,
    child_pids,
    is_running,
    kill_orphans,
    log_to_stderr,
    set_log_level,
)
from dray.jobs.slurm.network import Interface, boot_id, choose_interface
from dray.jobs.slurm.placement import Placement, environment, placements
from dray.jobs.slurm.plan import Task, run_task
from dray.name_resolution import is_loopback

LOOK_INTERVAL = 0.25
"""Seconds between two looks for the head's address: a file system that nodes share tells nobody that one came."""

ALIVE_INTERVAL = 1.0
"""Seconds between two reports to the head of which replicas run."""

_LOG = logging.getLogger("dray.jobs.slurm.node")


class _HeadAddress:
    """Where the head listens, as it has written it into the job's folder."""

    def __init__(self, document: dict[str, object]) -> None:
        self.host = str(document["host"])
        self.port = int(str(document["port"]))
        self.attempt = document["attempt"]
        self.job_id = document["job_id"]
        self.boot_id = document["boot_id"]

    @classmethod
    def read(cls, path: Path, attempt: str) -> _HeadAddress | None:
        """The address of the head of this `attempt`, if it is there.

        Raises:
            ConfigError: another user may have written it.
        """
        try:
            list(path.parent.iterdir())  # NFS may take a file for missing until its folder was looked at
            found = cls(json.loads(read_private_file(path, "the head's address")))
        except ConfigError:
            raise
        except (OSError, ValueError, KeyError):  # not yet, or no more, or of another version
            return None
        return found if found.attempt == attempt else None

    def check(self) -> None:
        """Make sure that this machine reaches the address.

        Raises:
            ConfigError: it is loopback, and that of another machine.
        """
        if is_loopback(self.host) and self.boot_id != boot_id():
            allowed = "an interface that nodes reach each other by: the head listens on its own loopback"
            raise ConfigError("slurm.interface", self.host, allowed)


class NodeSupervisor:
    """See the module. To be used in the main thread."""

    def __init__(self, task: Task, inbox: SignalInbox) -> None:
        self._task = task
        self._inbox = inbox
        self._timeouts = task.plan.config.timeouts
        self._silence = task.plan.config.controller.dead_after
        self._folder = JobFolder(task.plan.run_folder, task.name)
        self._placed = [each for each in placements(task.plan, task.nodes) if each.node == task.node]
        self._signals: list[signal.Signals] = []
        self._children: dict[str, Child] = {}
        self._asked: dict[str, signal.Signals] = {}
        self._teardown: ShutdownEscalation | None = None
        self._next_report = Deadline.after(0)
        self._dismissed = False

    def run(self) -> int:
        """Run until the head says goodbye, or is gone, or a signal comes; returns the exit code.

        Raises:
            DrayError: the head cannot be found or reached.
        """
        if not self._placed:
            _LOG.info("no replica has its process on node %s", self._task.node)
            return ExitCode.OK
        strangers = child_pids()
        adopt_orphans()
        with selectors.DefaultSelector() as selector, ExitStack() as resources:
            self._selector = selector
            interface = choose_interface(self._task.plan.interface)
            selector.register(self._inbox, selectors.EVENT_READ)
            found = self._connect_to_head()
            if found is None:
                return 128 + self._signals[0]
            address, connected = found
            self._channel = MessageChannel(connected, "the head")
            resources.callback(self._channel.close)
            resources.callback(kill_orphans, strangers, 1.0)
            resources.callback(self._kill_rest)
            self._strangers = strangers
            self._start(address, interface)
            self._watch()
        if self._signals:
            return 128 + self._signals[0]
        if self._dismissed:
            return ExitCode.OK
        _LOG.error("the head is gone")
        return ExitCode.CONTROLLER_LOST

    # --- start ------------------------------------------------------------------------------------------------

    def _connect_to_head(self) -> tuple[_HeadAddress, socket.socket] | None:
        """The head's address and a connection to it; None when a signal came.

        Raises:
            ConfigError: the address is one that this node does not reach.
            AuthenticationError: who listens there does not know the secret.
            ControlPlaneError: there was no head in time.
        """
        # The head imports the user's classes before it listens; it has `timeouts.start` for that.
        deadline = Deadline.after(2 * self._timeouts.start)
        why: TransportError | None = None
        while not deadline.expired:
            address = _HeadAddress.read(self._folder.head_address, self._task.name)
            if address is not None:
                address.check()
                try:
                    return address, self._connect(address, None, deadline)
                except TransportError as error:  # the network may come up while tasks start
                    why = error
            elif why is not None:
                break  # it has taken its address back
            self._wait(min(LOOK_INTERVAL, deadline.remaining))
            if self._signals:
                return None
        what = f"it has not written {self._folder.head_address}" if why is None else str(why)
        raise ControlPlaneError(f"there is no head: {what}", elapsed=deadline.elapsed)

    def _connect(self, address: _HeadAddress, rank: int | None, deadline: Deadline) -> socket.socket:
        purpose = ConnectionInfo(node=self._task.node, attempt=self._task.name, rank=rank)
        bound = deadline.capped_at(self._timeouts.http)
        return connect((address.host, address.port), self._task.plan.secret, purpose, bound, self._silence)

    def _start(self, address: _HeadAddress, interface: Interface) -> None:
        """Start the replicas and tell the head.

        Raises:
            ConfigError: the node does not have what the plan says.
            DrayError: a rank of the policy gets no connection.
        """
        try:
            spec = JobSpec.read(self._folder.spec)
        except OSError as error:
            raise ControlPlaneError(f"the head has taken {self._folder.spec} back: {error.strerror}") from error
        if spec.job_id != address.job_id:
            raise ControlPlaneError(f"{self._folder.spec} is of another attempt than the head's address")
        make_own_folders(self._folder.root, self._folder.logs, KEY)
        places = {each.name: environment(each, interface, os.environ) for each in self._placed}
        for placed in self._placed:
            child = self._start_replica(placed, places, address)
            self._children[child.name] = child
            self._selector.register(child.pidfd, selectors.EVENT_READ)
        self._selector.register(self._channel, selectors.EVENT_READ)
        self._hearing = True
        self._channel.post(ReplicasStarted(pids={name: child.pid for name, child in self._children.items()}))
        _LOG.info("started %s, at %s on %s", ", ".join(self._children), interface.address, interface.name)

    def _start_replica(self, placed: Placement, places: dict[str, dict[str, str]], address: _HeadAddress) -> Child:
        if placed.role is Role.ROLLOUT:
            return start_rollout(self._folder, placed.index, places.__getitem__)
        deadline = Deadline.after(self._timeouts.http)
        with self._connect(address, placed.index, deadline) as channel:
            return start_rank(self._folder, placed.index, 0, [channel], places.__getitem__)

    # --- run and end ------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Wait for children, the head and signals, until all children have ended and nobody wants to know more."""
        while any(child.running for child in self._children.values()) or not self._over:
            if self._teardown is not None and self._teardown.is_over:
                left = ", ".join(each.name for each in self._children.values() if each.running)
                _LOG.error("%s did not end although killed", left)
                return
            self._report_alive()
            # When everything was done, a child that was killed is waited for until the teardown is over.
            bound = math.inf if self._teardown is None else min(1.0, self._teardown.seconds_to_next)
            bound = min(bound, self._next_report.remaining)
            self._wait(None if bound == math.inf else bound)
            self._hear()
            for child in self._children.values():
                if child.running and child.collect() is not None:
                    self._ended(child)
            if self._over and self._teardown is None:
                self._end()
            self._apply_due()

    def _report_alive(self) -> None:
        """Tell the head in intervals which replicas run; those that are stopped do not."""
        if not self._next_report.expired:
            return
        if self._channel.lost:
            self._next_report = Deadline.after(None)
            return
        self._next_report = Deadline.after(min(ALIVE_INTERVAL, self._silence / 6))
        names = [child.name for child in self._children.values() if child.running and is_running(child.pid)]
        self._channel.post(ReplicasRunning(names=names))

    @property
    def _over(self) -> bool:
        return bool(self._signals) or self._dismissed or self._channel.lost

    def _wait(self, timeout: float | None) -> None:
        for key, _ in self._selector.select(timeout):
            if key.fileobj is self._inbox:
                self._signals.extend(self._inbox.receive())

    def _hear(self) -> None:
        """Do what the head says."""
        for said in [] if self._channel.lost else self._channel.poll():
            if isinstance(said, SendSignal) and said.name in self._children:
                self._children[said.name].signal(signal.Signals(said.number))
            elif isinstance(said, KillReplica) and said.name in self._children:
                self._children[said.name].kill_group()
            elif isinstance(said, Shutdown):
                self._dismissed = True
        if self._channel.lost and self._hearing:
            self._hearing = False
            self._selector.unregister(self._channel)

    def _ended(self, child: Child) -> None:
        self._selector.unregister(child.pidfd)
        code = child.exit_code
        assert code is not None
        known = self._strangers | {each.pid for each in self._children.values() if each.running}
        killed = kill_orphans(known, 1.0)
        left = f"; {killed} processes that it left behind were killed" if killed else ""
        _LOG.info("%s ended with code %d (%s)%s", child.name, code, meaning(code), left)
        if not self._channel.lost:
            self._channel.post(ReplicaEnded(name=child.name, code=code, request=self._asked.get(child.name, 0)))

    def _end(self) -> None:
        """Begin to end what is there: at once when the job is over, else with time to end in order."""
        why = (
            "the job is over"
            if self._dismissed
            else "the head is gone"
            if self._channel.lost
            else "told by signal"
        )
        running = [child.name for child in self._children.values() if child.running]
        _LOG.info("ends: %s; %s", why, f"waiting for {', '.join(running)}" if running else "nothing runs")
        self._teardown = ShutdownEscalation(self._timeouts.shutdown, at_once=True)
        if self._dismissed:
            self._teardown.hurry()

    def _apply_due(self) -> None:
        if self._teardown is None:
            return
        if len(self._signals) > 1:
            self._teardown.hurry()
        for means in self._teardown.take_due():
            for child in self._children.values():
                if not child.running:
                    continue
                _LOG.info("shutdown: %s: %s", child.name, means.name.lower().replace("_", " "))
                if means is KillStage.DUMP_STACKS:
                    child.signal(DUMP_SIGNAL)
                elif means is KillStage.TERMINATE:
                    self._asked[child.name] = signal.SIGTERM
                    child.signal(signal.SIGTERM)
                else:
                    self._asked[child.name] = signal.SIGKILL
                    child.kill_group()

    def _kill_rest(self) -> None:
        for child in self._children.values():
            if child.running:
                child.kill_group()
                child.collect(5.0)


def run_node(task: Task) -> int:
    """Do for one node what the head says, until the attempt is over; returns the exit code.

    Raises:
        DrayError: the head cannot be found or reached.
    """
    log_to_stderr(f"node {task.node}", logging.INFO)
    set_log_level(task.plan.config.job.log_level)
    with SignalInbox() as inbox:
        return NodeSupervisor(task, inbox).run()


def main() -> int:
    """See the module."""
    return run_task(run_node, failed=ExitCode.CONTROLLER_LOST)


if __name__ == "__main__":
    sys.exit(main())
