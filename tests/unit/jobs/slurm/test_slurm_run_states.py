"""The state machine of a run on Slurm, and the decisions for the batch script."""

from __future__ import annotations

import json
import os
import secrets
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dray.errors import ConfigError
from dray.jobs.exit_codes import ExitCode
from dray.jobs.job_file import parse_job
from dray.jobs.launch.output import open_output
from dray.jobs.slurm.plan import Plan
from dray.jobs.slurm.run_state import (
    TRANSITIONS,
    IllegalRunTransition,
    RunEvent,
    RunRecord,
    RunState,
    after,
    begin,
    cancel_marker,
    end,
    event_of_end,
    main,
)

MAX_STEPS = 100


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """The plan of a run that was just submitted, with two retries."""
    document = {
        "job": {"name": "small", "max_steps": MAX_STEPS, "output": str(tmp_path / "run")},
        "rollout": {"worker": "small.py:Worker"},
        "policy": {"trainer": "small.py:Trainer", "batch_size": 8},
        "slurm": {},
    }
    config = parse_job(document)
    made = Plan(config, tmp_path / "job.toml", tmp_path / "run", secrets.token_bytes(32))
    made.write()
    RunRecord(RunState.SUBMITTED, made.table.retries).write(made.run_folder)
    return made


def write_checkpoint(plan: Plan, step: int, outcome: str = "") -> None:
    folder = plan.run_folder / "checkpoint"
    folder.mkdir(exist_ok=True)
    state = {"step": step, "weight_version": step, "next_work_item": 8 * step, "outcome": outcome}
    (folder / "state.json").write_text(json.dumps(state))


def record(plan: Plan) -> RunRecord:
    return RunRecord.read(plan.run_folder)


def ends(plan: Plan) -> list[tuple[int, int, int | None, str]]:
    return [(each.part, each.attempt, each.exit_code, each.reason) for each in record(plan).ends]


# --- the table ------------------------------------------------------------------------------------------------


def test_every_run_that_is_neither_finished_nor_running_can_be_resumed() -> None:
    assert TRANSITIONS[RunState.FINISHED] == {}
    resumable = {
        state for state, events in TRANSITIONS.items() if events.get(RunEvent.RESUME) is RunState.SUBMITTED
    }
    assert resumable == set(RunState) - {RunState.FINISHED, RunState.RUNNING}


def test_only_begin_leads_to_running() -> None:
    ways = {(event, target) for events in TRANSITIONS.values() for event, target in events.items()}
    assert {event for event, target in ways if target is RunState.RUNNING} == {RunEvent.BEGIN}


@pytest.mark.parametrize("state", RunState)
@pytest.mark.parametrize("event", RunEvent)
def test_event_without_a_transition_raises(state: RunState, event: RunEvent) -> None:
    if event in TRANSITIONS[state]:
        assert after(state, event) is TRANSITIONS[state][event]
    else:
        with pytest.raises(IllegalRunTransition):
            after(state, event)


END: dict[str, Any] = {
    "finished": False,
    "signal": "",
    "nodes_lost": False,
    "progressed": True,
    "remaining_retries": 1,
}


@pytest.mark.parametrize(
    ("code", "changed", "event"),
    [
        (0, {}, RunEvent.FINISH),
        (143, {"finished": True, "signal": "TERM"}, RunEvent.FINISH),
        (137, {"finished": True, "remaining_retries": 0}, RunEvent.FINISH),
        (143, {"signal": "TERM"}, RunEvent.CANCEL),
        (ExitCode.TIME_LIMIT, {"signal": "USR1"}, RunEvent.TIME_LIMIT),
        (ExitCode.TIME_LIMIT, {"signal": "USR1", "remaining_retries": 0}, RunEvent.TIME_LIMIT),
        (ExitCode.TIME_LIMIT, {"signal": "USR1", "progressed": False}, RunEvent.REQUEUE),
        (ExitCode.TIME_LIMIT, {"signal": "USR1", "progressed": False, "remaining_retries": 0}, RunEvent.GIVE_UP),
        (1, {}, RunEvent.FAIL),
        (1, {"signal": "USR1"}, RunEvent.REQUEUE),
        (137, {"nodes_lost": True}, RunEvent.REQUEUE),
        (137, {"nodes_lost": True, "remaining_retries": 0}, RunEvent.GIVE_UP),
        (1, {"remaining_retries": 0}, RunEvent.GIVE_UP),
        (ExitCode.USER_CODE, {}, RunEvent.FAIL),
        (ExitCode.USER_VALUE, {}, RunEvent.GIVE_UP),
        (ExitCode.USER_VALUE, {"nodes_lost": True}, RunEvent.GIVE_UP),
        (ExitCode.USER_VALUE, {"signal": "TERM"}, RunEvent.CANCEL),
    ],
)
def test_end_of_an_attempt(code: int, changed: dict[str, Any], event: RunEvent) -> None:
    assert event_of_end(code, **{**END, **changed}) is event


