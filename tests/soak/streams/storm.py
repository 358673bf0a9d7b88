"""The supervisor: it starts the processes of a round, inflicts its faults, and ends them in order."""

from __future__ import annotations

import contextlib
import functools
import heapq
import itertools
import logging
import random
import select
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from soak.processes import Footprint
from soak.streams.checker import Account, check
from soak.streams.leftovers import janitor, leftovers
from soak.streams.members import Member
from soak.streams.plan import (
    LONG_STOP_SECONDS,
    MAX_EACH,
    WEIGHTS,
    ConsumerPlan,
    Fault,
    ProducerPlan,
    RoundPlan,
    Way,
)
from soak.streams.producer import DRAIN_SECONDS, PAUSE, PAUSED, RESUME

TICK: Final = 0.02
_ANY_PORTS: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")
END_SECONDS: Final = 30.0
"""How long a process may take to end, besides the time in which its payloads are consumed."""


@dataclass(slots=True)
class Outcome:
    """A round: what was done, and what it has shown."""

    plan: RoundPlan
    account: Account
    faults: Counter[str]
    processes: int
    seconds: float
    footprints: list[Footprint] = field(default_factory=list)  # of the steady ones


class Storm:
    """Runs rounds one after the other.

    Args:
        folder: for journals and logs.
        runtime: the folder in which dray keeps its sockets and entries; it must be that of the environment.
        scope: where names are known.
        seed: of all plans.
    """

    def __init__(self, folder: Path, runtime: Path, scope: str, seed: int) -> None:
        self._folder = folder
        self._runtime = runtime
        self._scope = scope
        self._rng = random.Random(seed)
        self._keys = itertools.count()
        self.steady: list[Member] = []

    def open(self) -> None:
        """Start the steady producer and the steady consumer."""
        seeds = self._rng.getrandbits(40), self._rng.getrandbits(40)
        stream = RoundPlan(0, 0, Way.STEADY, 0, producers=0, consumers=0, groups=("default",), faults=0).name
        plans = (
            ProducerPlan(next(self._keys), stream, self._scope, ("default",), seeds[0], steady=True),
            ConsumerPlan(next(self._keys), stream, self._scope, "default", seeds[1], steady=True),
        )
        self.steady = [Member.start(plan, self._folder) for plan in plans]
        self._pause()

    def run(self, plan: RoundPlan) -> Outcome:
        """One round, to its end."""
        began = time.monotonic()
        steady = self.steady if plan.way is Way.STEADY else []
        one = _Round(plan, self._folder, self._scope, self._keys)
        problems: list[str] = []
        try:
            for member in steady:
                member.offset = member.journal.stat().st_size
            for member in steady:
                if member.control is not None:
                    member.control.sendall(RESUME)
            one.storm()
            problems += one.finish(self._pause if steady else lambda: "")
        finally:
            one.kill_all()
        account = check([*one.members, *steady], plan.groups)
        account.problems[:0] = problems
        janitor(plan.name, self._scope)
        left = leftovers(self._runtime, {member.pid for member in self.steady})
        account.problems += [f"left behind: {each}" for each in left]
        account.problems += [
            f"{member.name}, which runs through all rounds, has ended" for member in self.steady if member.reap()
        ]
        if not account.problems:
            one.remove_files()
        footprints = [Footprint.of(member.pid) for member in self.steady if member.ended is None]
        seconds = time.monotonic() - began
        return Outcome(plan, account, one.faults, len(one.members), seconds, footprints)

    def close(self) -> list[str]:
        """End the steady ones; what is wrong with their end."""
        for member in self.steady:
            if not member.reap():
                member.ask_to_end()
        problems = _wait([member for member in self.steady if member.is_producer], DRAIN_SECONDS + END_SECONDS)
        return problems + _wait(self.steady, END_SECONDS)

    def _pause(self) -> str:
        """Let the steady producer drain, while consumers are alive; what is wrong."""
        producer = self.steady[0]
        assert producer.control is not None
        producer.control.sendall(PAUSE)
        if not select.select([producer.control], [], [], DRAIN_SECONDS + END_SECONDS)[0]:
            producer.signal(signal.SIGUSR2)
            return f"{producer.name}, which runs through all rounds, does not pause; see {producer.log}"
        answer = producer.control.recv(1)
        return "" if answer == PAUSED else f"{producer.name}: {answer!r} payloads were not consumed at its pause"


