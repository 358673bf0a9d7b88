import signal
from pathlib import Path

import pytest

from dray.jobs.exit_codes import ExitCode
from dray.jobs.folder import JobFolder
from dray.jobs.launch.shutdown import ending, finished_checkpoint, newest_status, recorded_status
from dray.jobs.messages.models import MemberState, MemberStatus, OutcomeReport, Phase, ProgressReport, Role, Status
from dray.jobs.replica.checkpoint import CheckpointState, save_checkpoint


def status(kind: str | None, cause: int | None = None) -> Status:
    outcome = None
    if kind is not None:
        outcome = OutcomeReport.model_validate({"kind": kind, "reason": "because", "cause": cause})
    return Status(job="small", phase=Phase.DRAINING, seconds=1.0, outcome=outcome, members=[], work_items={})


SOLVED = CheckpointState(7, 7, 70, "solved")


@pytest.mark.parametrize(
    ("kind", "checkpoint", "signals", "code", "reason"),
    [
        ("solved", None, [], 0, "because"),
        ("finished", None, [signal.SIGTERM], 0, "because"),
        ("max_steps", None, [signal.SIGINT], 1, "because"),
        ("failed", None, [], 1, "because"),
        ("interrupted", None, [], 1, "because"),
        ("interrupted", None, [signal.SIGINT, signal.SIGTERM], 130, "interrupted by SIGINT"),
        ("interrupted", None, [signal.SIGUSR2, signal.SIGTERM], 140, "interrupted by SIGUSR2"),
        ("interrupted", None, [signal.SIGQUIT], 131, "interrupted by SIGQUIT"),
        (None, None, [signal.SIGHUP], 129, "interrupted by SIGHUP"),
        (None, None, [], 1, "it broke"),
        ("failed", SOLVED, [], 0, "solved at step 7 (according to the checkpoint)"),
        ("interrupted", SOLVED, [signal.SIGTERM], 0, "solved at step 7 (according to the checkpoint)"),
        (None, SOLVED, [], 0, "solved at step 7 (according to the checkpoint)"),
    ],
)
def test_finished_work_stands_and_nothing_else_is_called_finished(
    kind: str | None,
    checkpoint: CheckpointState | None,
    signals: list[signal.Signals],
    code: int,
    reason: str,
) -> None:
    found = ending("small", status(kind), checkpoint, signals, "it broke")
    assert (found.exit_code, found.reason) == (code, reason)
    if checkpoint is not None:
        assert found.status is not None
        assert found.status.outcome is not None
        assert found.status.outcome.kind == "solved"


def test_sigusr2_means_that_the_time_limit_is_near_on_slurm_only() -> None:
    for on_slurm, reason in ((True, "the time limit is near"), (False, "interrupted by SIGUSR2")):
        found = ending("small", None, None, [signal.SIGUSR2], "", on_slurm=on_slurm)
        assert (found.exit_code, found.reason) == (140, reason)


def test_controller_that_the_supervisor_asked_to_end_gives_no_reason_for_it() -> None:
    asked = "the controller did not answer GET /status"
    found = ending("small", status("interrupted"), None, [], "", controller_request=asked)
    assert (found.exit_code, found.reason) == (1, asked)
    assert found.status is not None
    assert found.status.phase is Phase.FAILED
    # A signal, finished work and another outcome take precedence.
    for kind, checkpoint, signals, reason in (
        ("interrupted", None, [signal.SIGINT], "interrupted by SIGINT"),
        ("interrupted", SOLVED, [], "solved at step 7 (according to the checkpoint)"),
        ("failed", None, [], "because"),
        ("solved", None, [], "because"),
    ):
        assert ending("small", status(kind), checkpoint, signals, "", controller_request=asked).reason == reason


def test_newest_status_counts_wherever_it_is_from() -> None:
    recorded = status("solved")
    newer = recorded.model_copy(update={"seconds": recorded.seconds + 1})
    assert newest_status(recorded, newer) is newest_status(newer, recorded) is newer
    assert newest_status(None, recorded) is recorded
    assert newest_status(None, None) is None


def test_figures_are_complete_when_the_controller_has_seen_every_replica_end() -> None:
    final = status("failed").model_copy(update={"phase": Phase.FAILED})
    members = [
        MemberStatus(
            name=state.value, role=Role.ROLLOUT, state=state, reason="", pid=1, silence=0.0,
            progress=ProgressReport(doing="", seconds=0.0),
        )
        for state in MemberState
    ]  # fmt: skip
    ended = [each for each in members if each.state is not MemberState.ACTIVE]
    for last, complete in (
        (None, False),
        (status("failed"), False),
        (final, True),
        (final.model_copy(update={"members": ended}), True),
        (final.model_copy(update={"members": members}), False),
    ):
        assert ending("small", last, None, [], "").complete is complete


@pytest.mark.parametrize(("cause", "code"), [(None, 1), (0, 1), (-9, 1), (13, 1), (14, 1), (10, 10), (17, 17)])
def test_job_that_fails_for_a_mistake_in_the_users_class_has_the_exit_code_of_that(
    cause: int | None, code: int
) -> None:
    found = ending("small", status("failed", cause), None, [], "")
    assert (found.exit_code, found.reason) == (code, "because")
    # A finished job, and one that a signal ends, have their own.
    assert ending("small", status("failed", cause), SOLVED, [], "").exit_code == ExitCode.OK
    assert ending("small", status("failed", cause), None, [signal.SIGINT], "").exit_code == ExitCode.SIGINT
    assert ending("small", status("solved", cause), None, [], "").exit_code == ExitCode.OK


def test_ending_without_any_status_is_derived_from_the_checkpoint() -> None:
    found = ending("small", None, SOLVED, [], "the controller ended early")
    assert found.exit_code == ExitCode.OK
    assert ending("small", None, None, [], "").reason == "the job ended without an outcome"


def test_z9_phase_of_a_job_whose_checkpoint_is_finished_is_done() -> None:
    for phase, expected in ((Phase.FAILED, Phase.DONE), (Phase.DRAINING, Phase.DRAINING)):
        found = ending("small", status("failed").model_copy(update={"phase": phase}), SOLVED, [], "")
        assert found.status is not None
        assert found.status.phase is expected


def test_what_processes_left_behind_is_found(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    folder.run.mkdir()
    assert (recorded_status(folder), finished_checkpoint(folder)) == (None, None)
    folder.outcome.write_text("{}")
    assert recorded_status(folder) is None
    folder.outcome.write_text(status("solved").model_dump_json())
    assert recorded_status(folder) == status("solved")
    save_checkpoint(folder.checkpoint, CheckpointState(3, 3, 30), lambda _: None)
    assert finished_checkpoint(folder) is None
    save_checkpoint(folder.checkpoint, SOLVED, lambda _: None)
    assert finished_checkpoint(folder) == SOLVED
    (folder.checkpoint / "state.json").write_text("[]")
    assert finished_checkpoint(folder) is None
