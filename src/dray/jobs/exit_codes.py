"""Exit codes of `dray run` and of the job's processes, in one table."""

from __future__ import annotations

from enum import IntEnum
from typing import Final


class ExitCode(IntEnum):
    """| code | meaning |
    |---|---|
    | 0 | finished: solved, or all steps done where no `[stop]` is set |
    | 1 | failed: not solved within `max_steps`, or no replica left, unless that is 10 or 17 |
    | 2 | configuration: nothing was started |
    | 10 | a replica, and the job that fails for it: the user's class raised; its log has the traceback |
    | 11 | a replica: the controller did not answer for `timeouts.controller_lost` |
    | 12 | a replica: the controller no longer counts it as a member |
    | 13 | a replica: Redis did not answer, or refused, for `timeouts.redis` |
    | 14 | any process: an internal error; its log has the traceback |
    | 15 | a policy replica: its group has a newer epoch; its commit was refused |
    | 16 | a policy replica: another one of its group is gone |
    | 17 | a replica, and the job that fails for it: the user's class returned what cannot be used |
    | 130 | interrupted by SIGINT |
    | 140 | interrupted by SIGUSR2; on Slurm: the time limit was near, and the run continues in another part |
    | 143 | interrupted by SIGTERM |
    | 128 + n | interrupted by another signal n: 129 for SIGHUP, 131 for SIGQUIT |
    """

    OK = 0
    FAILED = 1
    CONFIGURATION = 2
    USER_CODE = 10
    CONTROLLER_LOST = 11
    NOT_A_MEMBER = 12
    REDIS_LOST = 13
    INTERNAL = 14
    OLD_EPOCH = 15
    GROUP_LOST = 16
    USER_VALUE = 17
    SIGINT = 130
    TIME_LIMIT = 140
    SIGTERM = 143


USER_CODES: Final = frozenset((ExitCode.USER_CODE, ExitCode.USER_VALUE))
"""Of a replica that has ended by a mistake in the user's class. A job that fails for it exits with the same."""

COMES_AGAIN: Final = frozenset((ExitCode.USER_VALUE,))
"""Another attempt would end the same way: with these neither a policy group nor a run is restarted."""

NOT_RESTARTED: Final = frozenset(
    (
        ExitCode.OK,
        ExitCode.CONFIGURATION,
        ExitCode.CONTROLLER_LOST,
        ExitCode.REDIS_LOST,
        ExitCode.USER_VALUE,
        ExitCode.SIGINT,
        ExitCode.TIME_LIMIT,
        ExitCode.SIGTERM,
    )
)
"""A rollout replica that ends with one of these is not restarted."""

JOB_FAILURES: Final = USER_CODES | {ExitCode.FAILED}
"""Of a job that has ended by itself and did not finish."""


def meaning(code: int) -> str:
    """One phrase for the exit status `code`, as `subprocess` gives it: negative for a signal."""
    if code < 0:
        return f"killed by signal {-code}"
    return _MEANINGS.get(code, f"exit code {code}")


_MEANINGS: dict[int, str] = {
    ExitCode.OK: "finished",
    ExitCode.FAILED: "failed",
    ExitCode.CONFIGURATION: "wrong configuration",
    ExitCode.USER_CODE: "the user's class raised",
    ExitCode.CONTROLLER_LOST: "the controller was gone",
    ExitCode.NOT_A_MEMBER: "no longer a member",
    ExitCode.REDIS_LOST: "Redis was gone",
    ExitCode.INTERNAL: "internal error",
    ExitCode.OLD_EPOCH: "the policy group has a newer epoch",
    ExitCode.GROUP_LOST: "another policy replica was gone",
    ExitCode.USER_VALUE: "the user's class returned what cannot be used",
    ExitCode.SIGINT: "interrupted by SIGINT",
    ExitCode.TIME_LIMIT: "the time limit was near",
    ExitCode.SIGTERM: "interrupted by SIGTERM",
}
