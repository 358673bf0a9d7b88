"""Direct leases against a ring that is overwritten all the time: seconds of `make stress`, and its account."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from stress.barriers import Build
from stress.ledger import MAX_BYTES, MIN_BYTES, nbytes_of, payload_of
from stress.run import Plan, run

from dray.ring.direct import direct_problem

TESTS = Path(__file__).parents[1]
needs_direct = pytest.mark.skipif(bool(direct_problem()), reason="this machine has no direct leases")


@needs_direct
@pytest.mark.timeout(300)
def test_leases_in_place_see_no_wrong_byte_and_every_payload_is_accounted_for(tmp_path: Path) -> None:
    report = tmp_path / "stress.json"
    options = ["--leases", "100000000", "--seconds", "3", "--only", "two processors", "--json", str(report)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-m", "stress", *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout
    accounts = json.loads(report.read_text())
    assert [account["problems"] for account in accounts] == [[], [], []]
    assert all(account["counts"]["DIRECT"] > 0 and account["ring"]["barriers"] > 0 for account in accounts)


@needs_direct
@pytest.mark.timeout(300)
def test_an_owner_that_ignores_lease_words_is_found_out(capfd: pytest.CaptureFixture[str]) -> None:
    ignoring = Plan(
        "ignoring", 2_000, 30.0, on_full="overwrite", own_readers=False, build=Build.WITHOUT_WORDS, hold=50
    )
    account = run(ignoring)
    assert account.wrong > 0
    assert any(problem.startswith("CHANGED_BYTES") for problem in account.problems)
    assert "CHANGED_BYTES: payload" in capfd.readouterr().err


def test_payloads_are_distinguished_from_each_other_by_every_part() -> None:
    sizes = [nbytes_of(sequence) for sequence in range(5_000)]
    assert (min(sizes) >= MIN_BYTES, max(sizes) <= MAX_BYTES, len(set(sizes)) > 900) == (True, True, True)
    for sequence, nbytes in enumerate(sizes):
        assert len(payload_of(sequence)) == nbytes
    assert len({payload_of(sequence) for sequence in range(5_000)}) == 5_000
