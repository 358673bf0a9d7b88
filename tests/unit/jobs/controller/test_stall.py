from dray.jobs.controller.stall import JobSnapshot, MemberActivity, StallWatch, job_snapshot
from dray.jobs.controller.state import Membership
from dray.jobs.controller.work_queue import WorkQueue
from dray.jobs.messages.models import ProgressReport, Role

POLICY = MemberActivity("policy-0", "waiting for 8 of 8 payloads", "the rollout replicas", 31.2)
STUCK = MemberActivity("rollout-0", "generating", "", 30.9)
BUSY = MemberActivity("rollout-1", "generating", "", 0.2)


class ManualClock:
    time = 100.0

    def now(self) -> float:
        return self.time


def test_one_line_states_which_replica_waits_for_which_and_for_what_and_how_old_things_are() -> None:
    ages = {"payload": (3.0, "rollout-1"), "reference": (29.5, "policy-0")}
    assert JobSnapshot([STUCK, BUSY, POLICY], ages).line(30.0) == (
        "policy-0 waits for the rollout replicas, for 8 of 8 payloads, since 31.2 s; "
        "rollout-0 is at 'generating' since 30.9 s; "
        "oldest payload 3.0 s (rollout-1), no lease, oldest unacknowledged reference 29.5 s (policy-0)"
    )


def test_long_work_that_no_replica_waits_for_is_no_stall() -> None:
    assert JobSnapshot([STUCK, BUSY]).longest_wait(30.0) == 0
    assert JobSnapshot([STUCK, POLICY]).longest_wait(30.0) == 31.2
    assert JobSnapshot([STUCK, POLICY]).longest_wait(31.2) == 0


def test_silence_is_a_wait_and_is_named() -> None:
    silent = MemberActivity("rollout-0", "generating", "", 40.0, 39.0)
    assert JobSnapshot([silent]).longest_wait(30.0) == 39.0
    assert "rollout-0 is at 'generating' since 40.0 s and silent since 39.0 s" in JobSnapshot([silent]).line(30.0)


def test_stall_is_reported_when_it_begins_and_each_time_it_has_doubled() -> None:
    watch = StallWatch(10.0)
    reported = []
    for second in range(1, 100):
        wait = MemberActivity("policy-0", "waiting for the commit", "Redis", float(second))
        if watch.update(JobSnapshot([wait])):
            reported.append(second)
        assert (watch.stall is not None) == (second > 10)
    assert reported == [11, 23, 47, 95]
    assert not watch.update(JobSnapshot([BUSY]))
    assert watch.stall is None
    assert watch.update(JobSnapshot([POLICY]))
    assert watch.stall is not None
    assert (watch.stall.seconds, watch.stall.reports) == (31.2, 5)


def test_facts_are_those_of_the_members_now() -> None:
    clock = ManualClock()
    expected = {Role.ROLLOUT: 2, Role.POLICY: 1}
    job = Membership(expected, WorkQueue(8), dead_after=10, start_timeout=60, clock=clock)
    job.register("rollout-0", Role.ROLLOUT, "a", 1)
    waits = {"doing": "waiting for the first weights", "seconds": 5.0, "waits_for": "the policy"}
    job.note_request("rollout-0", "a", ProgressReport(**waits, ages={"payload": 2.0}))
    clock.time += 3
    facts = job_snapshot(job, clock.now(), 40.0)
    assert list(facts.activities) == [
        MemberActivity("rollout-0", "waiting for the first weights", "the policy", 8.0, 3.0),
        MemberActivity("the controller", "their registration", "rollout-1, policy-0", 40.0),
    ]
    assert facts.ages == {"payload": (5.0, "rollout-0")}
    job.register("rollout-1", Role.ROLLOUT, "b", 2)
    job.register("policy-0", Role.POLICY, "c", 3)
    working = {"doing": "generating", "seconds": 0.0}
    job.note_request("rollout-1", "b", ProgressReport(**working, ages={"payload": 9.0, "lease": 1.0}))
    assert job_snapshot(job, clock.now(), 41.0).ages == {
        "payload": (9.0, "rollout-1"),
        "lease": (1.0, "rollout-1"),
    }
    job.left("rollout-0", "a", "done")
    assert [each.who for each in job_snapshot(job, clock.now(), 41.0).activities] == ["rollout-1", "policy-0"]
