"""Traces of jobs for tests: their files, and what must hold of the trace events that are made of them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from dray.jobs.folder import JobFolder
from dray.jobs.replica.stages import Span

NAMES = {"process_name", "thread_name"}
FIELDS = {
    "M": {"name": str, "pid": int, "tid": int, "args": dict},
    "X": {"name": str, "cat": str, "pid": int, "tid": int, "ts": int, "dur": int, "args": dict},
    "s": {"name": str, "cat": str, "pid": int, "tid": int, "ts": int, "id": int},
    "t": {"name": str, "cat": str, "pid": int, "tid": int, "ts": int, "id": int},
    "f": {"name": str, "cat": str, "pid": int, "tid": int, "ts": int, "id": int, "bp": str},
}
"""The fields of each kind of event, as docs/how-to/find-the-bottleneck.md has them, and their types."""


def write_spans(
    folder: JobFolder, name: str, spans: Iterable[Span], *, host: str = "one", unix: float = 1000.0, tail: str = ""
) -> None:
    """The file of one process; `tail` is what comes after its last line."""
    folder.trace.mkdir(exist_ok=True)
    header = json.dumps({"process": name, "pid": 7, "host": host, "unix": unix})
    lines = "".join(span.line() for span in spans)
    (folder.trace / f"{name}.jsonl").write_text(f"{header}\n{lines}{tail}")


def checked_events(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a document that a trace viewer opens, after a check of everything that the page promises."""
    assert document.keys() == {"displayTimeUnit", "traceEvents"}
    events: list[dict[str, Any]] = document["traceEvents"]
    slices: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    flows: dict[int, list[dict[str, Any]]] = defaultdict(list)
    named: dict[str, set[Any]] = defaultdict(set)
    for event in events:
        fields = FIELDS[event["ph"]]
        assert event.keys() == fields.keys() | {"ph"}
        assert all(isinstance(event[name], kind) for name, kind in fields.items())
        if event["ph"] == "M":
            assert event["name"] in NAMES
            named[event["name"]].add((event["pid"], event["tid"]))
        elif event["ph"] == "X":
            assert event["ts"] >= 0
            assert event["dur"] >= 0
            slices[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
        else:
            flows[event["id"]].append(event)
    assert slices.keys() == named["thread_name"]
    assert {(pid, 0) for pid, _ in slices} == named["process_name"]
    for found in slices.values():
        found.sort()
        assert all(before[1] <= after[0] for before, after in pairwise(found))
    for passed in flows.values():
        assert [each["ph"] for each in passed] == ["s", *["t"] * (len(passed) - 2), "f"]
        assert sorted(each["ts"] for each in passed) == [each["ts"] for each in passed]
        for each in passed:
            assert any(begin <= each["ts"] <= end for begin, end in slices[each["pid"], each["tid"]])
    return events


def spans_in(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of spans, without those about processes."""
    lines = [json.loads(line) for line in path.read_text().split("\n")[:-1] if line]
    return [line for line in lines if "stage" in line]
