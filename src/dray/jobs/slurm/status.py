"""`dray slurm status`: the states of runs, read from their folders and from Slurm's queue."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dray.errors import ConfigError
from dray.jobs.folder import JobFolder, short_path
from dray.jobs.replica.metrics import MEAN_RETURN
from dray.jobs.slurm.plan import Plan, plan_path
from dray.jobs.slurm.run_state import FILE_NAME, RunRecord, RunState, cancel_marker
from dray.jobs.slurm.scheduler import has_ended
from dray.jobs.slurm.submit import submitted_job
from dray.text import MAX_LINE, printable

MAX_DEPTH = 3
"""Depth of the search for runs in a folder: ``outputs/<job name>/<number>``."""

LOG_LINES = 8
"""Lines of the log that are shown for a failed run."""

RATE_STEPS = 20
"""Steps over which the throughput is averaged."""

COLUMNS = ("job", "run", "state", "in Slurm", "part", "step", "return", "MB/s", "restarts", "retries left")
_TAIL_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class RunProgress:
    """The progress of a run, from `metrics.jsonl`.

    Attributes:
        mean_return: None if payloads have no rewards, or it is not finite.
        rate: payload throughput in MB/s.
    """

    step: int = 0
    mean_return: float | None = None
    rate: float = math.nan


@dataclass(frozen=True, slots=True)
class RunView:
    """One row of the table.

    Attributes:
        in_slurm: Slurm's state of the job; empty if it is neither waiting nor running.
        cells: the values of `COLUMNS`.
        remarks: lines below the table.
    """

    folder: Path
    state: str
    in_slurm: str
    cells: tuple[str, ...]
    remarks: tuple[str, ...]


def find_runs(places: Sequence[Path]) -> list[Path]:
    """The folders of this user's runs at or below `places`.

    Raises:
        ConfigError: a place does not exist.
    """
    found = set()
    for place in places:
        if not place.is_dir():
            raise ConfigError("FOLDER", str(place), "must be a run folder, or a folder that contains run folders")
        found |= set(_runs_below(place.absolute(), MAX_DEPTH))
    return sorted(found)


def view_run(folder: Path, jobs: Mapping[str, str]) -> RunView:
    """The present state of a run.

    Args:
        jobs: the states of the user's jobs in Slurm, from `known_jobs`.

    Raises:
        ConfigError: the run's files are damaged.
    """
    record = RunRecord.read(folder)
    job_id = record.job_id if record.state is RunState.RUNNING else submitted_job(folder) or record.job_id
    in_slurm = jobs.get(job_id, "")
    # A job that is cancelled while it waits has no script yet that could record this.
    cancelled = in_slurm == "cancelled" or cancel_marker(folder).exists()
    in_slurm = "" if has_ended(in_slurm) else in_slurm
    state = shown_state(record.state, in_slurm, cancelled=cancelled)
    running = record.state is RunState.RUNNING
    attempts_before = len(record.ends) if running else max(0, len(record.ends) - 1)
    progress = read_progress(JobFolder(folder).metrics)
    max_steps = Plan.read(plan_path(folder)).config.job.max_steps
    cells = (
        job_id or "-",
        short_path(folder),
        state,
        in_slurm or "-",
        f"{record.part}.{record.attempt}" if record.part else "-",
        f"{progress.step}/{max_steps}",
        "-" if progress.mean_return is None else f"{progress.mean_return:.1f}",
        "-" if math.isnan(progress.rate) else f"{progress.rate:.2f}",
        str(attempts_before),
        str(record.remaining_retries),
    )
    return RunView(folder, state, in_slurm, cells, tuple(_remarks(folder, record, state)))


def shown_state(state: RunState, in_slurm: str, *, cancelled: bool) -> str:
    """The state to show, which depends on whether Slurm still has a job of a run that is not final."""
    if state.is_final or in_slurm:
        return state.value
    if cancelled:
        return RunState.CANCELLED.value
    return "lost" if state is RunState.RUNNING else f"{state.value}; Slurm no longer has its job"


def read_progress(metrics: Path) -> RunProgress:
    """The progress of a run; an incomplete last line is ignored."""
    lines = []
    for text in _tail(metrics, RATE_STEPS + 1):
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    if not lines:
        return RunProgress()
    first, last = lines[0], lines[-1]
    # Seconds and bytes are cumulative, also over restarts.
    seconds = last["seconds"] - first["seconds"]
    rate = (last["bytes"] - first["bytes"]) / seconds / 1e6 if seconds > 0 else math.nan
    return RunProgress(last["step"], last.get(MEAN_RETURN), rate)


def status_table(views: Sequence[RunView]) -> RenderableType:
    """The table of runs, with their remarks below it."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in COLUMNS:
        table.add_column(name, no_wrap=True)
    for view in views:
        table.add_row(*(Text(printable(cell, MAX_LINE)) for cell in view.cells))
    remarks = [
        Text(printable(f"{short_path(view.folder)}: {line}", MAX_LINE)) for view in views for line in view.remarks
    ]
    return Group(table, *remarks)


def plain_lines(views: Sequence[RunView]) -> Iterator[str]:
    """The same as plain text: one line for each run, followed by its remarks."""
    for view in views:
        yield "  ".join(
            f"{name} {printable(cell, MAX_LINE)}" for name, cell in zip(COLUMNS, view.cells, strict=True)
        )
        yield from (f"  {printable(line, MAX_LINE)}" for line in view.remarks)


def _runs_below(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / FILE_NAME).is_file():
        if folder.stat().st_uid == os.getuid():
            yield folder
    elif depth:
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink() and os.access(path, os.R_OK | os.X_OK):
                yield from _runs_below(path, depth - 1)


def _remarks(folder: Path, record: RunRecord, state: str) -> Iterator[str]:
    if record.ends:
        last = record.ends[-1]
        yield f"part {last.part}, attempt {last.attempt} ended {last.ended}: {last.reason}"
    if record.part and state in (RunState.FAILED, RunState.RETRYING, "lost"):
        log = record.folder(folder).logs / "head.out"
        yield from (f"{log.name}: {line}" for line in _tail(log, LOG_LINES))


def _tail(path: Path, count: int) -> list[str]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            content = file.read()
    except FileNotFoundError:
        return []
    return content.decode("utf-8", errors="replace").splitlines()[-count:]
