"""`dray trace`: where the time of a job's payloads goes, as a table and as a file for a trace viewer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import typer

from dray.cli.extras import require_extra
from dray.errors import ConfigError
from dray.files import write_whole
from dray.jobs.folder import JobFolder, short_path
from dray.text import MAX_LINE, printable

_TRACES = "*/*/trace"


def trace(
    output: Annotated[
        Path | None,
        typer.Argument(help="Output folder of a job. Default: the one under outputs/ that was traced last."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write. Default: trace.json in the output folder.")
    ] = None,
) -> None:
    """Write the stages of a job's payloads to a file for ui.perfetto.dev or chrome://tracing; print their table.

    The job may be running. Its processes measure the payloads of each work item whose index is a multiple of
    job.trace.

    Exit code 0: the file is written; 1: it cannot be written; 2: the folder has no trace.
    """
    require_extra("jobs")
    from dray.jobs.launch.stage_table import read_trace, stage_table
    from dray.jobs.launch.trace_events import trace_events

    folder = JobFolder(output if output is not None else find_traced(Path("outputs")))
    spans = read_trace(folder)
    path = folder.root / "trace.json" if out is None else out
    write_whole(path, json.dumps(trace_events(spans), separators=(",", ":")).encode())
    for line in table_lines(stage_table(spans)):
        typer.echo(line)
    payloads = len({each.span.payload for each in spans} - {""})
    processes = len({each.process for each in spans})
    shown = printable(short_path(path.absolute()), MAX_LINE)
    typer.echo(f"{shown}: processes {processes}, payloads {payloads}; open it at https://ui.perfetto.dev")


def find_traced(place: Path) -> Path:
    """The output folder in ``<job name>/<number>`` of `place` that was traced last.

    Raises:
        ConfigError: there is none.
    """
    found = sorted(place.glob(_TRACES), key=lambda path: path.stat().st_mtime)
    if not found:
        allowed = "must be the output folder of a job with job.trace above 0; none is there by default"
        raise ConfigError("OUTPUT", str(place), allowed)
    return found[-1].parent


def table_lines(table: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """The table of stages as lines of text, in milliseconds and, for the total, seconds."""
    yield f"{'stage':<14}{'count':>8}{'mean ms':>12}{'p50 ms':>12}{'p99 ms':>12}{'total s':>12}"
    for stage, row in table.items():
        times = "".join(f"{1000 * row[name]:>12.3f}" for name in ("mean", "p50", "p99"))
        yield f"{stage:<14}{row['count']:>8}{times}{row['total']:>12.3f}"
