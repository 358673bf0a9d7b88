"""What happens to payloads when the policy, its group, a rollout replica or Redis fails: rows R1, R2, R13,
R17 and H1.
"""

import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from job_runner import JobRun, job_settings, running

from dray.clock import Deadline
from dray.jobs.queue import JobKeys, RedisAddress, RedisConnection, RolloutConsumer
from dray.ring.direct import direct_problem

AGAIN = ("policy.args.restarts=true", "rollout.args.restarts=true", "policy.args.repeats=true")


def policy(job: JobRun, rank: int = 0) -> psutil.Process:
    (found,) = [each for each in job.processes("dray.jobs.replica.policy") if each.cmdline()[4] == str(rank)]
    return found


def wait_for_epoch(job: JobRun, number: int) -> None:
    log = job.output / "logs" / "policy-0.log"
    job.wait_until(lambda: log.exists() and log.read_text().count("begins epoch") > number, f"epoch {number}")


def account(job: JobRun) -> dict[str, int]:
    """The figures of the deliveries, after checking that they add up."""
    found: dict[str, int] = job.summary()["delivery"]
    ended = sum(found[name] for name in ("trained", "discarded", "too_old", "dead_letters"))
    assert found["published"] == ended + found["backlog"], found
    assert found["trained"] - found["rolled_back"] == len(job.contributed()), found
    return found


def test_r2_policy_that_dies_is_followed_by_one_that_trains_on_what_it_had_not_committed(tmp_path: Path) -> None:
    settings = job_settings(*AGAIN, "stop.at_least=30", "policy.checkpoint_every=4", "policy.args.pause=0.15")
    with running(tmp_path, *settings) as job:
        job.wait_for_checkpoint()
        # In the middle of a step, as nearly always.
        psutil.Process(policy(job).pid).kill()
        assert job.end() == 0, job.story()
        assert "policy-0 ended early: killed by signal 9" in job.text
        assert "restarting the policy group (restart 1 of 3)" in job.text
        log = job.log("policy-0")
        assert "begins epoch 2" in log
        assert "resuming from step" in log
        found = account(job)
        assert job.checkpoint()["step"] == 30
        assert len(job.contributed()) == 30 * 8
        assert [line["step"] for line in job.metrics()] == list(range(1, 31)), "those that were undone are gone"
        assert job.summary()["payloads"] == job.metrics()[-1]["payloads"] == 240, "of all policies together"
        assert found["rolled_back"] == found["trained"] - 240
        assert found["rolled_back"] % 8 == 0


@pytest.mark.endurance
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "more",
    [
        ("policy.checkpoint_every=5",),
        ("policy.checkpoint_every=2", "policy.ack=checkpoint"),
        ("policy.checkpoint_every=1", "policy.max_staleness=1"),
        ("policy.checkpoint_every=3", "policy.replicas=2", "policy.readers=2"),
        ("policy.checkpoint_every=3", "job.transfer=inline"),
    ],
)
def test_r2_policy_may_die_repeatedly_at_any_time(tmp_path: Path, more: tuple[str, ...]) -> None:
    chance = random.Random(str(more))
    kills = 8
    settings = job_settings(
        *AGAIN, *more, f"policy.restarts={kills}", "policy.max_deliveries=100", "stop.at_least=1e9",
        "policy.args.pause=0.02",
    )  # fmt: skip
    with running(tmp_path, *settings) as job:
        for number in range(kills):
            wait_for_epoch(job, number)
            time.sleep(chance.uniform(0.0, 1.5))
            victims = job.processes("dray.jobs.replica.policy")
            victims[chance.randrange(len(victims))].kill()
            job.wait_for(f"restarting the policy group (restart {number + 1} of {kills})")
        wait_for_epoch(job, kills)
        step = job.step()
        job.wait_until(lambda: job.step() not in range(step + 10), "further steps", 40.0)
        job.process.send_signal(signal.SIGINT)
        assert job.end(bound=10.0) == 130, job.story()
        account(job)


