"""A job on this machine: `dray run`."""

from __future__ import annotations

import faulthandler
from pathlib import Path

from dray.config import JobConfig
from dray.launch.display import Display
from dray.launch.output import open_output
from dray.launch.signals import SignalInbox
from dray.launch.site import this_machine
from dray.launch.supervisor import supervise
from dray.runtime.process import DUMP_SIGNAL


def run_job(config: JobConfig, job_file: Path, *, resume: bool = False) -> int:
    """Run a job to its end and return the exit code of `dray run`. Main thread of the main interpreter only.

    Raises:
        ConfigError: before anything was started.
    """
    faulthandler.register(DUMP_SIGNAL, all_threads=True, chain=False)
    with SignalInbox() as inbox, Display(f"dray: job {config.job.name}", config.job.max_steps) as display:
        with open_output(config, resume=resume) as (folder, state):
            return supervise(config, job_file, this_machine(config, folder), state, inbox, display)
