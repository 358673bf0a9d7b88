"""`dray slurm status`: what is known about runs, from their folders and from Slurm's queue. Nothing is changed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dray.errors import ConfigError
from dray.jobs.folder import short_path
from dray.jobs.replica.metrics import MEAN_RETURN
from dray.jobs.slurm.batch_cli import cancel_marker
from dray.jobs.slurm.plan import Plan, plan_path
from dray.jobs.slurm.run_state import FILE_NAME, RunRecord, RunState
from dray.jobs.slurm.scheduler import has_ended
from dray.jobs.slurm.submit import submitted_job
from dray.text import MAX_LINE, printable

MAX_DEPTH = 3
"""How many folders below the one that is named runs are looked for: ``outputs/<job name>/<number>``."""

LAST_LINES = 8
"""Lines of a log that are shown of a run that failed."""

RATE_STEPS = 20
"""Steps over which the throughput is taken."""

COLUMNS = ("job", "run", "state", "in Slurm", "part", "step", "return", "MB/s", "restarts", "retries left")
_TAIL_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Progress:
    """The newest lines of `metrics.jsonl`: step, dray's mean return (None where payloads have no rewards, or it is
    not finite), and payload bytes per second in MB/s."""

    step: int = 0
    mean_return: float | None = None
    rate: float = math.nan


@dataclass(frozen=True, slots=True)
class RunView:
    """One run, as the table shows it.

    Attributes:
        in_slurm: what Slurm says of its job; empty if it neither waits nor runs.
        restarts: how many attempts have ended before the newest.
        remarks: lines below the table.
    """

    folder: Path
    job_id: str
    state: str
    in_slurm: str
    part: str
    progress: Progress
    max_steps: int
    restarts: int
    remaining_retries: int
    remarks: tuple[str, ...]

    @property
    def is_over(self) -> bool:
        """Whether nothing more comes of it by itself."""
        return not self.in_slurm

    def cells(self) -> tuple[str, ...]:
        """What stands in `COLUMNS`."""
        return (
            self.job_id or "-",
            short_path(self.folder),
            self.state,
            self.in_slurm or "-",
            self.part,
            f"{self.progress.step}/{self.max_steps}",
            "-" if self.progress.mean_return is None else f"{self.progress.mean_return:.1f}",
            "-" if math.isnan(self.progress.rate) else f"{self.progress.rate:.2f}",
            str(self.restarts),
            str(self.remaining_retries),
        )


def find_runs(places: Sequence[Path]) -> list[Path]:
    """The folders of this user's runs at or below `places`.

    Raises:
        ConfigError: a place does not exist.
    """
    found = set()
    for place in places:
        if not place.is_dir():
            raise ConfigError("FOLDER", str(place), "must be a folder of runs that were submitted, or of one")
        found |= set(_runs_below(place.absolute(), MAX_DEPTH))
    return sorted(found)


def view_run(folder: Path, jobs: Mapping[str, str]) -> RunView:
    """A run as it is now.

    Args:
        jobs: what Slurm knows of the user's jobs, see `known_jobs`.

    Raises:
        ConfigError: its files are damaged.
    """
    record = RunRecord.read(folder)
    job_id = record.job_id if record.state is RunState.RUNNING else submitted_job(folder) or record.job_id
    in_slurm = jobs.get(job_id, "")
    # The job of a run that waits has no script yet that would note its end.
    cancelled = in_slurm == "cancelled" or cancel_marker(folder).exists()
    in_slurm = "" if has_ended(in_slurm) else in_slurm
    state = shown_state(record.state, in_slurm, cancelled=cancelled)
    running = record.state is RunState.RUNNING
    return RunView(
        folder=folder,
        job_id=job_id,
        state=state,
        in_slurm=in_slurm,
        part=f"{record.part}.{record.attempt}" if record.part else "-",
        progress=read_progress(folder / "metrics.jsonl"),
        max_steps=Plan.read(plan_path(folder)).config.job.max_steps,
        restarts=len(record.ends) if running else max(0, len(record.ends) - 1),
        remaining_retries=record.remaining_retries,
        remarks=tuple(_remarks(folder, record, state)),
    )


def shown_state(state: RunState, in_slurm: str, *, cancelled: bool) -> str:
    """The state in words: one that needs a job in Slurm, where there is none, was cut off."""
    if state.is_final or in_slurm:
        return state.value
    if cancelled:
        return RunState.CANCELLED.value
    return "lost" if state is RunState.RUNNING else f"{state.value}; Slurm no longer has its job"


def read_progress(metrics: Path) -> Progress:
    """How far the run is; a last line that is being written, or was cut off, is left out."""
    lines = []
    for text in _tail(metrics, RATE_STEPS + 1):
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    if not lines:
        return Progress()
    last = lines[-1]
    return Progress(last["step"], last.get(MEAN_RETURN), _rate(lines))


def picture(views: Sequence[RunView]) -> RenderableType:
    """The table, and below it what is to be said about single runs."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in COLUMNS:
        table.add_column(name, no_wrap=True)
    for view in views:
        table.add_row(*(Text(printable(cell, MAX_LINE)) for cell in view.cells()))
    said = [
        Text(printable(f"{short_path(view.folder)}: {line}", MAX_LINE)) for view in views for line in view.remarks
    ]
    return Group(table, *said)


def plain_lines(views: Sequence[RunView]) -> Iterator[str]:
    """The same for something that is not a terminal: one line for each run, and its remarks."""
    for view in views:
        yield "  ".join(
            f"{name} {printable(cell, MAX_LINE)}" for name, cell in zip(COLUMNS, view.cells(), strict=True)
        )
        yield from (f"  {printable(line, MAX_LINE)}" for line in view.remarks)


def _runs_below(folder: Path, deeper: int) -> Iterator[Path]:
    if (folder / FILE_NAME).is_file():
        if folder.stat().st_uid == os.getuid():
            yield folder
    elif deeper:
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink() and os.access(path, os.R_OK | os.X_OK):
                yield from _runs_below(path, deeper - 1)


def _remarks(folder: Path, record: RunRecord, state: str) -> Iterator[str]:
    if record.ends:
        last = record.ends[-1]
        yield f"part {last.part}, attempt {last.attempt} ended {last.ended}: {last.reason}"
    if record.part and state in (RunState.FAILED, RunState.RETRYING, "lost"):
        log = record.folder(folder).logs / "head.out"
        yield from (f"{log.name}: {line}" for line in _tail(log, LAST_LINES))


def _rate(lines: Sequence[Mapping[str, Any]]) -> float:
    """Over `lines`. Seconds and bytes go on where a run was resumed."""
    first, last = lines[0], lines[-1]
    seconds = last["seconds"] - first["seconds"]
    return float((last["bytes"] - first["bytes"]) / seconds / 1e6) if seconds > 0 else math.nan


def _tail(path: Path, count: int) -> list[str]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            content = file.read()
    except FileNotFoundError:
        return []
    return content.decode("utf-8", errors="replace").splitlines()[-count:]
