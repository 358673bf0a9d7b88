"""Faults of a whole job that are not in `test_job_faults.py`: the rows of docs/reference/failure-modes.md."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from job_runner import CLASSES, JOB, job_settings, running

from dray.clock import Stopwatch
from dray.jobs.controller.listener import advertise, bind
from dray.jobs.folder import JobFolder, JobSpec
from dray.jobs.job_file import load_job
from dray.jobs.messages import models
from dray.jobs.messages.controller_client import ControllerClient
from dray.jobs.queue import start_redis

FOREVER = "stop.at_least=1e9"


def spec_of(folder: Path, *settings: str) -> JobSpec:
    """A job's spec, written for processes that are started without a supervisor."""
    (folder / "small.py").write_text(CLASSES)
    (folder / "job.toml").write_text(JOB)
    config = load_job(folder / "job.toml", [f"job.output={json.dumps(str(folder / 'out'))}", *settings])
    output = JobFolder(folder / "out")
    spec = JobSpec(config, folder / "job.toml", output, b"s" * 32, "unix:///none", "id", False, 0)
    spec.folder.run.mkdir(parents=True)
    spec.write()
    return spec


def test_r1_redis_that_is_away_at_the_start_is_waited_for(tmp_path: Path) -> None:
    with start_redis(tmp_path / "redis") as server:
        assert server.pid is not None
        redis = psutil.Process(server.pid)
        redis.suspend()
        try:
            with running(tmp_path, *job_settings(f"redis.url={server.address.url}", "timeouts.redis=30")) as job:
                job.wait_for("does not answer; waiting for it, at most 30 s")
                redis.resume()
                assert job.end() == 0, job.story()
        finally:
            redis.resume()


def test_r3_replicas_may_join_and_leave_while_the_job_runs(tmp_path: Path) -> None:
    with running(tmp_path, *job_settings(FOREVER, "policy.args.repeats=true")) as job:
        job.wait_for("  step ")
        spec = str(job.output / ".run" / "job.json")
        command = [sys.executable, "-m", "dray.jobs.replica.rollout", spec, "7"]
        with (tmp_path / "joined.log").open("wb") as log, subprocess.Popen(command, stderr=log) as joined:
            try:
                with job.controller() as client:
                    job.wait_until(
                        lambda: any(
                            each.name == "rollout-7" and each.progress.counters.get("payloads", 0) > 20
                            for each in client.status().members
                        ),
                        "payloads of the replica that joined",
                    )
                joined.terminate()
                assert joined.wait(15) == 143
            finally:
                joined.kill()
        text = (tmp_path / "joined.log").read_text()
        order = (
            "no more work items",
            "serve payloads until",
            "stop serving payloads",
            "last heartbeat",
            "unregister",
        )
        places = [text.index(words) for words in order]
        assert places == sorted(places), text
        assert "were not consumed" not in text
        assert "rollout-7 left: received SIGTERM" in job.log("controller")
        job.process.send_signal(signal.SIGINT)
        assert job.end(bound=15.0) == 130, job.story()
        assert job.summary()["lost"] == 0


def test_r4_job_whose_replicas_are_all_killed_ends_as_failed(tmp_path: Path) -> None:
    with running(tmp_path, *job_settings(FOREVER)) as job:
        job.wait_for("  step ")
        for process in (*job.processes("dray.jobs.replica.rollout"), *job.processes("dray.jobs.replica.policy")):
            process.kill()
        assert job.end(bound=15.0) == 1, job.story()
        assert "replica is left" in job.text
        assert "phase draining -> failed" in job.log("controller")


def test_r4_finished_work_counts_although_a_replica_had_to_be_killed(tmp_path: Path) -> None:
    held_by = tmp_path / "held"
    os.mkfifo(held_by)
    settings = job_settings(
        "rollout.args.hang_at=0", "rollout.args.hanging=[1]", "timeouts.shutdown=4", "rollout.work_item_batch=1",
        "rollout.work_items_in_flight=1000", "policy.args.held_at=2", f'policy.args.held_by="{held_by}"',
    )  # fmt: skip
    with running(tmp_path, *settings) as job:
        with held_by.open("w"):
            # The other one waits for room, and leaves work items.
            job.wait_until((job.output / "rollout-1-hangs").exists, "a hanging rollout")
        assert job.end() == 0, job.story()
        assert "rollout-1" in job.text
        assert "did not end in time and was killed" in job.text
        assert job.summary()["solved"]


