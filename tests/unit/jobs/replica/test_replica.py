import pytest

from dray.errors import BufferClosedError, ConfigError
from dray.jobs.exit_codes import ExitCode
from dray.jobs.messages.channel import GroupLostError
from dray.jobs.messages.controller_client import ControllerLostError
from dray.jobs.messages.models import MAX_SENTENCE, MembershipError
from dray.jobs.process import StopFlag
from dray.jobs.queue import OldEpochError, RedisUnavailableError
from dray.jobs.replica.base import exit_code_of, reason_of
from dray.jobs.replica.user_code import UserCodeError, UserValueError


@pytest.mark.parametrize(
    ("error", "code", "code_when_interrupted"),
    [
        (UserCodeError("Worker.rollout() raised ValueError"), ExitCode.USER_CODE, ExitCode.USER_CODE),
        (UserValueError("Worker.rollout() returned None"), ExitCode.USER_VALUE, ExitCode.USER_VALUE),
        (ConfigError("rollout.slots", 3, "more"), ExitCode.CONFIGURATION, ExitCode.CONFIGURATION),
        (MembershipError("dead"), ExitCode.NOT_A_MEMBER, ExitCode.SIGTERM),
        (ControllerLostError("gone"), ExitCode.CONTROLLER_LOST, ExitCode.SIGTERM),
        (RedisUnavailableError("gone"), ExitCode.REDIS_LOST, ExitCode.SIGTERM),
        (OldEpochError("old"), ExitCode.OLD_EPOCH, ExitCode.OLD_EPOCH),
        (GroupLostError("policy-1 is gone"), ExitCode.GROUP_LOST, ExitCode.SIGTERM),
        (BufferClosedError("closed"), ExitCode.INTERNAL, ExitCode.INTERNAL),
        (RuntimeError("impossible"), ExitCode.INTERNAL, ExitCode.INTERNAL),
    ],
)
def test_exit_code_of_a_replica_follows_from_the_error_that_ends_it(
    error: BaseException, code: ExitCode, code_when_interrupted: ExitCode
) -> None:
    stop = StopFlag()
    assert exit_code_of(error, stop) is code
    stop.set("received SIGTERM", ExitCode.SIGTERM)
    assert exit_code_of(error, stop) is code_when_interrupted


def test_reason_of_a_replica_is_never_that_it_was_done_when_an_error_ends_it() -> None:
    assert reason_of(UserValueError("Worker.rollout() returned None")) == "Worker.rollout() returned None"
    assert reason_of(GroupLostError("policy-1 is gone")) == "policy-1 is gone"
    assert reason_of(RuntimeError("not\npossible")) == "internal error: RuntimeError: not possible"
    assert len(reason_of(RuntimeError("x" * 100_000))) <= MAX_SENTENCE
    assert len(reason_of(GroupLostError("x" * 100_000))) <= MAX_SENTENCE
