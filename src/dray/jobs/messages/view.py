"""What the controller shows of a job: the answer to `GET /view`, for the page and for `dray top`.

It is bounded, whatever the size of the job: so many points of each figure, replicas, lines and metrics.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dray.jobs.messages.models import MAX_WORK_WAIT, MemberState, Message, OutcomeReport, Phase, Role, Stall

MAX_POINTS = 360  # of the history of a figure
MAX_MEMBERS_SHOWN = 64
MAX_LOG_LINES = 40
MAX_LOG_TEXT = 300  # characters of a line
MAX_STALLS = 10
MAX_WARNINGS_SHOWN = 20
MAX_METRICS_SHOWN = 24
MAX_VIEW_WAIT = MAX_WORK_WAIT  # seconds that a request may be held open while there is nothing new


class MemberView(Message):
    """One replica: what it does, or why it ended, for how many seconds, and what it waits for.

    `silence` are seconds since its last request, `payloads` those that it has handed on or trained on.
    `ring_slots` and `ring_used_slots` are of its ring, if it has one, and `ages` those of `ProgressReport`, now.
    """

    name: str
    role: Role
    state: MemberState
    doing: str
    seconds: float
    silence: float
    waits_for: str = ""
    payloads: int = 0
    ring_slots: int = 0
    ring_used_slots: int = 0
    ages: dict[str, float] = {}


class JobView(Message):
    """``GET /view``: the job, the history of its figures, its replicas, and what it has reported last.

    `number` rises with every sample of the figures and every change of the phase. `history` has a list for each
    figure and one of `seconds` since the controller began, all of one length; null is a figure that was not known.
    `figures` has the newest value of each. `hidden_members` replicas are not among `members`. `recording` is about
    the newest order to record the job, if there was one.
    """

    number: int
    job: str
    phase: Phase
    seconds: float
    outcome: OutcomeReport | None
    step: int
    max_steps: int
    transfer: str
    lane: str
    figures: dict[str, float | None]
    history: dict[str, Annotated[list[float | None], Field(max_length=MAX_POINTS)]]
    metrics: dict[str, float]
    members: list[MemberView]
    hidden_members: int
    stall: Stall | None
    recording: str
    stalls: list[str]
    warnings: list[str]
    log_lines: list[tuple[str, str]]


class NewPageToken(Message):
    """``POST /page-tokens``: asks for a new one-time token that opens the page."""


class PageToken(Message):
    """The answer to ``POST /page-tokens``: ``/?token=…`` opens the page, once, within `seconds`."""

    token: str
    seconds: float
