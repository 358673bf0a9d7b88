"""`dray trace`: the file and the table of a job's folder, and which folder it is by default."""

import json
import os
from pathlib import Path

import pytest
from traces import checked_events, write_spans

from dray.cli.trace import find_traced, table_lines, trace
from dray.errors import ConfigError, OutputError
from dray.jobs.folder import JobFolder
from dray.jobs.replica.stages import Span, Stage


def traced(root: Path) -> JobFolder:
    folder = JobFolder(root)
    root.mkdir(parents=True)
    write_spans(folder, "policy-0", [Span(Stage.READ, 1, 2, 0, "p:0"), Span(Stage.TRAIN, 2, 4, 0, "p:0")])
    return folder


def test_file_is_in_the_output_folder_unless_it_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = traced(tmp_path / "out")
    trace(folder.root)
    trace(folder.root, tmp_path / "mine.json")
    for path in (folder.root / "trace.json", tmp_path / "mine.json"):
        assert len(checked_events(json.loads(path.read_text()))) == 6
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["stage", "count", "mean", "ms", "p50", "ms", "p99", "ms", "total", "s"]
    assert lines[2].split() == ["train", "1", "2000.000", "2000.000", "2000.000", "2.000"]
    assert lines[3].endswith(": processes 1, payloads 1; open it at https://ui.perfetto.dev")


def test_job_that_was_traced_last_is_the_default(tmp_path: Path) -> None:
    for age, name in enumerate(("one/001", "two/001", "one/002")):
        os.utime(traced(tmp_path / name).trace, (age, age))
    assert find_traced(tmp_path) == tmp_path / "one" / "002"


def test_folder_without_a_trace_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"job\.trace above 0"):
        find_traced(tmp_path)
    with pytest.raises(ConfigError, match=r"job\.trace above 0"):
        trace(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_file_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    folder = traced(tmp_path / "out")
    with pytest.raises(OutputError, match=r"mine\.json"):
        trace(folder.root, tmp_path / "nowhere" / "mine.json")


def test_table_without_stages_has_its_head_only() -> None:
    assert len(list(table_lines({}))) == 1
