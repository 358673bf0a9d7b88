import pytest
from job_series import run_series

SEED = 6


@pytest.mark.parametrize(
    "jobs",
    [
        pytest.param(4, marks=pytest.mark.timeout(300), id="short"),
        pytest.param(200, marks=[pytest.mark.endurance, pytest.mark.timeout(2 * 3600)], id="long"),
    ],
)
def test_no_job_of_a_series_hangs_lies_or_leaves_anything_behind(jobs: int) -> None:
    accounts = run_series(jobs, SEED, show=print)
    assert accounts["jobs"] == accounts["jobs that finished"] + accounts["jobs that failed"] == jobs
    assert accounts["replicas killed"] > 0
