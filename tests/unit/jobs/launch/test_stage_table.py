"""The files of spans are read whatever has happened to their writers, and joined to one axis of time."""

from pathlib import Path

import pytest
from traces import write_spans

from dray.errors import ConfigError
from dray.jobs.folder import JobFolder
from dray.jobs.launch.stage_table import read_trace, stage_table
from dray.jobs.replica.stages import Span, Stage

WRITTEN = [
    Span(Stage.ROLLOUT, 1, 2, 0, "p:0"),
    Span(Stage.PACK, 2, 3, 0, "p:0"),
    Span(Stage.HAND_OVER, 3, 5, 0, "p:0"),
]
GIVEN = [Span(Stage.READ, 7, 8, 0, "p:0"), Span(Stage.TRAIN, 8, 12, 0, "p:0"), Span(Stage.WEIGHTS, 12, 13, step=1)]


def spans_of(folder: JobFolder) -> list[Span]:
    return [each.span for each in read_trace(folder)]


def test_wait_in_the_ring_is_between_the_hand_over_and_the_read(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    write_spans(folder, "rollout-0", WRITTEN)
    write_spans(folder, "policy-0", GIVEN)
    assert spans_of(folder) == [*WRITTEN, Span(Stage.WAIT_IN_RING, 5, 7, 0, "p:0"), *GIVEN]


def test_hand_over_ends_with_the_read_that_is_earlier_than_its_answer(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    write_spans(folder, "rollout-0", WRITTEN)
    write_spans(folder, "policy-0", [Span(Stage.READ, 4, 8, 0, "p:0")])
    assert Span(Stage.HAND_OVER, 3, 4, 0, "p:0") in spans_of(folder)
    assert Span(Stage.WAIT_IN_RING, 4, 4, 0, "p:0") in spans_of(folder)


def test_clocks_of_other_hosts_are_brought_to_that_of_the_policy(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    write_spans(folder, "policy-0", GIVEN, host="one", unix=1000.0)
    write_spans(folder, "rollout-0", WRITTEN, host="two", unix=1001.5)
    assert [(each.begin, each.end) for each in spans_of(folder)[:4]] == [
        (2.5, 3.5),
        (3.5, 4.5),
        (4.5, 6.5),
        (6.5, 7),
    ]
    assert "wait_in_ring" not in stage_table(read_trace(folder)), "the clocks of two hosts differ"


def test_no_payload_is_read_before_it_was_handed_on_however_wrong_the_time_of_day_is(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    write_spans(folder, "policy-0", GIVEN, host="one", unix=1000.0)
    write_spans(folder, "rollout-0", WRITTEN, host="two", unix=1500.0)
    spans = spans_of(folder)
    assert [each.stage for each in spans[:5]] == ["rollout", "pack", "hand_over", "wait_in_ring", "read"]
    assert [each.end - each.begin for each in spans[:3]] == [1, 1, 2]


@pytest.mark.parametrize(
    "tail",
    [
        '{"stage": "tra',
        '{"stage": "nothing", "begin": 1, "end": 2, "work_item": 0, "payload": "p:0"}\n',
        '{"stage": "train", "begin": 2, "end": 1, "work_item": 0, "payload": "p:0"}\n',
        '{"stage": "train", "begin": "x", "end": 1, "work_item": 0, "payload": "p:0"}\n',
        '{"stage": "train", "begin": 1, "end": 2}\n[]\n\n7\n',
        '{"process": "policy-0"}\n',
    ],
)
def test_line_that_is_cut_or_damaged_is_left_out(tmp_path: Path, tail: str) -> None:
    folder = JobFolder(tmp_path)
    write_spans(folder, "policy-0", GIVEN, tail=tail)
    assert spans_of(folder) == GIVEN


def test_folder_without_a_trace_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a job with job\.trace above 0") as caught:
        read_trace(JobFolder(tmp_path))
    assert (caught.value.key, caught.value.value) == ("OUTPUT", str(tmp_path))


def test_table_sums_up_the_seconds_of_each_stage(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    reads = [Span(Stage.READ, 10 * number, 10 * number + number, 0, f"p:{number}") for number in range(1, 4)]
    write_spans(folder, "policy-0", [*GIVEN[1:], *reads])
    table = stage_table(read_trace(folder))
    assert list(table) == ["read", "train", "weights"]
    assert table["read"] == {"count": 3, "mean": 2.0, "p50": 2.0, "p99": 2.98, "total": 6.0}
