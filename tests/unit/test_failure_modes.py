"""docs/reference/failure-modes.md has every row, and names tests that exist; each row of the first five tables
has one that bears its number."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reference" / "failure-modes.md"
COUNTS = (
    ("B", 14),
    ("W", 13),
    ("C", 14),
    ("D", 14),
    ("T", 10),
    ("G", 4),
    ("H", 4),
    ("R", 18),
    ("Z", 13),
    ("V", 4),
    ("X", 17),
    ("Y", 31),
)
ROWS = [f"{letter}{number}" for letter, count in COUNTS for number in range(1, count + 1)]


@functools.cache
def documented() -> dict[str, str]:
    """The text below each row's heading."""
    parts = re.split(r"^### ([A-Z]\d+)\. .+\n", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    assert len(set(parts[::2])) == len(parts[::2])
    letters = {letter for letter, _ in COUNTS}
    return {row: text for row, text in zip(parts[::2], parts[1::2], strict=True) if row[0] in letters}


@functools.cache
def functions_in(path: str) -> set[str]:
    """The names of the test functions in a file."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    }


def test_every_row_is_there_in_order() -> None:
    assert list(documented()) == ROWS


@pytest.mark.parametrize("row", ROWS)
def test_row_states_what_happens_and_names_tests_that_exist(row: str) -> None:
    text = documented()[row]
    named = re.findall(r"^- `(tests/[\w/]+\.py)::(\w+)`$", text, re.MULTILINE)
    assert len(named) == len(re.findall(r"^- ", text, re.MULTILINE)) >= 1
    assert len(set(named)) == len(named)
    assert text.strip().splitlines()[0][0] != "-", "what happens comes first"
    assert [f"{path}::{name}" for path, name in named if name not in functions_in(path)] == []
    if row[0] in "BWCDGHR":
        assert any(name.startswith(f"test_{row.lower()}_") for _, name in named)
