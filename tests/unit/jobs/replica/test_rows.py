import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dray.errors import ConfigError
from dray.jobs.config import WorkTable
from dray.jobs.replica.entry_points import WorkItemRows, check_rows, shuffled


@pytest.fixture(autouse=True)
def _imports() -> Iterator[None]:
    modules, path = set(sys.modules), list(sys.path)
    yield
    for name in set(sys.modules) - modules:
        del sys.modules[name]
    sys.path[:] = path


def rows_of(items: str, folder: Path, *, shuffle: bool = False, seed: int = 0) -> WorkItemRows:
    return WorkItemRows(WorkTable(items=items, shuffle=shuffle), folder, seed)


@pytest.mark.parametrize("end", ["", "\n"])
def test_work_item_gets_the_line_of_its_index_and_begins_again_after_the_last(tmp_path: Path, end: str) -> None:
    (tmp_path / "items.jsonl").write_text('{"a": 1}\n{"a": "\u00e4"}\r\n{"a": [3]}' + end, encoding="utf-8")
    with rows_of("items.jsonl", tmp_path) as rows:
        assert [rows.row(index)["a"] for index in (0, 1, 2, 3, 7)] == [1, "\u00e4", [3], 1, "\u00e4"]


@pytest.mark.parametrize("name", ["LIST", "made", "generated", "Iterated"])
def test_rows_come_from_an_iterable_or_from_a_function_that_returns_one(tmp_path: Path, name: str) -> None:
    (tmp_path / "data.py").write_text(
        "LIST = [{'n': 0}, {'n': 1}]\n"
        "def made(): return tuple(LIST)\n"
        "def generated(): yield from LIST\n"
        "class Iterated:\n    def __iter__(self): return iter(LIST)\n"
    )
    rows = rows_of(f"data.py:{name}", tmp_path)
    assert [rows.row(index) for index in range(3)] == [{"n": 0}, {"n": 1}, {"n": 0}]


def test_change_of_a_row_does_not_reach_the_next_pass(tmp_path: Path) -> None:
    (tmp_path / "data.py").write_text("ROWS = [{'n': []}]\n")
    rows = rows_of("data.py:ROWS", tmp_path)
    rows.row(0)["n"].append(1)
    assert rows.row(1) == {"n": []}


def test_work_item_without_a_data_set_has_no_row(tmp_path: Path) -> None:
    assert WorkItemRows(WorkTable(), tmp_path, 0).row(3) is None


def test_every_pass_over_shuffled_rows_has_each_row_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text("".join(json.dumps({"n": number}) + "\n" for number in range(50)))
    orders = []
    for seed in (7, 7, 8):
        with rows_of("items.jsonl", tmp_path, shuffle=True, seed=seed) as rows:
            orders.append([rows.row(index)["n"] for index in range(150)])
    passes = [orders[0][begin : begin + 50] for begin in (0, 50, 100)]
    assert all(sorted(each) == list(range(50)) for each in passes)
    assert passes[0] != passes[1] != passes[2] != passes[0]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 17, 1000])
def test_shuffled_numbers_are_a_permutation(count: int) -> None:
    assert sorted(shuffled(number, count, "order") for number in range(count)) == list(range(count))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "items.jsonl is empty"),
        (b'{"a": 1}\n{"a": \n', "items.jsonl, line 2 is not JSON"),
        (b'{"a": 1}\n\n{"a": 2}\n', "items.jsonl, line 2 is not JSON"),
        (b'{"a": 1}\n[1]\n', "items.jsonl, line 2 is of type list; each line must be a JSON object"),
        (b"null\n", "items.jsonl, line 1 is null"),
        (b'{"a": "\xff"}\n', "items.jsonl, line 1 is not text in UTF-8"),
        (b"[" * 100_000, "items.jsonl, line 1 is not JSON"),
        (None, "items.jsonl: No such file or directory"),
    ],
)
def test_line_that_cannot_be_used_is_named(tmp_path: Path, text: bytes | None, words: str) -> None:
    if text is not None:
        (tmp_path / "items.jsonl").write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        check_rows("items.jsonl", tmp_path)
    assert (caught.value.key, caught.value.value) == ("work.items", "items.jsonl")
    assert words in caught.value.message
    assert caught.value.message.isprintable()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("NOTHING", "data.py has no NOTHING"),
        ("EMPTY", "it has no rows"),
        ("NUMBER", "TypeError: 'int' object is not iterable"),
        ("raises", "ValueError: no data (data.py:4 in raises); it must be an iterable"),
        ("breaks", "row 1 raised ValueError: torn"),
        ("OBJECTS", "row 1 is not what JSON can carry"),
        ("NANS", "row 0 is not what JSON can carry"),
    ],
)
def test_iterable_that_cannot_be_used_is_named(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "data.py").write_text(
        "EMPTY, NUMBER, OBJECTS, NANS = [], 3, [1, object()], [float('nan')]\n"
        "import json\n"
        "def raises():\n    raise ValueError('no data')\n"
        "def breaks():\n    yield 1\n    raise ValueError('torn')\n"
    )
    with pytest.raises(ConfigError) as caught:
        check_rows(f"data.py:{name}", tmp_path)
    assert caught.value.key == "work.items"
    assert words in caught.value.message


def test_row_of_a_file_that_was_cut_since_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    with rows_of("items.jsonl", tmp_path) as rows:
        path.write_text('{"a": 1}\n')
        with pytest.raises(ConfigError, match="line 2 is not JSON"):
            rows.row(1)
