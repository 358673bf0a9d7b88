"""The deterministic simulation: thousands of runs in which nothing is violated and everything happens."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from simulation.faults import Fault

from dray.transport.lanes import LANES

TESTS = Path(__file__).parents[1]
COUNTS = [
    pytest.param(500, marks=pytest.mark.timeout(300), id="short"),
    pytest.param(20_000, marks=[pytest.mark.endurance, pytest.mark.timeout(1800)], id="long"),
]
ERRORS = (
    "AuthenticationError",
    "BufferClosedError",
    "ConnectionClosed",
    "ConnectionReset",
    "MessageTruncated",
    "ProducerLostError",
    "SlotError",
    "StaleSlotError",
    "TransportTimeout",
    "Unreachable",
)


def simulate(*arguments: str, hash_seed: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own: neither coverage nor this process's collector are in its way."""
    return subprocess.run(
        [sys.executable, "-m", "simulation", *arguments],
        env={**os.environ, "PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=1700,
        check=False,
    )


@pytest.mark.parametrize("seeds", COUNTS)
def test_many_seeds_violate_nothing_and_see_every_fault_lane_and_error(seeds: int) -> None:
    done = simulate("--seeds", str(seeds), "--jobs", "1", "--counts")
    assert done.returncode == 0, done.stdout
    assert f"{seeds} seeds in " in done.stdout
    counted = {}
    for line in done.stdout.splitlines():
        count, _, name = line.strip().partition("  ")
        if count.isdecimal():
            counted[name] = int(count)
    expected = {fault.value for fault in Fault}
    expected |= {f"exchange over {lane.name}" for lane in LANES.values()}
    expected |= {f"error: {error}" for error in ERRORS}
    expected |= {f"{what}: done" for what in ("read", "read_many", "lease", "consume", "stat", "batch")}
    expected |= {"lease: LeaseInUseError", "write lost", "ring full"}
    expected |= {"direct lease", "lease: not entered", "wait_consumed: done"}
    expected |= {
        f"stream: {how}, redelivered: {again}" for how in ("in place", "copied") for again in (False, True)
    }
    expected |= {"stream: Interrupted", "stream: StreamTimeout", "stream: finished", "dead letter"}
    assert expected - counted.keys() == set()


@pytest.mark.parametrize("seed", [3, 17, 26])
def test_a_seed_that_is_replayed_gives_the_same_trace(seed: int) -> None:
    first, second = (simulate("--seed", str(seed), "--trace", hash_seed=number).stdout for number in (1, 2))
    assert first == second
    assert first.count("\n") > 20


def test_a_violation_ends_with_the_command_that_replays_it() -> None:
    script = (
        "import sys; from dray.ring.slots import SlotTable; from simulation import simulate;"
        "SlotTable.end_lease = lambda self, slot, reader, consumed: None;"
        "sys.exit(simulate.main(['--seeds', '400', '--jobs', '1', '--stop-at-first']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "replay: python -m simulation --seed " in done.stdout
    assert "Violation: server" in done.stdout
