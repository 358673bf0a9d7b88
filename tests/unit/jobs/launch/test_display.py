import io
import math
import os
import sys
from collections.abc import Mapping
from typing import Any

import pytest
from rich.console import Console

from dray.jobs.launch.display import Display, Figures
from dray.jobs.messages.models import MemberState, MemberStatus, Phase, ProgressReport, Role, Status

HOSTILE = {
    "step": 999.0,
    "payloads": math.nan,
    "bytes": math.inf,
    "mean_return": -3.0,
    "staleness": 77.0,
    "lane": 5.0,
    "[red]x[/blue]": 1.0,
    "a  step 5/6\n\x1b[2J": 2.0,
}


def status(seconds: float, step: int, nbytes: int, **changes: Any) -> Status:
    """One of a running job; `changes` are fields of the policy's progress."""
    policy = ProgressReport(
        doing="waiting for 3 of 16 payloads",
        seconds=0.2,
        counters={"step": step, "payloads": 16 * step, "bytes": nbytes, "mean_return": 21.5, "staleness": 1.25},
        labels={"transfer": "reference", "lane": "shm"},
    ).model_copy(update=changes)
    dead = ProgressReport(doing="generating", seconds=1.0, counters={"payloads": 7})

    def member(name: str, role: Role, state: MemberState, progress: ProgressReport) -> MemberStatus:
        return MemberStatus(
            name=name, role=role, state=state, reason="silent", pid=1, silence=0.1, progress=progress
        )

    return Status(
        job="small",
        phase=Phase.RUNNING,
        seconds=seconds,
        outcome=None,
        work_items={},
        members=[
            member("policy-0", Role.POLICY, MemberState.ACTIVE, policy),
            member("rollout-0", Role.ROLLOUT, MemberState.DEAD, dead),
        ],
    )


def test_rate_follows_the_bytes() -> None:
    reader = Figures(100)
    assert reader.read(status(0, 0, 0)).rate == 0
    for second in range(1, 30):
        figures = reader.read(status(second, second, second * 2_000_000))
    assert 1.99 < figures.rate <= 2.0
    assert figures.line() == (
        f"  29.0 s  running  step 29/100  mean return 21.5  payloads 464  throughput {figures.rate:.2f} MB/s  "
        "transfer reference  lane shm  staleness 1.25"
    )


def test_rate_leaves_out_the_bytes_of_the_training_that_a_policy_resumes_from() -> None:
    reader = Figures(100)
    for second, nbytes in enumerate((None, 9_000_000_000, 9_000_000_000, None, 5_000_000_000)):
        counters = {} if nbytes is None else {"bytes": float(nbytes)}
        assert reader.read(status(second, 0, 0, counters=counters)).rate == 0


def test_plain_output_is_a_line_now_and_then() -> None:
    console = Console(file=io.StringIO(), width=40)
    with Display("small", 100, console) as display:
        display.update(status(0, 0, 0))
        for second in range(1, 5):
            display.update(status(second, second, 0))
        display.show_line("a long line that is not wrapped, however narrow the console may be")
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 2
    assert "step 1/100" in lines[0]


def test_line_about_a_mistake_is_shown_to_its_end() -> None:
    console = Console(file=io.StringIO())
    line = f"rollout-0 ended early: {'a long reason ' * 100}; see out/logs/rollout-0.log"
    with Display("small", 100, console) as display:
        display.show_line(line)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == f"{line}\n"