def test_r5_controller_without_replicas_waits_for_the_first_until_its_bound(tmp_path: Path) -> None:
    settings = ("controller.dead_after=1", "controller.heartbeat_interval=0.3", "timeouts.start=6")
    spec = spec_of(tmp_path, *settings)
    with bind("127.0.0.1", 0) as listener:
        advertise(spec.folder, listener, spec.token)
        command = [sys.executable, "-m", "dray.jobs.controller.app", str(spec.folder.spec), str(listener.fileno())]
        with (tmp_path / "controller.log").open("wb") as log:
            controller = subprocess.Popen(command, stderr=log, pass_fds=[listener.fileno()])
    try:
        with ControllerClient.of_address_file(spec.folder.controller_address, spec.token, 10.0) as client:
            while client.status().seconds < 2.5:  # more than twice `dead_after`
                assert client.status().phase == "starting"
                assert controller.poll() is None
            # Nor does one that comes and goes end it: the others are expected.
            one = {"name": "rollout-0", "incarnation": "a"}
            client.post("/register", models.Register(**one, role="rollout", pid=1), models.Directive)  # type: ignore[arg-type]
            client.post("/unregister", models.Unregister(**one, reason="enough"), models.Directive)
            assert client.status().phase == "starting"
        assert controller.wait(20) == 1
        outcome = models.Status.model_validate_json(spec.folder.outcome.read_bytes())
        assert outcome.outcome is not None
        assert outcome.outcome.reason == "not every replica registered within 6 s"
        assert outcome.phase == "failed"
    finally:
        controller.kill()
        controller.wait()


def test_r6_replica_that_is_stuck_is_reported_with_the_replicas_that_wait_for_it(tmp_path: Path) -> None:
    settings = job_settings(FOREVER, "policy.args.hang_at=3", "timeouts.stall=1.5")
    with running(tmp_path, *settings) as job:
        job.wait_for("stall: rollout-")
        job.wait_for("(policy-0)\n")
        line = next(line for line in job.text.splitlines() if "stall: rollout-" in line)
        assert re.search(r"rollout-\d waits for the policy, for work items, since [\d.]+ s", line), line
        assert "policy-0 is at 'training step 4' since" in line
        assert re.search(r"oldest payload [\d.]+ s \(rollout-\d\), no lease, ", line), line
        assert re.search(r"oldest unacknowledged reference [\d.]+ s \(policy-0\)$", line), line
        assert "WARNING dray.jobs.controller.app: stall: rollout-" in job.log("controller")
        with job.controller() as client:
            stall = client.status().stall
            assert stall is not None
            assert "policy-0 is at 'training step 4' since" in stall.line
        job.process.send_signal(signal.SIGINT)
        assert job.end(bound=15.0) == 130, job.story()


def test_r8_controller_that_hangs_ends_the_job_within_the_bounds(tmp_path: Path) -> None:
    with running(tmp_path, *job_settings(FOREVER)) as job:
        job.wait_for("  step ")
        job.only("dray.jobs.controller.app").suspend()
        assert job.end(bound=25.0) == 1, job.story()
        assert job.text.count("ended early: the controller was gone") == 3
        assert "controller (pid" in job.text
        assert job.checkpoint()["step"] > 0


def test_controller_that_the_supervisor_ends_because_it_hung_is_no_reason_of_its_own(tmp_path: Path) -> None:
    settings = job_settings(FOREVER, "controller.dead_after=20", "timeouts.shutdown=10")
    with running(tmp_path, *settings) as job:
        job.wait_for("  step ")
        controller = job.only("dray.jobs.controller.app")
        controller.suspend()
        job.wait_for("the controller did not answer")
        job.wait_until(lambda: _has_pending(controller.pid, signal.SIGTERM), "SIGTERM to the controller")
        controller.resume()
        assert job.end() == 1, job.story()
        reason = job.summary()["exit_reason"]
        assert reason.startswith("the controller did not answer"), job.story()
        assert f"failed: {reason}" in job.text
        assert "controller received SIGTERM" in job.log("controller")
        assert "received SIGTERM" not in job.text


