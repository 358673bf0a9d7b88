import pytest

from dray.jobs.controller.state import TRANSITIONS, Membership, final_phase
from dray.jobs.controller.work_queue import WorkQueue
from dray.jobs.messages.models import (
    FailedAttempt,
    MembershipError,
    MemberState,
    OutcomeKind,
    OutcomeReport,
    Phase,
    ProgressReport,
    Role,
)


class ManualClock:
    def __init__(self) -> None:
        self.time = 100.0

    def now(self) -> float:
        return self.time


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def job(clock: ManualClock) -> Membership:
    expected = {Role.ROLLOUT: 2, Role.POLICY: 1}
    return Membership(expected, WorkQueue(8), dead_after=10, start_timeout=60, clock=clock)


def outcome(kind: OutcomeKind, reason: str, cause: int | None = None) -> OutcomeReport:
    return OutcomeReport(kind=kind, reason=reason, cause=cause)


def start(job: Membership) -> None:
    job.register("rollout-0", Role.ROLLOUT, "a", 1)
    job.register("rollout-1", Role.ROLLOUT, "b", 2)
    job.register("policy-0", Role.POLICY, "c", 3)


def test_final_phases_have_no_way_out() -> None:
    assert not any(phase.is_final for phase, _ in TRANSITIONS)
    assert {phase for phase in Phase if phase.is_final} == {Phase.DONE, Phase.INTERRUPTED, Phase.FAILED}


def test_job_runs_once_one_replica_of_each_role_is_there(job: Membership) -> None:
    job.register("rollout-0", Role.ROLLOUT, "a", 1)
    assert job.phase is Phase.STARTING
    job.register("policy-0", Role.POLICY, "c", 3)
    assert job.phase is Phase.RUNNING


def test_job_does_not_end_before_its_first_replica_has_registered(job: Membership, clock: ManualClock) -> None:
    for _ in range(5):
        clock.time += 10
        job.reap()
    assert job.phase is Phase.STARTING


def test_replica_that_ends_before_the_others_came_does_not_end_the_job(job: Membership) -> None:
    job.register("rollout-0", Role.ROLLOUT, "a", 1)
    job.left("rollout-0", "a", "done")
    assert job.phase is Phase.STARTING


def test_start_bound_fails_a_job_whose_replicas_never_come(job: Membership, clock: ManualClock) -> None:
    clock.time += 60
    job.reap()
    assert job.phase is Phase.FAILED
    assert job.outcome is not None
    assert "registered" in job.outcome.reason


def test_silent_replica_is_reaped_and_its_work_items_are_given_again(job: Membership, clock: ManualClock) -> None:
    start(job)
    assert job.work_items.assign("rollout-0", 2) == [0, 1]
    clock.time += 6
    job.note_request("rollout-1", "b", ProgressReport(doing="rollout", seconds=1.0))
    job.note_request("policy-0", "c")
    clock.time += 6
    job.reap()
    assert job.members["rollout-0"].state is MemberState.DEAD
    assert job.phase is Phase.RUNNING
    assert job.work_items.assign("rollout-1", 2) == [0, 1]


def test_silent_replica_whose_process_runs_is_alive_until_that_is_not_known_any_more(
    job: Membership, clock: ManualClock
) -> None:
    start(job)
    for _ in range(4):
        clock.time += 9
        job.seen("rollout-0", 1, 0.0)
        job.seen("rollout-1", 1, 0.0)  # another process
        job.note_request("policy-0", "c")
        job.reap()
    states = {name: member.state for name, member in job.members.items()}
    active, dead = MemberState.ACTIVE, MemberState.DEAD
    assert states == {"rollout-0": active, "rollout-1": dead, "policy-0": active}
    # For reports of stalls it is silent all the same.
    assert clock.time - job.members["rollout-0"].last_request == 36
    clock.time += 4
    job.seen("rollout-0", 1, 4.0)
    job.note_request("policy-0", "c")
    clock.time += 6
    job.reap()
    assert job.members["rollout-0"].reason == "silent for 10.0 s"


