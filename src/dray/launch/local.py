"""A job on this machine: `dray run`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dray.config import JobConfig
from dray.errors import ConfigError
from dray.launch.display import Display
from dray.launch.output import is_begun, open_output, resume_line, start_again_line
from dray.launch.run_options import RunOptions
from dray.launch.signals import SignalInbox
from dray.launch.site import this_machine
from dray.launch.supervisor import supervise
from dray.resources import raise_descriptor_limit
from dray.runtime.checkpoint import find_checkpoint
from dray.runtime.exit_codes import ExitCode
from dray.runtime.job import JobFolder, short_path
from dray.runtime.process import dump_stacks_on_signal
from dray.text import as_argument


def run_job(config: JobConfig, options: RunOptions, *, resume: bool = False, lines: Sequence[str] = ()) -> int:
    """Run a job to its end and return the exit code of `dray run`. Main thread of the main interpreter only.

    Args:
        options: what the run was started with; kept in its output folder once it has begun.
        lines: what to show first.

    Raises:
        ConfigError: before anything was started.
    """
    dump_stacks_on_signal()
    raise_descriptor_limit()
    with SignalInbox() as inbox, Display(f"dray: job {config.job.name}", config.job.max_steps) as display:
        with open_output(config, resume=resume) as (folder, state):
            site = this_machine(config, folder, options)
            if state is None or not state.outcome:
                first = [start_again_line(folder)] if resume else []
                for line in (*(first if state is None else [resume_line(folder, state)]), *lines):
                    display.say(line)
            code = supervise(config, options.job_file, site, state, inbox, display)
            if code != ExitCode.OK:
                display.say(how_to_resume(folder, options.job_file, config.job.max_steps))
            return code


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
        return f"start again with: {command} (the run has no checkpoint)"
    step = found[1].step
    if step >= max_steps:
        return f"nothing to resume: the checkpoint is of step {step}, the last one of job.max_steps"
    return f"resume with: {command} (checkpoint of step {step})"
