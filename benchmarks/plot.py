"""The plot of a run: rate over payload size, dray's lanes beside their limits and beside the peers."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.figures import Row
from benchmarks.machine import summary
from benchmarks.plan import size_name
from benchmarks.results import Results
from benchmarks.scenarios import batches, beside, in_place, reads

AVAILABLE = importlib.util.find_spec("matplotlib") is not None

Points = list[tuple[int, float]]

_SHM, _TCP, _UCX, _OTHER = "#1f5f99", "#2a8a57", "#c46a1b", "#7a7a7a"
_LEAST_GAP = 0.042
"""Between two labels, as a share of the axis."""


@dataclass(frozen=True, slots=True)
class Style:
    """How a line looks."""

    label: str
    colour: str
    line: str = "-"
    width: float = 2.2
    marker: str = "o"


_LANES: Mapping[str, Style] = {
    in_place.SUBJECT: Style("shm in place", "#6fb1e8"),
    "shm": Style("shm", _SHM),
    "tcp": Style("tcp", _TCP),
    "ucx": Style("ucx", _UCX),
    reads.WARM_COPY: Style("bare copy", _SHM, "--", 1.2, ""),
    reads.TCP_BULK: Style("bare TCP", _TCP, "--", 1.2, ""),
    reads.UCX: Style("bare UCX", _UCX, "--", 1.2, ""),
}
_PEERS: Mapping[str, Style] = {
    "dray stream in place": Style("dray stream in place", "#e08a1e"),
    "dray stream with a copy": Style("dray stream with a copy", "#b4561c"),
    "dray shm in place": Style("dray shm in place", "#6fb1e8"),
    "dray shm": Style("dray shm", _SHM),
    "dray shm, by Redis": Style("dray shm, by Redis", _SHM, "-.", 1.6, ""),
    "dray tcp": Style("dray tcp", _TCP),
    "dray ucx": Style("dray ucx", _UCX),
    "ZeroMQ ipc": Style("ZeroMQ ipc", "#5b5b5b", "--", 1.3, "s"),
    "ZeroMQ tcp": Style("ZeroMQ tcp", "#8f8f8f", "--", 1.3, "s"),
    "multiprocessing.Queue": Style("multiprocessing.Queue", "#4d8f8b", "--", 1.3, "s"),
    "torch queue": Style("torch queue", "#a0477a", "--", 1.3, "s"),
    "Ray": Style("Ray", "#7451a8", "--", 1.3, "s"),
    "TransferQueue": Style("TransferQueue", "#b09a2c", "--", 1.3, "s"),
    "Redis inline": Style("Redis inline", "#c23b3b", "--", 1.3, "s"),
}


def draw(results: Results, path: Path) -> bool:
    """Write the plot as a PNG.

    Returns:
        False if the run has nothing to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    left, right = _lane_lines(results.rows), _peer_lines(results.rows)
    panels = [panel for panel in (left, right) if panel]
    if not panels:
        return False
    figure = Figure(figsize=(7.4 * len(panels), 6.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for each, lines in zip(axes, panels, strict=True):
        _panel(each, lines)
        each.set_title(
            "Reads, and their limits (dashed)" if lines is left else "Producer's arrays → consumer's arrays"
        )
        each.set_ylabel("GB/s" if lines is left else "throughput, GB/s")
    figure.supxlabel(summary(results.machine), fontsize=8, color="0.4")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return True


def _lane_lines(rows: Iterable[Row]) -> dict[Style, Points]:
    """Rates at the median time of one read."""
    found: dict[Style, Points] = {}
    for row in rows:
        if row.scenario not in (reads.NAME, in_place.NAME) or row.nbytes is None:
            continue
        if row.subject in _LANES and row.rate is not None:
            found.setdefault(_LANES[row.subject], []).append((row.nbytes, row.rate))
    for row in rows:
        if row.scenario == batches.NAME and row.subject == batches.PERFTEST and row.nbytes:
            found[Style("ucx_perftest", _UCX, "", 0, "*")] = [(row.nbytes, row.figure.p50)]
    return found


def _peer_lines(rows: Iterable[Row]) -> dict[Style, Points]:
    found: dict[Style, Points] = {}
    for row in rows:
        what, _, name = row.subject.partition(", ")
        if row.scenario == beside.NAME and what == beside.THROUGHPUT and name in _PEERS and row.nbytes:
            found.setdefault(_PEERS[name], []).append((row.nbytes, row.figure.p50))
    return found


def _panel(axes: Any, lines: Mapping[Style, Points]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = sorted({nbytes for points in lines.values() for nbytes, _ in points})
    top = _top(lines)
    ends: list[tuple[Style, float]] = []
    for style, points in lines.items():
        points = sorted(points)
        x, y = [nbytes for nbytes, _ in points], [rate / 1e9 for _, rate in points]
        line = style.line or "none"
        axes.plot(
            x, y, line, color=style.colour, linewidth=style.width, marker=style.marker or None, markersize=4.5
        )
        if style.line:
            off = replace(style, label=f"{style.label} ↑ no copy") if y[-1] > top else style
            ends.append((off, min(y[-1], top)))
        else:
            axes.annotate(style.label, (x[-1], y[-1]), xytext=(7, -3), textcoords="offset points", fontsize=9)
    bottom = min(rate / 1e9 for points in lines.values() for _, rate in points) / 1.6
    axes.set_ylim(bottom, top)
    axes.set_xlim(sizes[0] / 1.3, sizes[-1] * (sizes[-1] / sizes[0]) ** 0.02)
    axes.set_xticks(sizes, [size_name(nbytes) for nbytes in sizes], rotation=35, ha="right")
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(color="0.91")
    axes.spines[["top", "right"]].set_visible(False)
    _label(axes, ends, bottom, top)


def _top(lines: Mapping[Style, Points]) -> float:
    """In place nothing is copied, and the rate grows with the size without end: the others set the scale."""
    copied = [
        rate / 1e9 for style, points in lines.items() if "in place" not in style.label for _, rate in points
    ] or [rate / 1e9 for points in lines.values() for _, rate in points]
    return max(copied) * 3


def _label(axes: Any, ends: Sequence[tuple[Style, float]], bottom: float, top: float) -> None:
    """Names at the right ends of the lines, moved apart where they would lie on each other."""
    places = [math.log(y / bottom) / math.log(top / bottom) for _, y in ends]
    moved = spread(places, _LEAST_GAP)
    for (style, _), place in zip(ends, moved, strict=True):
        weight = "bold" if style.line == "-" else "normal"
        axes.text(
            1.015, place, style.label, transform=axes.transAxes, color=style.colour, fontsize=9.5,
            fontweight=weight, va="center",
        )  # fmt: skip


def spread(places: Sequence[float], gap: float) -> list[float]:
    """The places in the same order, at least `gap` apart, none above 1, and near to where they were."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    found = [min(places[index], 1.0) for index in order]
    for index in range(1, len(found)):
        found[index] = max(found[index], found[index - 1] + gap)
    ceiling = 1.0
    for index in reversed(range(len(found))):
        found[index] = min(found[index], ceiling)
        ceiling = found[index] - gap
    result = [0.0] * len(places)
    for index, place in zip(order, found, strict=True):
        result[index] = place
    return result
