"""Starts the processes of a soak, inflicts the faults of the plan, and ends them in order: drain, then account."""

from __future__ import annotations

import contextlib
import functools
import heapq
import itertools
import os
import random
import secrets
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from soak import proxy
from soak.ledger import Kind, count_kinds, read_ledger
from soak.member import FENCED, JOB, MARK_VARIABLE, REDIS_VARIABLE, SECRET_VARIABLE, DeadMembers
from soak.network import Network
from soak.plan import DEAD_AFTER, ConsumerPlan, Event, Fault, Plan, ProducerPlan
from soak.processes import Process, ProcessRun, descendants

from dray.jobs.queue import JobKeys, RedisConnection, RedisServer, RolloutQueue

TICK = 0.05
MEASURE_EVERY = 2.0
COUNT_EVERY = 0.5
DRAIN_SECONDS = 45.0
END_SECONDS = 20.0
START_SECONDS = 60.0


@dataclass(slots=True)
class History:
    """What happened, for the account that is made of it."""

    runs: list[ProcessRun] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    redis_lost: list[int] = field(default_factory=list)  # monotonic ns
    log: list[str] = field(default_factory=list)
    began: float = 0.0
    interrupted: bool = False
    backlog: int | None = None
    processes_left: list[int] = field(default_factory=list)
    folders_left: list[str] = field(default_factory=list)


