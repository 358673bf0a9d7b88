"""One run: a producer, its consumers, the faults that they suffer, and the account at the end."""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stress.barriers import Build
from stress.ledger import END, PRODUCED, STOP, Count, Ledger

END_SECONDS = 120.0
"""A process that does not end within this time has lost a wake-up."""

_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Plan:
    """What a run is made of.

    Attributes:
        name: for the report.
        leases: it ends after so many.
        seconds: it ends after so many, at the latest.
        on_full, retain: those of the ring.
        consumers: how many.
        own_readers: each consumer has its own reader id, and every payload must reach each; else they share one.
        cpus: the processors of all processes; empty for all of the machine.
        slots: of the ring.
        kills, stops: how many each second.
        fork_every: leases of a consumer between two forks; 0 for none.
        barrier_failures: the probability that a barrier fails.
        build: the producer's, see `stress.barriers`.
        exchanging: consumers that ask the server for each lease, by index.
        hold: how often the bytes under a lease are compared again.
        payloads: at most so many are put.
    """

    name: str
    leases: int
    seconds: float
    on_full: str = "block"
    retain: str = "unread"
    consumers: int = 3
    own_readers: bool = True
    cpus: tuple[int, ...] = ()
    slots: int = 6
    kills: float = 0.0
    stops: float = 0.0
    fork_every: int = 0
    barrier_failures: float = 0.0
    build: Build = Build.NONE
    exchanging: tuple[int, ...] = ()
    hold: int = 1
    payloads: int = 4_000_000
    seed: int = 1


@dataclass
class Account:
    """What a run has shown.

    Attributes:
        problems: what must not be; empty if all is well.
    """

    plan: Plan
    seconds: float = 0.0
    committed: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=lambda: {"kills": 0, "stops": 0})
    ring: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> int:
        """Payloads with other bytes than their own."""
        return self.counts["WRONG_BYTES"] + self.counts["CHANGED_BYTES"]

    def line(self) -> str:
        """The run in one line."""
        c, ring = self.counts, self.ring
        faults = ", ".join(f"{count} {name}" for name, count in self.faults.items())
        rate = c["LEASES"] / self.seconds
        verdict = "ok" if not self.problems else "; ".join(self.problems)
        return (
            f"{self.plan.name}: {c['LEASES']:,} leases ({rate:,.0f}/s, {c['DIRECT']:,} direct) of "
            f"{self.committed:,} payloads in {self.seconds:.0f} s; stale {c['STALE']:,}, wrong {self.wrong}, "
            f"lost {c['LOST']}, given again {c['GIVEN_AGAIN']}; {faults}, {c['FORKS']} forks; "
            f"{ring.get('barriers', 0):,} barriers ({ring.get('barrier_failures', 0):,} failed), "
            f"{ring.get('late_looks', 0)} late looks, {ring.get('dropped_unread', 0):,} + "
            f"{ring.get('dropped_delivered', 0):,} dropped: {verdict}"
        )


def run(plan: Plan) -> Account:
    """Run a plan to its end."""
    memory = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else None
    with (
        tempfile.TemporaryDirectory(prefix="stress-", dir=memory) as folder,
        contextlib.ExitStack() as ended,
    ):
        return _Run(plan, Path(folder), ended).account()


