"""Rollout replicas that are killed repeatedly: what they have handed on is trained on, each payload once."""

import importlib.util
from pathlib import Path

import pytest
from rollout_storm import check, run_storm

from dray.ring.direct import direct_problem

pytestmark = pytest.mark.skipif(bool(direct_problem()), reason=direct_problem() or "-")


def test_h1_no_payload_is_lost_or_wrong_while_rollout_replicas_are_killed(tmp_path: Path) -> None:
    figures = check(run_storm(tmp_path, kills=3, seed=1))
    assert figures["deaths"] == 3
    assert figures["heirs"]["payloads"] >= 1


@pytest.mark.endurance
@pytest.mark.timeout(3600)
def test_h1_no_payload_is_lost_or_wrong_in_200_kills(tmp_path: Path) -> None:
    figures = check(run_storm(tmp_path, kills=200, seed=2, until_released=True))
    assert figures["deaths"] == 200
    assert figures["heirs"]["payloads"] >= 100


@pytest.mark.endurance
@pytest.mark.timeout(3600)
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch", "gymnasium"))), reason="torch or gymnasium is not installed"
)
def test_h1_no_payload_is_lost_or_wrong_while_rollout_replicas_of_cartpole_are_killed(tmp_path: Path) -> None:
    figures = check(run_storm(tmp_path, kills=20, seed=3, cartpole=True, until_released=True))
    assert figures["deaths"] == 20
    assert figures["heirs"]["payloads"] >= 20