def test_r17_paused_policy_that_wakes_has_its_commit_refused_and_exits(tmp_path: Path) -> None:
    slow = "policy.args.pause=0.5"
    settings = job_settings(
        *AGAIN, slow, "stop.at_least=8", "controller.dead_after=40", "timeouts.controller_lost=40"
    )
    with running(tmp_path, *settings) as job:
        job.wait_for("  step ")
        paused = policy(job)
        paused.suspend()
        spec = job.spec()
        with RedisConnection(RedisAddress(spec.redis_url)) as connection:
            # What another epoch of the group does, up to here.
            other = RolloutConsumer(connection, JobKeys(spec.job_id), "policy-0.other")
            other.attach()
            other.begin_epoch()
            held = other.claim_others()
            trained = other.statistics().counters["trained"]
            assert 8 <= len(held) <= 16, "a step is under way, and the payloads of the next one are read"
            paused.resume()
            job.wait_for("policy-0 ended early: the policy group has a newer epoch")
            counters = other.statistics().counters
        assert counters["trained"] == trained
        assert job.end() == 0, job.story()
        assert "still has epoch 1" in job.log("policy-0")
        assert "restarting the policy group (restart 1 of 3)" in job.text
        account(job)


def test_r17_paused_policy_is_replaced_once_it_counts_as_dead(tmp_path: Path) -> None:
    settings = job_settings(*AGAIN, "stop.at_least=30", "policy.args.pause=0.1")
    with running(tmp_path, *settings) as job:
        job.wait_for("  step ")
        policy(job).suspend()
        job.wait_for("and is killed")
        assert job.end() == 0, job.story()
        assert len(re.findall(r"policy-0 is silent for \d.*and is killed", job.text)) == 1
        assert "dead: silent for" in job.log("controller")
        assert len(job.contributed()) == 240
        account(job)


# The policy is slow, so that every ring holds payloads that no replica has read.
SLOW_POLICY = (
    "policy.args.repeats=true",
    "stop.at_least=12",
    "policy.args.pause=0.3",
    "rollout.work_items_in_flight=32",
)


@pytest.mark.skipif(bool(direct_problem()), reason=direct_problem() or "-")
def test_h1_payloads_of_a_killed_rollout_replica_are_trained_on(tmp_path: Path) -> None:
    with running(tmp_path, *job_settings(*SLOW_POLICY)) as job:
        job.wait_for("  step ")
        job.rollout_with_payloads(12).kill()
        assert job.end() == 0, job.story()
        kept = re.findall(r"has died; (\d+) payloads \(\d+ bytes\) are kept", job.log("supervisor"))
        assert sum(map(int, kept)) >= 1, job.story()
        assert job.summary()["lost"] == account(job)["discarded"] == 0
        assert job.summary()["payloads"] == 12 * 8


def test_r13_lost_rollouts_are_counted_and_training_continues(tmp_path: Path) -> None:
    with running(tmp_path, *job_settings(*SLOW_POLICY, "agent.memory=0")) as job:
        job.wait_for("  step ")
        job.rollout_with_payloads(12).kill()
        assert job.end() == 0, job.story()
        summary = job.summary()
        assert summary["lost"] >= 1
        assert summary["lost"] == account(job)["discarded"]
        assert "is lost" in job.log("policy-0")
        assert summary["payloads"] == 12 * 8


def test_what_a_checkpoint_has_is_committed_and_not_trained_on_again(tmp_path: Path) -> None:
    settings = job_settings(
        *AGAIN,
        "policy.ack=checkpoint",
        "policy.checkpoint_every=2",
        "policy.args.die_before_commit=true",
        "stop.at_least=10",
        "job.lane=tcp",
    )
    with running(tmp_path, *settings) as job:
        assert job.end() == 0, job.story()
        assert "policy-0 ended early: killed by signal 9" in job.text
        assert "resuming from step 2 of" in job.log("policy-0")
        assert "16 payloads that the checkpoint has are committed" in job.log("policy-0")
        found = account(job)
        assert (found["rolled_back"], len(job.contributed())) == (0, 80)
        assert found["unfreed"] == 0, "when the job ends, and not when the last of them were committed"
        # Those of the last two steps, which were committed when this checkpoint was there.
        assert (len(job.checkpoint()["unconfirmed"]), job.checkpoint()["committed"]) == (16, 64)


