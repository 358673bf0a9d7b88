"""The order to record a running job: who may give it, when it ends, and what its giver learns of the recording."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from dray.jobs.config import JobConfig
from dray.jobs.controller.app import Controller
from dray.jobs.controller.recording import ORDER_SECONDS, JobRecording
from dray.jobs.controller.state import Membership
from dray.jobs.controller.work_queue import WorkQueue
from dray.jobs.folder import JobFolder, JobSpec
from dray.jobs.job_file import parse_job
from dray.jobs.messages.models import RecordingOrder, RecordingRefusedError, RecordingReport, Role

FIELDS = {"id": "first", "folder": "/recording", "max_bytes": 1000, "file_bytes": 100}
ORDER = RecordingOrder(**FIELDS)
END = ORDER.model_copy(update={"end": True})
OTHER = ORDER.model_copy(update={"id": "second", "folder": "/other"})


class ManualClock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def now(self) -> float:
        return self.seconds


def config_of(**policy: Any) -> JobConfig:
    table = {"trainer": "a.py:B", "batch_size": 2, **policy}
    return parse_job({"job": {"name": "small", "max_steps": 3}, "rollout": {"worker": "a.py:A"}, "policy": table})


class Job:
    """A job that runs, with one replica of each role."""

    def __init__(self, **policy: Any) -> None:
        self.clock = ManualClock()
        self.members = Membership(
            {Role.ROLLOUT: 1, Role.POLICY: 1},
            WorkQueue(4, 0, max_attempts=1),
            dead_after=1000.0,
            start_timeout=1000.0,
            restartable=True,
            clock=self.clock,
        )
        self.members.register("rollout-0", Role.ROLLOUT, "a", 1)
        self.members.register("policy-0", Role.POLICY, "b", 2)
        self.recording = JobRecording(config_of(**policy), self.members, self.clock)

    def report(self, **fields: Any) -> None:
        self.recording.note(RecordingReport(**{"id": "first", "first": 0, **fields}))


@pytest.fixture
def job() -> Job:
    return Job()


def test_an_order_is_handed_on_until_the_policy_reports_that_its_recording_has_ended(job: Job) -> None:
    assert job.recording.order() is None
    job.recording.follow(ORDER)
    assert job.recording.order() == ORDER
    assert not job.recording.state().began
    job.report(first=3, payloads=8)
    state = job.recording.state()
    assert (state.began, state.payloads, state.ended) == (True, 8, False)
    job.recording.follow(END)
    assert job.recording.order() == END.model_copy(update={"first": 3})
    assert not job.recording.state().ended
    job.report(first=3, payloads=16, ended=True)
    assert job.recording.order() is None
    state = job.recording.state()
    assert (state.payloads, state.ended, state.confirmed, state.problem) == (16, True, True, "")


def test_an_order_that_is_not_sent_again_ends_and_does_not_come_back(job: Job) -> None:
    job.recording.follow(ORDER)
    for _ in range(3):
        job.clock.seconds += ORDER_SECONDS - 1
        job.recording.follow(ORDER)
    job.clock.seconds += ORDER_SECONDS
    job.recording.follow(ORDER)
    assert job.recording.order() == END
    assert not job.recording.state().ended
    job.report(ended=True)
    state = job.recording.state()
    assert state.ended
    assert f"silent for {ORDER_SECONDS:g} s" in state.problem


def test_the_newest_recording_is_described_in_words(job: Job) -> None:
    described = job.recording.line
    assert described() == ""
    job.recording.follow(ORDER)
    assert described() == "into /recording: nothing yet"
    job.report(payloads=8)
    assert described() == "into /recording: 8 payloads"
    job.report(payloads=8, ended=True, problem="the disk is full")
    assert described() == "into /recording has ended: 8 payloads; the disk is full"
    job.recording.follow(OTHER)
    job.report(id="second", first=None, ended=True)
    assert described() == "into /other has ended: nothing"


def test_a_second_order_is_refused_until_the_recording_of_the_first_has_ended(job: Job) -> None:
    job.recording.follow(ORDER)
    for _ in range(2):
        with pytest.raises(RecordingRefusedError, match="this one is, into /recording"):
            job.recording.follow(OTHER)
        job.recording.follow(END)
    job.report(ended=True)
    job.recording.follow(OTHER)
    assert job.recording.order() == OTHER
    job.report(payloads=5)
    assert job.recording.state().payloads == 0
    with pytest.raises(RecordingRefusedError, match="this one is, into /other"):
        job.recording.follow(ORDER)


def test_the_problem_that_ended_a_recording_is_reported(job: Job) -> None:
    job.recording.follow(ORDER)
    job.report(ended=True, problem="/recording cannot be written: No space left on device")
    state = job.recording.state()
    assert (state.ended, state.problem) == (True, "/recording cannot be written: No space left on device")
    job.recording.follow(ORDER)
    assert job.recording.order() is None


def test_a_restarted_policy_takes_the_order_up_where_the_first_one_began(job: Job) -> None:
    job.recording.follow(ORDER)
    job.report(first=7, payloads=8)
    job.members.died("policy-0", Role.POLICY, "killed", pid=2, final=False)
    assert not job.recording.state().ended
    job.members.register("policy-0", Role.POLICY, "c", 3)
    order = job.recording.order()
    assert order is not None
    assert (order.first, order.end) == (7, False)


def test_a_recording_has_ended_without_a_report_once_no_policy_can_report_on_it(job: Job) -> None:
    job.recording.follow(ORDER)
    job.report(payloads=8)
    job.members.stop("interrupted", "enough")
    assert not job.recording.state().ended
    job.members.left("policy-0", "b", "done")
    state = job.recording.state()
    assert (state.ended, state.confirmed, state.payloads) == (True, False, 8)
    with pytest.raises(RecordingRefusedError, match="a job that runs; this one is draining"):
        job.recording.follow(OTHER)


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"record": "recording"}, "a job without policy.record, which is 'recording'"),
        ({"replicas": 2, "readers": 2}, "a job with policy.replicas = 1, not 2"),
    ],
)
def test_jobs_that_cannot_be_recorded_refuse_every_order(policy: dict[str, Any], words: str) -> None:
    with pytest.raises(RecordingRefusedError, match=words):
        Job(**policy).recording.follow(ORDER)


# --- over HTTP ---------------------------------------------------------------------------------------------------

Call = Callable[[str, Any], Awaitable[httpx.Response]]
PROGRESS = {"doing": "training step 3", "seconds": 1.0}
ROLLOUT, POLICY = {"name": "rollout-0", "incarnation": "a"}, {"name": "policy-0", "incarnation": "b"}


def ask(tmp_path: Path, story: Callable[[Call], Awaitable[None]]) -> None:
    """Run `story` with a function that posts to the controller of a job that runs."""
    folder = JobFolder(tmp_path)
    spec = JobSpec(config_of(), tmp_path / "job.toml", folder, b"s" * 32, "unix:///x", "small-1", False, 0)

    async def run() -> None:
        headers = {"Authorization": f"Bearer {spec.token}"}
        transport = httpx.ASGITransport(Controller(spec).application)
        async with httpx.AsyncClient(transport=transport, base_url="http://job", headers=headers) as client:

            async def call(path: str, body: Any) -> httpx.Response:
                return await client.post(path, json=body)

            await call("/register", {**ROLLOUT, "role": "rollout", "pid": 1})
            await call("/register", {**POLICY, "role": "policy", "pid": 2})
            await story(call)

    asyncio.run(run())


def test_only_the_first_policy_replica_gets_the_order_and_its_report_answers_the_caller_at_once(
    tmp_path: Path,
) -> None:
    async def story(call: Call) -> None:
        state = (await call("/recording", FIELDS)).json()
        assert (state["ended"], state["doing"], state["phase"]) == (False, "starting", "running")
        assert (await call("/heartbeat", {**ROLLOUT, "progress": PROGRESS})).json()["recording"] is None
        order = (await call("/heartbeat", {**POLICY, "progress": PROGRESS})).json()["recording"]
        assert order == ORDER.model_dump()
        asked = asyncio.create_task(call("/recording", {**FIELDS, "end": True}))
        report = {"id": "first", "first": 0, "payloads": 8, "ended": True}
        await asyncio.sleep(0)
        answer = await call("/heartbeat", {**POLICY, "progress": {**PROGRESS, "recording": report}})
        assert answer.json()["recording"] is None
        state = (await asked).json()
        assert (state["ended"], state["payloads"], state["doing"]) == (True, 8, "training step 3")

    ask(tmp_path, story)


def test_a_refusal_is_a_status_of_its_own_and_a_folder_must_be_absolute(tmp_path: Path) -> None:
    async def story(call: Call) -> None:
        assert (await call("/recording", FIELDS)).status_code == 200
        refused = await call("/recording", {**FIELDS, "id": "second"})
        assert (refused.status_code, refused.json()["error"]) == (409, "recording refused")
        assert "/recording" in refused.json()["detail"]
        for wrong in ({"folder": "recording"}, {"max_bytes": 0}, {"payloads": 0}, {"id": ""}, {"more": 1}):
            assert (await call("/recording", {**FIELDS, **wrong})).status_code == 422

    ask(tmp_path, story)