def test_reaped_replica_that_wakes_is_refused(job: Membership, clock: ManualClock) -> None:
    start(job)
    clock.time += 11
    job.reap()
    with pytest.raises(MembershipError, match="silent"):
        job.note_request("rollout-0", "a")
    with pytest.raises(MembershipError):
        job.register("rollout-0", Role.ROLLOUT, "a", 1)


def test_restarted_replica_takes_the_place_of_its_predecessor(job: Membership) -> None:
    start(job)
    job.work_items.assign("rollout-0", 1)
    job.register("rollout-0", Role.ROLLOUT, "a2", 9)
    assert job.members["rollout-0"].pid == 9
    assert job.work_items.assign("rollout-0", 1) == [0]
    with pytest.raises(MembershipError):
        job.note_request("rollout-0", "a")


def test_job_without_policy_fails(job: Membership) -> None:
    start(job)
    job.died("policy-0", Role.POLICY, "killed by signal 9")
    assert job.phase is Phase.DRAINING
    job.left("rollout-0", "a", "job over")
    job.left("rollout-1", "b", "job over")
    assert job.phase is Phase.FAILED
    assert job.outcome == outcome("failed", "no policy replica is left: policy-0: killed by signal 9")


def test_late_report_of_the_end_of_an_earlier_process_changes_nothing_for_its_successor(job: Membership) -> None:
    start(job)
    job.register("policy-0", Role.POLICY, "c2", 33)
    job.died("policy-0", Role.POLICY, "killed by signal 9", pid=3, final=False)
    assert job.members["policy-0"].state is MemberState.ACTIVE
    job.died("policy-0", Role.POLICY, "killed by signal 9", pid=33)
    assert job.members["policy-0"].reason == "killed by signal 9"
    assert job.phase is Phase.DRAINING


def test_job_continues_without_one_rollout_replica_and_fails_without_any(job: Membership) -> None:
    start(job)
    job.died("rollout-0", Role.ROLLOUT, "killed by signal 9")
    assert job.phase is Phase.RUNNING
    job.died("rollout-1", Role.ROLLOUT, "killed by signal 9")
    assert job.phase is Phase.DRAINING
    assert job.outcome == outcome("failed", "no rollout replica is left: rollout-0: killed by signal 9")


@pytest.mark.parametrize(
    ("ends", "cause"),
    [
        ([("rollout-0", -9), ("rollout-1", -9)], "rollout-0"),
        ([("rollout-0", -9), ("rollout-1", 10)], "rollout-1"),
        ([("rollout-0", 12), ("rollout-1", -9)], "rollout-1"),
        ([("rollout-0", 0), ("rollout-1", 13)], "rollout-1"),
        ([("rollout-1", 17), ("rollout-0", 10)], "rollout-1"),
        ([("rollout-1", 0), ("rollout-0", 0)], "rollout-1"),
    ],
)
def test_job_fails_for_the_first_end_that_is_no_consequence_of_another(
    job: Membership, clock: ManualClock, ends: list[tuple[str, int]], cause: str
) -> None:
    start(job)
    for name, code in ends:
        clock.time += 1
        if code < 0:
            job.died(name, Role.ROLLOUT, f"code {code}", exit_code=code)
        else:
            job.left(name, "a" if name == "rollout-0" else "b", f"code {code}", exit_code=code)
    code = dict(ends)[cause]
    assert job.outcome == outcome("failed", f"no rollout replica is left: {cause}: code {code}", code)


def test_words_of_a_replica_that_has_left_stand_when_its_process_has_ended(job: Membership) -> None:
    start(job)
    job.left("policy-0", "c", "Trainer.weights() returned None", exit_code=17)
    job.died("policy-0", Role.POLICY, "the user's class returned what cannot be used", exit_code=17)
    assert job.members["policy-0"].reason == "Trainer.weights() returned None"
    assert job.outcome == outcome(
        "failed", "no policy replica is left: policy-0: Trainer.weights() returned None", 17
    )


def test_replica_that_dies_before_registering_counts_as_gone(job: Membership) -> None:
    job.register("rollout-0", Role.ROLLOUT, "a", 1)
    job.died("policy-0", Role.POLICY, "exit code 10")
    assert job.phase is Phase.DRAINING