def test_what_a_checkpoint_has_counts_as_trained_although_redis_ended_before_its_commit(tmp_path: Path) -> None:
    settings = ("policy.ack=checkpoint", "policy.checkpoint_every=2", "policy.args.die_before_commit=true")
    with running(tmp_path, *job_settings(*settings, "policy.restarts=0")) as job:
        assert job.end() == 1, job.story()
        assert (job.checkpoint()["step"], len(job.checkpoint()["unconfirmed"])) == (2, 16)
    with running(tmp_path, "--resume", *job_settings("stop.at_least=5", "policy.restarts=3")) as job:
        assert job.end() == 0, job.story()
        delivery = job.summary()["delivery"]
        assert (delivery["trained"], delivery["rolled_back"]) == (len(job.contributed()), 0)
        assert job.checkpoint()["committed"] + len(job.checkpoint()["unconfirmed"]) == delivery["trained"]


def test_payload_that_kills_the_policy_repeatedly_becomes_a_dead_letter(tmp_path: Path) -> None:
    settings = job_settings(
        *AGAIN, "policy.args.poison=20", "policy.max_deliveries=2", "policy.checkpoint_every=1",
        "stop.at_least=12",
    )  # fmt: skip
    with running(tmp_path, *settings) as job:
        assert job.end() == 0, job.story()
        found = account(job)
        assert 1 <= found["dead_letters"] <= 8
        assert "is a dead letter after 2 deliveries" in job.log("policy-0")
        assert "restarting the policy group (restart 2 of 3)" in job.text
        assert "3 of 3" not in job.text


def test_payload_that_the_stream_does_not_list_is_reclaimed(tmp_path: Path) -> None:
    settings = job_settings("stop.at_least=1e9", "policy.args.pause=0.2", "rollout.work_items_in_flight=32")
    with running(tmp_path, *settings) as job:
        job.wait_for("  step ")
        spec = job.spec()
        keys = JobKeys(spec.job_id)

        def newest(client: Any) -> Any:
            return client.do("XREVRANGE", keys.rollouts, "+", "-", "COUNT", 1)

        def not_read(client: Any) -> int:
            (group,) = client.do("XINFO", "GROUPS", keys.rollouts)
            return int(dict(zip(group[::2], group[1::2], strict=True))[b"lag"] or 0)

        with RedisConnection(RedisAddress(spec.redis_url)) as connection:
            # The policy reads 8 at a time, and trains on them for a while: the newest one is not read soon.
            job.wait_until(lambda: connection.call("look", not_read, Deadline.after(5)) > 8, "9 unread entries")
            ((entry, fields),) = connection.call("look", newest, Deadline.after(5))
            identity = fields[1] + b":" + fields[3]
            connection.call("lose", lambda client: client.do("XDEL", keys.rollouts, entry), Deadline.after(5))
            connection.call("lose", lambda client: client.do("HDEL", keys.index, identity), Deadline.after(5))
        logs = ["rollout-0", "rollout-1"]
        job.wait_until(lambda: any("is an orphan" in job.log(name) for name in logs), "its end as an orphan")
        job.process.send_signal(signal.SIGINT)
        assert job.end(bound=10.0) == 130, job.story()
        assert job.summary()["delivery"]["reclaimed"] == 1


KEEPING = """
from dataclasses import replace
import numpy as np
import small

class Worker(small.Worker):
    def rollout(self, work_item):
        return {**super().rollout(work_item), "frames": np.zeros(1 << 16, np.float32)}

class Trainer(small.Trainer):
    kept = []
    def train_step(self, trajectories):
        self.kept += [each.arrays["frames"] for each in trajectories]
        return super().train_step(trajectories)
"""


def keeping(tmp_path: Path, *more: str) -> tuple[str, ...]:
    (tmp_path / "keeping.py").write_text(KEEPING)
    classes = ("rollout.worker=keeping.py:Worker", "policy.trainer=keeping.py:Trainer")
    return job_settings(*classes, "rollout.slot_bytes=1048576", "rollout.slots=8", *more)


