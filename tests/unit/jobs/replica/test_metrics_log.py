import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from dray.jobs.replica.metrics import MetricsLog, read_metrics


def line(step: int, **more: Any) -> str:
    return json.dumps({"step": step, "committed": 8 * step, "metrics": {}, **more}) + "\n"


def steps(path: Path) -> list[int]:
    """The steps in the file, every line of which must be whole."""
    return [json.loads(each)["step"] for each in path.read_text().splitlines()]


def test_file_begins_with_the_steps_of_the_checkpoint_and_continues_from_there(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(map(line, range(1, 6))))
    with MetricsLog(path) as log:
        assert log.committed == 40, "of the steps that are rolled back, too"
        log.cut(3)
        log.write({"step": 4, "metrics": {"loss": 0.5}})
        assert steps(path) == [1, 2, 3, 4], "a line is there as soon as it is written"
        log.sync()
    assert read_metrics(path)[-1] == {"step": 4, "metrics": {"loss": 0.5}}


@pytest.mark.parametrize("torn", ['{"step": 3, "comm', "\x00\x00\x00", '{"step": 3, "note": "\udcff'])
def test_line_that_a_kill_has_cut_off_is_left_out(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes((line(1) + line(2) + torn).encode(errors="surrogateescape"))
    assert [each["step"] for each in read_metrics(path)] == [1, 2]
    with MetricsLog(path) as log:
        log.cut(2)
        log.write({"step": 3})
    assert steps(path) == [1, 2, 3]


def test_repeated_steps_replace_those_that_were_rolled_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(line(step, attempt=1) for step in (1, 2, 3, 4)) + line(3, attempt=2))
    assert [(each["step"], each["attempt"]) for each in read_metrics(path)] == [(1, 1), (2, 1), (3, 2)]


@pytest.mark.parametrize("text", ["", "[]\n", "7\n", "{}\n", '{"step": "1"}\n', "null\n"])
def test_what_is_no_line_of_a_step_is_left_out(tmp_path: Path, text: str) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text(text)
    assert read_metrics(path) == []
    with MetricsLog(path) as log:
        log.cut(10)
        assert log.committed == 0
    assert path.read_text() == ""


def test_process_that_was_replaced_writes_nothing_to_the_file_any_more(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as paused, MetricsLog(path) as log:
        paused.cut(0)
        paused.write({"step": 1})
        log.cut(0)
        log.write({"step": 1, "by": "the new one"})
        paused.write({"step": 2})
    assert read_metrics(path) == [{"step": 1, "by": "the new one"}]


def test_process_that_is_killed_at_any_time_leaves_whole_lines_in_order(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(map(line, range(1, 1001))))
    for _ in range(3):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                for number in range(10**9):
                    with MetricsLog(path) as log:
                        log.cut(990)
                        for step in range(991, 1000):
                            log.write({"step": step, "committed": 0})
                    if number == 3:
                        os.write(writer, b"x")
            finally:
                os._exit(1)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            assert pipe.read(1) == b"x"
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        found = [each["step"] for each in read_metrics(path)]
        assert found == list(range(1, len(found) + 1))
        assert len(found) >= 990


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_number_that_is_not_finite_is_refused_and_leaves_the_file_as_it_was(tmp_path: Path, value: float) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.cut(0)
        log.write({"step": 1})
        with pytest.raises(ValueError, match="JSON compliant"):
            log.write({"step": 2, "loss": value})
    assert steps(path) == [1]