# --- decisions for the batch script -----------------------------------------------------------------------------


def test_failed_attempt_is_retried_until_no_retry_is_left(plan: Plan) -> None:
    answers = []
    for _ in range(3):
        answers.append(begin(plan, "7"))
        answers.append(end(plan, 14))
    assert answers == ["start 1 1", "again", "start 1 2", "again", "start 1 3", "failed"]
    assert begin(plan, "7") == "failed"
    assert record(plan).state is RunState.FAILED
    assert [each[:3] for each in ends(plan)] == [(1, 1, 14), (1, 2, 14), (1, 3, 14)]


def test_attempt_whose_class_returns_an_unusable_value_is_not_retried(plan: Plan) -> None:
    assert [begin(plan, "7"), end(plan, ExitCode.USER_VALUE)] == ["start 1 1", "failed"]
    assert record(plan).state is RunState.FAILED
    assert begin(plan, "7") == "failed"


def test_part_that_ends_at_its_time_limit_resets_the_retries(plan: Plan) -> None:
    begin(plan, "7")
    end(plan, 1)
    begin(plan, "7")
    write_checkpoint(plan, 30)
    assert record(plan).remaining_retries == 1
    assert end(plan, ExitCode.TIME_LIMIT, signal="USR1") == "requeue"
    assert record(plan).remaining_retries == 2
    assert begin(plan, "7") == "start 2 1"
    assert record(plan).step == 30
    assert ends(plan)[-1][3] == "time limit near"


def test_part_without_progress_before_its_limit_uses_a_retry(plan: Plan) -> None:
    write_checkpoint(plan, 30)
    for part, answer in ((1, "requeue"), (2, "requeue"), (3, "failed")):
        assert begin(plan, "7") == f"start {part} 1"
        assert end(plan, ExitCode.TIME_LIMIT, signal="USR1") == answer


def test_run_whose_node_was_lost_uses_a_retry_for_another_part(plan: Plan) -> None:
    begin(plan, "7")
    assert begin(plan, "7") == "start 2 1"
    assert record(plan).remaining_retries == 1
    assert ends(plan) == [(1, 1, None, "lost: its node or its job ended before it could record its end")]
    assert end(plan, 137, nodes_lost=True) == "requeue"
    begin(plan, "7")
    assert begin(plan, "7") == "failed"


def test_finished_run_is_never_run_again(plan: Plan) -> None:
    begin(plan, "7")
    assert end(plan, 0) == "done"
    assert begin(plan, "7") == begin(plan, "8") == "done"
    assert len(ends(plan)) == 1


def test_run_that_was_killed_after_its_last_checkpoint_counts_as_finished(plan: Plan) -> None:
    begin(plan, "7")
    write_checkpoint(plan, 40, "solved")
    assert end(plan, 143) == "done"


def test_requeued_run_with_a_finished_checkpoint_is_not_started(plan: Plan) -> None:
    begin(plan, "7")
    write_checkpoint(plan, 40, "solved")
    assert begin(plan, "7") == "done"
    assert record(plan).state is RunState.FINISHED


def test_lost_run_without_a_retry_counts_as_finished_if_its_checkpoint_is_finished(plan: Plan) -> None:
    for _ in range(plan.table.retries):
        begin(plan, "7")
        end(plan, 1)
    begin(plan, "7")
    write_checkpoint(plan, 40, "finished")
    assert record(plan).remaining_retries == 0
    assert begin(plan, "7") == "done"


@pytest.mark.parametrize("event", [RunEvent.CANCEL, RunEvent.FAIL])
def test_run_with_a_finished_checkpoint_is_done_in_every_state(plan: Plan, event: RunEvent) -> None:
    begin(plan, "7")
    end(plan, 1, signal="TERM" if event is RunEvent.CANCEL else "")
    write_checkpoint(plan, 40, "solved")
    assert begin(plan, "7") == "done"


