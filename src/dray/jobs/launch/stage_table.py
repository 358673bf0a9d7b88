"""What the processes of a job have written about the stages of its payloads: read, joined, and summed up."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dray.errors import ConfigError
from dray.jobs.controller.state import FIRST_POLICY
from dray.jobs.folder import JobFolder
from dray.jobs.replica.stages import STEP_STAGES, Span, Stage

NEEDS = "must be the output folder of a job with job.trace above 0 that has handed on a sampled payload"


class TracedProcess(NamedTuple):
    """A process that has written spans.

    Attributes:
        host: identifies a host since its start: processes with the same one share a clock.
        unix: seconds from the clock of its spans to seconds since 1970, by its host's clock.
    """

    name: str
    pid: int
    host: str
    unix: float


class Traced(NamedTuple):
    """A span, and the process that it was measured in.

    Attributes:
        reliable: whether begin and end are of one clock.
    """

    process: TracedProcess
    span: Span
    reliable: bool = True


def read_trace(folder: JobFolder) -> list[Traced]:
    """Every span that is there, in the order of their begins, on one axis of time; `WAIT_IN_RING` is among them.

    Times are those of the first policy replica's host. Clocks of other hosts are brought to it by the time of day,
    and then so that no payload is read before it was handed on. Lines that a kill or a full disk has cut are left
    out.

    Raises:
        ConfigError: there are none.
    """
    files = sorted(folder.trace.glob("*.jsonl"))
    spans = [each for path in files for each in _spans_in(path)]
    if not spans:
        raise ConfigError("OUTPUT", str(folder.root), NEEDS)
    return sorted(_joined(_on_one_axis(spans)), key=lambda each: (each.span.begin, each.span.end))


def stage_table(spans: Iterable[Traced]) -> dict[str, dict[str, float]]:
    """By stage, in the order of `Stage`: ``count``, and ``mean``, ``p50``, ``p99`` and ``total`` in seconds.

    Waits between two hosts are left out: their clocks differ.
    """
    found: dict[Stage, list[float]] = {}
    for traced in spans:
        if traced.reliable:
            found.setdefault(traced.span.stage, []).append(traced.span.end - traced.span.begin)
    return {stage.value: _row(found[stage]) for stage in Stage if stage in found}


def _row(seconds: list[float]) -> dict[str, float]:
    p50, p99 = np.percentile(seconds, (50, 99))
    total = float(np.sum(seconds))
    row = {"mean": total / len(seconds), "p50": float(p50), "p99": float(p99), "total": total}
    return {"count": len(seconds), **{name: round(value, 6) for name, value in row.items()}}


# --- reading -----------------------------------------------------------------------------------------------------


def _spans_in(path: Path) -> Iterator[Traced]:
    process: TracedProcess | None = None
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            line = _line(text)
            if "process" in line:
                process = _process(line)
            elif process is not None and (span := _span(line)) is not None:
                yield Traced(process, span)


def _line(text: str) -> dict[str, Any]:
    """The values in a line; none if it is cut."""
    try:
        line = json.loads(text)
    except ValueError:
        return {}
    return line if isinstance(line, dict) else {}


def _process(line: dict[str, Any]) -> TracedProcess | None:
    try:
        return TracedProcess(str(line["process"]), int(line["pid"]), str(line["host"]), float(line["unix"]))
    except (KeyError, TypeError, ValueError):
        return None


def _span(line: dict[str, Any]) -> Span | None:
    try:
        stage, begin, end = Stage(line["stage"]), float(line["begin"]), float(line["end"])
        if not begin <= end:
            return None
        if stage in STEP_STAGES:
            return Span(stage, begin, end, step=int(line["step"]))
        return Span(stage, begin, end, int(line["work_item"]), str(line["payload"]))
    except (KeyError, TypeError, ValueError):
        return None


# --- joining -----------------------------------------------------------------------------------------------------


def _on_one_axis(spans: Sequence[Traced]) -> list[Traced]:
    reference = next((each.process for each in spans if each.process.name == FIRST_POLICY), spans[0].process)
    first = {each.process.host: each.process for each in reversed(spans)}
    offsets = {host: process.unix - reference.unix for host, process in first.items()}
    offsets[reference.host] = 0.0
    begun = {
        each.span.payload: each.span.begin + offsets[each.process.host]
        for each in reversed(spans)
        if each.span.stage is Stage.READ
    }
    late = dict.fromkeys(offsets, 0.0)
    for process, span, _ in spans:
        if span.stage is Stage.HAND_OVER and process.host != reference.host and span.payload in begun:
            after = span.end + offsets[process.host] - begun[span.payload]
            late[process.host] = max(late[process.host], after)
    return [
        each._replace(span=_moved(each.span, offsets[each.process.host] - late[each.process.host]))
        for each in spans
    ]


def _moved(span: Span, seconds: float) -> Span:
    return span._replace(begin=span.begin + seconds, end=span.end + seconds) if seconds else span


def _joined(spans: Iterable[Traced]) -> Iterator[Traced]:
    """`spans`, and the wait in the ring of each payload that was handed on and read.

    The reader may have the reference before the writer learns that it was handed on: then that ends with it.
    """
    listed = list(spans)
    reads = {each.span.payload: each for each in reversed(listed) if each.span.stage is Stage.READ}
    for traced in listed:
        process, span, _ = traced
        read = reads.get(span.payload) if span.stage is Stage.HAND_OVER else None
        if read is None:
            yield traced
            continue
        handed_on = max(span.begin, min(span.end, read.span.begin))
        yield traced._replace(span=span._replace(end=handed_on))
        wait = Span(Stage.WAIT_IN_RING, handed_on, max(handed_on, read.span.begin), span.work_item, span.payload)
        yield Traced(process, wait, reliable=process.host == read.process.host)
