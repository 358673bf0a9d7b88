"""What grows in the processes that run as long as the soak."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from soak.processes import Footprint, ProcessRun

_MIN_SECONDS = 90.0
"""A shorter run is not judged: what a process holds is still rising."""

_ALLOWED = {"memory": 64.0, "descriptors": 12.0, "sockets": 12.0, "threads": 4.0, "segments": 3.0}
"""By how much the last third of a run may exceed the second: connections come and go with the faults."""
_ALLOWED_SLOPE = 6.0
"""MiB per minute; counts where the run is long enough for a slope to mean something."""
_SLOPE_NEEDS = 240.0

HELD = tuple(_ALLOWED)
"""What is watched; memory in MiB."""


@dataclass(frozen=True, slots=True)
class Growth:
    """One process: medians of the second and of the last third of its run, and the slope of its memory."""

    name: str
    before: dict[str, float]
    after: dict[str, float]
    slope: float  # MiB per minute, from the second third on
    leaks: tuple[str, ...]


def growths(runs: Iterable[ProcessRun]) -> list[Growth]:
    """What each steady process held, once it was warm, and at the end of the plan."""
    return [_growth(run) for run in runs if run.steady and _seconds(run.footprints) >= _MIN_SECONDS]


def _seconds(footprints: list[Footprint]) -> float:
    return footprints[-1].at - footprints[0].at if footprints else 0.0


def _growth(run: ProcessRun) -> Growth:
    third = len(run.footprints) // 3
    warm, last = run.footprints[third : 2 * third], run.footprints[-third:]
    before, after = _medians(warm), _medians(last)
    slope = _slope(run.footprints[third:])
    leaks = [name for name, most in _ALLOWED.items() if after[name] > before[name] + most]
    if last[-1].at - warm[0].at > _SLOPE_NEEDS and slope > _ALLOWED_SLOPE:
        leaks.append("memory")
    return Growth(run.name, before, after, round(slope, 2), tuple(leaks))


def _medians(footprints: list[Footprint]) -> dict[str, float]:
    return {name: statistics.median(getattr(each, name) for each in footprints) for name in _ALLOWED}


def _slope(footprints: list[Footprint]) -> float:
    line = statistics.linear_regression([each.at for each in footprints], [each.memory for each in footprints])
    return line.slope * 60
