"""The near end of the other process of a measurement; its far end is `benchmarks.service`."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.peers.isolation import Isolation
from benchmarks.service import FAILED
from dray.clock import Deadline

ANSWER_SECONDS = 120.0
_END_SECONDS = 10.0
_CPUCLOCK_SCHED = 2
"""With the inverted number of a process above it: the clock of that process's processor time, on Linux."""
_ROOT = Path(__file__).parent.parent


class PartnerError(Exception):
    """A partner ended, failed or did not answer."""


class Partner:
    """A process that runs the service `kind`; it ends with its ``with`` block.

    Args:
        kind: what `module` calls the service.
        pass_fds: descriptors that the process inherits; it finds their numbers in its arguments.
        module: the package that holds the service, run with ``-m``.
        python: the interpreter, and with it the environment.
        quiet: drop what the process writes to standard error.
        isolation: the network and the home folder of its own that the process gets.
    """

    def __init__(
        self,
        kind: str,
        pass_fds: Sequence[int] = (),
        *,
        module: str = "benchmarks.exchanges",
        python: Path | str = sys.executable,
        quiet: bool = False,
        isolation: Isolation | None = None,
    ) -> None:
        self.kind = kind
        isolation = isolation or Isolation((), {})
        self._process = subprocess.Popen(
            [*isolation.prefix, str(python), "-m", module, kind, *map(str, pass_fds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if quiet else None,
            bufsize=0,
            pass_fds=tuple(pass_fds),
            cwd=_ROOT,
            env={**os.environ, **isolation.environment},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._received = b""

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and wait for its answer.

        Raises:
            PartnerError: there is none, or the command failed.
        """
        try:
            self._stdin.write(json.dumps({"command": command, **arguments}).encode() + b"\n")
        except BrokenPipeError as error:
            raise PartnerError(f"the {self.kind} process has ended") from error
        answer: dict[str, Any] = json.loads(self._line(Deadline.after(ANSWER_SECONDS)))
        if FAILED in answer:
            raise PartnerError(answer[FAILED])
        return answer

    def cpu_seconds(self) -> float:
        """Processor time that the process has used so far, all its threads together; it does not notice.

        Raises:
            PartnerError: it has ended.
        """
        try:
            return time.clock_gettime(~self._process.pid << 3 | _CPUCLOCK_SCHED)
        except OSError as error:
            raise PartnerError(f"the {self.kind} process has ended") from error

    def _line(self, deadline: Deadline) -> bytes:
        poll = select.poll()
        poll.register(self._stdout, select.POLLIN)
        while b"\n" not in self._received:
            if not poll.poll(deadline.remaining * 1000):
                raise PartnerError(f"the {self.kind} process did not answer for {deadline.elapsed:.0f} s")
            received = os.read(self._stdout.fileno(), 1 << 16)
            if not received:
                raise PartnerError(f"the {self.kind} process has ended")
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
