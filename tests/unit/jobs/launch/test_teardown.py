import math

from dray.jobs.launch.shutdown import Means, Teardown


class ManualClock:
    time = 100.0

    def now(self) -> float:
        return self.time


def test_means_become_firmer_as_the_deadline_comes_closer() -> None:
    clock = ManualClock()
    teardown = Teardown(10.0, at_once=False, clock=clock)
    assert teardown.take_due() == []
    assert teardown.seconds_to_next == 4.0
    clock.time += 4.0
    assert teardown.take_due() == [Means.TERMINATE]
    assert teardown.take_due() == []
    clock.time += 4.0
    assert teardown.take_due() == [Means.DUMP_STACKS, Means.KILL]
    assert teardown.seconds_to_next == math.inf
    assert not teardown.is_over
    clock.time += 12.0
    assert teardown.is_over


def test_interrupted_job_is_asked_at_once() -> None:
    assert Teardown(10.0, at_once=True, clock=ManualClock()).take_due() == [Means.TERMINATE]


def test_hurry_kills_at_once_and_only_once() -> None:
    teardown = Teardown(10.0, at_once=True, clock=ManualClock())
    teardown.hurry()
    assert teardown.take_due() == [Means.KILL]
    teardown.hurry()
    assert teardown.take_due() == []
