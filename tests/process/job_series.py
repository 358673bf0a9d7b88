"""Many short jobs, one after the other, with a replica killed in half of them: `make jobs`.

What is done to each job follows from the seed and the job's number. The user's classes keep ledgers, which
survive their SIGKILL: every payload that a worker made, before it is handed on, and every payload of a training
step. After each job it is checked that it ended in time and with the right exit code, that every payload is
accounted for, and that nothing of it is left on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job_runner import JobRun, job_settings, running
from ledgers import NOTE
from watched_runs import BOUND, processes_where

TOKEN = "DRAY_JOB_SERIES"
"""Environment variable by which processes of the series are known, whatever process started them."""

CLASSES = (
    NOTE
    + """
def content(identity):
    return np.random.default_rng(identity).integers(0, 1 << 40, 64)

class Worker:
    def setup(self, context):
        self.context, self.count = context, 0
    def load_weights(self, weights, version):
        assert float(weights["w"][0]) <= version
    def rollout(self, work_item):
        time.sleep(self.context.args["pause"])
        self.count += 1
        identity = [self.context.index, os.getpid(), self.count]
        note(self.context.output, "made.jsonl", identity)
        return {"identity": np.array(identity), "content": content(identity)}

class Trainer:
    def setup(self, context):
        self.context, self.steps = context, 0
        note(context.output, "trained.jsonl", "another process")
    def train_step(self, trajectories):
        for each in trajectories:
            identity = each.arrays["identity"].tolist()
            assert (each.arrays["content"] == content(identity)).all(), identity
        time.sleep(self.context.args["pause"])
        self.steps += 1
        note(self.context.output, "trained.jsonl", [each.arrays["identity"].tolist() for each in trajectories])
        return {"score": float(self.steps)}
    def weights(self):
        return {"w": np.full(1000, self.steps, np.float32)}
    def save(self, folder):
        (folder / "steps").write_text(str(self.steps))
    def load(self, folder):
        self.steps = int((folder / "steps").read_text())
        note(self.context.output, "trained.jsonl", self.steps)