def test_wait_for_a_rollout_replica_that_never_came_is_bounded(job: Membership, clock: ManualClock) -> None:
    job.register("rollout-0", Role.ROLLOUT, "a", 1)
    job.register("policy-0", Role.POLICY, "c", 3)
    for _ in range(8):
        clock.time += 8
        job.note_request("rollout-0", "a")
        job.note_request("policy-0", "c")
        job.reap()
    assert job.phase is Phase.RUNNING
    job.left("rollout-0", "a", "worker raised")
    assert job.phase is Phase.DRAINING


def test_solved_job_is_done_when_the_last_has_left_and_stays_done(job: Membership) -> None:
    start(job)
    job.stop("solved", "evaluation_return 480 at step 40")
    job.stop("interrupted", "SIGINT")
    job.left("rollout-0", "a", "job over")
    job.left("policy-0", "c", "job over")
    job.left("policy-0", "c", "job over")
    assert job.phase is Phase.DRAINING
    job.died("rollout-1", Role.ROLLOUT, "killed by signal 15")
    assert job.phase is Phase.DONE
    job.stop("interrupted", "SIGTERM")
    job.reap()
    assert job.phase is Phase.DONE
    assert job.outcome is not None
    assert job.outcome.kind == "solved"


def test_draining_job_takes_no_new_member_and_gives_no_work_item_again(job: Membership) -> None:
    start(job)
    job.stop("interrupted", "SIGINT")
    with pytest.raises(MembershipError, match="the job has been interrupted and takes no new members: SIGINT"):
        job.register("rollout-2", Role.ROLLOUT, "d", 4)


@pytest.mark.parametrize(
    ("kind", "phase"),
    [
        ("solved", Phase.DONE),
        ("finished", Phase.DONE),
        ("max_steps", Phase.FAILED),
        ("failed", Phase.FAILED),
        ("interrupted", Phase.INTERRUPTED),
    ],
)
def test_z9_last_phase_of_a_job_is_that_of_its_outcome(job: Membership, kind: OutcomeKind, phase: Phase) -> None:
    job.stop(kind, "because")
    assert job.phase is phase is final_phase(kind)
    with pytest.raises(MembershipError, match="takes no new members: because"):
        job.register("rollout-0", Role.ROLLOUT, "a", 1)


def test_notices_report_every_change(job: Membership) -> None:
    start(job)
    assert job.notices[0] == "rollout-0 registered (pid 1)"
    assert "phase starting -> running (quorum)" in job.notices


def restartable(clock: ManualClock, ranks: int = 1) -> Membership:
    expected = {Role.ROLLOUT: 2, Role.POLICY: ranks}
    job = Membership(expected, WorkQueue(8), dead_after=10, start_timeout=60, restartable=True, clock=clock)
    start(job)
    return job


def test_job_continues_while_its_policy_is_restarted(clock: ManualClock) -> None:
    job = restartable(clock)
    job.died("policy-0", Role.POLICY, "killed by signal 9", final=False)
    assert job.phase is Phase.RUNNING
    job.register("policy-0", Role.POLICY, "d", 9)
    clock.time += 9
    job.note_request("policy-0", "d")
    job.left("policy-0", "d", "train_step raised ValueError", exit_code=10)
    assert job.phase is Phase.RUNNING
    job.died("policy-0", Role.POLICY, "the user's class raised")
    assert job.phase is Phase.DRAINING
    reason = "no policy replica is left: policy-0: train_step raised ValueError"
    assert job.outcome == outcome("failed", reason, 10)


def test_job_does_not_wait_for_a_policy_that_would_come_to_the_same_again(clock: ManualClock) -> None:
    job = restartable(clock, ranks=2)
    job.register("policy-1", Role.POLICY, "e", 5)
    job.left("policy-0", "c", "Trainer.weights() returned None", exit_code=17)
    reason = "the policy group has lost 1 of its 2: policy-0: Trainer.weights() returned None"
    assert job.outcome == outcome("failed", reason, 17)


