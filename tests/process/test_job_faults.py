import os
import re
import signal
from pathlib import Path

import pytest
from job_runner import job_settings, running


def test_r3_job_continues_when_a_rollout_replica_is_killed(tmp_path: Path) -> None:
    settings = job_settings("stop.at_least=150", "policy.args.repeats=true")
    with running(tmp_path, *settings) as job:
        job.wait_for("  step ")
        job.processes("dray.jobs.replica.rollout")[0].kill()
        assert job.end() == 0, job.story()
        assert "ended early: killed by signal 9" in job.text
        assert "dead: killed by signal 9" in str(job.summary()["replicas"])
        assert job.summary()["payloads"] == 150 * 8


@pytest.mark.measured
def test_r3_stopped_rollout_replica_is_reaped_and_ends_when_it_wakes(tmp_path: Path) -> None:
    # Rollouts are slow here, so that a replica holds work items at any time.
    settings = job_settings("stop.at_least=1e9", "policy.args.repeats=true", "rollout.args.pause=0.2")
    with running(tmp_path, *settings) as job:
        job.wait_for("  step ")
        stopped = job.processes("dray.jobs.replica.rollout")[0]
        stopped.suspend()
        job.wait_until(lambda: "given out again" in job.log("controller"), "the controller to give it up", 20.0)
        assert "dead: silent for" in job.log("controller")
        stopped.resume()
        job.wait_for("ended early: the controller had declared it dead (silent for ")
        job.process.send_signal(signal.SIGINT)
        assert job.end(bound=10.0) == 130


@pytest.mark.parametrize("role", ["rollout", "policy"])
def test_job_fails_at_once_when_replicas_die_before_the_controller_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        f"if 'dray.jobs.replica.{role}' in sys.orig_argv:\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with running(tmp_path, *job_settings("timeouts.start=600", "policy.restarts=1")) as job:
        assert job.end() == 1, job.story()
        assert f"failed: no {role} replica is left: {role}-0: killed by signal 9" in job.text
        assert "did not answer" not in job.text


def test_job_is_solved_by_a_worker_that_holds_the_interpreter_longer_than_a_replica_may_be_silent(
    tmp_path: Path,
) -> None:
    (tmp_path / "holding.py").write_text(
        "import ctypes, small\n"
        "class Worker(small.Worker):\n"
        "    def rollout(self, work_item):\n"
        "        if work_item.index == 0:\n"
        "            ctypes.PyDLL(None).sleep(3)\n"
        "        return super().rollout(work_item)\n"
    )
    # The replica itself may not take the controller for lost either.
    limits = ("controller.dead_after=1", "timeouts.controller_lost=1", "timeouts.http=1", "timeouts.stall=1.5")
    settings = ("rollout.worker=holding.py:Worker", "rollout.replicas=1", "stop.at_least=3", *limits)
    with running(tmp_path, *job_settings(*settings)) as job:
        assert job.end() == 0, job.story()
        assert "dead" not in job.log("controller")
        assert "stall: " in job.text


RAISED = r"Worker\.rollout\(\) raised ValueError: the environment broke \(small\.py:\d+ in rollout\)"


def test_rollout_that_raises_costs_an_attempt_and_is_done_by_another_replica(tmp_path: Path) -> None:
    settings = job_settings("rollout.args.raise_at=40", "rollout.args.raising=[1]", "stop.at_least=50")
    with running(tmp_path, *settings) as job:
        assert job.end() == 0, job.story()
        warning = rf"rollout-1: {RAISED}; work item \d+ has failed \(attempt 1 of 3\)"
        assert len(re.findall(warning, job.text)) == 1, job.text
        assert "Traceback" in job.log("rollout-1")
        assert "ended early" not in job.text
        found = job.summary()["work_items"]
        assert found["failed_attempts"] > 0
        assert found["given_up"] == 0


def test_work_items_of_which_every_attempt_raises_are_given_up_and_the_job_continues(tmp_path: Path) -> None:
    (tmp_path / "poisoned.py").write_text(
        "import small\n"
        "class Worker(small.Worker):\n"
        "    def rollout(self, work_item):\n"
        "        if work_item.index % 10 == 3:\n"
        "            raise ValueError('the environment broke')\n"
        "        return super().rollout(work_item)\n"
    )
    settings = job_settings("rollout.worker=poisoned.py:Worker", "policy.max_staleness=2", "stop.at_least=15")
    with running(tmp_path, *settings) as job:
        assert job.end() == 0, job.story()
        found = job.summary()["work_items"]
        assert found["given_up"] >= 12
        assert found["failed_attempts"] >= 3 * found["given_up"]
        assert "work item 3 is given up after 3 attempts: rollout-" in job.log("controller")
        assert job.summary()["payloads"] == 15 * 8
        assert job.summary()["delivery"]["too_old"] == 0


