import pytest

from dray.jobs.launch.shutdown import ROLLOUT_SHARE, KillStage
from dray.jobs.replica.heartbeat import EndBounds


@pytest.mark.parametrize("shutdown", [0.1, 2.0, 8.0, 60.0, 3600.0])
def test_all_waits_of_a_rollout_replica_end_before_it_is_killed(shutdown: float) -> None:
    bounds = EndBounds.of(shutdown)
    killed_after = shutdown * ROLLOUT_SHARE * KillStage.KILL.value
    assert bounds.serve + bounds.close + 3 * bounds.answer < killed_after


@pytest.mark.parametrize("shutdown", [0.1, 8.0, 3600.0])
def test_waits_of_a_policy_replica_leave_most_of_the_time_to_its_checkpoint(shutdown: float) -> None:
    bounds = EndBounds.of(shutdown)
    # A call under way, the outcome, two heartbeats and to unregister.
    assert 5 * bounds.answer + bounds.close < 0.5 * shutdown * KillStage.KILL.value


def test_waits_are_bounded_however_long_a_shutdown_may_take() -> None:
    bounds = EndBounds.of(3600.0)
    assert (bounds.answer, bounds.transfers, bounds.threads) == (1.0, 2.0, 5.0)
