"""What users get wrong, as a table: each row a job that `dray run` must name the mistake of.

``python tests/process/user_mistakes.py [WORDS …]`` runs the rows whose names have one of WORDS in them, or all of
them, as a user would, and prints for each the exit code and what the terminal showed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

CLASSES = """
import json
import numpy as np

class Worker:
    def setup(self, context): ...
    def load_weights(self, weights, version): ...
    def rollout(self, work_item):
        return {"rewards": np.ones(8, np.float32)}

class Trainer:
    def setup(self, context):
        self.steps = 0
    def train_step(self, trajectories):
        self.steps += 1
        return {"score": float(self.steps)}
    def weights(self):
        return {"w": np.full(8, self.steps, np.float32)}
    def save(self, folder):
        (folder / "trainer.json").write_text(json.dumps(self.steps))
    def load(self, folder):
        self.steps = json.loads((folder / "trainer.json").read_text())
"""

JOB = """
[job]
name = "mistaken"
plot = ""
max_steps = 3
[rollout]
worker = "mistaken.py:<Worker>"
replicas = 1
slots = 8
slot_bytes = 4096
[policy]
trainer = "mistaken.py:<Trainer>"
batch_size = 4
[controller]
heartbeat_interval = 0.3
[timeouts]
shutdown = 4
"""
BOUND = 60.0


@dataclass(frozen=True)
class Mistake:
    """A job with one mistake.

    Args:
        text: of the class, or of lines that stand before it; empty for a mistake of the job file.
        words: must all be in what the terminal shows.
        settings: of the command line.
    """

    name: str
    text: str
    words: tuple[str, ...]
    exit_code: int
    settings: tuple[str, ...] = ()


def rollout(what: str, *words: str, code: int = 17) -> Mistake:
    """`Worker.rollout` returns `what`."""
    text = f"class BadWorker(Worker):\n    def rollout(self, work_item):\n        return {what}\n"
    return Mistake(f"rollout returns {what}", text, ("BadWorker.rollout() of mistaken.py", *words), code)


def weights(what: str, *words: str, code: int = 17) -> Mistake:
    """`Trainer.weights` returns `what`."""
    text = f"class BadTrainer(Trainer):\n    def weights(self):\n        return {what}\n"
    return Mistake(f"weights returns {what}", text, ("BadTrainer.weights() of mistaken.py", *words), code)


def train_step(what: str, *words: str, code: int = 17) -> Mistake:
    """`Trainer.train_step` returns `what`."""
    text = f"class BadTrainer(Trainer):\n    def train_step(self, trajectories):\n        return {what}\n"
    return Mistake(f"train_step returns {what}", text, ("BadTrainer.train_step() of mistaken.py", *words), code)


def worker(name: str, methods: str, *words: str, code: int) -> Mistake:
    """A worker with other methods."""
    return Mistake(name, f"class BadWorker(Worker):\n{_indented(methods)}", words, code)


def trainer(name: str, methods: str, *words: str, code: int) -> Mistake:
    """A trainer with other methods."""
    return Mistake(name, f"class BadTrainer(Trainer):\n{_indented(methods)}", words, code)


def _indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())


MISTAKES = [
    # --- values that cannot be used -----------------------------------------------------------------------------
    rollout("None", "returned None", "a mapping of names to arrays"),
    rollout("[np.ones(3)]", "returned a list", "a mapping of names to arrays"),
    rollout("[]", "returned an empty list", "at least one mapping"),
    rollout("[{'x': np.ones(3)}, None]", "a list whose item 1 is None", "a mapping of names to arrays"),
    rollout("3.5", "returned a float", "a mapping of names to arrays"),
    rollout("{}", "returned an empty mapping", "at least one array"),
    rollout("{3: np.ones(3)}", "name 3", "text"),
    rollout("{'x': [[1, 2], [3]]}", "field 'x'", "lists of different lengths"),
    rollout("{'x': np.array([None, 1])}", "field 'x'", "object"),
    rollout("{'x': np.array(['a', 'b'])}", "field 'x'", "<U1"),
    rollout("{'x': np.array(['a', 'b'], np.dtypes.StringDType())}", "field 'x'", "StringDType"),
    rollout("{'x': np.ones(3, np.complex128)}", "field 'x'", "complex128"),
    rollout("{'x': np.array(['2026-01-01'], 'datetime64[D]')}", "field 'x'", "datetime64[D]"),
    rollout("{'x': np.zeros(3, [('a', 'i4'), ('b', 'f4')])}", "field 'x'", "'a'"),
    rollout("{'x': np.ma.masked_less(np.arange(4.0), 2)}", "field 'x'", "masked array"),
    rollout("{'x': {1: np.ones(3)}}", "key 1 of field 'x'", "not text"),
    rollout("{'x': {'y': {1, 2}}}", "field 'x.y'", "a set"),
    rollout(
        "{'x': np.ones(131072)}", "a payload of 1,048,704 bytes", "rollout.slot_bytes = 4096", "at least 1048704"
    ),
    replace(
        rollout("{'x': np.zeros(50_000_000)}", "400,000,128 bytes", 'job.transfer = "reference"'),
        settings=("job.transfer=inline",),
    ),
    worker(
        "rollout returns a coroutine",
        "async def later(self):\n    return {}\ndef rollout(self, work_item):\n    return self.later()\n",
        "BadWorker.rollout() of mistaken.py returned a coroutine",
        "async",
        code=17,
    ),
    weights("None", "returned None", "a mapping of names to arrays"),
    weights("[np.ones(3)]", "returned a list", "a mapping of names to arrays"),
    weights("{}", "returned an empty mapping", "at least one array"),
    weights("{'w': np.array([None])}", "field 'w'", "object"),
    weights("{'w': {'layer': {1, 2}}}", "field 'w.layer'", "a set"),
    replace(
        weights("None", "returned None"),
        name="weights returns None in a policy group of two",
        settings=("policy.replicas=2", "policy.readers=2"),
    ),
    train_step("None", "returned None", "a mapping of metric names to numbers"),
    train_step("[1.0]", "returned a list", "a mapping of metric names to numbers"),
    train_step("{'loss': 'small'}", "metric 'loss'", "'small'"),
    train_step("{'loss': None}", "metric 'loss'", "None"),
    train_step("{'loss': np.ones(3)}", "metric 'loss'", "shape (3,)"),
    train_step("{3: 1.0}", "metric name 3", "text"),
    trainer(
        "save removes its folder",
        "def save(self, folder):\n    folder.rmdir()\n",
        "BadTrainer.save() of mistaken.py",
        "removed",
        code=17,
    ),
    # --- exceptions ---------------------------------------------------------------------------------------------
    worker(
        "rollout raises",
        "def rollout(self, work_item):\n    raise ValueError('the environment broke')\n",
        "BadWorker.rollout() raised ValueError: the environment broke (mistaken.py:25 in rollout)",
        code=10,
    ),
    worker(
        "rollout raises text with escape sequences",
        "def rollout(self, work_item):\n    raise ValueError('red \\x1b[31m\\nsupervisor INFO forged')\n",
        "ValueError: red \\x1b[31m supervisor INFO forged (mistaken.py:25 in rollout)",
        code=10,
    ),
    worker(
        "rollout leaves the interpreter",
        "def rollout(self, work_item):\n    raise SystemExit(3)\n",
        "BadWorker.rollout() raised SystemExit: 3",
        code=10,
    ),
    worker("setup raises", "def setup(self, context):\n    context.args['env']\n", "KeyError: 'env'", code=10),
    worker("the worker's __init__ raises", "def __init__(self):\n    1 / 0\n", "ZeroDivisionError", code=10),
    worker(
        "load_weights raises",
        "def load_weights(self, weights, version):\n    weights['bias']\n",
        "BadWorker.load_weights() raised KeyError: 'bias'",
        code=10,
    ),
    trainer(
        "train_step raises",
        "def train_step(self, trajectories):\n    trajectories[0].arrays['return']\n",
        "BadTrainer.train_step() raised KeyError: 'return'",
        code=10,
    ),
    trainer("weights raises", "def weights(self):\n    return self.model\n", "AttributeError", "'model'", code=10),
    trainer(
        "save raises",
        "def save(self, folder):\n    (folder / 'a' / 'b').write_text('')\n",
        "BadTrainer.save() raised FileNotFoundError",
        code=10,
    ),
    # --- signatures ---------------------------------------------------------------------------------------------
    worker("setup is async", "async def setup(self, context): ...\n", "setup() is an async function", code=2),
    worker(
        "load_weights is async and rollout is not",
        "async def load_weights(self, weights, version): ...\n",
        "load_weights() is an async function, and rollout() is not",
        code=2,
    ),
    replace(
        worker(
            "several work items at once in a plain worker",
            "pass\n",
            "rollout.concurrency = 8",
            "must be 1",
            code=2,
        ),
        settings=("rollout.concurrency=8",),
    ),
    worker("rollout yields", "def rollout(self, work_item):\n    yield {}\n", "rollout() is a generator", code=2),
    worker("rollout takes no work item", "def rollout(self): ...\n", "rollout(self)", "(self, work_item)", code=2),
    worker("self is forgotten", "def rollout(work_item): ...\n", "rollout(work_item)", "self", code=2),
    trainer("save takes two", "def save(self, folder, step): ...\n", "save(self, folder, step)", "'step'", code=2),
    trainer("setup is no method", "setup = None\n", "lacks setup", code=2),
    trainer("__init__ takes arguments", "def __init__(self, lr): ...\n", "without arguments", "'lr'", code=2),
    Mistake(
        "both classes have mistakes",
        "class BadWorker(Worker):\n    def rollout(self): ...\n    async def setup(self, context): ...\n"
        "class BadTrainer(Trainer):\n    def load(self): ...\n",
        ("rollout(self)", "setup() is an async function", "load(self)"),
        2,
    ),
    Mistake(
        "the file raises when it is imported",
        "raise RuntimeError('no GPU')\n",
        ("RuntimeError: no GPU (mistaken.py:23)",),
        2,
    ),
    Mistake("the file leaves the interpreter", "raise SystemExit(3)\n", ("SystemExit: 3 (mistaken.py:23)",), 2),
    Mistake("no such class", "", ("has no class Wroker, but",), 2, ("rollout.worker=mistaken.py:Wroker",)),
    # --- job files ----------------------------------------------------------------------------------------------
    Mistake(
        "several keys are wrong",
        "",
        ("job.sede = 1", "policy.batch_size = -1", "job.lane = 'rdma'", "stop.at_least is missing"),
        2,
        ("job.sede=1", "policy.batch_size=-1", "job.lane=rdma", "stop.metric=score"),
    ),
]


def write_job(mistake: Mistake, folder: Path) -> Path:
    """Write the files of a job with `mistake` into `folder`; returns the job file's path."""
    (folder / "mistaken.py").write_text(f"{CLASSES}{mistake.text}")
    text = JOB
    for role in ("Worker", "Trainer"):
        text = text.replace(f"<{role}>", f"Bad{role}" if f"class Bad{role}(" in mistake.text else role)
    path = folder / "job.toml"
    path.write_text(text)
    return path