def test_job_fails_with_the_users_error_when_every_rollout_raises(tmp_path: Path) -> None:
    with running(tmp_path, *job_settings("rollout.args.raise_at=40", "stop.at_least=1e9")) as job:
        assert job.end() == 10
        reason = rf"16 work items in a row were given up: rollout-\d: {RAISED}"
        assert re.search(f"failed: {reason}", job.text), job.text
        assert re.match(reason, job.summary()["exit_reason"])
        assert job.checkpoint()["step"] > 0


def test_rollout_that_hangs_is_a_failed_attempt_and_its_replica_is_restarted(tmp_path: Path) -> None:
    settings = job_settings(
        "rollout.args.hang_at=20", "rollout.args.hanging=[1]", "rollout.timeout=1", "rollout.restarts=1",
        "stop.at_least=60", "policy.args.repeats=true", "policy.args.pause=0.1",
    )  # fmt: skip
    with running(tmp_path, *settings) as job:
        reason = r"Worker\.rollout\(\) of small\.py took longer than rollout\.timeout = 1 s for work item \d+"
        job.wait_for("restarting rollout-1 (restart 1 of 1)")
        assert re.search(rf"rollout-1 ended early: {reason}; see .*rollout-1\.log", job.text), job.text
        assert job.end() == 0, job.story()
        assert "in rollout" in job.log("rollout-1")
        assert job.summary()["work_items"]["failed_attempts"] >= 1


def test_replica_that_is_killed_is_restarted_even_if_it_is_the_only_one(tmp_path: Path) -> None:
    settings = job_settings(
        "rollout.replicas=1", "rollout.restarts=2", "stop.at_least=40", "policy.args.repeats=true"
    )
    with running(tmp_path, *settings) as job:
        job.wait_for("  step ")
        job.only("dray.jobs.replica.rollout").kill()
        job.wait_for("restarting rollout-0 (restart 1 of 2)")
        assert job.end() == 0, job.story()
        assert job.summary()["replicas"]["rollout-0"].startswith("left: ")


@pytest.mark.measured
def test_r4_job_fails_when_its_policy_is_killed_once_too_often(tmp_path: Path) -> None:
    with running(tmp_path, *job_settings("stop.at_least=1e9", "policy.restarts=0")) as job:
        job.wait_for("  step ")
        job.only("dray.jobs.replica.policy").kill()
        assert job.end(bound=15.0) == 1
        assert "failed: no policy replica is left" in job.text


@pytest.mark.parametrize("replicas", [2, pytest.param(12, marks=pytest.mark.endurance)])
def test_r7_job_fails_when_its_controller_is_killed_and_every_replica_ends_by_itself(
    tmp_path: Path, replicas: int
) -> None:
    # More payloads than a policy trains on wait when the end comes.
    settings = job_settings("stop.at_least=1e9", f"rollout.replicas={replicas}", "rollout.work_items_in_flight=64")
    with running(tmp_path, *settings) as job:
        job.wait_for("  step ")
        job.only("dray.jobs.controller.app").kill()
        assert job.end(bound=15.0) == 1
        assert "the controller ended early: killed by signal 9" in job.text
        assert job.log("supervisor").count("ended with code 143 (ended as asked (SIGTERM)") == replicas + 1
        assert "was killed" not in job.text
        assert job.checkpoint()["step"] > 0
        age = job.summary()["figures_age"]
        assert age > 0
        assert f"(its figures may be {age:.1f} s old: the controller was gone before the end)" in job.text


def test_r7_replicas_notice_by_themselves_that_the_controller_is_gone(tmp_path: Path) -> None:
    with running(tmp_path, *job_settings("stop.at_least=1e9")) as job:
        job.wait_for("  step ")
        job.process.send_signal(signal.SIGSTOP)  # so that the supervisor does not end them
        job.only("dray.jobs.controller.app").kill()
        job.wait_until_gone(20.0, "dray.jobs")
        job.process.send_signal(signal.SIGCONT)
        assert job.end(bound=15.0) == 1
        assert "the controller is lost" in job.log("policy-0")
        assert job.text.count("ended early: the controller was gone") == 3, job.story()
        assert job.checkpoint()["step"] > 0


