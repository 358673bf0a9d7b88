import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dray.errors import ConfigError
from dray.runtime.entry_point import check_entry_points, load_entry_point


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


def test_class_without_the_needed_methods_is_refused(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text("class Worker:\n    setup = load_weights = rollout = lambda self: None\n")
    with pytest.raises(ConfigError, match="it lacks train_step, weights, save, load"):
        check_entry_points("job.py:Worker", "job.py:Worker", tmp_path)
