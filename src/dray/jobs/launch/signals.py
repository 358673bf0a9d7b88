"""Signals of the supervisor, as something that can be waited for together with other file descriptors."""

from __future__ import annotations

import signal
import socket
from collections.abc import Collection
from types import TracebackType
from typing import Self

from dray.forking import SignalHandlers, not_inherited

WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR2)
"""Each of them ends the job in order, with a checkpoint."""

TIME_LIMIT_SIGNAL = signal.SIGUSR2
"""Tells the supervisor of a job on Slurm that the time limit is near."""


class SignalInbox:
    """While open, signals that would end the process are collected instead. Main thread only.

    A signal that the process was started to ignore, as SIGHUP under ``nohup``, stays ignored.

    Args:
        watched: these signals.
    """

    def __init__(self, watched: Collection[signal.Signals] = WATCHED) -> None:
        self._watched = frozenset(each for each in watched if signal.getsignal(each) is not signal.SIG_IGN)

    def __enter__(self) -> Self:
        self._reader, self._writer = map(not_inherited, socket.socketpair())
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._handlers = SignalHandlers(self._watched, self._writer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handlers.restore()
        self._reader.close()
        self._writer.close()

    def fileno(self) -> int:
        """Readable when there is something to take."""
        return self._reader.fileno()

    def take(self) -> list[signal.Signals]:
        """The watched signals that came since the last call."""
        try:
            content = self._reader.recv(256)
        except BlockingIOError:
            return []
        return [signal.Signals(byte) for byte in content if byte in self._watched]


def reason_of(number: signal.Signals, *, on_slurm: bool) -> str:
    """Why a job ends that was sent this signal."""
    limit = on_slurm and number == TIME_LIMIT_SIGNAL
    return "the time limit is near" if limit else f"interrupted by {number.name}"
