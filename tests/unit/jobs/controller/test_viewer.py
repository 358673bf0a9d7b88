import json
import math
from typing import Any

import pytest

from dray.jobs.config import MAX_ROLLOUT_REPLICAS
from dray.jobs.controller.state import FIRST_POLICY, Membership
from dray.jobs.controller.viewer import JobViewer
from dray.jobs.controller.work_queue import WorkQueue
from dray.jobs.job_file import parse_job
from dray.jobs.log_files import LogLine
from dray.jobs.messages import view
from dray.jobs.messages.models import MAX_METRICS, MAX_WARNING, MAX_WARNINGS, ProgressReport, Role, Stall

HOSTILE = "<script>alert(1)</script>\x1b[2J\u202e\n"
ESCAPED = "<script>alert(1)</script>\\x1b[2J\\u202e"


@pytest.fixture
def viewer() -> JobViewer:
    rollout, policy = {"worker": "a.py:A"}, {"trainer": "a.py:B", "batch_size": 2}
    return JobViewer(parse_job({"job": {"name": "small", "max_steps": 3}, "rollout": rollout, "policy": policy}))


def membership(rollouts: int) -> Membership:
    made = Membership({Role.ROLLOUT: 1, Role.POLICY: 1}, WorkQueue(8, 0), dead_after=10.0, start_timeout=10.0)
    made.register(FIRST_POLICY, Role.POLICY, "a", 1)
    for index in range(rollouts):
        made.register(f"rollout-{index}", Role.ROLLOUT, "a", 2 + index)
    return made


def shown(viewer: JobViewer, job: Membership, **fields: Any) -> view.JobView:
    arguments = {"stall": None, "seconds": 1.0, "log_lines": [], **fields}
    return viewer.view(job, **arguments)


def test_text_of_users_and_peers_is_printable(viewer: JobViewer) -> None:
    job = membership(1)
    progress = ProgressReport(
        doing=HOSTILE,
        seconds=1.0,
        waits_for=HOSTILE,
        labels={"transfer": HOSTILE, "lane": HOSTILE},
        metrics={HOSTILE: 1.0},
        warnings=[HOSTILE],
    )
    job.note_request(FIRST_POLICY, "a", progress)
    job.stop("failed", HOSTILE)
    job.left("rollout-0", "a", HOSTILE)
    viewer.note_stall(HOSTILE, 3.0)
    stall = Stall(line=HOSTILE, seconds=1.0, reports=1)
    found = shown(viewer, job, stall=stall, log_lines=[LogLine("", HOSTILE, HOSTILE)], recording=HOSTILE)
    policy, rollout = found.members
    assert (policy.doing, policy.waits_for, rollout.doing) == (ESCAPED, ESCAPED, ESCAPED)
    assert (found.transfer, found.lane, list(found.metrics)) == (ESCAPED, ESCAPED, [ESCAPED])
    assert (found.warnings, found.stalls) == ([f"{FIRST_POLICY}: {ESCAPED}"], [f"after 3 s: {ESCAPED}"])
    assert found.stall is not None
    assert found.outcome is not None
    assert (found.stall.line, found.outcome.reason) == (ESCAPED, ESCAPED)
    assert found.log_lines == [(ESCAPED, ESCAPED)]
    assert found.recording == ESCAPED


def test_view_is_bounded_whatever_replicas_report_and_however_long_the_job_runs(viewer: JobViewer) -> None:
    job = membership(MAX_ROLLOUT_REPLICAS)
    for member in list(job.members.values()):
        progress = ProgressReport(
            doing="x" * 10_000,
            seconds=1.0,
            metrics={f"metric {number}": math.nan for number in range(2 * MAX_METRICS)},
            warnings=["y" * 10_000] * (2 * MAX_WARNINGS),
        )
        job.note_request(member.name, "a", progress)
    for second in range(3 * view.MAX_POINTS):
        viewer.sample(job, float(second))
        viewer.note_stall("z" * 10_000, float(second))
    lines = [LogLine("", "rollout-0", "l" * 10_000)] * view.MAX_LOG_LINES
    found = shown(viewer, job, log_lines=lines)
    assert len(found.members) == view.MAX_MEMBERS_SHOWN
    assert found.hidden_members == MAX_ROLLOUT_REPLICAS + 1 - view.MAX_MEMBERS_SHOWN
    assert {len(column) for column in found.history.values()} <= set(range(1, view.MAX_POINTS + 1))
    assert (len(found.metrics), len(found.stalls)) == (view.MAX_METRICS_SHOWN, view.MAX_STALLS)
    assert len(found.warnings) == view.MAX_WARNINGS_SHOWN
    assert max(map(len, found.warnings)) <= MAX_WARNING + len("rollout-1023: ")
    text = found.model_dump_json()
    assert len(text) < 200_000
    json.loads(text, parse_constant=pytest.fail)
    assert view.JobView.model_validate_json(text).number == found.number


def test_replicas_that_ended_or_do_the_same_for_longest_are_shown_in_order(viewer: JobViewer) -> None:
    job = membership(200)
    job.note_request("rollout-150", "a", ProgressReport(doing="stuck", seconds=500.0))
    job.died("rollout-199", Role.ROLLOUT, "killed")
    names = [member.name for member in shown(viewer, job).members]
    assert {"rollout-150", "rollout-199"} < set(names)
    rollouts = [int(name.partition("-")[2]) for name in names if name.startswith("rollout")]
    assert rollouts == sorted(rollouts)


def test_number_rises_with_each_sample_that_is_due_and_each_phase(viewer: JobViewer) -> None:
    job, numbers = membership(1), []
    viewer.note_phase(job)
    for seconds in (0.0, 0.1, 0.5, 1.0):
        viewer.sample(job, seconds)
        numbers.append(viewer.number)
    assert numbers[0] == numbers[1] == numbers[2] == numbers[3] - 1
    viewer.note_phase(job)
    assert viewer.number == numbers[3]
    job.stop("interrupted", "Ctrl-C")
    viewer.note_phase(job)
    assert viewer.number == numbers[3] + 1
