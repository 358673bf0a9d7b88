import pytest
from job_series import run_series


@pytest.mark.parametrize(
    ("jobs", "seed"),
    [
        # The policy of its second job is killed.
        pytest.param(3, 239, marks=pytest.mark.timeout(300), id="short"),
        pytest.param(200, 6, marks=[pytest.mark.endurance, pytest.mark.timeout(2 * 3600)], id="long"),
    ],
)
def test_no_job_of_a_series_hangs_lies_or_leaves_anything_behind(jobs: int, seed: int) -> None:
    accounts = run_series(jobs, seed, show=print)
    assert accounts["jobs"] == accounts["jobs that finished"] + accounts["jobs that failed"] == jobs
    assert accounts["replicas killed"] > 0