def test_run_that_has_done_all_steps_without_being_solved_is_not_retried(plan: Plan) -> None:
    begin(plan, "7")
    write_checkpoint(plan, MAX_STEPS)
    assert end(plan, 1) == "failed"


def test_cancelled_run_is_not_begun_by_another_job(plan: Plan) -> None:
    begin(plan, "7")
    assert end(plan, 143, signal="TERM") == "cancelled"
    assert begin(plan, "8") == "cancelled"


def test_preempted_run_continues_when_slurm_restarts_its_job(plan: Plan) -> None:
    begin(plan, "7")
    cancel_marker(plan.run_folder).touch()
    assert end(plan, 143, signal="TERM") == "cancelled"
    assert begin(plan, "7") == "start 2 1"
    assert record(plan).remaining_retries == 2
    assert not cancel_marker(plan.run_folder).exists()


def test_cancelled_run_without_a_recorded_end_is_not_lost(plan: Plan) -> None:
    begin(plan, "7")
    cancel_marker(plan.run_folder).touch()
    assert begin(plan, "8") == "cancelled"
    assert record(plan).remaining_retries == 2


def test_cancelling_between_two_attempts_is_recorded(plan: Plan) -> None:
    begin(plan, "7")
    end(plan, 1)
    assert end(plan, 143, signal="TERM") == "cancelled"
    assert len(ends(plan)) == 1


def test_signal_after_the_end_changes_nothing(plan: Plan) -> None:
    begin(plan, "7")
    end(plan, 0)
    assert end(plan, 143, signal="TERM") == "done"
    assert record(plan).state is RunState.FINISHED


def test_every_attempt_has_a_folder_and_latest_points_to_the_newest(plan: Plan) -> None:
    begin(plan, "7")
    end(plan, 1)
    begin(plan, "7")
    latest = plan.run_folder / "latest"
    assert os.readlink(latest) == "parts/001.2"  # noqa: PTH115  (as it is written)
    assert (latest / "logs").is_dir()
    assert (plan.run_folder / "parts" / "001.1" / "logs").is_dir()


def test_reason_of_an_end_is_the_one_that_the_head_wrote_in_this_attempt(plan: Plan) -> None:
    summary = plan.run_folder / "summary.json"
    summary.write_text(json.dumps({"exit_reason": "of an attempt before"}))
    os.utime(summary, (1e9, 1e9))
    begin(plan, "7")
    end(plan, 137)
    assert ends(plan)[0][3] == "head process: killed by signal 9; see parts/001.1/logs/head.out"
    begin(plan, "7")
    summary.write_text(json.dumps({"exit_reason": "no replica is left"}))
    end(plan, 1)
    assert ends(plan)[1][3] == "no replica is left"


def test_run_whose_folder_is_in_use_is_not_begun(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dray.jobs.slurm.run_state.LOCK_TIMEOUT", 0.05)
    before = record(plan)
    with open_output(plan.config, resume=False):
        with pytest.raises(ConfigError, match="must be a folder that no running job uses"):
            begin(plan, "7")
    assert record(plan) == before


def test_lock_of_a_lost_node_is_waited_for(plan: Plan) -> None:
    with ThreadPoolExecutor() as pool:
        with open_output(plan.config, resume=False):
            begun = pool.submit(begin, plan, "7")
            with pytest.raises(TimeoutError):
                begun.result(0.2)
        assert begun.result(10.0) == "start 1 1"


def test_commands_print_one_word_or_an_error(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["begin", str(plan.path), "--job-id", "7"]) == 0
    assert main(["end", str(plan.path), "--exit-code", "1", "--signal", ""]) == 0
    assert capsys.readouterr().out == "start 1 1\nagain\n"
    (plan.run_folder / "slurm.json").write_text('{"state": "well"}')
    assert main(["begin", str(plan.path), "--job-id", "7"]) == 2
    assert capsys.readouterr().err.startswith("error: slurm.json at ")


def test_record_reads_as_it_was_written(plan: Plan) -> None:
    begin(plan, "7")
    end(plan, 1)
    again = record(plan)
    again.write(plan.run_folder)
    assert record(plan) == again
    assert {"state", "part", "attempt", "remaining_retries", "ends"} <= set(
        json.loads((plan.run_folder / "slurm.json").read_text())
    )
