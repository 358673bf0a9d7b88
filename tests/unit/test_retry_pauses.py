from itertools import islice, pairwise

from dray.clock import MAX_RETRY_PAUSE, MIN_RETRY_PAUSE, retry_pauses


def test_pauses_between_attempts_double_up_to_a_limit() -> None:
    pauses = list(islice(retry_pauses(), 10))
    assert pauses[0] == MIN_RETRY_PAUSE
    assert all(later == min(2 * earlier, MAX_RETRY_PAUSE) for earlier, later in pairwise(pauses))
    assert pauses[-1] == MAX_RETRY_PAUSE
