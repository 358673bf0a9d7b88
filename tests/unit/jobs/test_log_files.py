import os
from pathlib import Path

import pytest

from dray.errors import ConfigError
from dray.jobs.log_files import LogFiles


def record(second: int, text: str) -> str:
    return f"2026-01-31 10:00:{second:02d},000 {text}\n"


def write(folder: Path, name: str, *lines: str) -> None:
    with (folder / f"{name}.log").open("a", encoding="utf-8") as file:
        file.write("".join(lines))


def texts(files: LogFiles, count: int = 100) -> list[tuple[str, str]]:
    return [(line.name, line.text.removeprefix("2026-01-31 10:00:")) for line in files.last(count)]


def test_last_lines_of_all_processes_are_merged_by_time(tmp_path: Path) -> None:
    write(tmp_path, "policy-0", record(1, "a"), record(4, "d"))
    write(tmp_path, "rollout-0", record(2, "b"), record(3, "c"), record(5, "e"))
    files = LogFiles(tmp_path)
    assert [text[-1] for _, text in texts(files)] == ["a", "b", "c", "d", "e"]
    assert texts(files, 2) == [("policy-0", "04,000 d"), ("rollout-0", "05,000 e")]
    assert files.last(0) == []


def test_lines_without_a_time_stay_with_their_record_or_come_before_the_next_one(tmp_path: Path) -> None:
    write(tmp_path, "policy-0", record(1, "error"), "    in a file\n", "printed\n", record(5, "later"))
    write(tmp_path, "rollout-0", record(3, "between"), "at the end\n")
    os.utime(tmp_path / "rollout-0.log", (0, 0))
    shown = [text for _, text in texts(LogFiles(tmp_path))]
    assert shown.index("    in a file") == shown.index("01,000 error") + 1
    assert shown.index("printed") == shown.index("05,000 later") - 1 > shown.index("03,000 between")
    os.utime(tmp_path / "rollout-0.log", None)  # it was written after every record
    assert texts(LogFiles(tmp_path))[-1] == ("rollout-0", "at the end")


def test_file_keeps_its_order_when_its_clock_goes_back(tmp_path: Path) -> None:
    write(tmp_path, "policy-0", record(9, "first"), record(1, "second"))
    assert [text for _, text in texts(LogFiles(tmp_path))] == ["09,000 first", "01,000 second"]


def test_new_lines_come_once_when_they_are_complete_also_of_new_files_and_replaced_ones(tmp_path: Path) -> None:
    write(tmp_path, "policy-0", record(1, "a"), "half a ")
    files = LogFiles(tmp_path)
    assert [line.text[-1] for line in files.last(10)] == ["a"]
    assert files.new() == []
    write(tmp_path, "policy-0", "line\n")
    write(tmp_path, "rollout-0", record(2, "b"))
    assert {(line.name, line.text[-6:]) for line in files.new()} == {
        ("policy-0", "a line"),
        ("rollout-0", ",000 b"),
    }
    assert files.new() == []
    (tmp_path / "policy-0.log").write_text("new\n")
    assert [line.text for line in files.new()] == ["new"]
    write(tmp_path, "policy-0", "no end")
    assert files.new() == []
    assert [line.text for line in files.new(ended=True)] == ["no end"]
    assert files.new(ended=True) == []


def test_only_the_process_that_is_named_is_read_and_a_wrong_name_is_an_error_that_lists_them(
    tmp_path: Path,
) -> None:
    write(tmp_path, "policy-0", record(1, "a"))
    write(tmp_path, "rollout-0", record(2, "b"))
    assert texts(LogFiles(tmp_path, "rollout-0")) == [("rollout-0", "02,000 b")]
    for wrong in ("rollout-1", "../rollout-0", "", "\x1b[2J"):
        with pytest.raises(ConfigError, match="must be one of policy-0, rollout-0") as caught:
            LogFiles(tmp_path, wrong)
        assert (caught.value.key, caught.value.value) == ("REPLICA", wrong)
        assert "\x1b" not in str(caught.value)


def test_characters_that_do_not_print_are_escaped(tmp_path: Path) -> None:
    (tmp_path / "rollout-0.log").write_bytes(b"\x1b[2Jred\r\x07 \xe2\x80\xae \xff\n")
    (line,) = LogFiles(tmp_path).last(10)
    assert line.text == "\\x1b[2Jred \\x07 \\u202e \ufffd"


def test_last_lines_of_a_long_file_are_found_whatever_their_length(tmp_path: Path) -> None:
    write(tmp_path, "policy-0", *(record(number % 60, f"{number} {'x' * 3000}") for number in range(1000)))
    found = [line.text.split()[2] for line in LogFiles(tmp_path).last(300)]
    assert found == [str(number) for number in range(700, 1000)]


def test_of_many_files_those_that_were_written_last_are_read(tmp_path: Path) -> None:
    for number in range(10):
        write(tmp_path, f"rollout-{number}", record(number, "x"))
        os.utime(tmp_path / f"rollout-{number}.log", (number, number))
    assert [line.name for line in LogFiles(tmp_path, most=2).last(10)] == ["rollout-8", "rollout-9"]


def test_what_is_no_file_is_left_out(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.log")
    (tmp_path / "folder.log").mkdir()
    (tmp_path / "gone.log").symlink_to("nothing")
    write(tmp_path, "policy-0", record(1, "a"))
    files = LogFiles(tmp_path)
    assert [line.name for line in files.last(10)] == ["policy-0"]
    assert files.new() == []
    assert LogFiles(tmp_path / "missing").last(10) == []