def test_job_does_not_wait_without_end_for_its_policy(clock: ManualClock) -> None:
    job = restartable(clock)
    job.died("policy-0", Role.POLICY, "killed by signal 9", final=False)
    for _ in range(12):
        clock.time += 5
        for name, incarnation in (("rollout-0", "a"), ("rollout-1", "b")):
            job.note_request(name, incarnation)
        job.reap()
    assert job.outcome == outcome("failed", "no policy replica is left: policy-0: killed by signal 9")


def test_group_that_has_lost_one_and_is_not_restarted_fails_the_job(clock: ManualClock) -> None:
    job = restartable(clock, ranks=2)
    job.register("policy-1", Role.POLICY, "e", 5)
    job.died("policy-1", Role.POLICY, "killed by signal 9")
    assert job.outcome == outcome("failed", "the policy group has lost 1 of its 2: policy-1: killed by signal 9")


def with_rollout_restarts(clock: ManualClock) -> Membership:
    expected = {Role.ROLLOUT: 1, Role.POLICY: 1}
    job = Membership(expected, WorkQueue(8), dead_after=10, start_timeout=60, rollout_restarts=1, clock=clock)
    job.register("rollout-0", Role.ROLLOUT, "a", 1)
    job.register("policy-0", Role.POLICY, "c", 3)
    return job


def test_job_continues_while_its_only_rollout_replica_is_restarted(clock: ManualClock) -> None:
    job = with_rollout_restarts(clock)
    job.died("rollout-0", Role.ROLLOUT, "killed by signal 9", pid=1, final=False, exit_code=-9)
    assert job.phase is Phase.RUNNING
    job.register("rollout-0", Role.ROLLOUT, "b", 2)
    job.died("rollout-0", Role.ROLLOUT, "killed by signal 9", pid=2, exit_code=-9)
    assert job.outcome == outcome("failed", "no rollout replica is left: rollout-0: killed by signal 9", -9)


@pytest.mark.parametrize("exit_code", [0, 2, 17])
def test_rollout_replica_that_ends_with_what_comes_again_is_not_waited_for(
    clock: ManualClock, exit_code: int
) -> None:
    job = with_rollout_restarts(clock)
    job.left("rollout-0", "a", "because", exit_code=exit_code)
    assert job.outcome == outcome("failed", "no rollout replica is left: rollout-0: because", exit_code)


def test_job_does_not_wait_without_end_for_a_rollout_replica(clock: ManualClock) -> None:
    job = with_rollout_restarts(clock)
    job.left("rollout-0", "a", "Worker.setup() raised ValueError", exit_code=10)
    for _ in range(12):
        assert job.phase is Phase.RUNNING
        clock.time += 5
        job.note_request("policy-0", "c")
        job.reap()
    reason = "no rollout replica is left: rollout-0: Worker.setup() raised ValueError"
    assert job.outcome == outcome("failed", reason, 10)


def fail_next(job: Membership, count: int) -> None:
    for _ in range(count):
        (index,) = job.work_items.assign("rollout-0", 1)
        job.failed(
            "rollout-0", [FailedAttempt(index=index, attempt=job.work_items.attempt(index), error="it broke")]
        )


def test_job_fails_when_work_items_in_a_row_are_given_up(clock: ManualClock) -> None:
    queue = WorkQueue(8, max_attempts=2)
    expected = {Role.ROLLOUT: 1, Role.POLICY: 1}
    job = Membership(expected, queue, dead_after=10, start_timeout=60, max_failures=2, clock=clock)
    job.register("rollout-0", Role.ROLLOUT, "a", 1)
    job.register("policy-0", Role.POLICY, "c", 3)
    fail_next(job, 2)
    assert "work item 0 is given up after 2 attempts: rollout-0: it broke" in job.notices
    queue.published("rollout-0", queue.assign("rollout-0", 1))
    fail_next(job, 3)
    assert job.phase is Phase.RUNNING
    fail_next(job, 1)
    assert job.outcome == outcome("failed", "2 work items in a row were given up: rollout-0: it broke", 10)