class _Round:
    def __init__(self, plan: RoundPlan, folder: Path, scope: str, keys: itertools.count[int]) -> None:
        self.plan = plan
        self.members: list[Member] = []
        self.faults: Counter[str] = Counter()
        self._folder = folder
        self._scope = scope
        self._keys = keys
        self._rng = random.Random(plan.seed)
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._ports = _free_ports(3 * MAX_EACH, self._rng) if plan.way is Way.TCP else []
        self._unused = list(self._ports)

    # --- the course of it -------------------------------------------------------------------------------------

    def storm(self) -> None:
        """Start, and let faults happen."""
        plan, rng = self.plan, self._rng
        starts: list[Callable[[], None]] = [self._start_producer] * plan.producers
        starts += [functools.partial(self._start_consumer, self._group(n)) for n in range(plan.consumers)]
        rng.shuffle(starts)
        for start in starts:
            start()
        until = time.monotonic() + plan.seconds
        kinds, weights = list(WEIGHTS), list(WEIGHTS.values())
        if plan.long_stop:
            until += LONG_STOP_SECONDS
            self._inflict(Fault.STOP_CONSUMER, LONG_STOP_SECONDS)
        next_fault = time.monotonic() + rng.expovariate(plan.faults)
        while (now := time.monotonic()) < until:
            if now >= next_fault:
                next_fault += rng.expovariate(plan.faults)
                self._inflict(rng.choices(kinds, weights)[0], rng.choice((0.005, 0.05, 0.3, 1.5)))
            self._tick()

    def finish(self, pause: Callable[[], str]) -> list[str]:
        """End the producers, then the consumers; what is wrong with that."""
        while self._due:  # stopped processes are resumed, dead ones have successors
            heapq.heappop(self._due)[2]()
        for member in self.members:
            member.resume()
        for group in self.plan.groups:
            if not self._alive(False, group):
                self._start_consumer(group)
        producers = [member for member in self.members if member.is_producer]
        for member in producers:
            if member.alive:
                member.ask_to_end()
        problems = [each for each in [pause()] if each]
        problems += _wait(producers, DRAIN_SECONDS + END_SECONDS)
        for member in self.members:
            if member.alive:
                member.ask_to_end()
        return problems + _wait(self.members, END_SECONDS)

    def kill_all(self) -> None:
        for member in self.members:
            if not member.reap():
                member.kill()
                member.resume()
        _wait(self.members, END_SECONDS)

    def remove_files(self) -> None:
        for member in self.members:
            member.journal.unlink(missing_ok=True)
            member.log.unlink(missing_ok=True)

    def _tick(self) -> None:
        time.sleep(TICK)
        while self._due and self._due[0][0] <= time.monotonic():
            heapq.heappop(self._due)[2]()
        for member in self.members:
            member.reap()

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._due, (time.monotonic() + seconds, next(self._order), act))

    # --- faults -----------------------------------------------------------------------------------------------

    def _inflict(self, fault: Fault, seconds: float) -> None:
        """One fault; `seconds` are those of a stop, or until a successor comes."""
        producer = fault in _OF_PRODUCERS
        if fault in (Fault.START_CONSUMER, Fault.START_PRODUCER):
            if len(self._alive(producer)) >= MAX_EACH or (producer and self._ports and not self._unused):
                return
            if producer:
                self._start_producer()
            else:
                self._start_consumer(self._rng.choice(self.plan.groups))
            self.faults[fault.value] += 1
            return
        victims = [member for member in self._alive(producer) if not member.stopped or "killed" in fault.value]
        if not victims:
            return
        victim = self._rng.choice(victims)
        self.faults[fault.value] += 1
        if fault in (Fault.KILL_CONSUMER, Fault.KILL_PRODUCER):
            victim.kill()
            self._replace(victim, seconds)
        elif fault in (Fault.STOP_CONSUMER, Fault.STOP_PRODUCER):
            victim.stop()
            self._later(seconds, victim.resume)
        elif fault is Fault.INTERRUPT_PRODUCER:
            victim.signal(signal.SIGUSR1)
        else:
            victim.ask_to_end()
            self._replace(victim, seconds)

    def _replace(self, victim: Member, seconds: float) -> None:
        """Perhaps another one comes soon; in any case if there is none left."""
        plan = victim.plan
        if isinstance(plan, ConsumerPlan):
            if self._rng.random() < 0.7 or not self._alive(False, plan.group):
                self._later(seconds, functools.partial(self._start_consumer, plan.group))
        elif self._ports:
            if victim.killed is not None:  # consumers try its address again
                self._later(seconds, functools.partial(self._start_producer, plan.listen, victim))
            elif self._unused:
                self._later(seconds, self._start_producer)
        elif self._rng.random() < 0.7 or not self._alive(True):
            self._later(seconds, self._start_producer)

    # --- processes --------------------------------------------------------------------------------------------

    def _group(self, index: int) -> str:
        return self.plan.groups[index % len(self.plan.groups)]

    def _alive(self, producers: bool, group: str = "") -> list[Member]:
        return [
            member
            for member in self.members
            if member.is_producer is producers
            and member.alive
            and (not group or (isinstance(member.plan, ConsumerPlan) and member.plan.group == group))
        ]

    def _start_producer(self, listen: str = "", before: Member | None = None) -> None:
        if before is not None:
            _wait([before], END_SECONDS)
        if self._ports and not listen:
            listen = f"tcp://127.0.0.1:{self._unused.pop()}"
        plan = self.plan
        self.members.append(
            Member.start(
                ProducerPlan(
                    next(self._keys), plan.name, self._scope, plan.groups, self._rng.getrandbits(40), listen
                ),
                self._folder,
            )
        )

    def _start_consumer(self, group: str) -> None:
        stream = self.plan.name if not self._ports else tuple(f"tcp://127.0.0.1:{port}" for port in self._ports)
        plan = ConsumerPlan(next(self._keys), stream, self._scope, group, self._rng.getrandbits(40))
        self.members.append(Member.start(plan, self._folder))


