from pathlib import Path

import pytest
from pythons import NOT_FOUND, Row, find_python, full_version, row_of, table

RUNS = "#!/bin/sh\necho 3.98.7\n"
DOES_NOT_RUN = "#!/bin/sh\nexit 127\n"


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_interpreter_on_path_that_does_not_run_is_passed_over_for_the_newest_of_pyenv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert find_python("3.98", tmp_path / "pyenv") is None
    program(tmp_path / "bin" / "python3.98", DOES_NOT_RUN)
    assert find_python("3.98", tmp_path / "pyenv") is None
    program(tmp_path / "pyenv" / "versions" / "3.98.1" / "bin" / "python3.98", RUNS)
    newest = program(tmp_path / "pyenv" / "versions" / "3.98.7" / "bin" / "python3.98", RUNS)
    assert find_python("3.98", tmp_path / "pyenv") == newest
    assert full_version(newest) == "3.98.7"
    on_path = program(tmp_path / "bin" / "python3.98", RUNS)
    assert find_python("3.98", tmp_path / "pyenv") == on_path


def test_row_counts_what_pytest_reported(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    assert row_of("3.98.7", 4, report, 2.0) == Row("3.98.7", "no tests: exit code 4", seconds=2.0)
    suite = '<testsuite tests="10" failures="1" errors="2" skipped="3"/>'
    report.write_text(f"<testsuites>{suite}</testsuites>")
    assert row_of("3.98.7", 1, report, 2.0) == Row("3.98.7", "failed", 4, 3, 3, 2.0)


def test_table_has_a_line_for_each_python() -> None:
    head, tested, missing = table([Row("3.98.7", "passed", 10, 0, 3, 61.4), Row("3.99", NOT_FOUND)])
    assert head.split() == ["Python", "result", "passed", "failed", "skipped", "seconds"]
    assert tested.split() == ["3.98.7", "passed", "10", "0", "3", "61"]
    assert missing.split() == ["3.99", "not", "found"]