def _has_pending(pid: int, number: signal.Signals) -> bool:
    """Whether a process that is stopped has been sent a signal."""
    fields = dict(line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(fields["ShdPnd"], 16) >> number - 1 & 1)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"])
def test_r8_replica_gives_up_a_peer_that_hangs_within_its_bound(tmp_path: Path, answer: bytes) -> None:
    spec = spec_of(tmp_path, "timeouts.start=2")
    over = threading.Event()

    def drip() -> None:
        """Takes connections, sends nothing or too little, and then a byte now and then."""
        while not over.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                while answer and not over.wait(0.2):
                    try:
                        connection.send(answer if connection.recv(65536) else b" ")
                    except OSError:
                        break
                over.wait()

    with bind("127.0.0.1", 0) as listener:
        advertise(spec.folder, listener, spec.token)
        thread = threading.Thread(target=drip)
        thread.start()
        command = [sys.executable, "-m", "dray.jobs.replica.rollout", str(spec.folder.spec), "0"]
        replica = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            began = Stopwatch()
            _, text = replica.communicate(timeout=20)
            assert replica.returncode == 11, text
            assert "the controller did not answer POST /register" in text
            assert began.elapsed < 15
        finally:
            replica.kill()
            replica.wait()
            over.set()
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_r9_shutdown_does_not_wait_for_a_redis_that_is_stopped(tmp_path: Path) -> None:
    with running(tmp_path, *job_settings(FOREVER, "timeouts.redis=60")) as job:
        job.wait_for("  step ")
        redis = job.only("redis.sock")
        with job.controller() as client:
            redis.suspend()
            # Nothing takes that long here but a command or a poll that Redis does not answer.
            job.wait_until(
                lambda: all(each.progress.seconds > 0.3 for each in client.status().members),
                "every replica to wait for Redis",
            )
        began = time.monotonic()
        job.process.send_signal(signal.SIGTERM)
        job.wait_for("interrupted by SIGTERM")
        assert job.end(bound=15.0) == 143, job.story()
        assert time.monotonic() - began < 12.0
        assert "did not end in time" not in job.text, job.story()
        assert job.checkpoint()["step"] > 0


@pytest.mark.parametrize(
    ("whom", "number"),
    [
        pytest.param("controller", signal.SIGKILL, marks=pytest.mark.endurance),
        ("controller", signal.SIGTERM),
        ("dray run", signal.SIGINT),
    ],
)
def test_r10_finished_run_stays_finished_whatever_signal_comes_then(
    tmp_path: Path, whom: str, number: signal.Signals
) -> None:
    # One rollout replica hangs, so that the job is finished for a while before its processes have ended.
    settings = job_settings("rollout.args.hang_at=20", "rollout.args.hanging=[1]", "timeouts.shutdown=4")
    with running(tmp_path, *settings, "--set", "rollout.work_item_batch=1") as job:
        job.wait_until((job.output / ".run" / "outcome.json").exists, "the outcome")
        if whom == "controller":
            job.only("dray.jobs.controller.app").send_signal(number)
        else:
            job.process.send_signal(number)
        assert job.end() == 0, job.story()
        assert job.summary()["solved"]
    with running(tmp_path, "--resume", *settings) as job:
        assert job.end() == 0
        assert "solved already" in job.text
        assert "started" not in job.text


def test_r10_run_is_finished_although_the_controller_could_not_be_notified(tmp_path: Path) -> None:
    with running(tmp_path, *job_settings("policy.args.save_pause=1.5")) as job:
        job.wait_until((job.output / "saving").exists, "the last checkpoint to begin")
        job.only("dray.jobs.controller.app").kill()
        assert job.end(bound=30.0) == 0, job.story()
        assert "solved at step 20 (according to the checkpoint)" in job.text
        assert job.summary()["solved"]