class _Run:
    def __init__(self, plan: Plan, folder: Path, ended: contextlib.ExitStack) -> None:
        self._plan = plan
        self._rng = random.Random(plan.seed)
        readers = plan.consumers if plan.own_readers else 1
        sizes = {"payloads": plan.payloads, "slots": plan.slots, "consumers": plan.consumers, "readers": readers}
        self._ledger = Ledger(folder, **sizes)
        self._ended = ended
        same = (
            "slots", "on_full", "retain", "cpus", "seed", "hold", "build", "fork_every", "barrier_failures",
            "exchanging",
        )  # fmt: skip
        self._shared: dict[str, Any] = {name: getattr(plan, name) for name in same}
        self._shared["folder"], self._shared["ledger"], self._shared["readers"] = str(folder), sizes, readers
        self._shared["reader_of"] = [index if plan.own_readers else 0 for index in range(plan.consumers)]
        self._account = Account(plan)

    def account(self) -> Account:
        account, plan = self._account, self._plan
        producer = self._start("stress.producer", json.dumps(self._shared))
        self._shared["producer"], self._shared["endpoints"] = _receive(producer)
        consumers = [self._start_consumer(index) for index in range(plan.consumers)]
        for consumer in consumers:
            _line(consumer, END_SECONDS)  # it has attached
        _send(producer)
        began = time.monotonic()
        self._inflict(consumers, began + plan.seconds)
        self._ledger.head[STOP] = 1
        full = _receive(producer, END_SECONDS)
        account.committed = self._ledger.head[PRODUCED]
        self._ledger.head[END] = 1
        for index, consumer in enumerate(consumers):
            try:
                if consumer.wait(END_SECONDS):
                    account.problems.append(f"consumer {index} failed")
            except subprocess.TimeoutExpired:
                account.problems.append(f"consumer {index} does not end")
                consumer.kill()
        account.seconds = time.monotonic() - began
        _send(producer)
        account.ring = _receive(producer, END_SECONDS)
        if producer.wait(END_SECONDS):
            account.problems.append("the producer failed")
        account.counts = {count.name: self._ledger.total(count) for count in Count if count is not Count.CURSOR}
        if full:
            account.problems.append(f"the ring stayed full for a minute, {full} times")
        self._check()
        return account

    def _inflict(self, consumers: list[subprocess.Popen[str]], until: float) -> None:
        """Let faults happen until the run has its leases, or its time has passed."""
        plan, rng, ledger = self._plan, self._rng, self._ledger
        rate = plan.kills + plan.stops
        while ledger.total(Count.LEASES) < plan.leases and time.monotonic() < until:
            pause = rng.expovariate(rate) if rate else 0.1
            time.sleep(min(pause, max(0.0, until - time.monotonic())))
            if ledger.head[PRODUCED] >= plan.payloads or any(each.poll() is not None for each in consumers):
                return
            index = rng.randrange(len(consumers))
            victim = consumers[index]
            if rng.random() * rate < plan.kills:
                self._account.faults["kills"] += 1
                victim.kill()
                victim.wait()
                consumers[index] = self._start_consumer(index)
                _line(consumers[index], END_SECONDS)
            elif rate:
                self._account.faults["stops"] += 1
                victim.send_signal(signal.SIGSTOP)
                time.sleep(rng.choice((0.001, 0.01, 0.15)))
                victim.send_signal(signal.SIGCONT)

    def _check(self) -> None:
        """Compare the ledger of the consumers with the counts of the ring."""
        account, plan, ledger, ring = self._account, self._plan, self._ledger, self._account.ring
        counts, problems, committed = account.counts, account.problems, account.committed
        for name in ("WRONG_BYTES", "CHANGED_BYTES", "GIVEN_AGAIN", "LOST", "OTHER_ERRORS", "FAULTY_CHILDREN"):
            if counts[name]:
                problems.append(f"{name} {counts[name]}")
        for name in ("leases", "attachments", "ignored_words", "listed_leases", "writing", "reading", "aborted"):
            if ring[name]:
                problems.append(f"{name} {ring[name]} at the end")
        ends = sum(ring[name] for name in ("consumed", "retired", "dropped_unread", "dropped_delivered", "ready"))
        if ring["committed"] != committed or ends != committed:
            problems.append(
                f"{committed} payloads were put, {ring['committed']} committed, {ends} are accounted for"
            )
        if plan.retain == "newest":
            expected = 0, 0
        elif plan.own_readers:
            expected = committed, committed
            for index in range(plan.consumers):
                missing = committed - ledger.numbers(ledger.checked[index], committed)
                if missing:
                    problems.append(f"{missing} payloads never reached consumer {index}")
        else:
            expected = (
                ledger.marked_by_any(ledger.done, committed),
                ledger.marked_by_any(ledger.checked, committed),
            )
        least, most = expected
        if not least <= ring["consumed"] <= most:
            problems.append(f"the ring counts {ring['consumed']} as consumed, the consumers {least} to {most}")

    # --- processes ----------------------------------------------------------------------------------------------

    def _start_consumer(self, index: int) -> subprocess.Popen[str]:
        return self._start("stress.consumer", json.dumps(self._shared), str(index))

    def _start(self, module: str, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        self._ended.callback(_end, process)
        return process


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def _send(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def _receive(process: subprocess.Popen[str], seconds: float = 30.0) -> Any:
    return json.loads(_line(process, seconds))


def _line(process: subprocess.Popen[str], seconds: float) -> str:
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], seconds)
    line = process.stdout.readline() if readable else ""
    if not line:
        raise RuntimeError(f"process {process.pid} ({process.args!r}) {'ended' if readable else 'is silent'}")
    return line
