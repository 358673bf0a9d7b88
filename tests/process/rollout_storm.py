"""One training whose rollout replicas are killed repeatedly: `python tests/process/rollout_storm.py`.

Which replica is killed, and how soon, follows from a seed. The user's classes keep ledgers of their own: every
payload that a worker makes, and every payload that the trainer trains on, each with content that follows from its
identity. No payload that was handed on may be lost, come twice or have another's content.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from job_runner import JobRun, job_settings, running
from ledgers import NOTE, noted

BATCH = 8

CLASSES = (
    NOTE
    + """
def content(identity):
    return np.random.default_rng(identity).integers(0, 1 << 30, 2000)

class Worker:
    def setup(self, context):
        self.context, self.count = context, 0
    def load_weights(self, weights, version):
        pass
    def rollout(self, work_item):
        time.sleep(0.001)
        self.count += 1
        identity = [self.context.index, os.getpid(), self.count]
        note(self.context.output, "made.jsonl", identity)
        return {"identity": np.array(identity), "content": content(identity)}

class Trainer:
    def setup(self, context):
        self.output, self.steps = context.output, 0
    def train_step(self, trajectories):
        time.sleep(0.05)
        self.steps += 1
        identities = []
        for each in trajectories:
            identities.append(each.arrays["identity"].tolist())
            assert np.array_equal(each.arrays["content"], content(identities[-1])), "another payload's content"
        note(self.output, "trained.jsonl", identities)
        return {"score": float((self.output / "finish").exists())}
    def weights(self):
        return {"w": np.full(100, self.steps, np.float32)}
    def save(self, folder):
        (folder / "steps").write_text(str(self.steps))
    def load(self, folder):
        self.steps = int((folder / "steps").read_text())
"""
)


def run_storm(folder: Path, kills: int, seed: int, *settings: str, show: Callable[[str], None] = print) -> JobRun:
    """Run a job to its end while `kills` rollout replicas are killed; returns it, with its exit code checked."""
    choose = random.Random(seed)
    options = job_settings(
        "stop.at_least=1",
        f"rollout.restarts={kills}",
        "rollout.slot_bytes=32768",
        "policy.checkpoint_every=20",
        "policy.max_deliveries=100",
        # A process that has its turn late on a busy machine must not count as dead.
        "controller.dead_after=20",
        *settings,
    )
    with running(folder, *options, classes=CLASSES) as job:
        for number in range(1, kills + 1):
            _kill_one(job, choose)
            if not number % 10:
                show(f"{number} kills, step {job.step()}")
        (job.output / "finish").touch()
        assert job.end() == 0, job.story()
    return job


def check(job: JobRun) -> dict[str, int]:
    """Compare dray's figures with the ledgers; returns them.

    Raises:
        AssertionError: a payload was lost, has come twice, or was not one that a worker has made.
    """
    summary, story = job.summary(), job.story()
    made = {tuple(identity) for identity in noted(job.output / "made.jsonl")}
    trained = [tuple(identity) for step in noted(job.output / "trained.jsonl") for identity in step]
    delivery, steps = summary["delivery"], [line["step"] for line in job.metrics()]
    assert steps == list(range(1, len(steps) + 1)), story
    assert len(trained) == len(set(trained)) == len(steps) * BATCH, story
    assert set(trained) <= made, story
    assert summary["payloads"] == job.checkpoint()["contributed"] == len(trained), story
    assert delivery["trained"] == job.checkpoint()["committed"] == len(trained), story
    lost = {name: delivery[name] for name in ("discarded", "too_old", "dead_letters", "rolled_back")}
    assert not any(lost.values()), f"{lost}\n{story}"
    log = job.log("supervisor")
    kept = [int(number) for number in re.findall(r"has died; (\d+) payloads", log)]
    last = re.findall(r"(\d+) were dropped, (\d+) are left with (\d+) bytes of memory", log) or [(0, 0, 0)]
    dropped, left, memory = map(int, last[-1])
    heirs = summary["heirs"]
    assert dropped == heirs["dropped"] == 0, story
    assert heirs["rings"] == sum(1 for number in kept if number), story
    assert heirs["payloads"] == sum(kept) == heirs["consumed"] + heirs["left"], story
    assert heirs["left"] == left, story
    ended = ("trained", "discarded", "too_old", "repeated", "trimmed", "dead_letters", "backlog")
    assert delivery["published"] == sum(delivery[name] for name in ended), story
    # What a killed replica was handing on, and what the job was about to train on.
    assert left <= len(kept) + 2 * BATCH, story
    figures = {"steps": len(steps), "trained": len(trained), "deaths": len(kept), "kept": sum(kept)}
    return {**figures, "left": left, "memory": memory, **lost}


def _kill_one(job: JobRun, choose: random.Random) -> None:
    """Kill one of the rollout replicas that have made a payload, soon after one of them has."""
    job.wait_until(lambda: _working(job), "a rollout replica that has made a payload")
    time.sleep(choose.uniform(0.0, 0.1))
    with contextlib.suppress(psutil.NoSuchProcess):
        choose.choice(_working(job)).kill()


def _working(job: JobRun) -> list[psutil.Process]:
    made = {pid for _, pid, _ in noted(job.output / "made.jsonl")}
    return [each for each in job.processes("dray.jobs.replica.rollout") if each.pid in made]


def main() -> None:
    """Run one storm and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="how many replicas are killed (default: 200)")
    parser.add_argument("--seed", type=int, default=1, help="what all choices follow from (default: 1)")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dray-storm-") as folder:
        print(check(run_storm(Path(folder), options.kills, options.seed)))
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