@dataclass(frozen=True)
class Run:
    """What a user has seen of a run."""

    exit_code: int
    text: str
    output: Path


def run_job(mistake: Mistake, folder: Path) -> Run:
    """Run the job of `mistake` as a user would, in `folder`."""
    settings = [part for setting in mistake.settings for part in ("--set", setting)]
    path, output = write_job(mistake, folder), folder / "out"
    ended = subprocess.run(
        [sys.executable, "-m", "dray.cli.app", "run", str(path), "--output", str(output), *settings],
        cwd=folder,
        env={**os.environ, "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=BOUND,
        check=False,
    )
    return Run(ended.returncode, ended.stdout.decode(), output)


def main(chosen: list[str]) -> int:
    """Run the mistakes, and print which were not named as they must be."""
    wrong = []
    for mistake in MISTAKES:
        if chosen and not any(words in mistake.name for words in chosen):
            continue
        with tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            run = run_job(mistake, Path(folder))
            missing = [words for words in mistake.words if words not in run.text]
            print(f"== {mistake.name}: exit code {run.exit_code}, {time.monotonic() - began:.1f} s")
            print(run.text.replace(folder, "…").rstrip(), flush=True)
            if missing or run.exit_code != mistake.exit_code:
                wrong.append(mistake.name)
                print(f"   MUST BE: exit code {mistake.exit_code}, with {missing or 'these words'}", flush=True)
    print(f"{len(wrong)} of the mistakes are not named as they must be: {wrong}" if wrong else "all are named")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