_OF_PRODUCERS: Final = frozenset(
    (Fault.KILL_PRODUCER, Fault.STOP_PRODUCER, Fault.END_PRODUCER, Fault.INTERRUPT_PRODUCER, Fault.START_PRODUCER)
)


def _wait(members: list[Member], seconds: float) -> list[str]:
    """Wait for their ends; what is wrong with these. What does not end writes its stacks, and is killed."""
    until = time.monotonic() + seconds
    problems = []
    while not all(member.reap() for member in members) and time.monotonic() < until:
        time.sleep(TICK)
    late = [member for member in members if not member.reap()]
    for member in late:
        member.signal(signal.SIGUSR2)
    if late:
        time.sleep(0.5)
    for member in late:
        member.kill()
        lines = member.log.read_text(errors="replace").strip().splitlines()[-60:] if member.log.exists() else []
        problems.append("\n    ".join([f"{member.name} (pid {member.pid}) does not end:", *lines]))
        while not member.reap():
            time.sleep(TICK)
    if late:
        logging.warning("%s did not end", ", ".join(member.name for member in late))
    return problems + [problem for member in members if member not in late and (problem := member.problem())]


def _free_ports(count: int, rng: random.Random) -> list[int]:
    """Ports that no program gets by chance, as connections and servers do that ask for any port."""
    below = int(_ANY_PORTS.read_text().split()[0])
    found: list[int] = []
    while len(found) < count:
        port = rng.randrange(1024, below)
        if port not in found:
            with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
                found.append(port)
    return found
