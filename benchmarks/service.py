"""The far end of a measurement: a process that carries out commands, lines of JSON on its standard input.

It answers each with one line on its standard output, and ends when its input does. Only the standard library is
needed, so that it runs in any environment.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TextIO

_PR_SET_PDEATHSIG = 1

FAILED = "failed"
"""The key of an answer that states why a command failed; the process ends after it."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A service's answer to a command.

    Attributes:
        values: what the near end gets.
        then: what to do once these are sent, before the next command.
    """

    values: Mapping[str, Any]
    then: Callable[[], None] | None = None


class Service(Protocol):
    """What such a process does."""

    def do(self, command: str, **arguments: Any) -> Reply:
        """Carry out a command."""
        ...

    def close(self) -> None:
        """Give back what the service holds."""
        ...


def end_with_parent() -> None:
    """Let the kernel kill this process when the thread that started it ends, whatever this process waits for."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def serve(service: Service) -> None:
    """Carry out the commands on standard input until it ends."""
    # UCX logs to descriptor 1, which becomes standard error.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        for line in sys.stdin:
            arguments = json.loads(line)
            command = arguments.pop("command")
            reply = _done(service, command, arguments, answers)
            _answer(answers, reply.values)
            if reply.then is not None:
                reply.then()
    finally:
        service.close()
        answers.close()


def _done(service: Service, command: str, arguments: dict[str, Any], answers: TextIO) -> Reply:
    try:
        return service.do(command, **arguments)
    except BaseException as error:
        _answer(answers, {FAILED: f"{type(error).__name__}: {error}"})
        raise


def _answer(answers: TextIO, values: Mapping[str, Any]) -> None:
    answers.write(json.dumps(values) + "\n")
    answers.flush()
