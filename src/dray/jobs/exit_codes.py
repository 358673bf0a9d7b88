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

    meaning: str

    def __new__(cls, code: int, meaning: str = "") -> ExitCode:
        """A code, and its meaning in one phrase."""
        member = int.__new__(cls, code)
        member._value_ = code
        member.meaning = meaning
        return member

    OK = 0, "finished"
    FAILED = 1, "failed"
    CONFIGURATION = 2, "wrong configuration"
    USER_CODE = 10, "the user's class raised"
    CONTROLLER_LOST = 11, "the controller was gone"
    NOT_A_MEMBER = 12, "no longer a member"
    REDIS_LOST = 13, "Redis was gone"
    INTERNAL = 14, "internal error"
    OLD_EPOCH = 15, "the policy group has a newer epoch"
    GROUP_LOST = 16, "another policy replica was gone"
    USER_VALUE = 17, "the user's class returned what cannot be used"
    SIGINT = 130, "interrupted by SIGINT"
    TIME_LIMIT = 140, "the time limit was near"
    SIGTERM = 143, "interrupted by SIGTERM"


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
"""A replica that ends with one of these is not restarted, nor is its policy group. Those of signals are among them
because a policy that is asked to end writes a checkpoint, and ends the job, too."""


def meaning(code: int) -> str:
    """One phrase for the exit status `code`, as `subprocess` gives it: negative for a signal."""
    if code < 0:
        return f"killed by signal {-code}"
    return next((each.meaning for each in ExitCode if each == code), f"exit code {code}")