@pytest.mark.measured
def test_r1_job_fails_when_redis_does_not_come_back(tmp_path: Path) -> None:
    settings = job_settings("stop.at_least=1e9", "timeouts.redis=2")
    with running(tmp_path, *settings) as job:
        job.wait_for("  step ")
        job.only("redis.sock").kill()
        assert job.end(bound=30.0) == 1, job.story()
        assert "Redis was gone" in job.text
        assert job.checkpoint()["step"] > 0


def test_r12_children_and_grandchildren_end_with_a_killed_supervisor(tmp_path: Path) -> None:
    settings = job_settings(
        "stop.at_least=1e9",
        "policy.checkpoint_every=1",
        "rollout.args.grandchild=true",
        "rollout.args.forking=true",
    )
    with running(tmp_path, *settings) as job:
        job.wait_for("  step ")
        assert len(job.processes("time.sleep(600)")) == 4
        # Controller and policy; each rollout replica with a child and a daemon that it has forked.
        assert len(job.processes("dray.jobs")) == 2 + 2 * 3
        job.process.kill()
        job.wait_until_gone(5.0)
        step = job.checkpoint()["step"]
    with running(tmp_path, "--resume", *job_settings(f"stop.at_least={step + 3}")) as job:
        assert job.end() == 0, job.story()


def test_r12_grandchildren_of_a_replica_that_is_still_set_up_end_with_a_killed_supervisor(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import time, small\n"
        "class Worker(small.Worker):\n"
        "    def setup(self, context):\n"
        "        super().setup(context)\n"
        "        time.sleep(600)\n"
    )
    settings = ("rollout.worker=slow.py:Worker", "rollout.args.grandchild=true", "rollout.args.forking=true")
    with running(tmp_path, *job_settings(*settings)) as job:
        # Each replica, and below it two programs, a child and a daemon.
        job.wait_until(lambda: len(job.processes("dray.jobs.replica.rollout")) == 2 * 3, "forked children")
        job.wait_until(lambda: len(job.processes("time.sleep(600)")) == 2 * 2, "programs")
        job.process.kill()
        job.wait_until_gone(5.0)


def test_r12_grandchildren_end_with_the_job(tmp_path: Path) -> None:
    with running(tmp_path, *job_settings("rollout.args.grandchild=true")) as job:
        job.wait_for("  step ")
        assert len(job.processes("time.sleep(600)")) == 4
        assert job.end() == 0, job.story()


def test_r11_hanging_child_has_its_stacks_dumped_and_is_killed(tmp_path: Path) -> None:
    settings = job_settings("policy.args.hang_at=3", "timeouts.shutdown=3")
    with running(tmp_path, *settings) as job:
        job.wait_for("  step 3")
        job.process.send_signal(signal.SIGINT)
        assert job.end(bound=10.0) == 130, job.story()
        assert "policy-0" in job.text
        assert "did not end in time and was killed" in job.text
        assert "small.py" in job.log("policy-0")
        assert "in train_step" in job.log("policy-0")


def test_r16_unfinished_start_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import time\nclass Trainer:\n    def setup(self, *arguments): time.sleep(600)\n"
        "    train_step = weights = save = load = setup\n"
    )
    settings = job_settings("policy.trainer=slow.py:Trainer", "timeouts.start=1000", "timeouts.shutdown=2")
    with running(tmp_path, *settings) as job:
        job.wait_for("started controller")
        job.process.send_signal(signal.SIGTERM)
        assert job.end(bound=10.0) == 143, job.story()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("job.sede=1", "job.sede = 1 is not allowed: unknown key (did you mean seed?)"),
        ("policy.batch_size=-1", "policy.batch_size = -1 is not allowed: must be a whole number, at least 1"),
        ("job.lane=rdma", "job.lane = 'rdma' is not allowed: must be \"auto\" or one of shm, ucx, tcp"),
        ("rollout.worker=small.py:Wroker", "small.py has no class Wroker, but Trainer, Worker"),
        ("rollout.worker=nothing.py:Worker", "there is no file"),
        ("policy.trainer=no_such_module:Trainer", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("policy.trainer=small.py:Worker", "it lacks train_step, weights, save, load"),
        ("controller.host=192.0.2.1", "must be an address of this machine"),
        ("redis.url=redis://127.0.0.1:1", "redis.url = 'redis://127.0.0.1:1' is not allowed"),
    ],
)
def test_r14_wrong_configuration_is_one_line_and_starts_nothing(tmp_path: Path, setting: str, words: str) -> None:
    with running(tmp_path, *job_settings(setting, "timeouts.redis=1")) as job:
        assert job.end(bound=30.0) == 2
        (line,) = job.lines
        assert words in line
        assert not job.output.exists()
