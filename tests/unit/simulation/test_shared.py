"""Memory that simulated processes share: which stores others see, and when."""

import random
from collections import Counter
from collections.abc import Callable

import pytest
from simulation import ManualClock
from simulation.faults import Fault, FaultPlan
from simulation.network import SimulatedKernel
from simulation.scheduler import Process, Scheduler
from simulation.shared import Memory, SimulatedMachine, SimulatedWords

LATE = 0.01


class Words:
    """Two words of a consumer, whose stores are late."""

    def __init__(self, *kinds: Fault) -> None:
        rng = random.Random(1)
        self.scheduler = Scheduler(rng, ManualClock())
        plan = FaultPlan(rng, Counter(), kinds)
        plan.store_delays = (LATE,)
        self.kernel = SimulatedKernel(self.scheduler, plan)
        self.process: Process = self.kernel.process("consumer")
        self.access = self.kernel.memory_of(self.process, late=True)
        self.kernel.registered[self.access] = None
        self.memory = Memory(2)
        self.words = SimulatedWords(self.memory, self.access)
        self.machine = SimulatedMachine(self.kernel, self.kernel.process("owner"), 1, 1)

    def run(self, what: Callable[[], None]) -> None:
        """Let a thread of the consumer do something."""
        actor = self.scheduler.spawn(self.process, "thread", what)
        assert self.scheduler.run(self.scheduler.now() + LATE / 2, lambda: actor.greenlet.dead)

    def store(self) -> None:
        """Change the first word."""
        self.words[0] = 5

    @property
    def seen(self) -> list[int]:
        """What others see."""
        return self.memory.words.tolist()


def test_a_process_sees_its_store_before_others_do() -> None:
    words, found = Words(), list[int]()

    def change() -> None:
        words.words[0] = 5
        found.extend(words.words[:].tolist())

    words.run(change)
    assert found == [5, 0]
    assert words.seen == [0, 0]
    words.scheduler.run(words.scheduler.now() + 2 * LATE, lambda: False)
    assert words.seen == [5, 0]


def test_a_barrier_makes_stores_visible_unless_it_fails() -> None:
    words = Words()
    words.run(words.store)
    assert words.seen == [0, 0]
    words.machine.barrier()
    assert words.seen == [5, 0]


def test_a_barrier_can_fail() -> None:
    words = Words(Fault.BARRIER_FAILS)
    failures = 0
    for _ in range(200):
        try:
            words.machine.barrier()
        except OSError:
            failures += 1
    assert 0 < failures < 200


def test_another_thread_of_the_process_makes_stores_visible() -> None:
    words = Words()
    words.run(words.store)
    words.run(lambda: words.words.__setitem__(1, 6))
    assert words.seen == [5, 0]


def test_the_stores_of_a_process_that_is_killed_are_not_lost_and_none_follows() -> None:
    words = Words()
    words.run(words.store)
    words.scheduler.kill(words.process)
    assert words.seen == [5, 0]
    words.words[1] = 6
    assert words.seen == [5, 0]


def test_words_outside_of_the_memory_are_an_error() -> None:
    words = Words()
    with pytest.raises(IndexError):
        words.words[2]
    words.words[-1] = 7
    assert words.seen == [0, 7]
