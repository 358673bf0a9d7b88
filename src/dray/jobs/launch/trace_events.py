"""The stages of payloads as trace events, the format that ui.perfetto.dev and chrome://tracing open."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import count, groupby
from typing import Any, Final

from dray.jobs.launch.stage_table import Traced
from dray.jobs.replica.stages import STEP_STAGES, Span, Stage

_KINDS: Final[dict[str, frozenset[Stage]]] = {
    "steps": STEP_STAGES,
    "work": frozenset((Stage.ROLLOUT, Stage.PACK, Stage.HAND_OVER)),
    "ring": frozenset((Stage.WAIT_IN_RING,)),
    "payload": frozenset((Stage.READ, Stage.WAIT_IN_BATCH, Stage.TRAIN, Stage.COMMIT, Stage.FREE)),
}
"""The kinds of threads that each process is shown with, and the stages on them."""

Event = dict[str, Any]


def trace_events(spans: Sequence[Traced]) -> dict[str, Any]:
    """The document. Its times are whole microseconds since the first span.

    Slices of one thread do not overlap: what happens at the same time is on several threads of one kind. A flow
    leads through the slices of each payload.
    """
    start = min((each.span.begin for each in spans), default=0.0)
    events: list[Event] = []
    slices: dict[str, list[Event]] = {}
    by_process = groupby(sorted(spans, key=lambda each: each.process), key=lambda each: each.process)
    for pid, (process, group) in enumerate(by_process, 1):
        own = [each.span for each in group]
        events.append(_name("process_name", pid, 0, f"{process.name} (pid {process.pid})"))
        tids = count(1)
        for kind, stages in _KINDS.items():
            found = [span for span in own if span.stage in stages]
            for index, thread in enumerate(_threads(found, chained=kind == "payload")):
                tid = next(tids)
                events.append(_name("thread_name", pid, tid, f"{kind} {index + 1}" if index else kind))
                for span in thread:
                    made = _slice(span, pid, tid, start)
                    events.append(made)
                    if span.payload:
                        slices.setdefault(span.payload, []).append(made)
    for flow, passed in enumerate(slices.values(), 1):
        events += _flow(flow, sorted(passed, key=lambda each: (each["ts"], each["dur"])))
    return {"displayTimeUnit": "ms", "traceEvents": events}


def _threads(spans: Iterable[Span], *, chained: bool) -> list[list[Span]]:
    """The spans of each thread, on few threads; with `chained`, those of a payload are on one."""
    chains: dict[object, list[Span]] = {}
    for index, span in enumerate(sorted(spans, key=lambda each: (each.begin, each.end))):
        chains.setdefault(span.payload if chained else index, []).append(span)
    threads: list[list[Span]] = []
    for chain in chains.values():
        free = next((thread for thread in threads if thread[-1].end <= chain[0].begin), None)
        if free is None:
            threads.append(chain)
        else:
            free += chain
    return threads


def _name(what: str, pid: int, tid: int, name: str) -> Event:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}


def _slice(span: Span, pid: int, tid: int, start: float) -> Event:
    begin, end = (round((at - start) * 1e6) for at in (span.begin, span.end))
    about = (
        {"step": span.step}
        if span.stage in STEP_STAGES
        else {"work_item": span.work_item, "payload": span.payload}
    )
    times = {"ts": begin, "dur": end - begin}
    return {"ph": "X", "name": span.stage.value, "cat": "stage", "pid": pid, "tid": tid, **times, "args": about}


def _flow(number: int, slices: Sequence[Event]) -> Iterable[Event]:
    """The arrows from each of the slices to the next, bound to their middles."""
    last = len(slices) - 1
    for index, each in enumerate(slices if last else ()):
        phase = "s" if index == 0 else "f" if index == last else "t"
        at = {"pid": each["pid"], "tid": each["tid"], "ts": each["ts"] + each["dur"] // 2}
        ends = {"bp": "e"} if phase == "f" else {}
        yield {"ph": phase, "name": "payload", "cat": "payload", "id": number, **at, **ends}
