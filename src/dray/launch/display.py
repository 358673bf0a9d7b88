"""What `dray run` shows while a job runs: a live table on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dray.clock import MONOTONIC
from dray.runtime.membership import FIRST_POLICY
from dray.runtime.messages import MemberStatus, Status

PLAIN_INTERVAL = 5.0
"""Seconds between lines where there is no terminal."""


@dataclass(frozen=True, slots=True)
class Figures:
    """The numbers of one moment, read off a job's status."""

    phase: str
    seconds: float
    step: int
    max_steps: int
    mean_return: float
    payloads: int
    nbytes: int
    rate: float
    lane: str
    staleness: float

    def line(self) -> str:
        """Everything in one line."""
        shown = "-" if math.isnan(self.mean_return) else f"{self.mean_return:.1f}"
        return (
            f"{self.seconds:6.1f} s  {self.phase}  step {self.step}/{self.max_steps}  mean return {shown}  "
            f"payloads {self.payloads}  {self.rate:.2f} MB/s  lane {self.lane or '-'}  "
            f"staleness {self.staleness:.2f}"
        )


class FigureReader:
    """Makes `Figures` of statuses that follow each other; the rate is smoothed over a few seconds."""

    def __init__(self, max_steps: int) -> None:
        self._max_steps = max_steps
        self._last: tuple[float, int] | None = None
        self._rate = 0.0

    def read(self, status: Status) -> Figures:
        """The figures of `status`, newer than those read before."""
        policies = [member.progress for member in status.members if member.name == FIRST_POLICY]
        counters = policies[0].counters if policies else {}
        nbytes = int(counters.get("bytes", 0))
        self._follow(status.seconds, nbytes)
        return Figures(
            phase=status.phase.value,
            seconds=status.seconds,
            step=int(counters.get("step", 0)),
            max_steps=self._max_steps,
            mean_return=counters.get("mean_return", math.nan),
            payloads=int(counters.get("payloads", 0)),
            nbytes=nbytes,
            rate=self._rate,
            lane=policies[0].labels.get("lane", "") if policies else "",
            staleness=counters.get("staleness", 0.0),
        )

    def _follow(self, seconds: float, nbytes: int) -> None:
        if self._last is not None:
            elapsed = seconds - self._last[0]
            if elapsed < 0.1:
                return
            weight = 1 - math.exp(-elapsed / 3.0)
            self._rate += weight * ((nbytes - self._last[1]) / elapsed / 1e6 - self._rate)
        self._last = (seconds, nbytes)


class Display:
    """Shows a job's progress until closed."""

    def __init__(self, title: str, max_steps: int, console: Console | None = None) -> None:
        self._title = title
        self._console = Console() if console is None else console
        self._reader = FigureReader(max_steps)
        self._live: Live | None = None
        self._next_line = 0.0

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=False)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.freeze()

    def freeze(self) -> None:
        """Leave the picture as it is; what is said from now on comes below it."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        """One line that stays."""
        self._console.print(Text(text), soft_wrap=True)
        sys.stdout.flush()

    def update(self, status: Status) -> None:
        """Show `status`."""
        figures = self._reader.read(status)
        if self._live is not None:
            stall = "" if status.stall is None else f"stall: {status.stall.line}"
            self._live.update(self._picture(figures, status.members, stall), refresh=True)
        elif MONOTONIC.now() >= self._next_line and figures.step > 0:
            self._next_line = MONOTONIC.now() + PLAIN_INTERVAL
            self.say(figures.line())

    def _picture(self, figures: Figures, members: list[MemberStatus], stall: str) -> RenderableType:
        head = Table.grid(padding=(0, 3))
        shown = "-" if math.isnan(figures.mean_return) else f"{figures.mean_return:.1f}"
        for name in ("phase", "time", "step", "mean return", "payloads", "throughput", "lane", "staleness"):
            head.add_column(name)
        head.add_row(
            *(
                Text(name, style="dim")
                for name in ("phase", "time", "step", "mean return", "payloads", "throughput", "lane", "staleness")
            )
        )
        head.add_row(
            figures.phase,
            f"{figures.seconds:.0f} s",
            f"{figures.step}/{figures.max_steps}",
            Text(shown, style="bold green"),
            str(figures.payloads),
            f"{figures.rate:.2f} MB/s",
            figures.lane or "-",
            f"{figures.staleness:.2f}",
        )
        replicas = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
        for name in ("replica", "state", "doing", "for", "payloads"):
            replicas.add_column(name)
        for member in sorted(members, key=lambda member: (member.role, member.name)):
            style = "" if member.state.value == "active" else "yellow" if member.state.value == "left" else "red"
            doing = member.progress.doing if member.state.value == "active" else member.reason
            replicas.add_row(
                member.name,
                Text(member.state.value, style=style),
                Text(doing, overflow="ellipsis", no_wrap=True),
                f"{member.progress.seconds + member.silence:.1f} s",
                f"{member.progress.counters.get('payloads', 0):.0f}",
            )
        return Group(Text(self._title, style="bold"), head, Text(stall, style="yellow"), replicas)
