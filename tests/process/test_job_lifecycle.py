import json
import signal
import time
from pathlib import Path

import pytest
from job_runner import job_settings, running

MORE_WAYS = [pytest.param(way, marks=pytest.mark.endurance) for way in ("shm", "inline")]
WAYS = ["redis", "tcp", "sparse tcp", "ucx", *MORE_WAYS]
"""Other jobs of these tests use shared memory, and payloads inline."""


def way_settings(way: str) -> list[str]:
    if way == "ucx":
        pytest.importorskip("ucxx")
    travel = [f"job.lane={way}"]
    if way == "redis":
        travel = ["job.transfer=inline"]
    elif way == "inline":
        travel = ["rollout.inline_bytes=4096"]
    elif way == "sparse tcp":
        travel = ["job.lane=tcp", "policy.weights=sparse"]
    # No process dies here: on a machine that gives a process its turn late, none may be taken for dead either.
    return job_settings(*travel, "job.plot=returns.png", "controller.dead_after=30", "timeouts.controller_lost=30")


@pytest.mark.parametrize("way", WAYS)
def test_job_is_solved_however_payloads_travel(tmp_path: Path, way: str) -> None:
    with running(tmp_path, *way_settings(way)) as job:
        assert job.end() == 0, job.story()
        assert "solved: score 20 >= 20 at step 20" in job.text
        summary = job.summary()
        assert (summary["solved"], summary["steps"], summary["payloads"]) == (True, 20, 160)
        assert (summary["stale"], summary["lost"]) == (0, 0)
        assert summary["bytes"] > 160 * 256
        assert (summary["metrics"], summary["mean_return"]) == ({"score": 20.0}, 8.0)
        # One that came late may have found the job done.
        worked = [name for name in ("rollout-0", "rollout-1") if summary["counters"].get(name, {}).get("rollouts")]
        assert worked
        assert all(summary["weight_payloads_fetched"][name] > 0 for name in worked)
        inline = way in ("redis", "inline")
        assert summary["transfer"] == ("inline" if inline else "reference")
        assert ("lane" in summary) is not inline
        assert summary.get("lane", way) == way.removeprefix("sparse ")
        weights = summary["weights"]
        assert weights["loaded"] == sum(summary["weight_payloads_fetched"].values()) <= 2 * weights["published"]
        assert weights["in_place"] == (weights["loaded"] if way in ("shm", "inline") else 0)
        assert (weights["deltas"] > 0) is (way == "sparse tcp")
        if way == "sparse tcp":
            assert weights["received_bytes"] < weights["bytes"]
        lines = [json.loads(line) for line in (job.output / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, 21))
        assert (lines[-1]["metrics"], lines[-1]["mean_return"]) == ({"score": 20.0}, 8.0)
        assert job.checkpoint()["outcome"] == "solved"
        assert (job.output / "returns.png").stat().st_size > 10_000


def test_job_that_is_not_solved_in_time_exits_with_one(tmp_path: Path) -> None:
    with running(tmp_path, *job_settings("job.max_steps=5")) as job:
        assert job.end() == 1
        assert "not solved within 5 steps" in job.text
        assert "phase draining -> failed (last left, failed)" in job.log("controller")
        assert not job.summary()["solved"]
        assert job.checkpoint()["step"] == 5


def test_job_without_a_stop_table_finishes_with_its_steps(tmp_path: Path) -> None:
    with running(tmp_path, *job_settings("job.max_steps=5"), stop_table="") as job:
        assert job.end() == 0, job.story()
        assert "finished: all 5 steps are done" in job.text
        assert not job.summary()["solved"]


