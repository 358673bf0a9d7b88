"""`dray logs`: the last lines of the logs of a job, running or ended, and those that follow."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from dray.cli.status import find_running, is_running
from dray.errors import ConfigError
from dray.jobs.folder import JobFolder
from dray.jobs.log_files import LogFiles, LogLine
from dray.text import printable

FOLLOW_INTERVAL = 0.25
"""Seconds between two reads of the logs: a shared file system does not report what another node writes."""

MAX_LINES = 100_000
_ALLOWED = "must be the output folder of a job"


def logs(
    output: Annotated[
        Path | None,
        typer.Argument(
            help="Output folder of a job. Default: that of the only job running under outputs/, "
            "or, where none is running, of the newest one."
        ),
    ] = None,
    replica: Annotated[
        str | None,
        typer.Argument(help="Name of the only process to show, such as rollout-0 or supervisor. Default: all."),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Also show new lines, until the job ends or Ctrl-C.")
    ] = False,
    lines: Annotated[
        int,
        typer.Option(
            "--lines", "-n", min=0, max=MAX_LINES, help="Show so many of the last lines, of all together."
        ),
    ] = 50,
) -> None:
    """Show the last lines of a job's logs, merged by time, each with the name of its process.

    Characters that do not print are escaped.

    Exit code 0: they were shown, or Ctrl-C; 2: there is no such job or process.
    """
    folder = JobFolder(output if output is not None else _find(Path("outputs")))
    if not folder.newest_logs.is_dir():
        raise ConfigError("OUTPUT", str(folder.root), _ALLOWED)
    files = LogFiles(folder.newest_logs, replica)
    width = len(replica) if replica is not None else max(map(len, files.names()), default=0)
    with suppress(KeyboardInterrupt):
        _show(files.last(lines), width)
        if follow:
            _follow(folder, files, width)


def _follow(folder: JobFolder, files: LogFiles, width: int) -> None:
    never = threading.Event()
    while is_running(folder):
        _show(files.new(), width)
        never.wait(FOLLOW_INTERVAL)
    while lines := files.new(ended=True):
        _show(lines, width)


def _show(lines: Iterable[LogLine], width: int) -> None:
    for line in lines:
        typer.echo(f"{printable(line.name):{width}}  {line.text}")


def _find(place: Path) -> Path:
    """The folder of the only job that is running in a folder ``<job name>/<number>`` of `place`, else the newest.

    Raises:
        ConfigError: several are running, or there is none.
    """
    folders = [path.parent for name in ("logs", "latest") for path in place.glob(f"*/*/{name}")]
    if not any(is_running(JobFolder(path)) for path in folders) and folders:
        return max(folders, key=lambda path: JobFolder(path).newest_logs.stat().st_mtime)
    return find_running(place)
