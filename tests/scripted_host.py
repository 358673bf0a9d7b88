"""A host for supervisors that starts no process, and processes that do with a signal what the test has decided."""

import os
import selectors
import signal
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dray.clock import Deadline
from dray.jobs.launch.processes import JobProcess, replica_name
from dray.jobs.messages.models import Role


@dataclass(eq=False)
class ScriptedProcess(JobProcess):
    """A process that does with a signal what the test has decided."""

    name: str
    role: Role | None
    pid: int
    host: "ScriptedHost"
    log: Path = Path("replica.log")
    exit_code: int | None = None
    ended_with: int | None = None
    received: list[signal.Signals] = field(default_factory=list)

    @property
    def ending(self) -> str:
        return f"exit code {self.exit_code}"

    def seconds_unseen(self) -> float:
        return 0.0

    def signal(self, number: signal.Signals) -> None:
        self.received.append(number)
        if number in self.host.obeyed:
            self.end(128 + number)

    def kill_group(self) -> None:
        self.received.append(signal.SIGKILL)
        if signal.SIGKILL in self.host.obeyed:
            self.end(-signal.SIGKILL)

    def end(self, code: int) -> None:
        self.ended_with = code
        self.host.wake()


class ScriptedHost:
    """In the place of a `LocalHost`: starts nothing, and keeps what it was asked to start."""

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self.lost = False
        self.obeyed = {signal.SIGTERM, signal.SIGKILL}
        self.started: list[ScriptedProcess] = []
        self.closed = 0
        self._newest: dict[str, ScriptedProcess] = {}
        self._woken = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        selector.register(self._woken, selectors.EVENT_READ, lambda: os.eventfd_read(self._woken))

    def __getitem__(self, name: str) -> ScriptedProcess:
        return self._newest[name]

    @property
    def processes(self) -> Sequence[ScriptedProcess]:
        return list(self._newest.values())

    def start(
        self, role: Role, index: int, *, restarts: int = 0, connections: Sequence[socket.socket] = ()
    ) -> ScriptedProcess:
        return self._add(replica_name(role, index), role)

    def start_controller(self, listener: socket.socket, token: str) -> ScriptedProcess:
        listener.close()
        return self._add("controller", None)

    def collect(self) -> Iterator[ScriptedProcess]:
        for process in self.processes:
            if process.running and process.ended_with is not None:
                process.exit_code = process.ended_with
                yield process

    def kill(self, processes: Iterable[JobProcess]) -> None:
        for process in processes:
            if process.running:
                process.kill_group()
                self[process.name].exit_code = self[process.name].ended_with

    def request_shutdown(self) -> None:
        pass

    def close(self, deadline: Deadline) -> None:
        self.closed += 1

    def wake(self) -> None:
        os.eventfd_write(self._woken, 1)

    def release(self) -> None:
        os.close(self._woken)

    def _add(self, name: str, role: Role | None) -> ScriptedProcess:
        process = ScriptedProcess(name, role, 100 + len(self.started), self)
        self.started.append(process)
        self._newest[name] = process
        return process
