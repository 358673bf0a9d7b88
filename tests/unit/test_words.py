"""The list of banned words finds a word wherever it stands, and leaves the places where it is right."""

from pathlib import Path

import pytest
from words import findings, main, read_list

LISTED = read_list()


def found(text: str) -> list[tuple[int, str]]:
    return [(each.line, each.word) for each in findings(text, LISTED)]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("# Nobody waits for it.", "Nobody"),
        ('"""The server tells the client."""', "tells"),
        ("the job goes on", "goes on"),
        ("its first look into the segment", "first look"),
        ("the lease is returned", "lease is returned"),
    ],
)
def test_a_word_in_prose_is_found(text: str, word: str) -> None:
    assert found(text) == [(1, word)]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("def test_nobody_waits() -> None:", "nobody"),
        ("class LeaseGraveyard:", "Graveyard"),
        ("self._settled = True", "settled"),
        ("_LINKS = 3", "LINKS"),
    ],
)
def test_a_word_in_an_identifier_is_found(text: str, word: str) -> None:
    assert found(text) == [(1, word)]


@pytest.mark.parametrize("name", ["look", "take", "_take", "mind"])
def test_a_method_with_a_banned_name_is_found(name: str) -> None:
    assert f"def {name}" in [word for _, word in found(f"    def {name}(self) -> None:")]


@pytest.mark.parametrize("name", ["MOST_READS", "_LARGEST_SIZE", "LONGEST_NAME", "SMALLEST_SIZE", "FEWEST_SLOTS"])
def test_a_constant_with_a_banned_prefix_is_found(name: str) -> None:
    assert found(f"{name} = 2") == [(1, name)]


@pytest.mark.parametrize("mark", ["", "# ", "> ", "| "])
def test_a_phrase_is_found_across_lines_and_has_the_line_in_which_it_begins(mark: str) -> None:
    ((line, word),) = found(f"{mark}one\n{mark}the reader goes\n{mark}on\n")
    assert line == 2
    assert word.startswith("goes")


@pytest.mark.parametrize(
    "text",
    [
        "most of the time",
        "look up the address",
        "def takes_a_lease(self) -> None:",
        "a symbolic\nlink to the folder",
        "UCX's stream channel",
        "the life cycle of a slot",
        "a payload is over 3 MiB",
        "their reminder, a doorbell, the essay",
    ],
)
def test_a_word_that_is_right_there_is_left(text: str) -> None:
    assert found(text) == []


def test_each_finding_names_file_line_word_and_what_to_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "notes.md"
    file.write_text("Fine.\nIt waits in vain.\n")
    assert main([str(file)]) == 1
    assert capsys.readouterr().out == f'{file}:2: in vain: write "without success" instead\n'
    assert main(["--count", str(file)]) == 1
    assert capsys.readouterr().out.split() == ["1", str(file)]


def test_a_file_without_findings_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "notes.md"
    file.write_text("The server reports the error.\n")
    assert main([str(file)]) == 0
    assert capsys.readouterr().out == ""


def test_a_word_in_the_name_of_a_file_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "graveyard.py"
    file.touch()
    assert main([str(file)]) == 1
    assert f"{file}:0: graveyard:" in capsys.readouterr().out


def test_the_list_names_code_tests_pages_and_examples_and_not_itself() -> None:
    names = {path.name for path in LISTED.files}
    assert {"ring.py", "test_ring.py", "conftest.py", "architecture.md", "README.md", "Makefile"} <= names
    assert {"cartpole.py", "comparison.py", "streams.md", "zensical.toml"} <= names
    assert not {"words.py", "test_words.py", "banned-words.toml"} & names
