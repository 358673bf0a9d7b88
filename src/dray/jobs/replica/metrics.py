"""What a training step returned: its line in `metrics.jsonl`, and whether it meets `[stop]`."""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from dray.errors import ConfigError
from dray.files import open_to_append, output_errors, write_whole
from dray.jobs.config import StopTable
from dray.resources import Closing
from dray.text import printable

# --- metrics log -------------------------------------------------------------------------------------------------

# `metrics.jsonl`: one JSON line for each training step of the weights, in the order of the steps.
#
# When the policy starts, `MetricsLog.cut` replaces the file by one that ends with the step of the checkpoint:
# without the lines of steps that a crash has rolled back, and without a line that a kill has cut off. A line is in
# the file before a checkpoint has its step.


class MetricsLog(Closing):
    """The file as the first policy replica writes it.

    Attributes:
        committed: the highest number of committed payloads in a line that was there before `cut`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found = _read(path)
        self._file: TextIOWrapper | None = None
        self.committed = max((int(line.get("committed", 0)) for line, _ in self._found), default=0)

    def cut(self, step: int) -> None:
        """Keep the lines of steps up to `step` only, and open the file for the ones that follow.

        The file is replaced as a whole: after a kill there is either the old one or the new one. What a process
        that was paused and replaced still writes goes to the old one, which is gone.

        Raises:
            OutputError: it cannot be written.
        """
        kept = "".join(f"{text}\n" for line, text in self._found if line["step"] <= step)
        write_whole(self._path, kept.encode())
        self._found = []
        self._file = os.fdopen(open_to_append(self._path, "job.output"), "a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        """Append the line of a step: a kill of this process does not lose it any more. Only after `cut`.

        Raises:
            OSError: it cannot be written, as on a full disk. It is kept, and written before the next one.
        """
        assert self._file is not None
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Make what was written survive a crash of the machine: a checkpoint that follows has these steps.

        Raises:
            OutputError: a line could not be written, and cannot now.
        """
        if self._file is not None:
            with output_errors(self._path):
                self._file.flush()
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file. May be called twice."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # `write` has raised it before
                self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of `path`, each step once and in order; none if there is no file.

    What is no line of a step, such as one that a kill has cut off, is left out. A line replaces the lines before
    it that are of the same step or a later one: these were rolled back.
    """
    return [line for line, _ in _read(path)]


def _read(path: Path) -> list[tuple[dict[str, Any], str]]:
    """As `read_metrics`, each line with its text."""
    try:
        content = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    found: list[tuple[dict[str, Any], str]] = []
    for text in content.split("\n"):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            while found and found[-1][0]["step"] >= line["step"]:
                found.pop()
            found.append((line, text))
    return found


# --- stop condition ----------------------------------------------------------------------------------------------

# A step may return no value of a metric that a later step returns, such as an evaluation every ten steps. So its
# absence alone is no error. It is one if the name is nearly that of a metric which the step did return, and no
# step so far has returned the metric itself.

MEAN_RETURN = "mean_return"
"""dray's own figure: the mean, over the payloads of a step, of the sum of their `rewards`."""

MISSPELLING_RATIO = 0.8
"""Of two names at least this similar, by `difflib`, one is taken for a misspelling of the other."""

_MAX_NAMES = 10
_MAX_NAME = 60
_DIGITS = re.compile(r"\d+")


class StopMetricError(ConfigError):
    """`stop.metric` is a misspelt name of a metric."""


class StopCondition:
    """Judges the training steps of one process in order.

    Args:
        stop: the table of the job file; without one no step solves the job.
        patience: steps without the metric after which `remark` reports it.
    """

    def __init__(self, stop: StopTable | None, patience: int) -> None:
        self._stop = stop
        self._patience = patience
        self._judged = 0
        self._seen = False
        self._returned: set[str] = set()
        self.remark = ""

    @property
    def never_returned(self) -> str:
        """The remark at the end about a metric that no step has returned; otherwise empty."""
        if self._stop is None or self._seen or not self._judged:
            return ""
        return f"no step returned stop.metric = {self._stop.metric!r}"

    def judge(self, step: int, metrics: Mapping[str, float], mean_return: float | None) -> str:
        """Why the job is solved by `step`, or nothing. A value that is not finite never solves it.

        Args:
            metrics: what `train_step` returned. A metric named `mean_return` takes the place of dray's own.
            mean_return: dray's own figure, where payloads have rewards.

        Raises:
            StopMetricError: no step has returned the metric, and this one returned a metric of nearly that name.
        """
        self.remark = ""
        if self._stop is None:
            return ""
        name = self._stop.metric
        self._judged += 1
        self._returned.update(metrics)
        value = metrics.get(name)
        if name == MEAN_RETURN and name not in self._returned:
            value = mean_return
        if value is None:
            if not self._seen:
                self._missing(step, [*metrics, *([] if mean_return is None else [MEAN_RETURN])])
            return ""
        self._seen = True
        if not math.isfinite(value) or value < self._stop.at_least:
            return ""
        return f"{printable(name)} {value:g} >= {self._stop.at_least:g} at step {step}"

    def _missing(self, step: int, known: list[str]) -> None:
        assert self._stop is not None
        name = self._stop.metric
        if meant := misspelling_of(name, known):
            raise StopMetricError(
                "stop.metric",
                name,
                f"it must be a metric that train_step returns; step {step} returned {listed(known)} "
                f"(did you mean {meant!r}?)",
            )
        if self._judged == self._patience:
            self.remark = (
                f"stop.metric = {name!r}: no step up to {step} has returned this metric; step {step} returned "
                f"{listed(known)}; the job is not solved before a step returns it"
            )


def misspelling_of(name: str, known: Iterable[str]) -> str:
    """The one of `known` that `name` is most likely a misspelling of, or nothing.

    Names that differ in their numbers only, such as ``top_1`` and ``top_5``, are different metrics.
    """
    plain = _plain(name)
    best, found = MISSPELLING_RATIO, ""
    for each in known:
        other = _plain(each)
        if each != name and other != plain and _DIGITS.sub("", other) == _DIGITS.sub("", plain):
            continue
        ratio = 1.0 if other == plain else difflib.SequenceMatcher(None, plain, other).ratio()
        if ratio >= best:
            best, found = ratio, each
    return found


def listed(names: list[str]) -> str:
    """The first of `names` in quotes, and how many more there are."""
    if not names:
        return "no metrics"
    shown = ", ".join(f"'{printable(each, _MAX_NAME)}'" for each in names[:_MAX_NAMES])
    more = len(names) - _MAX_NAMES
    return f"{shown} and {more} more" if more > 0 else shown


def _plain(name: str) -> str:
    """`name` without what people mix up: case, and which characters separate words."""
    return re.sub(r"[\W_]+", "_", name.casefold())
