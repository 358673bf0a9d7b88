"""The benchmarks in their smallest form: that every scenario runs, and the shape of what is written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.peers.isolation import NotIsolated, isolated
from dray.transport.lanes.ucx_worker import UCXX_AVAILABLE

ROOT = Path(__file__).parents[2]
TINY = ("--quick", "--sizes", "1KiB", "--rounds", "2", "--operations", "4", "--details")
FEW = ("--idle-seconds", "0.1", "--memory-reads", "100", "--job-steps", "1")

LANES, WITHIN, SERVING = "P1,P2,P3,P4,P5,P6,P7", "P9,P9A,P10,P13", "P8,P11,P12"
BESIDE, STREAMS, WEIGHTS, SELECTION = "P15", "P16", "P19,P20", "P17"
SCENARIOS = {
    LANES: {"in place", "reads", "batches"},
    WITHIN: {"packing", "nested values", "ring", "memory"},
    SERVING: {"idle", "fleet", "busy", "owner"},
    BESIDE: {"beside"},
    STREAMS: {"streams"},
    WEIGHTS: {"weights"},
    SELECTION: {"selection"},
}


MEASURED_ONCE, HELD = {"memory"}, {"B", "descriptors"}


def run_benchmarks(*arguments, cwd=ROOT, cache=None):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    if cache is not None:
        # Without the peers that have environments of their own: they take long to start.
        environment["XDG_CACHE_HOME"] = str(cache)
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
    )


def measured(folder, targets):
    written = ("--json", str(folder / "result.json"), "--plot", str(folder / "plot.png"))
    done = run_benchmarks(*TINY, *FEW, "--only", targets, *written, cwd=folder, cache=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "result.json").read_text()), folder


def check_rows(result, targets):
    """What holds for every run: its scenarios, figures of every round, a line for each target that was judged."""
    shown, document, _ = result
    assert document["schema"] == 2
    assert {row["scenario"] for row in document["rows"]} == SCENARIOS[targets]
    for row in document["rows"]:
        low, high = row["quartiles"]
        assert low <= row["p50"] <= high, row
        assert row["operations"] >= 1
        assert len(row["rounds"]) >= (1 if row["scenario"] in MEASURED_ONCE or row["unit"] in HELD else 2), row
        if row["ratio"] is not None:
            low, high = row["ratio"]["quartiles"]
            assert 0 < low <= row["ratio"]["median"] <= high
            assert len(row["limit"]["rounds"]) == len(row["rounds"])
    table = shown[shown.rindex("\nTargets\n") :] if "\nTargets\n" in shown else ""
    judged = {row["target"]["name"] for row in document["rows"] if row["target"]}
    assert all(f"\n{name} " in table for name in judged)
    return judged


@pytest.mark.endurance
def test_lanes_stand_beside_their_limits_and_a_result_beside_itself(tmp_path):
    result = measured(tmp_path, LANES)
    # At 1 KiB nothing is asked of large payloads.
    ucx = {"P6"} if UCXX_AVAILABLE else set()
    assert check_rows(result, LANES) >= {"P1", "P4", "P7"} | ucx
    _, document, _ = result
    held = {row["subject"] for row in document["rows"] if row["scenario"] == "reads" and row["limit"]}
    assert held == {"tcp", "tcp with checksum"} | ({"ucx"} if UCXX_AVAILABLE else set())
    check_machine(document["machine"])
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    check_against_itself(str(tmp_path / "result.json"))


def check_machine(machine):
    """It is described without being named."""
    assert machine["cores"] >= 1
    assert machine["processor"]
    assert machine["versions"]["dray"]
    assert os.uname().nodename not in json.dumps(machine)


def check_against_itself(file):
    """Nothing has moved."""
    done = run_benchmarks("--load", file, "--against", file)
    assert done.returncode == 0, done.stderr
    assert "What moved" in done.stdout
    assert "better\n" not in done.stdout
    assert "worse\n" not in done.stdout


@pytest.mark.parametrize(
    "targets", [WITHIN, STREAMS, WEIGHTS, SELECTION, pytest.param(SERVING, marks=pytest.mark.endurance)]
)
def test_costs_of_one_side_have_rows_and_targets(tmp_path, targets):
    assert check_rows(measured(tmp_path, targets), targets) == set(targets.split(","))


def test_peers_are_measured_or_skipped_with_a_reason(tmp_path):
    result = measured(tmp_path, BESIDE)
    check_rows(result, BESIDE)
    _, document, _ = result
    found = {row["subject"].partition(", ")[2] for row in document["rows"]}
    skipped = {each["what"]: each["why"] for each in document["skipped"]}
    streams = {"dray stream in place", "dray stream with a copy"}
    assert streams | {"dray shm", "dray shm in place", "dray shm, by Redis"} <= found
    assert {"Redis inline", "multiprocessing.Queue"} <= found
    judged = {row["subject"]: row["target"]["bound"] for row in document["rows"] if row["target"]}
    assert judged == {"p50, dray stream in place": 0.8}
    for name in ("ZeroMQ ipc", "torch queue", "Ray"):
        assert name in found or skipped[name]


ISOLATED = """
import socket
from pathlib import Path
from benchmarks.peers.isolation import join_loopback
join_loopback()
with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
    pass
print([name for _, name in socket.if_nameindex()], [each.name for each in Path.home().iterdir()])
"""


def test_ray_gets_a_network_of_its_own_with_nothing_but_loopback():
    try:
        with isolated() as isolation:
            done = subprocess.run(
                [*isolation.prefix, sys.executable, "-c", ISOLATED],
                cwd=ROOT,
                env={**os.environ, **isolation.environment},
                capture_output=True,
                text=True,
                timeout=60,
            )
            home = Path(isolation.environment["HOME"])
    except NotIsolated as error:
        pytest.skip(str(error))
    assert (done.stdout, done.stderr) == ("['lo'] ['ray_bootstrap_config.yaml']\n", "")
    assert not home.exists()


def test_ray_is_not_started_where_it_could_reach_other_hosts(tmp_path):
    """Of interfaces besides loopback, and of the provider file: one of them is missing in this process."""
    starting = "from benchmarks.peers.ray_store import start_ray; start_ray()"
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", starting], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "NotIsolated: Ray runs only " in done.stderr


@pytest.mark.endurance
def test_the_job_reports_its_time_inside_reads(tmp_path):
    shown, document, _ = measured(tmp_path, "P14")
    assert [row["scenario"] for row in document["rows"]] == ["job", "job"]
    assert all(0 <= row["p50"] < 100 for row in document["rows"])
    assert "\nP14 " in shown


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--sizes", "1XiB"),
        ("--sizes", "12"),
        ("--only", "P99"),
        ("--against", "nothing.json"),
        ("--load", "README.md"),
    ],
)
def test_a_wrong_choice_ends_before_anything_is_measured(option, value):
    done = run_benchmarks(option, value)
    assert done.returncode == 2
    assert value in done.stderr
