"""One training whose rollout replicas are killed repeatedly: `python tests/process/rollout_storm.py`.

Which replica is killed, and how soon, follows from a seed. The user's classes keep ledgers of their own: every
payload that a worker makes, and every payload that the trainer trains on, each with content that follows from its
identity, or with a digest of it. No payload that was handed on may be lost, come twice or have another's content.
At the end, the supervisor must hold no more than before the first kill: its agent keeps nothing that was consumed.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from job_runner import JOB, JobRun, job_settings, running
from ledgers import NOTE, noted
from watched_runs import BOUND

BATCH, REPLICAS = 8, 2
KEEP = 60.0
"""Seconds for which heirs keep payloads that were never handed on, where the end of the storm waits for memory."""

MAX_GROWTH = 64 << 20
"""Bytes of resident memory that the supervisor may have more at the end than before the first kill."""

SMALL = (
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


CARTPOLE = (
    NOTE
    + """
import hashlib
from cartpole import CartPoleRollout, CartPoleTrainer

def digest(arrays):
    found = hashlib.sha256()
    for name in sorted(set(arrays) - {"digest"}):
        found.update(name.encode() + arrays[name].tobytes())
    return np.frombuffer(found.digest(), np.uint8)

class Worker(CartPoleRollout):
    def setup(self, context):
        super().setup(context)
        self.context, self.count = context, 0
    def rollout(self, work_item):
        arrays = super().rollout(work_item)
        self.count += 1
        identity = [self.context.index, os.getpid(), self.count]
        note(self.context.output, "made.jsonl", identity)
        arrays["identity"] = np.array(identity)
        return {**arrays, "digest": digest(arrays)}

class Trainer(CartPoleTrainer):
    def setup(self, context):
        super().setup(context)
        self.output = context.output
    def train_step(self, trajectories):
        for each in trajectories:
            assert np.array_equal(each.arrays["digest"], digest(each.arrays)), "another payload's content"
        metrics = super().train_step(trajectories)
        note(self.output, "trained.jsonl", [each.arrays["identity"].tolist() for each in trajectories])
        return {**metrics, "score": float((self.output / "finish").exists())}
