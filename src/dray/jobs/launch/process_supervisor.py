"""What the supervisor of a job and the agent of a node have in common: they watch processes, and end them."""

from __future__ import annotations

import abc
import logging
import math
import selectors
import signal
from collections.abc import Callable, Sequence

from dray.jobs.launch.processes import EndRequest, Host, JobProcess
from dray.jobs.launch.shutdown import KillStage, ShutdownEscalation
from dray.jobs.process import DUMP_SIGNAL, SignalInbox

_MAX_WAIT_AT_END = 1.0
_LOG = logging.getLogger("dray.jobs.launch.process_supervisor")


class ProcessSupervisor(abc.ABC):
    """Waits for the ends of processes, signals and connections at once, and ends processes with ever firmer means.

    In the main thread, which never polls: everything that may happen wakes up the selector.

    Args:
        inbox: signals that ask for the end. After the second one, what is left is killed.
        selector: its keys have a function to call as their data, or None if `Host.collect` finds the reason.
        report: logs a line, and shows it where there is a user.

    Attributes:
        signals: those that have come.
        requests: the last one to each process.
    """

    def __init__(
        self,
        inbox: SignalInbox,
        selector: selectors.BaseSelector,
        hosts: Sequence[Host],
        report: Callable[[str], None],
    ) -> None:
        self._report = report
        self._inbox = inbox
        self._selector = selector
        self._hosts = hosts
        self._escalations: list[tuple[Callable[[], Sequence[JobProcess]], ShutdownEscalation]] = []
        self.signals: list[signal.Signals] = []
        self.requests: dict[JobProcess, EndRequest] = {}
        selector.register(inbox, selectors.EVENT_READ, self._receive_signals)

    @property
    def processes(self) -> Sequence[JobProcess]:
        """Those of all hosts."""
        return [process for host in self._hosts for process in host.processes]

    def watch(self) -> None:
        """Return when there is nothing left to watch, or what is left is still alive although it was killed."""
        while self._is_needed():
            if self._is_ending and all(escalation.has_ended for _, escalation in self._escalations):
                left = ", ".join(f"{each.name} (pid {each.pid})" for each in self.processes if each.running)
                self._report(f"{left} is still alive after SIGKILL")
                return
            due = [escalation.seconds_to_next for _, escalation in self._escalations]
            # A process that was killed is waited for until its escalation has ended.
            self._wait(min(self._seconds_to_next(), *due, _MAX_WAIT_AT_END if due else math.inf))
            self._collect()
            self._react()
            if any(escalation.seconds_to_next <= 0 for _, escalation in self._escalations):
                self._collect()  # a reaction may take seconds: what has ended meanwhile is not killed
            self._escalate()

    # --- what each supervisor decides ---------------------------------------------------------------------------

    @abc.abstractmethod
    def _is_needed(self) -> bool:
        """Whether there is something left to watch."""

    @abc.abstractmethod
    def _seconds_to_next(self) -> float:
        """Seconds until `_react` has something to do though nothing has happened."""

    @abc.abstractmethod
    def _on_end(self, process: JobProcess) -> None:
        """A process has ended."""

    @abc.abstractmethod
    def _react(self) -> None:
        """Do what signals, messages and time ask for."""

    @abc.abstractmethod
    def _why_it_ends(self, stage: KillStage) -> str:
        """Why a process gets SIGTERM or SIGKILL; completes "because"."""

    # --- what they have in common --------------------------------------------------------------------------------

    @property
    def _is_ending(self) -> bool:
        return bool(self._escalations)

    def _wait(self, timeout: float) -> None:
        """Wait for something to happen, at most `timeout` seconds."""
        for key, _ in self._selector.select(None if timeout == math.inf else timeout):
            if key.data is not None:
                key.data()

    def _collect(self) -> None:
        for host in self._hosts:
            for process in host.collect():
                self._on_end(process)

    def _receive_signals(self) -> None:
        self.signals += self._inbox.receive()

    def _escalate(self) -> None:
        for processes, escalation in self._escalations:
            if len(self.signals) > 1:
                escalation.hurry()
            for stage in escalation.due_stages():
                for process in processes():
                    if process.running:
                        self._apply(stage, process)

    def _apply(self, stage: KillStage, process: JobProcess) -> None:
        _LOG.info("shutdown: %s: %s", process.name, stage.name.lower().replace("_", " "))
        if stage is KillStage.DUMP_STACKS:
            process.signal(DUMP_SIGNAL)
        else:
            number = signal.SIGKILL if stage is KillStage.KILL else signal.SIGTERM
            self._request_end(process, number, self._why_it_ends(stage))

    def _request_end(self, process: JobProcess, number: signal.Signals, why: str) -> None:
        """Send SIGTERM to a process, or SIGKILL to its group."""
        self.requests[process] = EndRequest(number, why)
        if number == signal.SIGKILL:
            process.kill_group()
        else:
            process.signal(number)
