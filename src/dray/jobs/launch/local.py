"""A job on this machine: `dray run` and `dray check`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from dray.errors import ConfigError
from dray.jobs.exit_codes import ExitCode
from dray.jobs.folder import JobFolder, RunOptions, short_path
from dray.jobs.job_file import JobDraft
from dray.jobs.launch.display import Display
from dray.jobs.launch.output import is_begun, resume_line
from dray.jobs.launch.preparation import preparation, raise_mistakes
from dray.jobs.launch.processes import JobPlacement
from dray.jobs.launch.shutdown import stopped_early
from dray.jobs.launch.supervisor import supervise
from dray.jobs.process import SignalInbox, adopt_orphans, dump_stacks_on_signal
from dray.jobs.replica.checkpoint import find_checkpoint
from dray.resources import raise_descriptor_limit
from dray.text import MAX_LINE, as_argument, printable


def run_job(draft: JobDraft, options: RunOptions, *, resume: bool = False, lines: Sequence[str] = ()) -> int:
    """Run a job to its end and return the exit code of `dray run`. Main thread of the main interpreter only.

    Args:
        options: what the run was started with; kept in its output folder once it has begun.
        lines: what to show first.

    Raises:
        ConfigError: before anything was started; every mistake is named.
    """
    if draft.mistakes:
        return check_job(draft, options.job_file, resume=resume)
    dump_stacks_on_signal()
    adopt_orphans()
    raise_descriptor_limit()
    config = draft.config
    with SignalInbox() as inbox, Display(f"dray: job {config.job.name}", config.job.max_steps) as display:
        checks = preparation(draft, options.job_file, inbox, show_line=display.show_line, resume=resume)
        with checks as found:
            folder, state = found.folder, found.state
            if found.signals:
                return stopped_early(folder, found.signals, display.show_line)
            if found.mistakes:
                raise_mistakes(draft, found.mistakes, display.show_line)
            assert folder is not None
            rollouts = range(config.rollout.replicas)
            placement = JobPlacement(
                folder, config.controller.host, config.policy.replicas, rollouts, options=options
            )
            if not found.finished:
                if state is not None:
                    display.show_line(resume_line(folder, state))
                elif resume:
                    display.show_line(f"no checkpoint in {short_path(folder.root)}: starting from the beginning")
                for line in (*draft.notes, *lines):
                    display.show_line(line)
            code = supervise(config, options.job_file, placement, state, inbox, display)
            if code != ExitCode.OK:
                display.show_line(how_to_resume(folder, options.job_file, config.job.max_steps))
            return code


def check_job(draft: JobDraft, job_file: Path, *, resume: bool = False) -> int:
    """Check a job and start nothing of it; returns 0, or the exit code after a signal. Main thread only.

    Args:
        resume: whether an earlier run would be resumed.

    Raises:
        ConfigError: every mistake is named.
    """
    dump_stacks_on_signal()
    adopt_orphans()
    with SignalInbox() as inbox, preparation(draft, job_file, inbox, show_line=_print, resume=resume) as found:
        pass
    if found.signals:
        return stopped_early(None, found.signals, _print)
    raise_mistakes(draft, found.mistakes, _print)
    return ExitCode.OK


def _print(line: str) -> None:
    """Show a line beside the results of a command."""
    with suppress(OSError):  # stderr cannot be written
        print(printable(line, MAX_LINE), file=sys.stderr, flush=True)


def how_to_resume(folder: JobFolder, job_file: Path, max_steps: int) -> str:
    """The command that resumes a run that did not finish, and its checkpoint's step, or why there is none."""
    try:
        found = find_checkpoint(folder.checkpoint)
    except ConfigError as error:
        return f"nothing to resume: {error}"
    if found is None and not is_begun(folder.root):
        return "nothing to resume: the run had not begun"
    words = ["dray", "run", "--resume", short_path(job_file), "--output", short_path(folder.root)]
    command = " ".join(map(as_argument, words))
    if found is None:
        return f"restart with: {command} (the run has no checkpoint)"
    step = found[1].step
    if step >= max_steps:
        return f"nothing to resume: the checkpoint is of step {step}, the last one of job.max_steps"
    return f"resume with: {command} (checkpoint of step {step})"