def test_r11_policy_that_hangs_when_the_job_has_failed_is_killed_within_the_bound(tmp_path: Path) -> None:
    settings = job_settings(FOREVER, "policy.args.hang_at=3", "rollout.args.raise_at=36", "timeouts.shutdown=3")
    with running(tmp_path, *settings) as job:
        job.wait_for("started controller")
        job.wait_until(lambda: "phase running -> draining" in job.log("controller"), "the end of the job to begin")
        assert job.end(bound=15.0) == 10, job.story()
        assert "policy-0 (pid" in job.text
        assert "did not end in time and was killed" in job.text
        assert "in train_step" in job.log("policy-0")
        assert "failed: 16 work items in a row were given up: rollout-" in job.text


def test_r12_what_a_killed_replica_leaves_behind_is_killed_while_the_job_continues(tmp_path: Path) -> None:
    settings = job_settings(
        FOREVER, "policy.args.repeats=true", "rollout.args.grandchild=true", "rollout.args.forking=true"
    )
    with running(tmp_path, *settings) as job:
        job.wait_for("  step ")
        replicas = [each for each in job.processes("dray.jobs.replica.rollout") if each.ppid() == job.pid]
        assert len(replicas) == 2

        def living() -> list[psutil.Process]:
            return [each for each in replicas[0].children(recursive=True) if each.status() != psutil.STATUS_ZOMBIE]

        # Two programs, a fork and its daemon, whose parent is on its way out.
        job.wait_until(lambda: len(living()) == 4, "four processes below the replica")
        below = living()
        replicas[0].kill()
        psutil.wait_procs(below, timeout=10)
        assert [each for each in below if each.is_running()] == [], job.story()
        job.wait_for("left behind were killed")
        assert replicas[1].is_running()
        job.process.send_signal(signal.SIGINT)
        assert job.end(bound=15.0) == 130, job.story()


def test_job_that_does_not_end_in_time_shows_the_stacks_of_all_its_processes(tmp_path: Path) -> None:
    with running(tmp_path, *job_settings(FOREVER, "policy.args.hang_at=3")) as job:
        job.wait_for("  step 3")
        with pytest.raises(AssertionError, match=r"did not end within 0\.5 s") as caught:
            job.end(bound=0.5)
    story = str(caught.value)
    # The hanging trainer, a rollout replica without work items, the controller's loop, and `dray run`
    # itself.
    for words in ("in train_step", 'replica/rollout.py", line', 'controller/app.py", line', "in run_job"):
        assert words in story, story
    assert job.processes() == []


def test_r14_class_that_leaves_the_interpreter_is_distinguished_from_one_that_is_done(tmp_path: Path) -> None:
    (tmp_path / "leaving.py").write_text(
        "import small, sys\nclass Trainer(small.Trainer):\n    def train_step(self, trajectories): sys.exit(0)\n"
    )
    with running(tmp_path, "--set", "policy.trainer=leaving.py:Trainer") as job:
        assert job.end(bound=30.0) == 10, job.story()
        assert "policy-0 ended early: Trainer.train_step() raised SystemExit: 0 (leaving.py:3 in" in job.text
        assert "train_step() raised SystemExit" in job.summary()["replicas"]["policy-0"]


def test_r15_port_is_held_from_before_it_is_advertised_until_the_end(tmp_path: Path) -> None:
    with running(tmp_path, *job_settings(FOREVER)) as job:
        job.wait_until((job.output / ".run" / "controller.json").exists, "the controller's address")
        # The controller may not even have begun to run: a client that connects now waits in the listener's queue.
        with job.controller() as client:
            assert client.status().phase in ("starting", "running")
            port = int(client.url.rpartition(":")[2])
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with pytest.raises(OSError, match="in use"):
                other.bind(("127.0.0.1", port))
        second = tmp_path / "second"
        second.mkdir()
        with running(second, *job_settings(f"controller.port={port}")) as refused:
            assert refused.process.wait(30) == 2
            refused.wait_for("must be an address of this machine and a free port")
        job.process.send_signal(signal.SIGTERM)
        assert job.end(bound=15.0) == 143, job.story()
