"""Reads from a producer that runs pure Python meanwhile, and the speed of its loop."""

from __future__ import annotations

import sys
import time
from contextlib import closing
from typing import Any, NamedTuple

from benchmarks.exchange import timed
from benchmarks.exchanges.lanes import How, LaneRead, PayloadService
from benchmarks.exchanges.spinning import SharedCount, Spinner
from benchmarks.partner import ANSWER_SECONDS, PartnerError
from benchmarks.plan import LaneName
from benchmarks.service import Reply
from dray.clock import Deadline

_AWAKE_SECONDS = 1e-3
"""This process computes for so long before it reads: it may have slept."""


class BusyService(PayloadService):
    """Puts and serves payloads, and runs a loop on request.

    Args:
        descriptor: of the `SharedCount` of the loop's turns.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._turns = SharedCount(descriptor)
        self._spinner: Spinner | None = None

    def do(self, command: str, **arguments: Any) -> Reply:
        if command == "spin":
            if self._spinner is None:
                self._spinner = self._opened.enter_context(closing(Spinner(self._turns)))
            sys.setswitchinterval(arguments["switch_interval"])
            return Reply({}, self._spinner.spin)
        if command == "rest":
            assert self._spinner is not None
            self._spinner.rest()
            return Reply({})
        return super().do(command, **arguments)

    def close(self) -> None:
        self._spinner = None
        super().close()


class Stretch(NamedTuple):
    """What a busy producer's loop did for a while: its turns, and the processor time of its process."""

    turns: int
    seconds: float
    cpu_seconds: float

    def plus(self, other: Stretch) -> Stretch:
        """Both together."""
        return Stretch(
            self.turns + other.turns, self.seconds + other.seconds, self.cpu_seconds + other.cpu_seconds
        )

    def since(self, began: Stretch) -> Stretch:
        """From another one to this one, which began with it."""
        return Stretch(
            self.turns - began.turns, self.seconds - began.seconds, self.cpu_seconds - began.cpu_seconds
        )


class BusyRead(LaneRead):
    """Reads while the producer's process runs a loop of pure Python.

    Args:
        lane, how: as for `LaneRead`.
    """

    def __init__(self, lane: LaneName, how: How) -> None:
        self._turns = SharedCount()
        super().__init__(lane, how, kind="busy payloads", descriptors=[self._turns.descriptor])

    def close(self) -> None:
        super().close()
        self._turns.close()

    def read_idle(self, count: int) -> list[float]:
        """Read `count` payloads while the producer's process waits; seconds of each."""
        self.prepare(count)
        _compute(_AWAKE_SECONDS)
        return timed(self.once, count)

    def read_beside(self, count: int, switch_interval: float) -> tuple[list[float], Stretch, Stretch]:
        """Read `count` payloads while the loop runs; then compute for as long, without reads.

        The producer's loop thus has the machine to itself to the same extent in both stretches.

        Returns:
            Seconds of each read; what the loop did beside the reads; what it did without them.
        """
        self.prepare(count)
        self._partner.ask("spin", switch_interval=switch_interval)
        self._wait_for_turns()
        _compute(_AWAKE_SECONDS)
        began = self._until_now()
        times = timed(self.once, count)
        ended = self._until_now()
        _compute(ended.seconds - began.seconds)
        over = self._until_now()
        self._partner.ask("rest")
        return times, ended.since(began), over.since(ended)

    def _until_now(self) -> Stretch:
        return Stretch(self._turns.value, time.perf_counter(), self._partner.cpu_seconds())

    def _wait_for_turns(self) -> None:
        deadline = Deadline.after(ANSWER_SECONDS)
        before = self._turns.value
        while self._turns.value == before:
            if deadline.expired:
                raise PartnerError("the producer's loop does not begin")


def _compute(seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass
