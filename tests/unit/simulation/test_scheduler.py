"""The simulation's own parts: which actor runs, which waits, and what counts as a violation."""

import random

import pytest
from simulation import ManualClock
from simulation.scheduler import Interrupted, Scheduler, Signal, Violation


def scheduler(seed: int = 1) -> Scheduler:
    return Scheduler(random.Random(seed), ManualClock())


def test_a_wait_ends_by_its_signal_or_by_its_time() -> None:
    world = scheduler()
    process, signal = world.process("p"), Signal(world)
    notes: list[tuple[str, bool, float]] = []

    def waits(name: str, seconds: float) -> None:
        woken = world.wait((signal,), world.now() + seconds)
        notes.append((name, woken, round(world.now() - 1000, 1)))

    world.spawn(process, "a", lambda: waits("a", 1.0))
    world.spawn(process, "b", lambda: waits("b", 9.0))
    world.at(1005.0, signal.notify)
    assert not world.run(1100.0, lambda: False)
    assert notes == [("a", False, 1.0), ("b", True, 5.0)]
    assert world.now() == 1100.0


def test_the_same_seed_runs_actors_in_the_same_order_and_others_in_others() -> None:
    def order(seed: int) -> list[str]:
        world = scheduler(seed)
        process = world.process("p")
        notes: list[str] = []

        def talks(name: str) -> None:
            for _ in range(5):
                notes.append(name)
                world.pause()

        for name in "abc":
            world.spawn(process, name, lambda name=name: talks(name))
        world.run(2000.0, lambda: False)
        return notes

    assert order(1) == order(1)
    assert len({tuple(order(seed)) for seed in range(20)}) > 10


def test_a_stopped_actor_resumes_where_it_was_and_what_it_waited_for_is_not_lost() -> None:
    world = scheduler()
    notes: list[float] = []

    def waits() -> None:
        world.sleep(1.0)
        notes.append(round(world.now() - 1000, 1))

    actor = world.spawn(world.process("p"), "a", waits)
    world.at(1000.5, lambda: world.stop(actor))
    world.at(1007.0, lambda: world.resume(actor))
    world.run(1100.0, lambda: False)
    assert notes == [7.0]


def test_a_killed_process_runs_no_more_of_its_code() -> None:
    world = scheduler()
    process = world.process("p")
    notes: list[str] = []
    process.ends.append(lambda: notes.append("kernel"))

    def works() -> None:
        try:
            world.sleep(10.0)
        finally:
            notes.append("cleaned up")

    world.spawn(process, "a", works)
    world.at(1001.0, lambda: world.kill(process))
    world.run(1100.0, lambda: False)
    assert notes == ["kernel"]
    world.end()


def test_an_interrupted_actor_is_notified_where_it_waits() -> None:
    world = scheduler()
    notes: list[str] = []

    def works() -> None:
        try:
            world.sleep(10.0)
        except Interrupted:
            notes.append("interrupted")

    actor = world.spawn(world.process("p"), "a", works)
    world.at(1001.0, lambda: world.interrupt(actor) and None)
    world.run(1100.0, lambda: False)
    assert notes == ["interrupted"]


@pytest.mark.parametrize("seconds", [2.0, float("inf")])
def test_a_wait_beyond_the_deadline_of_what_is_under_way_is_a_violation(seconds: float) -> None:
    world = scheduler()
    actor = None

    def works() -> None:
        assert actor is not None
        actor.bound = world.now() + 1.0
        world.wait((Signal(world),), world.now() + seconds)

    actor = world.spawn(world.process("p"), "a", works)
    with pytest.raises(Violation, match=r"beyond its deadline"):
        world.run(1100.0, lambda: False)


def test_going_round_in_circles_is_a_violation() -> None:
    world = scheduler()

    def works() -> None:
        while True:
            world.pause()

    world.spawn(world.process("p"), "a", works)
    with pytest.raises(Violation, match="no end"):
        world.run(1e9, lambda: False)
    world.end()
