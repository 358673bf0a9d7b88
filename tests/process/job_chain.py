"""One training that is killed repeatedly, and resumed each time: `python tests/process/job_chain.py`.

What is killed, and when, follows from a seed: the policy, the supervisor, the controller, or every process. The
user's classes keep ledgers of their own, in files that survive a SIGKILL: every payload that a worker makes, and
every step that the trainer begins, trains, publishes or resumes from. dray's figures must agree with them.

A step whose weights the trainer was asked for is committed. A step that was trained and whose weights the trainer
was not asked for, because the policy was killed in between, may be committed or not: only dray can know.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from job_runner import JobRun, job_settings, running
from ledgers import noted

from dray.jobs.replica.checkpoint import CheckpointState, find_checkpoint

BATCH = 8
VICTIMS = ("policy", "supervisor", "controller", "everything")

CLASSES = """
import json, os, time
import numpy as np

def note(folder, name, line):
    descriptor = os.open(folder / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(descriptor, (json.dumps(line) + "\\n").encode())
    os.fsync(descriptor)
    os.close(descriptor)

class Worker:
    def setup(self, context):
        self.context, self.count = context, 0
    def load_weights(self, weights, version):
        assert float(weights["w"][0]) <= version
    def rollout(self, work_item):
        time.sleep(0.001)
        self.count += 1
        identity = [self.context.index, os.getpid(), self.count]
        note(self.context.output, "made.jsonl", identity)
        return {"identity": np.array(identity)}

class Trainer:
    def setup(self, context):
        self.output, self.steps = context.output, 0
        self.note("started", 0)
    def note(self, what, *more):
        note(self.output, "trained.jsonl", [what, *more])
    def train_step(self, trajectories):
        time.sleep(0.01)
        self.steps += 1
        self.note("trained", self.steps, [each.arrays["identity"].tolist() for each in trajectories])
        return {"score": float(self.steps)}
    def weights(self):
        self.note("published", self.steps)
        return {"w": np.full(100, self.steps, np.float32)}
    def save(self, folder):
        (folder / "steps").write_text(str(self.steps))
    def load(self, folder):
        self.steps = int((folder / "steps").read_text())
        self.note("resumed", self.steps)
"""


@dataclass(frozen=True)
class Kill:
    """What is killed in one attempt: once the trainer has noted `events` of it, and `pause` seconds later."""

    victim: str
    events: int
    pause: float


@dataclass
class Ledger:
    """What the trainer's own notes contain.

    Attributes:
        steps: those that the last weights have learnt from, each with its payloads.
        attempts: how many policies have started.
        committed: payloads that are committed for certain.
        unknown: payloads of steps whose commit only dray can know.
    """

    steps: dict[int, list[tuple[int, ...]]] = field(default_factory=dict)
    attempts: int = 0
    committed: int = 0
    unknown: int = 0

    @classmethod
    def read(cls, folder: Path) -> Ledger:
        found, open_step = cls(), 0
        for what, step, *more in noted(folder / "trained.jsonl"):
            if what == "started":
                found.attempts += 1
                found.unknown += BATCH if open_step else 0
                open_step = 0
            elif what == "resumed":
                found._keep(step)
            elif what == "trained":
                found._keep(step - 1)
                found.steps[step] = [tuple(identity) for identity in more[0]]
                open_step = step
            elif open_step:  # published: the commit comes before it
                assert step == open_step
                found.committed += BATCH
                open_step = 0
        found.unknown += BATCH if open_step else 0
        return found

    def _keep(self, last: int) -> None:
        self.steps = {step: payloads for step, payloads in self.steps.items() if step <= last}

    @property
    def contributed(self) -> list[tuple[int, ...]]:
        """Every payload that the last weights have learnt from."""
        return [payload for payloads in self.steps.values() for payload in payloads]


def random_victims(seed: int, count: int) -> list[str]:
    """What is killed, in order; the last one is not the policy, whose end alone does not end the job."""
    choose = random.Random(seed)
    victims = [choose.choice(VICTIMS) for _ in range(count - 1)]
    return [*victims, choose.choice(VICTIMS[1:])]


def kills_of(seed: int, victims: Sequence[str]) -> list[Kill]:
    """When each of `victims` is killed."""
    choose = random.Random(seed)
    return [Kill(victim, choose.randint(1, 30), choose.uniform(0.0, 0.05)) for victim in victims]


def run_chain(folder: Path, kills: Sequence[Kill], show: Callable[[str], None] = print) -> dict[str, int]:
    """Run a job through `kills`, of which the last ends it, and then to its end; returns its figures.

    Raises:
        AssertionError: they do not agree with the ledgers.
    """
    left = list(kills)
    while left:
        left = _run_until_it_ends(folder, left, show)
    state = _checkpoint(folder)
    assert state is not None
    with running(folder, *_settings(folder, state.step + 4), classes=CLASSES) as job:
        assert job.end() == 0, job.story()
        figures = check(job, state.step + 4)
    show(f"{len(kills)} kills: {figures}")
    return figures


def check(job: JobRun, steps: int) -> dict[str, int]:
    """Compare dray's figures of a job that is solved at step `steps` with the ledgers; returns them."""
    ledger, summary, state, lines = Ledger.read(job.output), job.summary(), job.checkpoint(), job.metrics()
    delivery, contributed = summary["delivery"], ledger.contributed
    story = f"{ledger.committed} + {ledger.unknown} in the ledger, {delivery}\n{job.story()}"
    assert list(ledger.steps) == [line["step"] for line in lines] == list(range(1, steps + 1)), story
    assert len(set(contributed)) == len(contributed) == steps * BATCH, story
    assert set(contributed) <= {tuple(identity) for identity in noted(job.output / "made.jsonl")}, story
    assert summary["payloads"] == state["contributed"] == lines[-1]["payloads"] == len(contributed), story
    assert delivery["trained"] == state["committed"] == lines[-1]["committed"], story
    assert delivery["trained"] - delivery["rolled_back"] == len(contributed), story
    assert ledger.committed <= delivery["trained"] <= ledger.committed + ledger.unknown, story
    for name in ("payloads", "committed", "bytes", "seconds"):
        values = [line[name] for line in lines]
        assert values == sorted(values), f"{name}: {values}"
    return {
        "attempts": ledger.attempts,
        "steps": steps,
        "contributed": len(contributed),
        "trained": delivery["trained"],
        "rolled_back": delivery["rolled_back"],
        "committed": state["committed"],
        "committed according to the ledger, at least": ledger.committed,
        "committed according to the ledger, at most": ledger.committed + ledger.unknown,
    }


def _run_until_it_ends(folder: Path, kills: list[Kill], show: Callable[[str], None]) -> list[Kill]:
    """Start or resume the job, and kill until it has ended; returns the kills that are left."""
    before = Ledger.read(folder / "out").attempts
    with running(folder, *_settings(folder, 10**9), classes=CLASSES) as job:
        while kills:
            kill, *kills = kills
            _wait(job, kill, before)
            before = Ledger.read(job.output).attempts
            _kill(job, kill.victim)
            show(f"{kill}; {len(Ledger.read(job.output).steps)} steps so far")
            if kill.victim != "policy":
                break
        if kill.victim == "controller":
            assert job.end() == 1, job.story()
        job.process.wait(10.0)
        job.wait_until_gone(10.0)
        steps = [line["step"] for line in job.metrics()]
        assert steps == list(range(1, len(steps) + 1)), job.story()
    return kills


def _settings(folder: Path, steps: int) -> Iterator[str]:
    if _checkpoint(folder) is not None:
        yield "--resume"
    yield from job_settings(
        f"stop.at_least={steps}",
        "policy.checkpoint_every=3",
        "policy.restarts=100",
        "policy.max_deliveries=100",
        # A process that has its turn late on a busy machine must not count as dead.
        "controller.dead_after=20",
    )


def _checkpoint(folder: Path) -> CheckpointState | None:
    found = find_checkpoint(folder / "out" / "checkpoint")
    return None if found is None else found[1]


def _wait(job: JobRun, kill: Kill, before: int) -> None:
    """Wait until a policy after the first `before` ones has made `kill.events` notes, and a resume is possible."""

    def reached() -> bool:
        notes = noted(job.output / "trained.jsonl")
        started = [number for number, note in enumerate(notes) if note[0] == "started"]
        return len(started) > before and len(notes) - started[-1] >= kill.events

    job.wait_until(reached, f"{kill.events} notes of the trainer")
    if kill.victim != "policy":
        job.wait_for_checkpoint()
    time.sleep(kill.pause)


def _kill(job: JobRun, victim: str) -> None:
    supervisor = psutil.Process(job.pid)
    if victim == "supervisor":
        killed = [supervisor]
    elif victim == "everything":
        killed = [*job.processes(), supervisor]
    else:
        killed = [job.only(f"dray.jobs.replica.{victim}")]
    for process in killed:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def main() -> None:
    """Run one chain and print how far it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="how often something is killed (default: 10)")
    parser.add_argument("--seed", type=int, default=1, help="what all choices follow from (default: 1)")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dray-chain-") as folder:
        run_chain(Path(folder), kills_of(options.seed, random_victims(options.seed, options.kills)))
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
