"""What `dray run` prints about the end of a replica is what it knows, not only what the exit code is."""

import signal

import pytest

from dray.jobs.exit_codes import ExitCode, meaning
from dray.jobs.launch.processes import EndRequest, replica_end
from dray.jobs.messages.models import MemberState, OutcomeKind

ASKED = EndRequest(signal.SIGTERM, "the job had failed")
KILLED = EndRequest(signal.SIGKILL, "it did not end in time")
ACTIVE = (MemberState.ACTIVE, "")
LEFT = (MemberState.LEFT, "the job is draining")
RAISED = (MemberState.LEFT, "Worker.rollout() raised KeyError: 3")
SILENT = (MemberState.DEAD, "silent for 3.2 s")


@pytest.mark.parametrize(
    ("code", "request_", "member", "outcome", "line"),
    [
        (ExitCode.SIGTERM, ASKED, LEFT, "failed", "r ended as asked (SIGTERM): the job had failed"),
        (-signal.SIGTERM, ASKED, None, "failed", "r ended as asked (SIGTERM): the job had failed"),
        (-signal.SIGKILL, KILLED, ACTIVE, "solved", "r was killed: it did not end in time"),
        (ExitCode.NOT_A_MEMBER, None, None, "failed", "r tried to register after the job had failed, and ended"),
        (
            ExitCode.NOT_A_MEMBER,
            None,
            None,
            "interrupted",
            "r tried to register after the job had been interrupted, and ended",
        ),
        (
            ExitCode.NOT_A_MEMBER,
            None,
            SILENT,
            None,
            "r ended early: the controller had declared it dead (silent for 3.2 s)",
        ),
        (
            ExitCode.CONTROLLER_LOST,
            None,
            None,
            "failed",
            "r ended: the job had failed and the controller was gone",
        ),
        (ExitCode.OK, None, LEFT, None, "r finished"),
        (ExitCode.FAILED, None, LEFT, "max_steps", "r failed"),
        (ExitCode.OK, None, ACTIVE, None, "r ended early: its process left without unregistering (exit code 0)"),
        (ExitCode.FAILED, None, ACTIVE, None, "r ended early: failed"),
        (ExitCode.CONTROLLER_LOST, None, ACTIVE, None, "r ended early: the controller was gone"),
        (5, None, ACTIVE, None, "r ended early: exit code 5"),
        (ExitCode.USER_CODE, ASKED, RAISED, "failed", "r ended early: Worker.rollout() raised KeyError: 3"),
        (ExitCode.USER_CODE, None, None, None, "r ended early: the user's class raised"),
        (-signal.SIGSEGV, KILLED, ACTIVE, "failed", "r ended early: killed by signal 11"),
        (ExitCode.SIGTERM, None, LEFT, None, "r ended early: interrupted by SIGTERM"),
    ],
)
def test_z8_end_is_derived_from_what_the_supervisor_did_and_what_the_controller_knows(
    code: int,
    request_: EndRequest | None,
    member: tuple[MemberState, str] | None,
    outcome: OutcomeKind | None,
    line: str,
) -> None:
    assert replica_end(code, meaning(code), request_, member, outcome).line("r") == line


def test_z8_only_a_kill_by_the_supervisor_is_one() -> None:
    assert replica_end(-signal.SIGKILL, "", KILLED, ACTIVE, None).killed
    assert not replica_end(-signal.SIGKILL, "", None, ACTIVE, None).killed
    assert not replica_end(-signal.SIGKILL, "", ASKED, ACTIVE, None).killed
