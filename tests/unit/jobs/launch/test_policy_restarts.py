import signal

import pytest

from dray.jobs.exit_codes import ExitCode
from dray.jobs.launch.processes import is_restarted


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("code", [-signal.SIGKILL, -signal.SIGSEGV, 1, 5, 7, 134, 255])
def test_z7_group_is_restarted_however_a_rank_is_lost(code: int, replicas: int) -> None:
    assert is_restarted([code], replicas)


@pytest.mark.parametrize(
    ("codes", "replicas", "restarted"),
    [
        ([ExitCode.OLD_EPOCH], 1, True),
        ([ExitCode.NOT_A_MEMBER], 1, True),
        ([ExitCode.INTERNAL], 1, True),
        ([ExitCode.USER_CODE], 1, False),
        ([ExitCode.USER_CODE], 2, True),
        ([ExitCode.USER_VALUE], 1, False),
        ([ExitCode.USER_VALUE, ExitCode.GROUP_LOST], 2, False),
        ([ExitCode.GROUP_LOST], 2, True),
        ([ExitCode.GROUP_LOST, ExitCode.REDIS_LOST], 2, False),
        ([ExitCode.GROUP_LOST, ExitCode.CONFIGURATION], 2, False),
        ([ExitCode.CONTROLLER_LOST], 1, False),
        ([ExitCode.OK], 2, False),
        ([ExitCode.OK, -signal.SIGKILL], 2, False),
        ([ExitCode.SIGTERM], 1, False),
        ([], 1, False),
    ],
)
def test_z7_no_code_may_forbid_the_restart_and_one_must_ask_for_it(
    codes: list[int], replicas: int, restarted: bool
) -> None:
    assert is_restarted(codes, replicas) is restarted
