"""What `dray run` shows while a job runs: a live table on a terminal, a line now and then elsewhere.

Some of its text comes from user code. All text is made printable, and none is read as markup. A display
that fails, because the terminal is gone or a stream is closed, ends nothing but itself.
"""

from __future__ import annotations

import errno
import io
import logging
import math
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dray.clock import MONOTONIC
from dray.jobs.controller.state import FIRST_POLICY
from dray.jobs.messages.models import MemberState, ProgressReport, Status
from dray.jobs.replica.metrics import MEAN_RETURN
from dray.jobs.standard_streams import discard
from dray.resources import Closing
from dray.text import MAX_LINE, printable

PLAIN_INTERVAL = 5.0
"""Seconds between lines where there is no terminal."""

MAX_METRICS_SHOWN = 8
"""Metrics of the user's trainer that are shown."""

_LOG = logging.getLogger("dray.jobs.launch.display")
_MAX_NAME = 40
_MAX_CELL = 200
_STYLES = {"mean return": "bold green"}
_STATE_STYLES = {MemberState.ACTIVE: "", MemberState.LEFT: "yellow", MemberState.DEAD: "red"}
_WORD = re.compile(r"[\w./@:-]+")


class Figures:
    """The numbers of a job's newest status.

    Attributes:
        status: the newest one.
        policy: what the first policy replica has reported in it.
        rate: MB/s of payloads, smoothed over a few seconds.
    """

    status: Status
    policy: ProgressReport

    def __init__(self, max_steps: int) -> None:
        self.rate = 0.0
        self._max_steps = max_steps
        self._last: tuple[float, int] | None = None

    def read(self, status: Status) -> Self:
        """These figures, of `status` from now on."""
        self.status, self.policy = status, status.progress(FIRST_POLICY)
        if "bytes" in self.policy.counters:
            self._follow(status.seconds, self.policy.count("bytes"))
        else:
            self._last = None  # a policy that is restarted begins with the bytes of its checkpoint
        return self

    def line(self) -> str:
        """Everything in one line."""
        own = "  ".join(f"{name} {value}" for name, value in self.cells().items() if name not in ("phase", "time"))
        metrics = self.shown_metrics()
        return f"{self.status.seconds:6.1f} s  {self.status.phase}  {own}{metrics and f'  metrics {metrics}'}"

    def cells(self) -> dict[str, str]:
        """dray's own figures by their names; without those that this job does not have."""
        policy, mean_return = self.policy, self.policy.counters.get(MEAN_RETURN)
        shown = {
            "phase": self.status.phase.value,
            "time": f"{self.status.seconds:.0f} s",
            "step": f"{policy.count('step')}/{self._max_steps}",
            "mean return": "" if mean_return is None else f"{mean_return:.1f}",
            "payloads": str(policy.count("payloads")),
            "throughput": f"{self.rate:.2f} MB/s",
            "transfer": printable(policy.labels.get("transfer", ""), _MAX_NAME),
            "lane": printable(policy.labels.get("lane", ""), _MAX_NAME),
            "staleness": f"{policy.counters.get('staleness', 0.0):.2f}",
        }
        return {name: value for name, value in shown.items() if value}

    def shown_metrics(self) -> str:
        """The user's metrics as ``name=value``, sorted; names that are no words are quoted."""
        metrics = self.policy.metrics
        names = sorted(metrics)
        parts = [f"{_quoted(name)}={metrics[name]:.4g}" for name in names[:MAX_METRICS_SHOWN]]
        more = len(names) - MAX_METRICS_SHOWN
        return " ".join([*parts, f"and {more} more"] if more > 0 else parts)

    def _follow(self, seconds: float, nbytes: int) -> None:
        if self._last is not None:
            elapsed = seconds - self._last[0]
            if elapsed < 0.1:
                return
            weight = 1 - math.exp(-elapsed / 3.0)
            self.rate += weight * ((nbytes - self._last[1]) / elapsed / 1e6 - self.rate)
        self._last = (seconds, nbytes)


