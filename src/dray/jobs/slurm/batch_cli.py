"""The decisions of the batch script: whether to start an attempt, and what to do after its end.

``begin PLAN`` prints ``start PART ATTEMPT``, or ``done``, ``failed`` or ``cancelled`` if nothing is to be run.
``end PLAN --exit-code N`` prints ``again`` (another attempt in this job), ``requeue``, ``done``, ``failed`` or
``cancelled``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dray.errors import DrayError, error_lines
from dray.jobs.exit_codes import ExitCode, meaning
from dray.jobs.files import open_own_folder, read_own_file
from dray.jobs.folder import JobFolder
from dray.jobs.launch.output import KEY, attempt_folder, lock_folder
from dray.jobs.launch.shutdown import finished_checkpoint
from dray.jobs.replica.checkpoint import find_checkpoint
from dray.jobs.slurm.plan import Plan
from dray.jobs.slurm.run_state import TRANSITIONS, RunEvent, RunRecord, RunState, event_of_end

LOCK_TIMEOUT = 120.0
"""Seconds to wait for the folder's lock, which a file system may keep after its node was lost."""

_ANSWERS = {
    RunState.RETRYING: "again",
    RunState.REQUEUED: "requeue",
    RunState.FINISHED: "done",
    RunState.FAILED: "failed",
    RunState.CANCELLED: "cancelled",
}


def begin(plan: Plan, job_id: str) -> str:
    """Record the start of an attempt, if one is to be run; returns the line for the batch script.

    Raises:
        ConfigError: another job is running this run.
    """
    root = plan.run_folder
    folder = JobFolder(root)
    refuse_folder_in_use(root, LOCK_TIMEOUT)
    record = read_stopped_run(root, plan.retries)
    continues = not record.state.is_final or (record.state is RunState.CANCELLED and record.job_id == job_id)
    if not continues:
        record.write(root)
        return _ANSWERS[record.state]
    cancel_marker(root).unlink(missing_ok=True)
    record = record.begin(job_id, checkpoint_step(folder))
    attempt_folder(record.folder(root))
    record.write(root)
    return f"start {record.part} {record.attempt}"


def end(plan: Plan, exit_code: int, *, signal: str = "", nodes_lost: bool = False) -> str:
    """Record the end of the attempt; returns the word for the batch script.

    Args:
        exit_code: exit code of the head process, as the shell reports it.
        signal: the signal that the batch script received: ``"TERM"``, ``"USR1"`` or empty.
        nodes_lost: the job no longer has all its nodes.
    """
    root = plan.run_folder
    folder = JobFolder(root)
    record = RunRecord.read(root)
    if record.state.is_final:  # cancelled after the run had ended
        return _ANSWERS[record.state]
    if record.state is not RunState.RUNNING:  # cancelled between two attempts
        record = record.apply(RunEvent.CANCEL)
    else:
        step = checkpoint_step(folder)
        event = event_of_end(
            exit_code,
            finished=finished_checkpoint(folder) is not None,
            signal=signal,
            nodes_lost=nodes_lost,
            progressed=step > record.step,
            # If all steps are done and the job is not solved, another attempt would have nothing to do.
            remaining_retries=record.remaining_retries if step < plan.config.job.max_steps else 0,
        )
        record = record.end(event, plan.retries, exit_code, _reason(plan, record, event, exit_code))
    record.write(root)
    return _ANSWERS[record.state]


def read_stopped_run(root: Path, retries: int) -> RunRecord:
    """The record of a run that has no process; if the end of its last attempt is missing, it is added.

    It is missing if the node of the batch script was lost or the job was killed.
    """
    record = RunRecord.read(root)
    finished = finished_checkpoint(JobFolder(root)) is not None
    if record.state is RunState.RUNNING:
        return _add_missing_end(record, retries, finished=finished, cancelled=cancel_marker(root).exists())
    if finished and RunEvent.FINISH in TRANSITIONS[record.state]:
        return record.apply(RunEvent.FINISH)
    return record


def cancel_marker(run_folder: Path) -> Path:
    """The empty file that the batch script creates first of all when it receives SIGTERM."""
    return run_folder / ".slurm" / "cancelled"


def checkpoint_step(folder: JobFolder) -> int:
    """The step of the newest checkpoint; 0 without one."""
    found = find_checkpoint(folder.checkpoint)
    return 0 if found is None else found[1].step


def refuse_folder_in_use(root: Path, timeout: float = 0.0) -> None:
    """Wait at most `timeout` seconds until no head process has locked the folder (`open_output`).

    Raises:
        ConfigError: a head process still uses the folder, or another user may write to it.
    """
    descriptor = open_own_folder(root, KEY)
    try:
        lock_folder(descriptor, root, timeout)
    finally:
        os.close(descriptor)


def _add_missing_end(record: RunRecord, retries: int, *, finished: bool, cancelled: bool) -> RunRecord:
    if finished:
        return record.end(RunEvent.FINISH, retries, None, "finished (according to the checkpoint)")
    if cancelled:
        return record.end(RunEvent.CANCEL, retries, None, "cancelled")
    event = RunEvent.REQUEUE if record.remaining_retries else RunEvent.GIVE_UP
    return record.end(event, retries, None, "lost: its node or its job ended before it could record its end")


def _reason(plan: Plan, record: RunRecord, event: RunEvent, exit_code: int) -> str:
    """Why the attempt ended, for users: the reason that the head process wrote, if it wrote one."""
    if event is RunEvent.CANCEL:
        return "cancelled"
    folder = record.folder(plan.run_folder)
    summary, place = folder.summary, folder.logs.parent
    if event is RunEvent.TIME_LIMIT:
        return "time limit near"
    if summary.exists() and summary.stat().st_mtime >= place.stat().st_mtime:
        return str(json.loads(read_own_file(summary, KEY))["exit_reason"])
    status = 128 - exit_code if exit_code > 128 else exit_code
    return f"head process: {meaning(status)}; see {place.relative_to(plan.run_folder)}/logs/head.out"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the two commands; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m dray.jobs.slurm.batch_cli", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("begin", "end"):
        command = commands.add_parser(name)
        command.add_argument("plan", type=Path)
        command.add_argument("--job-id", required=name == "begin")
    command.add_argument("--exit-code", type=int, required=True)
    command.add_argument("--signal", default="", choices=["", "TERM", "USR1"])
    command.add_argument("--nodes-lost", action="store_true")
    given = parser.parse_args(arguments)
    try:
        plan = Plan.read(given.plan)
        if given.command == "begin":
            print(begin(plan, given.job_id))
        else:
            print(end(plan, given.exit_code, signal=given.signal, nodes_lost=given.nodes_lost))
    except DrayError as error:
        print(*error_lines(error), sep="\n", file=sys.stderr)
        return ExitCode.CONFIGURATION
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