def shown(*statuses: Status, terminal: bool) -> str:
    """What a display writes for these."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=150, height=40)
    with Display("small", 100, console) as display:
        for each in statuses:
            display.update(each)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("metrics", [{}, HOSTILE], ids=["none", "hostile"])
def test_metrics_of_the_trainer_change_no_figure(metrics: Mapping[str, float]) -> None:
    line = Figures(100).read(status(3, 12, 1000, metrics=metrics)).line()
    own, _, users = line.partition("  metrics ")
    assert own == (
        "   3.0 s  running  step 12/100  mean return 21.5  payloads 192  throughput 0.00 MB/s  "
        "transfer reference  lane shm  staleness 1.25"
    )
    assert users == (
        "'[red]x[/blue]'=1 'a  step 5/6 \\x1b[2J'=2 bytes=inf lane=5 mean_return=-3 payloads=nan "
        "staleness=77 step=999"
        if metrics
        else ""
    )


def test_metrics_beyond_a_number_are_counted() -> None:
    line = Figures(100).read(status(3, 12, 0, metrics={f"m{number}": 1.0 for number in range(12)})).line()
    assert line.endswith(" and 4 more")


@pytest.mark.parametrize("terminal", [True, False])
def test_text_of_users_and_peers_is_shown_as_it_is_and_ends_nothing(terminal: bool) -> None:
    evil = "[/red]\x1b[35m\nforged"
    escaped = "[/red]\\x1b[35m forged"
    text = shown(
        status(3, 12, 1000, metrics=HOSTILE, labels={"lane": evil, "transfer": evil}, doing=evil, warnings=[evil]),
        terminal=terminal,
    )
    assert f"policy-0: {escaped}" in text
    assert text.count(escaped) >= (4 if terminal else 3)
    assert "\x1b[35m" not in text
    assert "'[red]x[/blue]'=1" in text
    assert "12/100" in text


def test_text_that_the_encoding_of_the_output_does_not_have_is_escaped() -> None:
    output = io.BytesIO()
    with (
        io.TextIOWrapper(output, encoding="ascii") as file,
        Display("small", 100, Console(file=file, width=150)) as display,
    ):
        display.update(status(3, 12, 0, metrics={"größe": 1.0}))
        display.show_line("大")
        lines = output.getvalue().splitlines()
    assert lines[0].endswith(b"metrics gr\\xf6\\xdfe=1")
    assert lines[1:] == [b"\\u5927"]


def test_figures_that_are_not_finite_end_nothing() -> None:
    counters = dict.fromkeys(("step", "payloads", "bytes", "mean_return", "staleness"), math.nan)
    for terminal in (True, False):
        shown(
            status(3, 12, 0, counters=counters), status(4, 13, 0, counters={"step": math.inf}), terminal=terminal
        )
    assert "mean return nan" in Figures(100).read(status(3, 12, 0, counters=counters)).line()


def test_lane_and_mean_return_are_shown_where_there_are_any() -> None:
    figures = Figures(100).read(status(3, 12, 0, counters={"step": 12}, labels={"transfer": "inline"}))
    assert "transfer inline" in figures.line()
    assert "lane" not in figures.line()
    assert "mean return" not in figures.line()


def test_warning_of_a_replica_is_shown_once() -> None:
    text = shown(
        status(1, 0, 0, warnings=["loss is nan"]),
        status(2, 0, 0, warnings=["loss is nan", "worst is inf"]),
        terminal=False,
    )
    assert text.splitlines() == ["policy-0: loss is nan", "policy-0: worst is inf"]


def test_terminal_shows_figures_and_every_replica() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, height=30)
    with Display("small", 100, console) as display:
        display.update(status(3, 12, 1000))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for words in (
        "12/100",
        "21.5",
        "192",
        "shm",
        "1.25",
        "policy-0",
        "waiting for 3 of 16",
        "rollout-0",
        "dead",
        "silent",
    ):
        assert words in text


def picture_of(display: Display) -> None:
    """All that a display is asked to do."""
    display.update(status(3, 12, 1000, warnings=["loss is nan"]))
    display.show_line("a line")
    display.close()
    display.show_line("another line")


def test_terminal_that_is_gone_ends_the_display_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    terminal, end = os.openpty()
    with os.fdopen(end, "w") as file, Display("small", 100, Console(file=file, force_terminal=True)) as display:
        display.update(status(2, 11, 0))
        os.close(terminal)
        picture_of(display)
    (record,) = caplog.records
    assert (
        record.getMessage()
        == "the display has failed ([Errno 5] Input/output error): the job continues without it"
    )


@pytest.mark.parametrize("sink", ["a full device", "a pipe without a reader"])
def test_output_that_cannot_be_written_ends_the_display_and_nothing_else(
    sink: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if sink == "a full device":
        descriptor = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, descriptor = os.pipe()
        os.close(reader)
    with os.fdopen(descriptor, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with Display("small", 100) as display:
            picture_of(display)
        monkeypatch.undo()
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_display_that_raises_anything_is_logged_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(io.StringIO):
        def write(self, _text: str) -> int:
            raise LookupError("no such style")

    with Display("small", 100, Console(file=Broken(), force_terminal=True)) as display:
        picture_of(display)
    (record,) = caplog.records
    assert record.exc_info is not None
    assert "no such style" in record.getMessage()
