"""The benchmarks in their smallest form: that every scenario runs, and the shape of what is written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCENARIOS = {"reads", "batches", "idle", "packing", "ring", "fleet", "busy", "memory", "job", "beside"}


def run_benchmarks(*arguments, cwd=ROOT, cache=None):
    environment = dict(os.environ)
    if cache is not None:
        # Without the peers that have environments of their own: they take long to start.
        environment["XDG_CACHE_HOME"] = str(cache)
    return subprocess.run(
        [sys.executable, "-m", "dray.cli.app", "bench", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
    )


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    tiny = ["--quick", "--sizes", "1KiB", "--rounds", "2", "--operations", "4", "--idle-seconds", "0.1"]
    tiny += ["--memory-reads", "100", "--job-steps", "1", "--details"]
    written = ["--json", str(folder / "result.json"), "--plot", str(folder / "plot.png")]
    done = run_benchmarks(*tiny, *written, cwd=folder, cache=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "result.json").read_text()), folder


def test_every_scenario_has_rows(result):
    _, document, _ = result
    assert {row["scenario"] for row in document["rows"]} == SCENARIOS
    assert document["schema"] == 2
    assert document["plan"]["rounds"] == 2


def test_every_row_has_figures_of_every_round(result):
    _, document, _ = result
    for row in document["rows"]:
        low, high = row["quartiles"]
        assert low <= row["p50"] <= high, row
        assert row["operations"] >= 1
        assert len(row["rounds"]) >= (1 if row["scenario"] in ("memory", "job") else 2), row


def test_the_machine_is_described_without_being_named(result):
    _, document, _ = result
    machine = document["machine"]
    assert machine["cores"] >= 1
    assert machine["processor"]
    assert machine["versions"]["dray"]
    assert os.uname().nodename not in json.dumps(machine)


def test_every_target_has_a_line_in_the_table(result):
    shown, document, _ = result
    table = shown[shown.rindex("\nTargets\n") :]
    judged = {row["target"]["name"] for row in document["rows"] if row["target"]}
    # At 1 KiB nothing is asked of large payloads.
    assert judged >= {"P1", "P4", "P7", "P8", "P9", "P10", "P11", "P12", "P13", "P14"}
    for number in range(1, 16):
        assert f"\nP{number} " in table


def test_what_has_a_limit_has_a_ratio_to_it(result):
    _, document, _ = result
    lanes = {row["subject"]: row for row in document["rows"] if row["scenario"] == "reads" and row["limit"]}
    missing = {"ucx"} if any("ucx" in skipped["what"] for skipped in document["skipped"]) else set()
    assert set(lanes) == {"shm", "shm in place", "tcp", "tcp with checksum", "ucx"} - missing
    for row in lanes.values():
        low, high = row["ratio"]["quartiles"]
        assert 0 < low <= row["ratio"]["median"] <= high
        assert len(row["limit"]["rounds"]) == len(row["rounds"])


def test_peers_are_measured_or_skipped_with_a_reason(result):
    _, document, _ = result
    measured = {row["subject"].partition(", ")[2] for row in document["rows"] if row["scenario"] == "beside"}
    skipped = {each["what"]: each["why"] for each in document["skipped"]}
    assert {"dray shm", "dray shm in place", "dray shm, by Redis", "Redis inline"} <= measured
    for name in ("ZeroMQ ipc", "torch queue", "Ray"):
        assert name in measured or skipped[name]


def test_the_plot_is_a_png(result):
    *_, folder = result
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_against_itself_has_not_moved(result):
    *_, folder = result
    file = str(folder / "result.json")
    done = run_benchmarks("--load", file, "--against", file)
    assert done.returncode == 0, done.stderr
    assert "What moved" in done.stdout
    assert "better\n" not in done.stdout
    assert "worse\n" not in done.stdout


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--sizes", "1XiB"),
        ("--sizes", "12"),
        ("--only", "P16"),
        ("--against", "nothing.json"),
        ("--load", "README.md"),
    ],
)
def test_a_wrong_choice_ends_before_anything_is_measured(option, value):
    done = run_benchmarks(option, value)
    assert done.returncode == 2
    assert value in done.stderr