"""
)

EXAMPLE = Path(__file__).parents[2] / "examples" / "cartpole"


class Resources(NamedTuple):
    """What a process holds."""

    descriptors: int
    segments: int  # of shared memory: those behind its descriptors
    shared: int  # bytes of memory of these
    resident: int  # bytes

    @classmethod
    def by(cls, process: psutil.Process) -> Resources:
        segments = {}
        for number in Path(f"/proc/{process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
                if str(number.readlink()).startswith("/memfd:"):
                    found = number.stat()
                    segments[found.st_ino] = 512 * found.st_blocks
        return cls(process.num_fds(), len(segments), sum(segments.values()), process.memory_info().rss)


@dataclass(frozen=True)
class Storm:
    """A storm that has ended.

    Attributes:
        job: the job.
        before, after: what the supervisor held before the first kill, and after the last one; None if the storm
            has not waited for that.
    """

    job: JobRun
    before: Resources
    after: Resources | None


def run_storm(
    folder: Path,
    kills: int,
    seed: int,
    *,
    cartpole: bool = False,
    until_released: bool = False,
    show: Callable[[str], None] = print,
) -> Storm:
    """Run a job to its end while `kills` rollout replicas are killed; returns it, with its exit code checked.

    Args:
        folder: of the job; empty.
        seed: what all choices follow from.
        cartpole: run `examples/cartpole/job.toml` instead of a small job without torch.
        until_released: wait after the last kill until the supervisor has no more descriptors than before the first
            one. That takes as long as heirs keep payloads that were never handed on, `KEEP`.
        show: gets a line about every tenth kill.
    """
    choose = random.Random(seed)
    if cartpole:
        shutil.copytree(
            EXAMPLE, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", "outputs")
        )
    options = job_settings(
        "rollout.worker=small.py:Worker",
        "policy.trainer=small.py:Trainer",
        "stop.metric=score",
        "stop.at_least=1",
        "job.max_steps=100000000",
        f"rollout.replicas={REPLICAS}",
        f"rollout.restarts={kills}",
        "rollout.slot_bytes=32768",
        "rollout.inline_bytes=0",
        f"policy.batch_size={BATCH}",
        "policy.checkpoint_every=20",
        "policy.max_deliveries=100",
        # A process that has its turn late on a busy machine must not count as dead.
        "controller.dead_after=20",
        *([f"agent.keep={KEEP}"] if until_released else []),
        *(["policy.args.evaluate_above=1e9"] if cartpole else []),
    )
    classes, job_file = (CARTPOLE, None) if cartpole else (SMALL, JOB)
    with running(folder, *options, job=job_file, classes=classes) as job:
        supervisor, after = psutil.Process(job.pid), None
        job.wait_until(lambda: _in_order(job), "all replicas at work")
        before = Resources.by(supervisor)
        for number in range(1, kills + 1):
            _kill_one(job, choose)
            if not number % 10:
                show(f"{number} kills, step {job.step()}, {Resources.by(supervisor)}")
        if until_released:
            job.wait_until(
                lambda: _in_order(job) and supervisor.num_fds() <= before.descriptors,
                f"no more descriptors of the supervisor than {before.descriptors}",
                KEEP + BOUND,
            )
            after = Resources.by(supervisor)
        (job.output / "finish").touch()
        assert job.end() == 0, job.story()
    return Storm(job, before, after)


def check(storm: Storm) -> dict[str, Any]:
    """Compare dray's figures with the ledgers, and what the supervisor held; returns the figures.

    Raises:
        AssertionError: a payload was lost, has come twice, or was not one that a worker has made; or the
            supervisor holds more than before.
    """
    job = storm.job
    summary, story = job.summary(), job.story()
    made = {tuple(identity) for identity in noted(job.output / "made.jsonl")}
    trained = [tuple(identity) for step in noted(job.output / "trained.jsonl") for identity in step]
    delivery, steps = summary["delivery"], [line["step"] for line in job.metrics()]
    assert steps == list(range(1, len(steps) + 1)), story
    assert len(trained) == len(set(trained)) == len(steps) * BATCH, story
    assert set(trained) <= made, story
    assert summary["payloads"] == job.checkpoint()["contributed"] == len(trained), story
    assert delivery["trained"] == job.checkpoint()["committed"] == len(trained), story
    lost = {name: delivery[name] for name in ("discarded", "too_old", "dead_letters", "rolled_back", "trimmed")}
    lost |= {name: summary[name] for name in ("lost", "stale")}
    assert not any(lost.values()), f"{lost}\n{story}"
    # All that was handed on was trained on, or is in the stream still.
    assert delivery["published"] == delivery["trained"] + delivery["repeated"] + delivery["backlog"], story
    kept = [int(number) for number in re.findall(r"has died; (\d+) payloads", job.log("supervisor"))]
    heirs = summary["heirs"]
    assert heirs["rings"] == sum(1 for number in kept if number), story
    assert heirs["payloads"] == sum(kept) == heirs["consumed"] + heirs["dropped"] + heirs["left"], story
    # What a killed replica had not handed on yet, at most one payload each.
    assert heirs["dropped"] <= len(kept), story
    # Besides, what the job was about to train on.
    assert heirs["dropped"] + heirs["left"] <= len(kept) + 2 * BATCH, story
    figures: dict[str, Any] = {
        "steps": len(steps),
        "trained": len(trained),
        "deaths": len(kept),
        "heirs": heirs,
        **lost,
    }
    if storm.after is not None:
        before, after = storm.before, storm.after
        assert after.segments <= before.segments, f"{before}\n{after}\n{story}"
        assert after.resident <= before.resident + MAX_GROWTH, f"{before}\n{after}\n{story}"
        figures |= {"before": before, "after": after}
    return figures


def _in_order(job: JobRun) -> bool:
    """Every rollout replica has made payloads, and some were trained on."""
    return job.step() >= 1 and len(_working(job)) == REPLICAS


def _kill_one(job: JobRun, choose: random.Random) -> None:
    """Kill one of the rollout replicas that have made a payload, soon after one of them has."""
    job.wait_until(lambda: _working(job), "a rollout replica that has made a payload")
    victim = choose.choice(_working(job))
    time.sleep(choose.uniform(0.0, 0.1))
    victim.kill()
    job.wait_until(lambda: victim not in _working(job), "the end of a killed replica")


def _working(job: JobRun) -> list[psutil.Process]:
    made = {pid for _, pid, _ in noted(job.output / "made.jsonl")}
    return [each for each in job.processes("dray.jobs.replica.rollout") if each.pid in made]


def main() -> None:
    """Run one storm and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="how many replicas are killed (default: 200)")
    parser.add_argument("--seed", type=int, default=1, help="what all choices follow from (default: 1)")
    parser.add_argument("--cartpole", action="store_true", help="run examples/cartpole instead of a small job")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dray-storm-") as folder:
        storm = run_storm(
            Path(folder), options.kills, options.seed, cartpole=options.cartpole, until_released=True
        )
        for name, figure in check(storm).items():
            print(f"{name}: {figure}")
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
