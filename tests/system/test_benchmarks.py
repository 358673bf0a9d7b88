"""The benchmarks in their smallest form: that they run, and the shape of what they write."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_benchmarks(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=110
    )


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    written = tmp_path_factory.mktemp("benchmarks") / "result.json"
    tiny = ("--sizes", "1KiB", "--rounds", "2", "--operations", "4", "--idle-seconds", "0.2")
    done = run_benchmarks(*tiny, "--json", str(written))
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(written.read_text())


def test_every_scenario_has_rows(result):
    _, document = result
    assert {row["scenario"] for row in document["rows"]} == {"reads", "idle", "packing", "ring"}
    assert document["schema"] == 1
    assert document["plan"]["rounds"] == 2
    assert document["machine"]["versions"]["dray"]


def test_every_row_has_figures_of_every_round(result):
    _, document = result
    for row in document["rows"]:
        assert row["p50_low"] <= row["p50"] <= row["p50_high"], row
        assert row["operations"] >= len(row["rounds"]) >= 2, row
        assert row["unit"] in ("s", "% of a core"), row


def test_every_lane_stands_beside_its_limit_and_target(result):
    _, document = result
    lanes = {row["subject"]: row for row in document["rows"] if row["scenario"] == "reads" and row["limit"]}
    missing = {"ucx"} if any("ucx" in skipped["what"] for skipped in document["skipped"]) else set()
    assert set(lanes) == {"shm", "shm in place", "tcp", "tcp with checksum", "ucx"} - missing
    for row in lanes.values():
        assert row["nbytes"] == 1024
        assert row["limit"]["p50"] > 0
        assert 0 < row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
        assert row["bytes_per_second"] > 0
    assert lanes["shm in place"]["target"]["name"] == "P1"
    assert lanes["tcp"]["target"]["name"] == "P4"


def test_idle_rows_tell_how_many_connections_there_were(result):
    _, document = result
    idle = [row for row in document["rows"] if row["scenario"] == "idle"]
    assert {row["subject"] for row in idle} >= {"shm server", "shm client", "tcp server", "tcp client"}
    assert {row["note"] for row in idle} == {"64 connections"}


def test_the_table_is_plain_where_there_is_no_terminal(result):
    shown, _ = result
    assert "Reads between two processes" in shown
    assert any(line.startswith("1 KiB") and "shm in place" in line for line in shown.splitlines())
    assert "│" not in shown


@pytest.mark.parametrize(
    ("option", "value"), [("--sizes", "1XiB"), ("--sizes", "12"), ("--lane", "rdma"), ("--scenario", "nothing")]
)
def test_an_unknown_choice_ends_before_anything_is_measured(option, value):
    done = run_benchmarks(option, value)
    assert done.returncode == 2
    assert value in done.stderr
