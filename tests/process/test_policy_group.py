"""Several policy replicas that learn together, on real processes."""

import signal
from pathlib import Path

import pytest
from job_runner import job_settings, running

AGAIN = ("policy.args.restarts=true", "rollout.args.restarts=true", "policy.args.repeats=true")


@pytest.mark.parametrize(("readers", "each"), [(1, 80), (2, 160)])
def test_ranks_of_a_group_train_on_their_part_and_the_step_is_committed_once(
    tmp_path: Path, readers: int, each: int
) -> None:
    with running(tmp_path, *job_settings("policy.replicas=2", f"policy.readers={readers}")) as job:
        assert job.end() == 0, job.story()
        summary = job.summary()
        assert (summary["solved"], summary["steps"], summary["payloads"]) == (True, 20, 160)
        assert (summary["delivery"]["trained"], summary["delivery"]["unfreed"]) == (160, 0)
        parts = [job.contributed(rank) for rank in range(2)]
        assert [len(part) for part in parts] == [each, each]
        assert parts[0] == parts[1] if readers == 2 else not set(parts[0]) & set(parts[1])
        assert job.checkpoint()["ranks"] == 2


@pytest.mark.parametrize(
    ("rank", "number"),
    [
        (1, signal.SIGKILL),
        (0, signal.SIGSTOP),
        pytest.param(0, signal.SIGKILL, marks=pytest.mark.endurance),
        pytest.param(1, signal.SIGSTOP, marks=pytest.mark.endurance),
    ],
)
@pytest.mark.measured
def test_r2_step_of_a_dead_rank_is_discarded_and_the_group_begins_another_epoch(
    tmp_path: Path, rank: int, number: signal.Signals
) -> None:
    settings = job_settings(
        *AGAIN, "policy.replicas=2", "policy.readers=2", "policy.checkpoint_every=3", "policy.args.pause=0.1",
        "stop.at_least=25",
    )  # fmt: skip
    with running(tmp_path, *settings) as job:
        job.wait_for_checkpoint()
        for process in job.processes("dray.jobs.replica.policy"):
            if process.cmdline()[4] == str(rank):
                process.send_signal(number)
        assert job.end() == 0, job.story()
        assert "restarting the policy group (restart 1 of 3)" in job.text
        assert "begins epoch 2" in job.log("policy-0")
        assert "resuming from step" in job.log("policy-0")
        parts = [job.contributed(rank) for rank in range(2)]
        assert parts[0] == parts[1]
        assert len(parts[0]) == 25 * 8
        found = job.summary()["delivery"]
        assert found["trained"] - found["rolled_back"] == 200


def test_group_resumes_from_its_checkpoint_and_with_as_many_ranks_only(tmp_path: Path) -> None:
    group = ("policy.replicas=2", "policy.readers=2")
    with running(tmp_path, *job_settings(*group, "stop.at_least=1e9")) as job:
        job.wait_for("  step ")
        job.process.send_signal(signal.SIGINT)
        assert job.end(bound=10.0) == 130, job.story()
        step = job.checkpoint()["step"]
    fewer = ("policy.replicas=1", "policy.readers=1")
    with running(tmp_path, "--resume", *job_settings(*fewer)) as job:
        assert job.end() == 2
        assert "policy.replicas = 1 is not allowed: must be 2" in job.text
    with running(tmp_path, "--resume", *job_settings(f"stop.at_least={step + 4}")) as job:
        assert job.end() == 0, job.story()
        assert job.contributed(0) == job.contributed(1)
        assert len(job.contributed()) == (step + 4) * 8
