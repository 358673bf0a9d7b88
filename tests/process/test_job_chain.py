from pathlib import Path

import pytest
from job_chain import kills_of, random_victims, run_chain


@pytest.mark.timeout(180)
def test_figures_of_a_job_that_is_killed_and_resumed_agree_with_ledgers_of_its_classes(tmp_path: Path) -> None:
    figures = run_chain(tmp_path, kills_of(3, ["policy", "everything"]))
    assert figures["attempts"] == 3


@pytest.mark.endurance
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [1, 2])
def test_figures_agree_with_ledgers_after_ten_random_kills(tmp_path: Path, seed: int) -> None:
    figures = run_chain(tmp_path, kills_of(seed, random_victims(seed, 10)))
    assert figures["attempts"] == 11
