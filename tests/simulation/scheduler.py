"""The order of execution: greenlets on one thread, a manual clock, and a seed that decides.

An *actor* is a greenlet that runs production code and gives way only where that code would block. Between two
such points nothing else happens. The clock moves a little with each step, and jumps to the next event when
no actor can run. The same seed gives the same run.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Sequence
from typing import NoReturn

from greenlet import GreenletExit, getcurrent, greenlet

from simulation.clock import ManualClock

MAX_STEPS = 400_000
"""A run that takes more of them goes round in circles."""
MAX_STEP_SECONDS = 40e-6
_EPSILON = 1e-6


class Violation(AssertionError):
    """Something that dray promises does not hold."""


class Interrupted(BaseException):
    """Strikes an actor in the middle of a wait, as a signal handler's exception does."""


class Signal:
    """Something that actors wait for."""

    __slots__ = ("_scheduler", "waiting")

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.waiting: list[Actor] = []

    def notify(self) -> None:
        """Wake all actors that wait now."""
        if self.waiting:
            woken, self.waiting = self.waiting, []
            for actor in woken:
                self._scheduler.wake(actor, True)


class Process:
    """Actors that are stopped, continued and killed together.

    Attributes:
        dead: it was killed; what is left of it is gone.
        ends: called when it is killed, to do what the kernel does with what it held.
        at_step: called by its actors before each access to shared memory.
    """

    def __init__(self, name: str, number: int) -> None:
        self.name = name
        self.pid = 1000 + number
        self.actors: list[Actor] = []
        self.dead = False
        self.ends: list[Callable[[], None]] = []
        self.at_step: Callable[[], None] = lambda: None


class Actor:
    """One thread of a simulated process.

    Attributes:
        bound: the deadline of what it does now; no wait may be longer, none may begin after it.
        slack: seconds that it may continue after `bound`.
        late: seconds by which it was resumed after its waits had ended, since `bound` was set.
        idles: it may wait without a bound, as a server does for work.
        granted: seconds of accesses to shared memory, by which `bound` was moved.
        locks: locks that it holds.
    """

    __slots__ = (
        "bound",
        "ended",
        "granted",
        "greenlet",
        "idles",
        "late",
        "locks",
        "name",
        "pending",
        "process",
        "queued",
        "signals",
        "slack",
        "stopped",
        "struck",
        "turn",
        "woken",
    )

    def __init__(
        self, ended: Signal, hub: greenlet, process: Process, name: str, run: Callable[[], None], idles: bool
    ) -> None:
        self.process = process
        self.name = name
        self.idles = idles
        self.bound = math.inf
        self.late = 0.0
        self.granted = 0.0
        self.locks = 0
        self.slack = _EPSILON
        self.turn = 0
        self.woken = False
        self.stopped = 0
        self.queued = False
        self.pending = False
        self.struck = False
        self.signals: Sequence[Signal] = ()
        self.ended = ended
        self.greenlet = greenlet(run, hub)

    @property
    def alive(self) -> bool:
        return not self.greenlet.dead and not self.process.dead


