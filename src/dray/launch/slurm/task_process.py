"""How a process on a node begins and ends: what it is told, its log, and the exit codes of its errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from dray.errors import ConfigError, DrayError, error_lines
from dray.launch.slurm.command_line import Task, read_task
from dray.resources import raise_descriptor_limit
from dray.runtime.exit_codes import ExitCode
from dray.runtime.process import dump_stacks_on_signal, exit_with_own_code_on_crash


def run_task(run: Callable[[Task], int], *, failed: ExitCode) -> int:
    """Call `run` with what this process was told, in the environment of the plan; returns the exit code.

    An error of dray's is a line on stderr (a `ConfigError` one for each mistake), and `ExitCode.CONFIGURATION` or,
    if it is of another kind, `failed`.
    """
    exit_with_own_code_on_crash()
    dump_stacks_on_signal()
    raise_descriptor_limit()
    try:
        task = read_task()
        os.environ.update(task.plan.environment)
        return run(task)
    except ConfigError as error:
        print(*error_lines(error), sep="\n", file=sys.stderr)
        return ExitCode.CONFIGURATION
    except DrayError as error:
        print(*error_lines(error), sep="\n", file=sys.stderr)
        return failed
