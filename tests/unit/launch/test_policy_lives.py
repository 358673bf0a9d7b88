import signal

import pytest

from dray.launch.policy_group import is_worth_another_life
from dray.runtime.exit_codes import ExitCode


@pytest.mark.parametrize(
    ("codes", "replicas", "again"),
    [
        ([-signal.SIGKILL], 1, True),
        ([ExitCode.OLD_EPOCH], 1, True),
        ([ExitCode.NOT_A_MEMBER], 1, True),
        ([ExitCode.USER_CODE], 1, False),
        ([ExitCode.USER_CODE], 2, True),
        ([ExitCode.USER_VALUE], 1, False),
        ([ExitCode.USER_VALUE, ExitCode.GROUP_LOST], 2, False),
        ([ExitCode.GROUP_LOST], 2, True),
        ([ExitCode.GROUP_LOST, ExitCode.REDIS_LOST], 2, False),
        ([ExitCode.OK], 2, False),
        ([ExitCode.FAILED], 1, False),
        ([ExitCode.CONTROLLER_LOST], 1, False),
        ([], 1, False),
    ],
)
def test_group_goes_on_where_another_life_may_do_better(codes: list[int], replicas: int, again: bool) -> None:
    assert is_worth_another_life(codes, replicas) is again
