"""The shortest check of the storage for TransferQueue, where it and Ray are installed with the tests."""

import json
import sys
from pathlib import Path

import loopback
import pytest
from optional import require

require("ray", "transfer_queue")

PROGRAM = Path(__file__).parents[1] / "integrations" / "transfer_queue" / "queue_scenarios.py"


@pytest.mark.timeout(240)
def test_a_batch_goes_through_the_real_transfer_queue() -> None:
    if loopback.problem():
        pytest.skip(loopback.problem())
    ended = loopback.run([sys.executable, "-W", "ignore", str(PROGRAM), "", "--short"], timeout=200)
    lines = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith('{"scenario"')]
    assert [line["problem"] for line in lines] == [""], (ended.stdout[-2000:], ended.stderr[-2000:])
