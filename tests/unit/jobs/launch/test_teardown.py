import math

from dray.jobs.launch.shutdown import KillStage, ShutdownEscalation


class ManualClock:
    time = 100.0

    def now(self) -> float:
        return self.time


def test_means_become_firmer_as_the_deadline_comes_closer() -> None:
    clock = ManualClock()
    teardown = ShutdownEscalation(10.0, at_once=False, clock=clock)
    assert teardown.due_stages() == []
    assert teardown.seconds_to_next == 4.0
    clock.time += 4.0
    assert teardown.due_stages() == [KillStage.TERMINATE]
    assert teardown.due_stages() == []
    clock.time += 4.0
    assert teardown.due_stages() == [KillStage.DUMP_STACKS, KillStage.KILL]
    assert teardown.seconds_to_next == math.inf
    assert not teardown.has_ended
    clock.time += 12.0
    assert teardown.has_ended


def test_interrupted_job_is_asked_at_once() -> None:
    assert ShutdownEscalation(10.0, at_once=True, clock=ManualClock()).due_stages() == [KillStage.TERMINATE]


def test_hurry_kills_at_once_and_only_once() -> None:
    teardown = ShutdownEscalation(10.0, at_once=True, clock=ManualClock())
    teardown.hurry()
    assert teardown.due_stages() == [KillStage.KILL]
    teardown.hurry()
    assert teardown.due_stages() == []