class Supervisor:
    """Runs one soak.

    Args:
        plan: what is to happen.
        folder: for ledgers, logs and sockets.
        redis: the server to use, and to kill.
        network: the namespaces, where there are any.
        show: called every half second with the records counted so far.
    """

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        redis: RedisServer,
        network: Network | None,
        show: Callable[[Counter[Kind], History], None],
    ) -> None:
        self.history = History()
        self._plan = plan
        self._folder = folder
        self._redis = redis
        self._network = network
        self._show = show
        self._rng = random.Random(plan.seed + 1)
        self._members: dict[str, ProducerPlan | ConsumerPlan] = {each.name: each for each in plan.producers}
        self._members |= {each.name: each for each in plan.consumers}
        self._runs_of: Counter[str] = Counter()
        self._running: dict[str, Process] = {}
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._dead_members = folder / "dead_members.json"
        self._dead_producers: list[bytes] = []
        self._dead_consumers: list[str] = []
        self._cuts: Counter[str] = Counter()
        self._counts: Counter[Kind] = Counter()
        self._offsets: dict[Path, int] = {}
        self._counted = self._measured = 0.0
        self._taken_over: dict[str, str] = {}  # names in the stream that the next run of a consumer uses
        self._draining = False
        self._redis_away = False
        self.sockets = folder / "s"
        self.sockets.mkdir(mode=0o700)
        self._control = str(folder / "proxy.sock")
        self._environment = {
            **os.environ,
            MARK_VARIABLE: str(os.getpid()),
            REDIS_VARIABLE: redis.address.url,
            SECRET_VARIABLE: secrets.token_hex(32),
            "DRAY_RUNTIME_DIR": str(self.sockets),
            "PYTHONPATH": os.pathsep.join(dict.fromkeys(filter(None, map(os.path.abspath, sys.path)))),
            "PYTHONUNBUFFERED": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }

    # --- the course of it -------------------------------------------------------------------------------------

    def run(self) -> None:
        """Everything; KeyboardInterrupt cuts the plan short, a second one the drain."""
        DeadMembers.write(self._dead_members, [], [])
        with contextlib.ExitStack() as opened:
            opened.callback(self._kill_all)
            opened.enter_context(self._proxy())
            self.history.began = time.monotonic()
            try:
                for name in self._members:
                    self._start(name)
                self._wait_for_all()
                self._follow_plan()
            except KeyboardInterrupt:
                self._note("interrupted")
                self.history.interrupted = True
            with contextlib.suppress(KeyboardInterrupt):
                self._drain()
        self.history.processes_left = descendants(MARK_VARIABLE, str(os.getpid()))

    def _follow_plan(self) -> None:
        began = time.monotonic()
        for event in self._plan.events:
            self._later(began + event.at - time.monotonic(), functools.partial(self._inflict, event))
        while time.monotonic() < began + self._plan.seconds:
            self._tick()

    def _drain(self) -> None:
        """Heal everything, let producers and consumers finish, and see that nothing is left in the stream."""
        self._note("drain")
        self._draining = True
        self._due.clear()
        self._restart_redis()
        for name in self._cuts:
            self._heal(name)
        for process in self._running.values():
            process.resume()
        limit = time.monotonic() + DRAIN_SECONDS + END_SECONDS
        while any(process.expected for process in self._running.values()) and time.monotonic() < limit:
            self._tick()  # a process has yet to end before the next run uses its name
        for name in self._members:
            if name not in self._running:
                self._start(name)
        self._wait_for_all()
        self._end_all(producers=True, seconds=DRAIN_SECONDS + END_SECONDS)
        with RedisConnection(self._redis.address) as connection:
            queue = RolloutQueue(connection, JobKeys(JOB))
            limit = time.monotonic() + END_SECONDS
            while (backlog := queue.statistics().backlog) and time.monotonic() < limit:
                self._tick()
        self.history.backlog = backlog
        self._end_all(producers=False, seconds=END_SECONDS)

    def _end_all(self, *, producers: bool, seconds: float) -> None:
        limit = time.monotonic() + seconds
        ending = [process for process in self._running.values() if process.run.producer is producers]
        for process in ending:
            process.run.final = True
            process.end()
        while any(process.run.ended is None for process in ending):
            if time.monotonic() > limit:
                for process in ending:
                    if process.run.ended is None:
                        self._note(f"{process.run.name} does not end: its stacks are in {process.run.log}")
                        process.dump_stacks()
                time.sleep(0.5)
                return
            self._tick()

    # --- time -------------------------------------------------------------------------------------------------

    def _later(self, seconds: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._due, (time.monotonic() + seconds, next(self._order), do))

    def _tick(self) -> None:
        time.sleep(TICK)
        now = time.monotonic()
        while self._due and self._due[0][0] <= now:
            heapq.heappop(self._due)[2]()
        for process in self._reap():
            self._note_end(process)
        if now >= self._measured + MEASURE_EVERY:
            self._measured = now
            for process in self._running.values():
                if process.run.steady and not process.stopped:
                    process.measure()
        if now >= self._counted + COUNT_EVERY:
            self._counted = now
            for run in self.history.runs:
                found, self._offsets[run.ledger] = count_kinds(run.ledger, self._offsets.get(run.ledger, 0))
                self._counts.update(found)
            self._show(self._counts, self.history)

    def _wait_for_all(self) -> None:
        limit = time.monotonic() + START_SECONDS
        while any(not process.run.has_begun for process in self._running.values()):
            if time.monotonic() > limit:
                raise TimeoutError(f"not all processes have begun; see {self._folder}")
            self._tick()

    # --- runs ------------------------------------------------------------------------------------------------

    def _start(self, name: str) -> None:
        """Start a member; again, if it ran before."""
        if name in self._running:
            return
        member = self._members[name]
        number = self._runs_of[name]
        self._runs_of[name] += 1
        unique = f"{name}.{number}"
        run = ProcessRun(
            name, isinstance(member, ProducerPlan), unique, self._taken_over.pop(name, unique),
            self._folder / f"{unique}.ledger", self._folder / f"{unique}.log", member.steady,
        )  # fmt: skip
        spec = {
            "ledger": str(run.ledger),
            "seed": self._rng.getrandbits(32),
            "drain": DRAIN_SECONDS,
            "name": name,
        }
        if isinstance(member, ProducerPlan):
            module = "soak.producer"
            spec |= {
                "slots": member.slots, "slot_bytes": member.slot_bytes, "on_full": member.on_full,
                "rate": member.rate, "threads": member.threads, "port": member.port,
                "host": "127.0.0.1" if self._network is None else self._network.address(name),
                "proxy": self._control if member.proxied else None,
                "endpoints": str(self._folder / f"{name}.endpoints"),
            }  # fmt: skip
        else:
            module = "soak.consumer"
            spec |= {
                "consumer": run.consumer,
                "dead_members": str(self._dead_members),
                "role": member.roles[number % len(member.roles)],
                "lane": member.lanes[number % len(member.lanes)],
            }
            spec["drain"] = END_SECONDS / 2
        run.described = spec
        where = name if run.producer else "hub"
        within = [] if self._network is None else self._network.within(where)
        self.history.runs.append(run)
        self._running[name] = Process(run, module, spec, within, self._environment)

    def _note_end(self, process: Process) -> None:
        """Notify the other processes, and start the next run unless the plan does so."""
        run = process.run
        self._note(f"{run.name} {run.how}")
        if run.producer:
            self._dead_producers += [record.producer for record in read_ledger(run.ledger)[:1]]
        elif run.member not in self._taken_over:
            self._dead_consumers.append(f"{run.consumer}#ended")
        DeadMembers.write(self._dead_members, self._dead_producers, self._dead_consumers)
        if run.how in ("fenced", "crashed") and not self._draining:
            self._start(run.member)

    def _reap(self) -> list[Process]:
        """The processes that have ended since the last call; they are no longer in `_running`."""
        ended = {name: process for name, process in self._running.items() if process.over(FENCED)}
        for name in ended:
            del self._running[name]
        return list(ended.values())

    def _kill_all(self) -> None:
        for process in self._running.values():
            process.kill()
        limit = time.monotonic() + END_SECONDS
        while self._running and time.monotonic() < limit:
            time.sleep(TICK)
            self._reap()

    # --- faults -----------------------------------------------------------------------------------------------

    def _inflict(self, event: Event) -> None:
        """Inflict a fault of the plan, if its target is running."""
        if event.fault is Fault.REDIS_KILL:
            self._kill_redis(event.seconds)
            return
        process = self._running.get(event.target)
        if process is None or not process.run.has_begun or process.expected:
            return
        if event.fault in (Fault.STOP, Fault.END) and process.stopped:
            return
        match event.fault:
            case Fault.KILL:
                if event.same_name and process.run.declared_dead is None:
                    self._taken_over[event.target] = process.run.consumer
                process.kill()
                self._later(event.seconds, lambda: self._restart(process))
            case Fault.END:
                process.end()
                self._later(event.seconds, lambda: self._restart(process))
            case Fault.STOP:
                process.stop()
                self._later(event.seconds, process.resume)
                if not process.run.producer and not process.run.steady:
                    self._later(DEAD_AFTER, lambda: self._declare_dead(process))
            case Fault.BLACKHOLE | Fault.REJECT:
                self._cut(event)
            case _:
                proxy.inflict(self._control, event.target, _AT_THE_PROXY[event.fault], event.seconds)
        who = "producer" if process.run.producer else "consumer"
        self.history.faults[f"{who} {event.fault}" if event.fault in _OF_PROCESSES else str(event.fault)] += 1
        self._note(f"{event.target} {event.fault} for {event.seconds:.1f} s")

    def _restart(self, process: Process) -> None:
        if process.run.ended is None:
            self._later(TICK, lambda: self._restart(process))
        elif process.run.how != "crashed":
            self._start(process.run.member)

    def _declare_dead(self, process: Process) -> None:
        run = process.run
        if process.stopped and run.ended is None and time.monotonic_ns() - run.stops[-1][0] > 0.9e9 * DEAD_AFTER:
            run.declared_dead = time.monotonic_ns()
            self._dead_consumers.append(f"{run.consumer}#stopped")
            DeadMembers.write(self._dead_members, self._dead_producers, self._dead_consumers)
            self.history.faults["consumer declared dead while stopped"] += 1
            self._note(f"{run.name} declared dead")

    def _cut(self, event: Event) -> None:
        assert self._network is not None
        port = None
        if not event.whole:
            endpoints = (self._folder / f"{event.target}.endpoints").read_text(encoding="utf-8").splitlines()
            port = int(self._rng.choice([each for each in endpoints if ":" in each[5:]]).rpartition(":")[2])
        self._network.cut(event.target, reject=event.fault is Fault.REJECT, port=port)
        self._cuts[event.target] += 1
        self._later(event.seconds, lambda: self._heal(event.target))

    def _heal(self, name: str) -> None:
        assert self._network is not None
        self._network.heal(name)

    def _kill_redis(self, away: float) -> None:
        pid = self._redis.pid
        if pid is None or self._redis_away:
            return
        self._redis_away = True
        self.history.redis_lost.append(time.monotonic_ns())
        os.kill(pid, 9)
        self.history.faults[str(Fault.REDIS_KILL)] += 1
        self._note(f"Redis killed for {away:.1f} s")
        self._later(away, self._restart_redis)

    def _restart_redis(self) -> None:
        if self._redis_away:
            self._redis.restart()
            self._redis_away = False

    # --- the proxy, and notes ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _proxy(self) -> Iterator[None]:
        within = [] if self._network is None else self._network.within("hub")
        with (self._folder / "proxy.log").open("ab") as log:
            process = subprocess.Popen(
                [*within, sys.executable, "-m", "soak.proxy", self._control],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True,
                process_group=0, env=self._environment,
            )  # fmt: skip
        assert process.stdout is not None
        try:
            if process.stdout.readline() != "ready\n":
                raise RuntimeError(f"the proxy does not begin; see {self._folder / 'proxy.log'}")
            yield
        finally:
            process.terminate()
            process.wait(END_SECONDS)
            process.stdout.close()

    def _note(self, what: str) -> None:
        self.history.log.append(f"{time.monotonic() - self.history.began:8.2f} {what}")


_OF_PROCESSES = (Fault.KILL, Fault.END, Fault.STOP)
_AT_THE_PROXY = {
    Fault.PROXY_STALL: proxy.STALL,
    Fault.PROXY_RESET: proxy.RESET,
    Fault.PROXY_TRUNCATE: proxy.TRUNCATE,
}