class Display(Closing):
    """Shows a job's progress until closed.

    Args:
        timestamps: each line that stays begins with the local date and time.
    """

    def __init__(
        self, title: str, max_steps: int, console: Console | None = None, *, timestamps: bool = False
    ) -> None:
        self._title = title
        self._timestamps = timestamps
        self._console = _Console() if console is None else console
        if isinstance(self._console.file, io.TextIOWrapper):
            # A character that the terminal's encoding does not have is shown as an escape.
            self._console.file.reconfigure(errors="backslashreplace")
        self._figures = Figures(max_steps)
        self._live: Live | None = None
        self._next_line = 0.0
        self._failed = False
        self._warned: set[tuple[str, str]] = set()

    def __enter__(self) -> Self:
        self._show(self._start)
        return self

    def close(self) -> None:
        """Leave the picture as it is; later lines come below it. Twice is fine."""
        self._show(self._stop)

    def show_line(self, text: str) -> None:
        """One line that stays."""
        self._show(lambda: self._print(text))

    def update(self, status: Status) -> None:
        """Show `status`, and once each warning of a replica."""
        self._show(lambda: self._update(status))

    def _show(self, show: Callable[[], None]) -> None:
        """Call `show`, unless an earlier call has failed: that ends the display, and not the job.

        The logs and the output folder have all that is not shown.
        """
        if self._failed:
            return
        try:
            show()
        except Exception as error:  # noqa: BLE001 - of rich, of an encoding, or of a stream that cannot be written
            self._failed = True
            discard(self._console.file)
            with suppress(Exception):
                self._stop()  # gives the standard streams back, which a live display redirects
            known = isinstance(error, OSError)
            _LOG.warning("the display has failed (%s): the job continues without it", error, exc_info=not known)

    def _start(self) -> None:
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=False)
            self._live.start()

    def _stop(self) -> None:
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()

    def _print(self, text: str) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S ") if self._timestamps else ""
        self._console.print(Text(stamp + printable(text, MAX_LINE)), soft_wrap=True)
        self._console.file.flush()

    def _update(self, status: Status) -> None:
        figures = self._figures.read(status)
        for member in status.members:
            for warning in member.progress.warnings:
                if (member.name, warning) not in self._warned:
                    self._warned.add((member.name, warning))
                    self._print(f"{member.name}: {warning}")
        if self._live is not None:
            self._live.update(self._picture(figures), refresh=True)
        elif MONOTONIC.now() >= self._next_line and figures.policy.count("step") > 0:
            self._next_line = MONOTONIC.now() + PLAIN_INTERVAL
            self._print(figures.line())

    def _picture(self, figures: Figures) -> RenderableType:
        head = Table.grid(padding=(0, 3))
        cells = figures.cells()
        for name in cells:
            head.add_column(name)
        head.add_row(*(Text(name, style="dim") for name in cells))
        head.add_row(*(Text(value, style=_STYLES.get(name, "")) for name, value in cells.items()))
        replicas = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
        for name in ("replica", "state", "doing", "for", "payloads"):
            replicas.add_column(name)
        for member in sorted(figures.status.members, key=lambda member: (member.role, member.name)):
            active = member.state is MemberState.ACTIVE
            replicas.add_row(
                _cell(member.name),
                _cell(member.state.value, _STATE_STYLES[member.state]),
                _cell(member.progress.doing if active else member.reason),
                f"{member.progress.seconds + member.silence:.1f} s",
                str(member.progress.count("payloads")),
            )
        parts: list[RenderableType] = [Text(self._title, style="bold"), head]
        if metrics := figures.shown_metrics():
            parts.append(_cell(f"metrics of train_step: {metrics}", limit=MAX_LINE))
        stall = "" if figures.status.stall is None else f"stall: {figures.status.stall.line}"
        return Group(*parts, Text(printable(stall, MAX_LINE), style="yellow"), replicas)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave the error to the display: by default this ends the process."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def _cell(text: str, style: str = "", limit: int = _MAX_CELL) -> Text:
    return Text(printable(text, limit), style=style, overflow="ellipsis", no_wrap=True)


def _quoted(name: str) -> str:
    shown = printable(name, _MAX_NAME)
    return shown if _WORD.fullmatch(name) and shown == name else f"'{shown}'"