class Scheduler:
    """Runs actors one step at a time.

    Args:
        rng: decides.
        clock: the clock of the simulated world.
        traced: keep a line for everything that is noted.
    """

    def __init__(self, rng: random.Random, clock: ManualClock, traced: bool = False) -> None:
        self.rng = rng
        self.clock = clock
        self.now = clock.now
        self.steps = 0
        self.traced = traced
        self.trace: list[str] = []
        self.actor: Actor | None = None
        self.processes: list[Process] = []
        self.ending = False
        self._hub = getcurrent()
        self._ready: list[Actor] = []
        self._violation: Violation | None = None
        self._timers: list[tuple[float, int, Actor | Callable[[], None], int]] = []
        self._timer = 0

    # --- for the world ----------------------------------------------------------------------------------------

    def process(self, name: str) -> Process:
        """A new process without threads."""
        process = Process(name, len(self.processes))
        self.processes.append(process)
        return process

    def spawn(self, process: Process, name: str, run: Callable[[], None], idles: bool = False) -> Actor:
        """A new actor, which can run from now on."""
        actor = Actor(Signal(self), self._hub, process, f"{process.name}.{name}", self._guarded(run), idles)
        process.actors.append(actor)
        self._enqueue(actor)
        return actor

    def at(self, when: float, event: Callable[[], None]) -> None:
        """Call `event` at a time, outside of any actor."""
        self._timer += 1
        heapq.heappush(self._timers, (when, self._timer, event, 0))

    def note(self, text: str) -> None:
        """Add a line to the trace, if one is kept."""
        if self.traced:
            who = self.actor.name if self.actor is not None else "kernel"
            self.trace.append(f"{self.steps:6d} {self.now() - 1000.0:12.6f}  {who:<16} {text}")

    def stop(self, actor: Actor) -> None:
        """Let an actor not run until `resume` was called as often."""
        actor.stopped += 1
        if actor.queued:
            actor.queued = False
            self._ready.remove(actor)
            actor.pending = True

    def resume(self, actor: Actor) -> None:
        """Undo a `stop`."""
        actor.stopped -= 1
        if actor.pending and not actor.stopped:
            actor.pending = False
            self._enqueue(actor)

    def interrupt(self, actor: Actor) -> bool:
        """Have a wait of the actor end with `Interrupted`; False if it does not wait now."""
        if actor.queued or not actor.alive or actor is self.actor:
            return False
        actor.struck = True
        self.wake(actor, True)
        return True

    def kill(self, process: Process) -> None:
        """End a process where it stands: none of its code runs any more, not even to clean up."""
        if process.dead:
            return
        process.dead = True
        for actor in process.actors:
            self._forget(actor)
        for end in process.ends:
            end()
        if self.actor is not None and self.actor.process is process:
            self._hub.switch()

    # --- for actors -------------------------------------------------------------------------------------------

    def wait(self, signals: Sequence[Signal], until: float) -> bool:
        """Wait for one of `signals`, or for the time `until`; whether it was a signal."""
        actor = self.actor
        if actor is None or self.ending or actor.process.dead:
            raise GreenletExit
        self._check_wait(actor, until)
        actor.signals = signals
        for signal in signals:
            signal.waiting.append(actor)
        actor.turn += 1
        if until != math.inf:
            self._timer += 1
            heapq.heappush(self._timers, (until, self._timer, actor, actor.turn))
        elif not signals:
            raise Violation(f"{actor.name} waits for nothing, without a limit")
        try:
            self._give_way(actor)
        finally:
            actor.late += max(0.0, self.now() - until)
        return actor.woken

    def pause(self) -> None:
        """Let other actors run; resume when the seed decides."""
        actor = self.actor
        if actor is None or self.ending or actor.process.dead:
            raise GreenletExit
        self._check_wait(actor, self.now())
        began = self.now()
        self._enqueue(actor)
        try:
            self._give_way(actor)
        finally:
            actor.late += self.now() - began

    def sleep(self, seconds: float) -> None:
        """Do nothing for a while."""
        self.wait((), self.now() + seconds)

    def stall(self, seconds: float) -> None:
        """Be held up, as a thread is that gets no processor: an actor that waits for it has to wait."""
        actor = self.actor
        if actor is None or self.ending:
            return
        bound, actor.bound = actor.bound, math.inf
        began = self.now()
        try:
            self.sleep(seconds)
        finally:
            actor.bound = bound
            actor.late += max(0.0, self.now() - max(began, min(bound, self.now())))

    def block(self, signal: Signal) -> None:
        """Wait for another thread of the same process, which is about to continue: a delay, not a wait."""
        actor = self.actor
        if actor is None or self.ending:
            raise GreenletExit
        began, idles = self.now(), actor.idles
        actor.idles = True
        try:
            self.wait((signal,), math.inf)
        finally:
            actor.idles = idles
            actor.late += self.now() - began

    def violate(self, what: str) -> NoReturn:
        """Raise, and have `run` raise as well: what generators and `__del__` raise is lost."""
        self._violation = Violation(what)
        raise self._violation

    # --- the loop ---------------------------------------------------------------------------------------------

    def run(self, until: float, done: Callable[[], bool]) -> bool:
        """Run until `done`, or the time `until`; whether it was the former. `done` is called when time jumps."""
        clock, rng, ready, timers = self.clock, self.rng, self._ready, self._timers
        random_, ceiling = rng.random, MAX_STEP_SECONDS
        while True:
            if ready:
                clock.advance(random_() * ceiling)
            elif done():
                return True
            elif timers and timers[0][0] <= until:
                clock.advance(max(0.0, timers[0][0] - clock.now()) + random_() * ceiling)
            else:
                clock.advance(max(0.0, until - clock.now()))
                return False
            now = clock.now()
            while timers and timers[0][0] <= now:
                self._due(*heapq.heappop(timers)[2:])
            if not ready:
                continue
            index = int(random_() * len(ready))
            actor = ready[index]
            ready[index] = ready[-1]
            ready.pop()
            actor.queued = False
            self.steps += 1
            if self.steps > MAX_STEPS:
                raise Violation(f"no end after {MAX_STEPS} steps; {actor.name} runs")
            self.actor = actor
            actor.greenlet.switch()
            self.actor = None
            if self._violation is not None:
                raise self._violation
            if actor.greenlet.dead:
                actor.ended.notify()

    def end(self) -> None:
        """Unwind every actor that has not ended, without letting it wait again."""
        self.ending = True
        for process in self.processes:
            for actor in process.actors:
                self._forget(actor)
                for _ in range(100):
                    if not actor.greenlet or actor.greenlet.dead:
                        break
                    self.actor = actor
                    actor.greenlet.throw(GreenletExit)
                self.actor = None
        self._timers.clear()

    # --- inside -----------------------------------------------------------------------------------------------

    def wake(self, actor: Actor, by_signal: bool) -> None:
        """Resume a waiting actor; called by signals and timers."""
        for signal in actor.signals:
            if actor in signal.waiting:
                signal.waiting.remove(actor)
        actor.signals = ()
        actor.turn += 1
        actor.woken = by_signal
        self._enqueue(actor)

    def _give_way(self, actor: Actor) -> None:
        self._hub.switch()
        if self.ending:
            raise GreenletExit
        if actor.struck:
            actor.struck = False
            raise Interrupted

    def _guarded(self, run: Callable[[], None]) -> Callable[[], None]:
        def guarded() -> None:
            try:
                run()
            except GreenletExit:
                if not self.ending:
                    raise

        return guarded

    def _due(self, what: Actor | Callable[[], None], turn: int) -> None:
        if not isinstance(what, Actor):
            what()
        elif what.turn == turn and what.alive:
            self.wake(what, False)

    def _enqueue(self, actor: Actor) -> None:
        if actor.stopped:
            actor.pending = True
        elif not actor.queued and actor.alive:
            actor.queued = True
            self._ready.append(actor)

    def _forget(self, actor: Actor) -> None:
        for signal in actor.signals:
            if actor in signal.waiting:
                signal.waiting.remove(actor)
        actor.signals = ()
        actor.turn += 1
        if actor.queued:
            actor.queued = False
            self._ready.remove(actor)

    def _check_wait(self, actor: Actor, until: float) -> None:
        if actor.idles:
            return
        if until > actor.bound + actor.slack and until > self.now() + _EPSILON:
            self.violate(
                f"{actor.name} waits until {until - 1000:.6f}, {until - actor.bound:.6f} s beyond its deadline"
            )
        if self.now() > actor.bound + actor.late + actor.slack:
            self.violate(f"{actor.name} continues {self.now() - actor.bound:.6f} s after its deadline")
        if until == math.inf:
            self.violate(f"{actor.name} waits without a deadline")