@pytest.mark.parametrize("ranks", [1, 2])
def test_trainer_that_keeps_arrays_beyond_its_step_is_named_before_the_rings_are_full(
    tmp_path: Path, ranks: int
) -> None:
    with running(tmp_path, *keeping(tmp_path, "stop.at_least=1e9", f"policy.replicas={ranks}")) as job:
        job.wait_for("the trainer keeps arrays 'frames' of ")
        names = [f"policy-{rank}" for rank in range(ranks)]
        job.wait_until(
            lambda: all("keeps arrays 'frames' of" in job.log(name) for name in names), "the warning of each rank"
        )
        job.process.send_signal(signal.SIGINT)
        assert job.end(bound=20.0) == 130, job.story()


def test_trainer_that_is_given_copies_may_keep_them(tmp_path: Path) -> None:
    with running(tmp_path, *keeping(tmp_path, "policy.in_place=false")) as job:
        assert job.end() == 0, job.story()
        assert "keeps arrays" not in job.text


def test_nothing_too_old_is_trained_on_with_admission(tmp_path: Path) -> None:
    settings = job_settings(
        "policy.max_staleness=1", "policy.args.oldest=1", "rollout.args.pause=0.01", "stop.at_least=30"
    )
    with running(tmp_path, *settings) as job:
        assert job.end() == 0, job.story()
        assert job.summary()["staleness_max"] <= 1
        assert account(job)["too_old"] == 0


def test_what_is_too_old_is_dropped_and_counted(tmp_path: Path) -> None:
    settings = job_settings(
        "policy.max_staleness=1",
        "policy.staleness=drop",
        "policy.args.oldest=1",
        "rollout.work_items_in_flight=64",
        "rollout.slots=64",
        "stop.at_least=20",
    )
    with running(tmp_path, *settings) as job:
        assert job.end() == 0, job.story()
        assert job.summary()["staleness_max"] <= 1
        assert account(job)["too_old"] > 0
        assert job.summary()["payloads"] == 160


def test_what_a_killed_job_had_committed_after_its_checkpoint_is_rolled_back(tmp_path: Path) -> None:
    settings = job_settings("stop.at_least=1e9", "policy.checkpoint_every=7", "policy.args.pause=0.05")
    with running(tmp_path, *settings) as job:
        job.wait_for_checkpoint()
        job.wait_until(lambda: job.step() > 7 + job.checkpoint()["step"] % 7, "another step")
        job.process.kill()
        job.wait_until_gone(5.0)
        done, kept = job.metrics()[-1], job.checkpoint()
    again = job_settings(f"stop.at_least={kept['step'] + 3}")
    with running(tmp_path, "--resume", *again) as job:
        assert job.end() == 0, job.story()
        delivery = job.summary()["delivery"]
        assert delivery["rolled_back"] >= done["committed"] - kept["contributed"]
        assert delivery["trained"] - delivery["rolled_back"] == len(job.contributed()) == (kept["step"] + 3) * 8


def test_weights_whose_commit_redis_did_not_take_have_a_version_of_their_own(tmp_path: Path) -> None:
    held_by = tmp_path / "held"
    os.mkfifo(held_by)
    settings = job_settings("stop.at_least=1e9", "policy.args.held_at=8", f'policy.args.held_by="{held_by}"')
    with running(tmp_path, *settings) as job:
        with held_by.open("w"):  # the ninth step is under way
            for redis in job.processes("redis.sock"):
                redis.suspend()
            job.process.send_signal(signal.SIGINT)
            job.wait_until(lambda: "stopping:" in job.log("policy-0"), "the policy's word that it stops")
        assert job.end(bound=15.0) == 130, job.story()
        assert "although it is unknown whether the group has a newer epoch" in job.log("policy-0")
    assert job.checkpoint()["step"] == 9
    assert [line["step"] for line in job.metrics()] == list(range(1, 10)), "each step of the checkpoint has a line"
    # Its weights are those of step 9, and called so: the rollout workers of `job_runner` check it.
    with running(tmp_path, "--resume", *job_settings("stop.at_least=12")) as job:
        assert job.end() == 0, job.story()
