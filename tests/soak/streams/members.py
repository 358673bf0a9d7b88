"""The processes of a storm, as their supervisor sees them."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from soak.streams import consumer, producer
from soak.streams.journal import Journal
from soak.streams.plan import BLOCKED, ConsumerPlan, ProducerPlan


@dataclass(slots=True, eq=False)
class Member:
    """One process, from its start to its end. Times are monotonic nanoseconds.

    Attributes:
        plan: what it does.
        folder: where its journal and its log are.
        pid: its process.
        began: when it was started.
        stops: when it was stopped and continued.
        killed: when it was sent SIGKILL.
        asked: it was asked to end.
        ended: when its end was seen.
        code: its exit code, negative for a signal.
        offset: where the current round begins in its journal.
    """

    plan: ProducerPlan | ConsumerPlan
    folder: Path
    pid: int = -1
    began: int = 0
    stops: list[list[int]] = field(default_factory=list)
    killed: int | None = None
    asked: bool = False
    ended: int | None = None
    code: int | None = None
    offset: int = 0
    control: socket.socket | None = None

    @classmethod
    def start(cls, plan: ProducerPlan | ConsumerPlan, folder: Path) -> Member:
        """Fork it: that is much faster than a new interpreter, so that there can be more kills."""
        member = cls(plan, folder, began=time.monotonic_ns())
        theirs = None
        if isinstance(plan, ProducerPlan) and plan.steady:
            member.control, theirs = socket.socketpair()
        signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
        try:
            member.pid = os.fork()
            if not member.pid:
                _be(plan, member, theirs)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, BLOCKED)
        if theirs is not None:
            theirs.close()
        return member

    @property
    def is_producer(self) -> bool:
        return isinstance(self.plan, ProducerPlan)

    @property
    def name(self) -> str:
        return f"{'p' if self.is_producer else 'c'}{self.plan.key}"

    @property
    def journal(self) -> Path:
        return self.folder / f"{self.name}.journal"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def alive(self) -> bool:
        """It has not ended, and was not sent what ends it."""
        return self.ended is None and self.killed is None and not self.asked

    @property
    def stopped(self) -> bool:
        return bool(self.stops) and len(self.stops[-1]) == 1

    def kill(self) -> None:
        self.killed = time.monotonic_ns()
        self.signal(signal.SIGKILL)

    def ask_to_end(self) -> None:
        self.asked = True
        self.signal(signal.SIGTERM)

    def stop(self) -> None:
        self.stops.append([time.monotonic_ns()])
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        if self.stopped:
            self.signal(signal.SIGCONT)
            self.stops[-1].append(time.monotonic_ns())

    def signal(self, number: int) -> None:
        if self.ended is None:
            os.kill(self.pid, number)

    def reap(self) -> bool:
        """It has ended."""
        if self.ended is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.ended, self.code = time.monotonic_ns(), os.waitstatus_to_exitcode(status)
                if self.stopped:
                    self.stops[-1].append(self.ended)
                if self.control is not None:
                    self.control.close()
        return self.ended is not None

    def problem(self) -> str:
        """Why its end is not what it should be; empty if it is."""
        if self.ended is None or (self.code == -signal.SIGKILL and self.killed is not None):
            return ""
        if self.code == 0 and self.asked:
            return ""
        log = self.log.read_text(errors="replace").strip().splitlines()[-25:]
        return "\n    ".join([f"{self.name} (pid {self.pid}) has ended with {self.code}:", *log])


def _be(plan: ProducerPlan | ConsumerPlan, member: Member, control: socket.socket | None) -> None:
    """What a forked child does, from its start to its end."""
    code = 1
    try:
        os.setpgid(0, 0)  # the terminal's Ctrl-C is for the supervisor
        log = os.open(member.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for number in (1, 2):
            os.dup2(log, number)
        faulthandler.enable(log)
        faulthandler.register(signal.SIGUSR2, log)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", force=True)
        journal = Journal(member.journal)
        if isinstance(plan, ProducerPlan):
            producer.run(plan, journal, control)
        else:
            consumer.run(plan, journal)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
