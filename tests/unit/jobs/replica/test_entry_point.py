import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dray.errors import ConfigError
from dray.jobs.replica.entry_points import check_entry_points, load_entry_point


@pytest.fixture(autouse=True)
def _imports() -> Iterator[None]:
    modules, path = set(sys.modules), list(sys.path)
    yield
    for name in set(sys.modules) - modules:
        del sys.modules[name]
    sys.path[:] = path


def test_class_is_found_in_a_file_beside_the_job_and_in_a_module(tmp_path: Path) -> None:
    (tmp_path / "sibling.py").write_text("VALUE = 3\n")
    (tmp_path / "job.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nimport sibling\n"
        "@dataclass\nclass Worker:\n    value: int = sibling.VALUE\n"
    )
    found = load_entry_point("rollout.worker", "job.py:Worker", tmp_path)
    assert found().value == 3
    assert load_entry_point("rollout.worker", "job.py:Worker", tmp_path) is found
    assert load_entry_point("rollout.worker", "pathlib:Path", tmp_path) is Path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nothing.py:Worker", "there is no file"),
        ("no.such.module:Worker", "ModuleNotFoundError"),
        ("job.py:Worker", "has no class Worker, but Other"),
        ("job.py:number", "has no class number"),
        ("broken.py:Worker", "SyntaxError"),
        ("raising.py:Worker", "ValueError: two lines"),
    ],
)
def test_what_cannot_be_imported_is_named_with_its_reason(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "job.py").write_text("class Other: ...\nnumber = 3\n")
    (tmp_path / "broken.py").write_text("class Worker(:\n")
    (tmp_path / "raising.py").write_text("raise ValueError('two\\nlines')\n")
    with pytest.raises(ConfigError) as caught:
        load_entry_point("rollout.worker", text, tmp_path)
    assert (caught.value.key, caught.value.value) == ("rollout.worker", text)
    assert words in caught.value.allowed
    assert "\n" not in str(caught.value)


GOOD = """
class Worker:
    def setup(self, context): ...
    def load_weights(self, weights, version=None): ...
    def rollout(self, *work_items): ...
class Trainer:
    def __init__(self, rate=0.1, **more): ...
    @classmethod
    def setup(cls, context): ...
    @staticmethod
    def train_step(trajectories): ...
    def weights(self): ...
    save = load = print
"""


def mistakes(tmp_path: Path, text: str, trainer: str = "job.py:Trainer") -> list[str]:
    """What is found wrong with the classes of a file with this text."""
    (tmp_path / "job.py").write_text(text)
    with pytest.raises(ConfigError) as caught:
        check_entry_points("job.py:Worker", trainer, tmp_path)
    return [each.message for each in caught.value.mistakes]


def test_methods_that_can_be_called_as_dray_does_are_enough(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(GOOD)
    check_entry_points("job.py:Worker", "job.py:Trainer", tmp_path)


def test_worker_may_be_asynchronous_and_have_several_work_items_in_flight(tmp_path: Path) -> None:
    text = GOOD.replace("def rollout", "async def rollout").replace("def load_weights", "async def load_weights")
    (tmp_path / "job.py").write_text(text)
    check_entry_points("job.py:Worker", "job.py:Trainer", tmp_path, concurrency=8)


def test_worker_with_a_plain_rollout_has_one_work_item_in_flight(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(GOOD)
    with pytest.raises(ConfigError, match=r"rollout\(\) is a plain function") as caught:
        check_entry_points("job.py:Worker", "job.py:Trainer", tmp_path, concurrency=8)
    assert (caught.value.key, caught.value.value) == ("rollout.concurrency", 8)


def test_class_without_the_needed_methods_is_refused(tmp_path: Path) -> None:
    (found,) = mistakes(tmp_path, GOOD, "job.py:Worker")
    assert "'job.py:Worker' cannot be used: it lacks train_step, weights, save, load; the methods must be" in found


@pytest.mark.parametrize(
    ("good", "bad", "words"),
    [
        (
            "def rollout(self, *work_items)",
            "def rollout(self)",
            "rollout(self) cannot be called with (self, work_item)",
        ),
        ("def rollout(self, *work_items)", "def rollout(work_item)", "rollout(work_item) cannot be called with"),
        (
            "def load_weights(self",
            "async def load_weights(self",
            "load_weights() is an async function, and rollout() is not: make both async",
        ),
        ("def setup(self", "async def setup(self", "setup() is an async function, and dray does not await it"),
        ("def weights(self)", "async def weights(self)", "weights() is an async function"),
        (
            "def rollout(self, *work_items): ...",
            "def rollout(self, work_item): yield 1",
            "rollout() is a generator",
        ),
        (
            "def rollout(self, *work_items): ...",
            "async def rollout(self, work_item): yield 1",
            "rollout() is a generator",
        ),
        ("def rollout(self, *work_items): ...", "rollout = 3", "it lacks rollout"),
        ("version=None", "*, version", "load_weights(self, weights, *, version) cannot be called with"),
        ("def weights(self)", "def weights(self, step: int) -> None", "weights(self, step) cannot be called with"),
        ("def setup(cls, context)", "def setup(cls)", "setup() cannot be called with (context)"),
        ("def train_step(trajectories)", "def train_step()", "train_step() cannot be called with (trajectories)"),
        ("rate=0.1", "rate", "Trainer(rate, **more) cannot be made without arguments: missing a required"),
        (
            "class Worker:",
            "import abc\nclass Worker(abc.ABC):\n    @abc.abstractmethod\n    def reset(self): ...",
            "Worker is abstract: it lacks reset",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, good: str, bad: str, words: str) -> None:
    assert good in GOOD
    (found,) = mistakes(tmp_path, GOOD.replace(good, bad, 1))
    assert words in found
    assert found.isprintable()


def test_mistakes_of_both_classes_are_named_at_once(tmp_path: Path) -> None:
    broken = GOOD.replace("*work_items", "").replace("def weights(self)", "async def weights(self)")
    worker, trainer = mistakes(tmp_path, broken)
    assert worker.startswith("rollout.worker = ")
    assert trainer.startswith("policy.trainer = ")
    (tmp_path / "other").mkdir()
    worker, trainer = mistakes(tmp_path / "other", broken.replace("class Worker", "class Other"))
    assert "has no class Worker, but Other, Trainer" in worker
    assert "weights() is an async function" in trainer


def test_file_that_ends_the_interpreter_is_named_with_the_line(tmp_path: Path) -> None:
    found = mistakes(tmp_path, "import sys\n\nsys.exit(3)\n")
    assert all("importing it raised SystemExit: 3 (job.py:3)" in each for each in found)
    assert len(found) == 2