@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.endurance), (signal.SIGTERM, 143)]
)
@pytest.mark.measured
def test_r16_interrupted_job_leaves_a_checkpoint_and_resumes_from_it(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    with running(tmp_path, *job_settings("stop.at_least=1e9")) as job:
        job.wait_for("  step ")
        began = time.monotonic()
        job.process.send_signal(number)
        assert job.end(bound=10.0) == code, job.story()
        assert time.monotonic() - began < 10
        assert f"interrupted by {number.name}" in job.text
        assert "killed" not in job.text
        assert "phase draining -> interrupted" in job.log("controller")
        assert "received SIGTERM" not in str(job.summary()["replicas"])
        state = job.checkpoint()
        assert state["step"] == job.summary()["steps"] > 0
    goal = state["step"] + 10
    with running(tmp_path, "--resume", *job_settings(f"stop.at_least={goal}")) as job:
        assert job.end() == 0, job.story()
        assert job.summary()["steps"] == goal
        assert job.summary()["steps_of_this_run"] == 10
        assert f"resuming from step {state['step']}" in job.log("policy-0")
        steps = [json.loads(line)["step"] for line in (job.output / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, goal + 1))
    with running(tmp_path, "--resume", *job_settings(f"stop.at_least={goal}")) as job:
        assert job.end() == 0
        assert "solved already" in job.text


def test_sigquit_and_sigusr2_leave_a_checkpoint_and_a_run_resumes_with_its_figures(tmp_path: Path) -> None:
    with running(tmp_path, *job_settings("stop.at_least=1e9")) as job:
        job.wait_until(job.step, "a training step")
        job.process.send_signal(signal.SIGQUIT)
        assert job.end(bound=10.0) == 131, job.story()
        assert "stopped: interrupted by SIGQUIT" in job.text
        first = job.summary()
        assert first["payloads"] == job.checkpoint()["contributed"] == 8 * first["steps"] > 0
        assert first["figures_age"] is None
    # What a process that is killed while it saves leaves behind.
    (job.output / ".checkpoint.partial" / "trainer").mkdir(parents=True)
    with running(tmp_path, "--resume", *job_settings("stop.at_least=1e9")) as job:
        job.wait_until(lambda: job.step() > first["steps"], "a further step")
        job.process.send_signal(signal.SIGUSR2)
        assert job.end(bound=10.0) == 140, job.story()
        assert "stopped: interrupted by SIGUSR2" in job.text
        last = job.summary()
        assert last["payloads"] == job.checkpoint()["contributed"] == 8 * last["steps"] > first["payloads"]
        assert last["bytes"] > first["bytes"]
        assert last["delivery"]["trained"] == last["payloads"]
        assert [line["step"] for line in job.metrics()] == list(range(1, last["steps"] + 1))
        assert not (job.output / ".checkpoint.partial").exists()


@pytest.mark.parametrize("words", ["started controller", ""])
def test_job_can_be_interrupted_while_it_starts(tmp_path: Path, words: str) -> None:
    with running(tmp_path) as job:
        if words:
            job.wait_for(words)
        else:
            job.wait_until((job.output / ".run").exists, "the folder of the run")
        job.process.send_signal(signal.SIGINT)
        assert job.end(bound=10.0) == 130, job.story()


def test_second_interrupt_kills_at_once(tmp_path: Path) -> None:
    with running(tmp_path, *job_settings("policy.args.hang_at=3", "timeouts.shutdown=50")) as job:
        job.wait_for("  step ")
        job.process.send_signal(signal.SIGINT)
        job.wait_for("ending the job")
        job.process.send_signal(signal.SIGINT)
        assert job.end(bound=10.0) == 130, job.story()
        assert "was killed" in job.text


def test_folder_of_an_earlier_or_running_job_is_refused(tmp_path: Path) -> None:
    with running(tmp_path, *job_settings("stop.at_least=1e9")) as job:
        job.wait_for("  step ")
        with running(tmp_path, "--resume") as second:
            second.wait_for("no running job uses")
            assert second.process.wait(30) == 2
        job.process.send_signal(signal.SIGTERM)
        assert job.end(bound=10.0) == 143
    with running(tmp_path) as job:
        assert job.end() == 2
        assert "--resume" in job.text
