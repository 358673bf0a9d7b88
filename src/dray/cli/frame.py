"""One frame of `dray top`: a job's view as text that fits into a terminal."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from dray.jobs.messages.models import MemberState
from dray.jobs.messages.view import JobView, MemberView
from dray.text import MAX_LINE, printable

MIN_ROWS = 3
"""Replicas that are shown even where the terminal is too low for all the rest."""

_BARS, _PLAIN_BARS = "▁▂▃▄▅▆▇█", "_.-=+*%#"
_MAX_REPORTS = 3
_MAX_WRAPPED = 3
_SILENT_SECONDS = 5.0
_NAME, _VALUE = 14, 15
_STATE_STYLES = {MemberState.ACTIVE: "", MemberState.LEFT: "yellow", MemberState.DEAD: "red"}
_KEYS = "q or Ctrl-C ends dray top; the job continues"


def number(value: float) -> str:
    """`value` with four digits."""
    return f"{value:.4g}"


def percent(value: float) -> str:
    """The share `value` in percent."""
    return f"{100 * value:.0f} %"


def duration(seconds: float) -> str:
    """Seconds in the unit that is short to read."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


_FIGURES: tuple[tuple[str, str, Callable[[float], str], bool], ...] = (
    ("mean return", "mean_return", number, False),
    ("throughput", "megabytes_per_second", lambda value: f"{number(value)} MB/s", False),
    ("payloads", "payloads_per_second", lambda value: f"{number(value)} /s", False),
    ("staleness", "staleness", number, False),
    ("ring fill", "ring_fill", percent, True),
    ("policy waits", "policy_waits", percent, True),
    ("rollouts wait", "rollouts_wait", percent, True),
)
"""Name, figure of the view, how a value is written, and whether it is a share, whose bars go from 0 to 1."""


def frame(view: JobView, console: Console, *, keys: bool = False) -> RenderableType:
    """The job in at most as many lines as the console is high, and more only for `MIN_ROWS` replicas.

    Args:
        keys: whether the last line has the keys that end the display.
    """
    width = console.width
    head = f"{view.job}: {view.phase.value} for {duration(view.seconds)}, step {view.step} of {view.max_steps}"
    transfer = ", ".join(each for each in (view.transfer, view.lane) if each)
    parts: list[RenderableType] = [_line(f"{head}{transfer and f'; {transfer}'}", "bold")]
    parts += [_figure(view, console, each) for each in _FIGURES]
    # Without the names of the columns, the keys, and the line that a terminal leaves empty.
    left = console.height - len(parts) - 3
    below = _reports(view, width)[: max(0, min(left - MIN_ROWS, left // 2))]
    rows = max(MIN_ROWS, left - len(below))
    return Group(*parts, *_replicas(view, rows), *below, *([_line(_KEYS, "dim")] if keys else []))


def bars(values: Sequence[float | None], width: int, *, share: bool, plain: bool = False) -> str:
    """`values` as bars, one for each, or, if there are more than `width`, one for several."""
    found = _fitted(values, width)
    known = [value for value in found if value is not None]
    if not known:
        return ""
    low, high = (0.0, 1.0) if share else (min(known), max(known))
    symbols = _PLAIN_BARS if plain else _BARS
    scale = (len(symbols) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if value is None else symbols[round(scale * (value - low))] for value in found)


def _fitted(values: Sequence[float | None], width: int) -> list[float | None]:
    if len(values) <= width:
        return list(values)
    found: list[float | None] = []
    for index in range(width):
        part = values[index * len(values) // width : (index + 1) * len(values) // width]
        known = [value for value in part if value is not None]
        found.append(math.fsum(known) / len(known) if known else None)
    return found


def _figure(view: JobView, console: Console, figure: tuple[str, str, Callable[[float], str], bool]) -> Text:
    title, name, written, share = figure
    value = view.figures.get(name)
    shown = "-" if value is None else written(value)
    width = max(8, console.width - _NAME - _VALUE - 2)
    drawn = bars(view.history.get(name, []), width, share=share, plain=console.options.ascii_only)
    return Text.assemble((f"{title:{_NAME}}", "dim"), f"{shown:{_VALUE}}", (drawn, "cyan"), no_wrap=True)


def _replicas(view: JobView, rows: int) -> list[RenderableType]:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", expand=False)
    for name in ("replica", "does", "for", "payloads", "ring", "oldest"):
        right = name in ("for", "payloads", "ring")
        # Where there is little space, the column that may wrap is the one that becomes narrow.
        table.add_column(name, no_wrap=name != "does", overflow="ellipsis", justify="right" if right else "left")
    shown = view.members[: rows if len(view.members) + view.hidden_members <= rows else rows - 1]
    for member in shown:
        ages = max(member.ages.items(), key=lambda each: each[1], default=None)
        table.add_row(
            _cell(member.name),
            _cell(_doing(member), _STATE_STYLES[member.state]),
            duration(member.seconds),
            str(member.payloads),
            f"{member.ring_used_slots}/{member.ring_slots}" if member.ring_slots else "",
            "" if ages is None else f"{ages[0]} {duration(ages[1])}",
        )
    more = len(view.members) + view.hidden_members - len(shown)
    return [table, _line(f"and {more} more replicas", "dim")] if more else [table]


def _doing(member: MemberView) -> str:
    if member.state is not MemberState.ACTIVE:
        return f"{member.state.value}: {member.doing}"
    if member.silence > max(_SILENT_SECONDS, member.seconds / 2):
        return f"silent for {duration(member.silence)}: {member.doing}"
    return f"{member.doing} ({member.waits_for})" if member.waits_for else member.doing


def _reports(view: JobView, width: int) -> list[RenderableType]:
    """The outcome, the stall, the recording, and the last warnings, each in at most three lines."""
    found = []
    if view.outcome is not None:
        found.append((f"outcome: {view.outcome.kind}, {view.outcome.reason}", "bold"))
    if view.stall is not None:
        found.append((f"stall: {view.stall.line}", "yellow"))
    if view.recording:
        found.append((f"recording {view.recording}", "cyan"))
    found += [(f"warning: {each}", "yellow") for each in view.warnings[-_MAX_REPORTS:]]
    lines: list[RenderableType] = []
    for text, style in found:
        lines += [_line(each, style) for each in textwrap.wrap(printable(text, MAX_LINE), width)[:_MAX_WRAPPED]]
    return lines


def _line(text: str, style: str = "") -> Text:
    return Text(printable(text, MAX_LINE), style=style, overflow="ellipsis", no_wrap=True)


def _cell(text: str, style: str = "") -> Text:
    return Text(printable(text), style=style, overflow="ellipsis", no_wrap=True)
