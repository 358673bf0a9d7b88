"""The other process of a measurement: `Peer` is the near end, `serve` runs the far one.

A peer gets commands as lines of JSON on its standard input and answers each with one on its standard output. It
ends when its input does.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from dray.clock import Deadline

ANSWER_SECONDS = 120.0
_END_SECONDS = 10.0


class PeerError(Exception):
    """A peer ended, or did not answer."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A service's answer to a command.

    Attributes:
        values: what to tell the near end.
        then: what to do once it has been told, before the next command.
    """

    values: Mapping[str, Any]
    then: Callable[[], None] | None = None


class Service(Protocol):
    """What a peer does."""

    def do(self, command: str, **arguments: Any) -> Reply:
        """Carry out a command."""
        ...

    def close(self) -> None:
        """Give back what the service holds."""
        ...


class Peer:
    """A process that runs the service `kind`; it ends with its ``with`` block."""

    def __init__(self, kind: str, pass_fds: Sequence[int] = ()) -> None:
        self.kind = kind
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.exchanges", kind, *map(str, pass_fds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            pass_fds=tuple(pass_fds),
            cwd=Path(__file__).parent.parent,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._received = b""

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and wait for its answer.

        Raises:
            PeerError: there is none.
        """
        try:
            self._stdin.write(json.dumps({"command": command, **arguments}).encode() + b"\n")
        except BrokenPipeError as error:
            raise PeerError(f"the {self.kind} process has ended") from error
        answer: dict[str, Any] = json.loads(self._line(Deadline.after(ANSWER_SECONDS)))
        return answer

    def cpu_seconds(self) -> float:
        """Processor time that the peer has used so far, all its threads together."""
        return float(self.ask("cpu")["seconds"])

    def _line(self, deadline: Deadline) -> bytes:
        poll = select.poll()
        poll.register(self._stdout, select.POLLIN)
        while b"\n" not in self._received:
            if not poll.poll(deadline.remaining * 1000):
                raise PeerError(f"the {self.kind} process did not answer for {deadline.elapsed:.0f} s")
            received = os.read(self._stdout.fileno(), 1 << 16)
            if not received:
                raise PeerError(f"the {self.kind} process has ended")
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        return line

    def close(self) -> None:
        """End the process. Twice is fine."""
        self._stdin.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def serve(service: Service) -> None:
    """Do what standard input says until it ends."""
    # UCX logs to descriptor 1, which becomes standard error.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        for line in sys.stdin:
            arguments = json.loads(line)
            command = arguments.pop("command")
            if command == "cpu":
                reply = Reply({"seconds": time.process_time()})
            else:
                reply = service.do(command, **arguments)
            answers.write(json.dumps(reply.values) + "\n")
            answers.flush()
            if reply.then is not None:
                reply.then()
    finally:
        service.close()
        answers.close()
