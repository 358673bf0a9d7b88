import io
from typing import Any

import pytest
from rich.console import Console

from dray.cli.frame import MIN_ROWS, bars, frame
from dray.jobs.messages.view import JobView


def view_of(members: list[dict[str, Any]], **fields: Any) -> JobView:
    figures = ("mean_return", "staleness", "ring_fill", "policy_waits")
    given = {
        "number": 7,
        "job": "small",
        "phase": "running",
        "seconds": 31.25,
        "outcome": None,
        "step": 12,
        "max_steps": 100,
        "transfer": "reference",
        "lane": "shm",
        "figures": {"mean_return": 21.5, "ring_fill": 0.25},
        "history": {"seconds": [0.0, 1.0, 2.0], **{name: [0.0, None, 1.0] for name in figures}},
        "metrics": {},
        "members": members,
        "hidden_members": 0,
        "stall": None,
        "recording": "",
        "stalls": [],
        "warnings": [],
        "log_lines": [],
    }
    return JobView.model_validate({**given, **fields})


def member(name: str, **fields: Any) -> dict[str, Any]:
    fixed = {"name": name, "role": name.partition("-")[0], "state": "active", "doing": "generating"}
    return {**fixed, "seconds": 2.0, "silence": 0.1, **fields}


def drawn(view: JobView, width: int = 80, height: int = 24, encoding: str = "utf-8") -> list[str]:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, width=width, height=height, force_terminal=True, color_system=None)
    console.print(frame(view, console, keys=True))
    file.seek(0)
    return [line.rstrip() for line in file.read().splitlines()]


def test_frame_has_the_job_its_figures_and_what_each_replica_does() -> None:
    waits = member("rollout-0", doing="waiting for work items", waits_for="the policy", payloads=8)
    ring = {"ring_slots": 64, "ring_used_slots": 16, "ages": {"payload": 3.0}}
    dead = member("rollout-1", state="dead", doing="killed", silence=60.0)
    silent = member("rollout-2", seconds=40.0, silence=30.0)
    members = [member("policy-0", doing="training step 13"), {**waits, **ring}, dead, silent]
    lines = drawn(view_of(members), width=120)
    assert lines[0] == "small: running for 31.2 s, step 12 of 100; reference, shm"
    assert lines[1].split() == ["mean", "return", "21.5", "▁", "█"]
    assert next(line for line in lines if line.startswith("ring fill")).split()[2:4] == ["25", "%"]
    assert next(line for line in lines if line.startswith("throughput")).split() == ["throughput", "-"]
    row = next(line for line in lines if line.startswith("rollout-0"))
    assert row.split("  ")[1] == "waiting for work items (the policy)"
    assert row.split()[-7:] == ["2.0", "s", "8", "16/64", "payload", "3.0", "s"]
    assert any("dead: killed" in line for line in lines)
    assert any("silent for 30.0 s: generating" in line for line in lines)
    assert lines[-1] == "q or Ctrl-C ends dray top; the job continues"


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (200, 60)])
def test_frame_fits_into_the_terminal_and_counts_the_replicas_that_do_not(size: tuple[int, int]) -> None:
    width, height = size
    replicas = [member(f"rollout-{index}", doing="x" * 300) for index in range(64)]
    stall = {"line": "policy-0 waits " * 60, "seconds": 31.0, "reports": 1}
    lines = drawn(view_of(replicas, hidden_members=100, stall=stall, warnings=["w" * 500] * 9), width, height)
    assert len(lines) < height
    assert max(map(len, lines)) <= width
    shown = sum(line.startswith("rollout-") for line in lines)
    assert shown >= MIN_ROWS - 1
    assert f"and {164 - shown} more replicas" in lines


def test_terminal_without_unicode_gets_bars_of_plain_characters() -> None:
    lines = drawn(view_of([member("policy-0")]), encoding="ascii")
    assert lines[1].split() == ["mean", "return", "21.5", "_", "#"]


def test_text_of_the_job_neither_moves_the_cursor_nor_is_markup() -> None:
    hostile = "\x1b[2J[red]x[/red]\r\nnew"
    outcome = {"kind": "failed", "reason": hostile}
    view = view_of([member("policy-0", doing=hostile)], warnings=[hostile], outcome=outcome, recording=hostile)
    lines = drawn(view, width=160)
    escaped = "\\x1b[2J[red]x[/red] new"
    assert f"recording {escaped}" in lines
    assert f"warning: {escaped}" in lines
    assert f"outcome: failed, {escaped}" in lines
    assert any(line.startswith(f"policy-0  {escaped}") for line in lines)


def test_bars_are_scaled_to_their_values_and_shares_to_one() -> None:
    assert bars([0.0, 7.0], 10, share=False) == "▁█"
    assert bars([0.0, 0.5, 1.0], 10, share=True) == "▁▅█"
    assert bars([0.5, 0.5], 10, share=False) == "▁▁"
    assert bars([None, 1.0, None, 2.0], 10, share=False) == " ▁ █"
    assert bars([None, None], 10, share=True) == ""
    assert bars([0.0] * 50 + [1.0] * 50, 10, share=True) == "▁" * 5 + "█" * 5