"""
)


@dataclass(frozen=True)
class Plan:
    """What is done to one job; `kill_after` are seconds from the start of its processes or from the first step."""

    number: int
    replicas: int
    batch: int
    steps: int
    lane: str
    worker_pause: float
    trainer_pause: float
    victim: str
    at_work: bool
    kill_after: float

    @classmethod
    def of(cls, seed: int, number: int) -> Plan:
        choose = random.Random(f"{seed}:{number}")
        replicas = choose.randint(2, 3)
        victims = ["policy-0", *(f"rollout-{index}" for index in range(replicas))]
        return cls(
            number=number,
            replicas=replicas,
            batch=choose.choice((4, 8)),
            steps=choose.randint(20, 80),
            lane=choose.choice(("shm", "tcp")),
            worker_pause=choose.choice((0.0, 0.005, 0.02)),
            trainer_pause=choose.choice((0.0, 0.02, 0.05)),
            victim=choose.choice(victims) if number % 2 else "",
            at_work=(at_work := choose.random() < 0.7),
            kill_after=choose.uniform(0.0, 2.0 if at_work else 5.0),
        )

    @property
    def settings(self) -> list[str]:
        return job_settings(
            f"rollout.replicas={self.replicas}",
            f"policy.batch_size={self.batch}",
            f"stop.at_least={self.steps}",
            f"job.lane={self.lane}",
            f"rollout.args.pause={self.worker_pause}",
            f"policy.args.pause={self.trainer_pause}",
            # No process is stopped here: on a machine that gives a process its turn late, none is taken for dead.
            "controller.dead_after=20",
            "timeouts.controller_lost=20",
        )


def _names(folder: Path) -> set[str]:
    """What is below a folder for sockets; the folder `streams` of a user stays when it is empty."""
    return {str(each.relative_to(folder)) for each in folder.rglob("*")} - {"streams"}


def run_series(jobs: int, seed: int, *, first: int = 0, show: Callable[[str], None] | None = None) -> Counter[str]:
    """Run jobs `first` … `first + jobs - 1` of the series of `seed`; returns the outcomes of jobs and payloads.

    Raises:
        AssertionError: one of them did not end as it must; the message has its name and its output.
    """
    accounts: Counter[str] = Counter()
    root = Path(tempfile.mkdtemp(prefix="dray-series-", dir="/tmp"))
    os.environ[TOKEN] = root.name
    sockets = Path(os.environ.setdefault("DRAY_RUNTIME_DIR", str(root / "sockets")))
    before = _names(sockets)  # other tests of this run have folders there, too
    try:
        for number in range(first, first + jobs):
            plan, folder = Plan.of(seed, number), root / str(number)
            folder.mkdir()
            try:
                accounts.update(_run(plan, folder))
                left = _names(sockets) - before
                assert not left, f"socket folders are left: {left}"
            except AssertionError as error:
                raise AssertionError(f"job {number} of seed {seed}, {plan}: {error}") from error
            shutil.rmtree(folder)
            if show is not None:
                show(f"{accounts['jobs']:4d} of {jobs}: {dict(sorted(accounts.items()))}")
    finally:
        del os.environ[TOKEN]
        shutil.rmtree(root)
    return accounts


def _run(plan: Plan, folder: Path) -> Counter[str]:
    began = time.monotonic()
    with running(folder, *plan.settings, classes=CLASSES) as job:
        killed = bool(plan.victim) and _kill(job, plan)
        code = job.end(BOUND)
        _check_nothing_runs(job)
        checkpoint = job.output / "checkpoint" / "state.json"
        finished = checkpoint.exists() and bool(json.loads(checkpoint.read_text())["outcome"])
        assert code == (0 if finished else 1), f"exit code {code}\n{job.story()}"
        # Without its only policy replica a job cannot be finished; without one of several others it is.
        assert finished or (killed and plan.victim == "policy-0"), job.story()
        assert job.summary()["solved"] == finished, job.story()
        accounts = _account(job, plan, killed)
    accounts.update(
        {
            "jobs": 1,
            "jobs that finished": int(finished),
            "jobs that failed": int(not finished),
            "replicas killed": int(killed),
            "seconds": round(time.monotonic() - began),
        }
    )
    return accounts


def _kill(job: JobRun, plan: Plan) -> bool:
    """Kill the victim, if it still runs when its time has come."""
    job.wait_for("started controller")
    if plan.at_work:
        job.wait_until(
            lambda: "[[" in _text(job, "trained.jsonl") or job.process.poll() is not None, "a training step"
        )
    try:
        job.process.wait(plan.kill_after)
    except subprocess.TimeoutExpired:
        role, _, index = plan.victim.partition("-")
        victims = [each for each in job.processes(f"dray.jobs.replica.{role}") if each.cmdline()[-1:] == [index]]
        for victim in victims:
            victim.kill()
        return bool(victims)
    return False


def _check_nothing_runs(job: JobRun) -> None:
    me, token = os.getpid(), os.environ[TOKEN]
    left = processes_where(lambda process: process.pid != me and process.environ().get(TOKEN) == token)
    assert not left, f"processes are left: {left}\n{job.story()}"


def _account(job: JobRun, plan: Plan, killed: bool) -> Counter[str]:
    """The outcome of every payload of a job that has ended."""
    made = _ledger(job, "made.jsonl")
    trained = [identity for step in _steps(job) for identity in step]
    twice = [identity for identity, count in Counter(map(tuple, trained)).items() if count > 1]
    assert not twice, f"trained on twice: {twice}\n{job.story()}"
    assert set(map(tuple, trained)) <= set(map(tuple, made)), job.story()
    summary = job.summary()
    policy_killed = killed and plan.victim == "policy-0" and not summary["solved"]
    if not policy_killed:
        assert len(trained) == plan.steps * plan.batch, job.story()
        assert summary["payloads"] == len(trained), job.story()
    accounts = Counter({"payloads made": len(made), "trained on": len(trained)})
    given_up = summary["stale"] + summary["lost"] + summary["delivery"]["rolled_back"]
    for index in range(plan.replicas):
        name = f"rollout-{index}"
        own_made, own_trained = (sum(each[0] == index for each in ledger) for ledger in (made, trained))
        if killed and plan.victim == name:
            accounts["gone with a killed rollout replica"] += own_made - own_trained
            continue
        counters = summary["counters"].get(name, {})
        published, abandoned = (int(counters.get(key, 0)) for key in ("payloads", "abandoned"))
        accounts["not handed on: the job had ended"] += own_made - published
        accounts["handed on and not wanted any more"] += abandoned
        unknown = published - own_trained - abandoned
        if policy_killed:
            # Whether the batch at hand was trained on is unknown.
            assert abs(unknown) <= plan.batch, f"{name}: {unknown} payloads unaccounted\n{job.story()}"
            accounts["in the hands of a killed policy replica"] += max(0, unknown)
        else:
            assert 0 <= unknown <= given_up, f"{name}: {unknown} payloads unaccounted\n{job.story()}"
            accounts["given up by the policy or undone with its weights, counted"] += unknown
    return accounts


def _steps(job: JobRun) -> list[Any]:
    """The steps that the last weights have learnt from: a policy that begins again goes back to a checkpoint."""
    steps: list[Any] = []
    checkpoint = 0
    for line in _ledger(job, "trained.jsonl"):
        if isinstance(line, list):
            del steps[checkpoint:]
            steps.append(line)
            checkpoint += 1
        else:
            checkpoint = line if isinstance(line, int) else 0
    return steps


def _ledger(job: JobRun, name: str) -> list[Any]:
    return [json.loads(line) for line in _text(job, name).splitlines()]


def _text(job: JobRun, name: str) -> str:
    path = job.output / name
    return path.read_text() if path.exists() else ""


def main() -> None:
    """Run a series and print how far it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--first", type=int, default=0, help="number of the first job")
    options = parser.parse_args()
    run_series(options.jobs, options.seed, first=options.first, show=lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
