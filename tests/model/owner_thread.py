"""A thread of the owner: its steps, the ring's lock, and the barrier.

Each step has at most one shared access. Steps whose number is in `UNLOCKED` begin without the ring's lock.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from model.machine import State
from model.world import World

if TYPE_CHECKING:
    from model.consumer import Consumer
    from model.properties import Properties

# Steps: places in `OwnerThread.steps`, to which planted defects append.
(
    BEGIN_OBSERVATION,
    OBSERVE,
    RETIRE,
    SCAN,
    MARK,
    BARRIER,
    END_OBSERVATION,
    VICTIM_BOARD,
    VICTIM_RETIRE,
    DROP,
    GIVE_BACK,
    OBSERVED,
    SLEEP,
    DONE,
    CLAIM,
    WRITE,
    COMMIT,
    CLOSE_WORD,
    CLOSE_GENERATION,
) = range(19)
BARRIER_RUNS: Final = 100
"""The barrier reaches the consumers' processors, one after the other, in any order."""

UNLOCKED: Final = frozenset(
    {
        BEGIN_OBSERVATION,
        BARRIER,
        BARRIER_RUNS,
        END_OBSERVATION,
        OBSERVED,
        SLEEP,
        DONE,
        CLAIM,
        WRITE,
        COMMIT,
        CLOSE_WORD,
    }
)
_TAKES_LOCK: Final = frozenset({BEGIN_OBSERVATION, END_OBSERVATION, OBSERVED, SLEEP, CLAIM, COMMIT, CLOSE_WORD})


class OwnerThread(ABC):
    """A thread of the owner.

    Attributes:
        name: its name in traces.
        processor: its processor.
        step: the place of its step.
        puts: how many payloads it puts.
        armed: the place of what it waits with: it has set the doorbell.
        signal: the place of what the ring's condition has notified.
        observes_again: the place of what it waits with: a barrier has failed: it observes again later.
    """

    puts = 0
    kind = "server"

    def __init__(self, world: World, properties: Properties, number: int) -> None:
        self.world = world
        self.properties = properties
        self.number = number
        self.name = name = self._name()
        self.processor = world.processor(name)
        self.slots = range(world.scenario.slots)
        self.step = world.variable(f"step of {name}", SLEEP)
        self.passed = world.variable(f"a barrier of {name} has passed")
        self.after = world.variable(f"step of {name} after the barrier")
        self.awaited = world.variable(f"consumers that the barrier of {name} has not reached")
        self.armed = world.variable(f"{name} has set the doorbell")
        self.signal = world.variable(f"{name} was notified")
        self.observes_again = world.variable(f"a barrier has failed, {name} observes again")
        self.others: list[OwnerThread] = []
        self.consumers: list[Consumer] = []
        self.steps: list[Callable[[State], None]] = []

    def _name(self) -> str:
        return "server's thread"

    def resolve(self, threads: list[OwnerThread], consumers: list[Consumer]) -> None:
        """Know the other threads of the owner, and the consumers that a barrier reaches."""
        self.others = [thread for thread in threads if thread is not self]
        self.consumers = consumers

    # --- questions ---------------------------------------------------------------------------------------------

    def can_step(self, state: bytes) -> bool:
        """A step of this thread is possible."""
        step = state[self.step]
        if step in (DONE, BARRIER_RUNS) or (step == SLEEP and not self.is_woken(state)):
            return False
        return step not in _TAKES_LOCK or all(other.has_unlocked(state) for other in self.others)

    @abstractmethod
    def is_woken(self, state: bytes) -> bool:
        """What this thread waits for has happened."""

    def do_step(self, state: State) -> None:
        """The next step."""
        self.steps[state[self.step]](state)

    def has_unlocked(self, state: bytes | State) -> bool:
        """This thread does not hold the ring's lock, and all that it stored under the lock is visible."""
        world = self.world
        return state[self.step] in UNLOCKED and world.holds_only(state, self.processor, world.content_words)

    def waits(self, state: bytes | State) -> bool:
        """This thread waits to be woken."""
        return state[self.step] == SLEEP

    # --- the barrier ------------------------------------------------------------------------------------------

    def _barrier_then(self, state: State, step: int) -> None:
        state[self.after] = step
        state[self.step] = BARRIER

    def _begin_barrier(self, state: State) -> None:
        """The barrier empties the buffer of this processor, then reaches those of registered processes."""
        world = self.world
        world.drain(state, self.processor)
        awaited = 0
        for consumer in self.consumers:
            if state[world.registered] >> consumer.process & 1:
                awaited |= 1 << consumer.number
        state[self.awaited] = awaited
        state[self.step] = BARRIER_RUNS
        if not awaited:
            self._barrier_passed(state)
        if world.tracing:
            world.note("membarrier begins")

    def barrier_can_reach(self, state: bytes, consumer: Consumer) -> bool:
        """The barrier has not reached a consumer's processor."""
        return bool(state[self.awaited] >> consumer.number & 1)

    def barrier_reaches(self, state: State, consumer: Consumer) -> None:
        """The barrier empties the buffer of a consumer's processor."""
        world = self.world
        world.drain(state, consumer.processor)
        if world.tracing:
            world.note(f"membarrier reaches the processor of {consumer.name}")
        state[self.awaited] &= ~(1 << consumer.number)
        if not state[self.awaited]:
            self._barrier_passed(state)

    def _barrier_passed(self, state: State) -> None:
        state[self.step] = state[self.after]
        state[self.passed] = state[self.after] == END_OBSERVATION
        state[self.after] = 0

    def barrier_can_fail(self, state: bytes) -> bool:
        """A barrier begins, and none has failed yet."""
        return state[self.step] == BARRIER and not state[self.world.barrier_failed]

    def barrier_fails(self, state: State) -> None:
        """The system call reports an error and has reached no processor. Waits observe again after a while."""
        world = self.world
        state[world.barrier_failed] = 1
        world.reached.add("barrier failed")
        for thread in (self, *self.others):
            state[thread.observes_again] = thread.puts > 0
        if world.tracing:
            world.note("membarrier fails")
        self._failed(state)

    def _failed(self, state: State) -> None:
        state[self.step] = state[self.after]
        state[self.after] = 0

    # --- notifications -----------------------------------------------------------------------------------------

    def notify(self, state: State) -> None:
        """Notify the claims that wait, and those that observe: they do so again before they wait."""
        for other in self.others:
            other.notified(state)

    @abstractmethod
    def notified(self, state: State) -> None:
        """What this thread waits for may have happened."""

    def notify_of_retirement(self, state: State) -> None:
        """Notify the threads that wait until payloads are consumed."""
        for other in self.others:
            if other.drains(state) and state[other.step] == SLEEP:
                state[other.signal] = 1

    def drains(self, state: bytes | State) -> bool:
        """This thread waits until every payload is consumed."""
        return False

    def has_finished(self, state: bytes | State) -> bool:
        """This thread has put all payloads; that of the server waits."""
        return state[self.step] == SLEEP
