import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from dray.jobs.controller.app import MAX_BODY, Controller, record_status
from dray.jobs.folder import JobFolder, JobSpec
from dray.jobs.job_file import parse_job
from dray.jobs.launch.shutdown import recorded_status
from dray.jobs.messages import models
from dray.jobs.messages.models import Role
from dray.jobs.replica.heartbeat import Activity

Call = Callable[..., Awaitable[httpx.Response]]
ROLLOUT = {"name": "rollout-0", "incarnation": "a"}
POLICY = {"name": "policy-0", "incarnation": "b"}
PROGRESS = {
    "doing": "generating",
    "seconds": 0.5,
    "counters": {"payloads": 3},
    "labels": {"lane": "shm"},
    "waits_for": "",
    "ages": {"payload": 1.5},
    "metrics": {"loss": 0.5},
    "warnings": ["policy-0 has a warning"],
}


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    config = parse_job(
        {
            "job": {"name": "small", "max_steps": 3, "seed": 5},
            "rollout": {"worker": "a.py:A", "replicas": 1, "work_items_in_flight": 4},
            "policy": {"trainer": "a.py:B", "batch_size": 2},
        }
    )
    return JobSpec(config, tmp_path / "job.toml", JobFolder(tmp_path), b"s" * 32, "unix:///x", "small-1", False, 0)


def ask(spec: JobSpec, story: Callable[[Controller, Call], Awaitable[None]], token: str | None = None) -> None:
    """Run `story` with a controller and a function that posts to it (or gets, without a body)."""

    async def run() -> None:
        controller = Controller(spec)
        shown = (spec.token if token is None else token).encode()
        headers = {b"Authorization": b"Bearer " + shown}
        transport = httpx.ASGITransport(controller.application)
        async with httpx.AsyncClient(transport=transport, base_url="http://job", headers=headers) as client:

            async def call(path: str, body: Any = None) -> httpx.Response:
                return await (client.get(path) if body is None else client.post(path, json=body))

            await story(controller, call)

    asyncio.run(run())


async def start(call: Call) -> None:
    assert (await call("/register", {**ROLLOUT, "role": "rollout", "pid": 1})).json()["phase"] == "starting"
    assert (await call("/register", {**POLICY, "role": "policy", "pid": 2})).json()["phase"] == "running"


def test_report_that_exceeds_every_bound_is_trimmed_and_that_is_shown(spec: JobSpec) -> None:
    async def story(controller: Controller, call: Call) -> None:
        await start(call)
        figures = {f"figure {number}": 1.0 for number in range(1000)}
        labels = {f"label {number}": "x" * 1000 for number in range(10)}
        large = {**PROGRESS, "doing": "y" * 1000, "counters": figures, "labels": labels, "metrics": figures}
        assert (await call("/heartbeat", {**POLICY, "progress": large})).status_code == 200
        trimmed = 1 + 2 * (1000 - 256) + 10
        (policy,) = [each for each in controller.status().members if each.name == "policy-0"]
        assert policy.progress.trimmed == trimmed
        assert (len(policy.progress.counters), len(policy.progress.metrics)) == (256, 256)
        sample = f'dray_trimmed_entries{{job="small",replica="policy-0"}} {trimmed}'
        assert sample in (await call("/metrics")).text
        assert (await call("/heartbeat", {**POLICY, "progress": {**PROGRESS, "counters": 3}})).status_code == 422

    ask(spec, story)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("stranger", "rollout"),
        ("rollout-1024", "rollout"),
        ("rollout-00", "rollout"),
        ("rollout-x", "rollout"),
        ("rollout-0", "policy"),
        ("policy-1", "policy"),
        ("policy-0", "rollout"),
    ],
)
def test_name_that_is_none_of_the_jobs_is_refused_and_takes_no_room(spec: JobSpec, name: str, role: str) -> None:
    async def story(controller: Controller, call: Call) -> None:
        await start(call)
        answers = [
            await call("/register", {"name": name, "incarnation": "z", "role": role, "pid": 9}),
            await call("/died", {"name": name, "role": role, "reason": "killed"}),
        ]
        for answer in answers:
            assert answer.status_code == 409
            assert name in answer.json()["detail"]
            assert "must be one of" in answer.json()["detail"]
        assert {each.name for each in controller.status().members} == {"rollout-0", "policy-0"}

    ask(spec, story)


def test_controller_answers_while_it_writes_the_metrics_of_many_replicas(spec: JobSpec) -> None:
    async def story(controller: Controller, call: Call) -> None:
        await start(call)
        metrics = {f"metric {number}": 1.0 for number in range(256)}
        for number in range(200):
            controller.membership.register(f"rollout-{number}", Role.ROLLOUT, "a", 1)
            controller.membership.note_request(
                f"rollout-{number}", "a", models.ProgressReport(doing="training", seconds=0.0, metrics=metrics)
            )
        written = asyncio.create_task(call("/metrics"))
        for _ in range(5):
            assert (await call("/heartbeat", {**POLICY, "progress": PROGRESS})).status_code == 200
        assert not written.done()
        assert (await written).text.count("dray_user_metric{") == 200 * 256 + 1

    ask(spec, story)


def test_replicas_register_work_and_leave(spec: JobSpec) -> None:
    async def story(controller: Controller, call: Call) -> None:
        await start(call)
        answer = (await call("/work-items", {**ROLLOUT, "want": 3})).json()
        assert [index for index, _ in answer["work_items"]] == [0, 1, 2]
        answer = (await call("/work-items", {**ROLLOUT, "want": 3, "published": [0, 1, 2]})).json()
        assert [index for index, _ in answer["work_items"]] == [3]
        await call("/heartbeat", {**POLICY, "progress": PROGRESS, "finished": [0, 1]})
        answer = (await call("/work-items", {**ROLLOUT, "want": 3, "published": [3]})).json()
        assert [index for index, _ in answer["work_items"]] == [4, 5]
        answer = (await call("/finish", {**POLICY, "kind": "solved", "reason": "score 5"})).json()
        assert answer == {"phase": "draining", "stop": True, "readers": 1, "given_up": 0}
        assert (await call("/work-items", {**ROLLOUT, "want": 3})).json()["stop"]
        await call("/unregister", {**ROLLOUT, "reason": "done"})
        assert not controller.final.is_set()
        assert (await call("/unregister", {**POLICY, "reason": "done"})).json()["phase"] == "done"
        assert controller.final.is_set()

    ask(spec, story)


def test_policy_that_begins_learns_which_work_items_are_under_way(spec: JobSpec) -> None:
    async def story(_: Controller, call: Call) -> None:
        await start(call)
        await call("/work-items", {**ROLLOUT, "want": 3})
        await call("/work-items", {**ROLLOUT, "want": 1, "published": [0, 2]})
        await call("/heartbeat", {**POLICY, "progress": PROGRESS, "finished": [2]})
        answer = (await call("/under-way", POLICY)).json()
        assert answer == {"unfinished": [0, 1], "published": [0], "next": 3, "finished_parts": []}
        assert (await call("/under-way", {**POLICY, "incarnation": "z"})).status_code == 409

    ask(spec, story)


def test_job_waits_for_a_policy_that_is_restarted_and_no_longer(spec: JobSpec) -> None:
    async def story(_: Controller, call: Call) -> None:
        await start(call)
        died = {"name": "policy-0", "role": "policy", "reason": "killed by signal 9"}
        assert (await call("/died", {**died, "final": False})).json()["phase"] == "running"
        assert (await call("/died", died)).json() == {
            "phase": "draining",
            "stop": True,
            "readers": 0,
            "given_up": 0,
        }

    ask(spec, story)


def test_reason_with_which_a_replica_leaves_is_in_the_status_and_the_outcome(
    spec: JobSpec,
) -> None:
    async def story(controller: Controller, call: Call) -> None:
        await start(call)
        reason = "Worker.rollout() of small.py returned None"
        await call("/unregister", {**ROLLOUT, "reason": reason, "exit_code": 17})
        for index in range(1, spec.config.rollout.replicas):
            name = f"rollout-{index}"
            await call("/died", {"name": name, "role": "rollout", "reason": "it never came", "exit_code": 1})
        died = {"name": "rollout-0", "role": "rollout", "reason": "exit code 17", "exit_code": 17}
        assert (await call("/died", died)).json()["stop"]
        status = controller.status()
        assert {each.name: each.reason for each in status.members}["rollout-0"] == reason
        assert status.outcome is not None
        assert status.outcome.reason == f"no rollout replica is left: rollout-0: {reason}"
        assert status.outcome.cause == 17

    ask(spec, story)


def test_request_for_work_items_waits_until_there_are_some(spec: JobSpec) -> None:
    async def story(controller: Controller, call: Call) -> None:
        await start(call)
        await call("/work-items", {**ROLLOUT, "want": 4})
        waiting = asyncio.ensure_future(
            call("/work-items", {**ROLLOUT, "want": 4, "wait": 2.0, "published": [0, 1, 2, 3]})
        )
        while not controller.membership.work_items.statistics()["published"]:
            await asyncio.sleep(0)
        await call("/heartbeat", {**POLICY, "progress": PROGRESS, "finished": [2]})
        assert [index for index, _ in (await waiting).json()["work_items"]] == [4]

    ask(spec, story)


def test_request_for_work_items_is_answered_at_once_when_the_job_stops(spec: JobSpec) -> None:
    async def story(_: Controller, call: Call) -> None:
        await start(call)
        await call("/work-items", {**ROLLOUT, "want": 4})
        waiting = asyncio.ensure_future(
            call("/work-items", {**ROLLOUT, "want": 4, "wait": 2.0, "published": [0, 1, 2, 3]})
        )
        await asyncio.sleep(0)
        await call("/stop", {"reason": "interrupted by SIGINT"})
        answer = (await waiting).json()
        assert (answer["phase"], answer["stop"], answer["work_items"]) == ("draining", True, [])

    ask(spec, story)


def test_status_and_metrics_show_what_replicas_do(spec: JobSpec) -> None:
    async def story(_: Controller, call: Call) -> None:
        await start(call)
        await call("/heartbeat", {**ROLLOUT, "progress": PROGRESS})
        status = (await call("/status")).json()
        assert status["members"][0]["progress"] == {**PROGRESS, "trimmed": 0, "recording": None}
        metrics = (await call("/metrics")).text
        assert 'dray_job_phase{job="small",phase="running"} 1.0' in metrics
        assert 'dray_published_payloads_total{job="small",replica="rollout-0"} 3.0' in metrics

    ask(spec, story)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_metric_that_is_no_number_any_more_is_reported_like_others(spec: JobSpec, value: float) -> None:
    """A loss that diverges is a matter for the user; it must not cost the replica its place."""

    async def story(controller: Controller, call: Call) -> None:
        await start(call)
        activity = Activity()
        activity.show_metrics({"loss": value})
        body = models.Heartbeat(**POLICY, progress=activity.report()).model_dump_json()
        assert (await call("/heartbeat", json.loads(body, parse_constant=pytest.fail))).status_code == 200
        answer = await call("/status")
        json.loads(answer.content, parse_constant=pytest.fail)
        (policy,) = (m for m in models.Status.model_validate_json(answer.content).members if m.role == "policy")
        assert str(policy.progress.metrics["loss"]) == str(value)
        assert 'dray_user_metric{job="small",name="loss",replica="policy-0"}' in (await call("/metrics")).text

    ask(spec, story)


def test_everything_but_the_health_probe_needs_the_token(spec: JobSpec) -> None:
    async def story(_: Controller, call: Call) -> None:
        assert (await call("/healthz")).status_code == 200
        for path in ("/status", "/metrics"):
            assert (await call(path)).status_code == 401
        for path in ("/register", "/heartbeat", "/work-items", "/finish", "/unregister", "/stop", "/died"):
            answer = await call(path, {**ROLLOUT, "role": "rollout", "pid": 1})
            assert (answer.status_code, answer.json()["error"]) == (401, "unauthorised")

    ask(spec, story, token="")
    ask(spec, story, token="wrong")
    ask(spec, story, token="ü")


def test_stranger_is_refused_and_a_dead_member_too(spec: JobSpec) -> None:
    async def story(_: Controller, call: Call) -> None:
        assert (await call("/work-items", {**ROLLOUT, "want": 1})).status_code == 409
        await start(call)
        await call("/died", {"name": "rollout-0", "role": "rollout", "reason": "killed by signal 9"})
        answer = await call("/heartbeat", {**ROLLOUT, "progress": PROGRESS})
        assert answer.status_code == 409
        assert "killed by signal 9" in answer.json()["detail"]

    ask(spec, story)


@pytest.mark.parametrize(
    "body",
    [
        {},
        [],
        {**ROLLOUT, "role": "critic", "pid": 1},
        {**ROLLOUT, "role": "rollout", "pid": -1},
        {**ROLLOUT, "role": "rollout", "pid": 1, "more": 1},
        {"name": "../x", "incarnation": "a", "role": "rollout", "pid": 1},
    ],
)
def test_malformed_body_is_refused_and_changes_nothing(spec: JobSpec, body: Any) -> None:
    async def story(controller: Controller, call: Call) -> None:
        answer = await call("/register", body)
        assert (answer.status_code, answer.json()["error"]) == (422, "malformed")
        assert controller.membership.members == {}

    ask(spec, story)


def test_body_that_is_too_large_is_refused(spec: JobSpec) -> None:
    async def story(_: Controller, call: Call) -> None:
        assert (await call("/register", {"name": "x" * MAX_BODY})).status_code == 413

    ask(spec, story)


def test_client_that_hangs_up_within_its_request_costs_one_line(
    spec: JobSpec, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def story(controller: Controller, call: Call) -> None:
        await start(call)
        scope = {
            "type": "http", "method": "POST", "path": "/heartbeat", "query_string": b"",
            "headers": [(b"authorization", f"Bearer {spec.token}".encode())],
        }  # fmt: skip
        events = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]

        async def receive() -> Any:
            return events.pop(0)

        async def send(_: Any) -> None:
            """No client receives it."""

        caplog.clear()
        await controller.application(scope, receive, send)
        assert (await call("/healthz")).status_code == 200

    ask(spec, story)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("dray")]
    assert lines == ["a client closed its connection before its request for /heartbeat was complete"]
    assert not [record for record in caplog.records if record.exc_info]


def test_draining_replica_is_notified_at_once_that_no_reader_is_left(spec: JobSpec) -> None:
    async def story(controller: Controller, call: Call) -> None:
        await start(call)
        draining = {**ROLLOUT, "progress": PROGRESS, "until_unread": 2.0}
        asked = asyncio.create_task(call("/heartbeat", draining))
        await call("/finish", {**POLICY, "kind": "solved", "reason": "score 5"})
        assert not (await asyncio.wait({asked}, timeout=0.05))[0]
        await call("/unregister", {**POLICY, "reason": "done"})
        assert (await asyncio.wait_for(asked, 1.0)).json() == {
            "phase": "draining",
            "stop": True,
            "readers": 0,
            "given_up": 0,
            "recording": None,
        }
        # And when a policy replica stays, the wait has its bound.
        answer = await call("/heartbeat", {**draining, "until_unread": 0.05})
        assert answer.json()["readers"] == 0

    ask(spec, story)


def test_work_items_that_a_replica_has_published_are_not_given_again_when_it_leaves(spec: JobSpec) -> None:
    async def story(controller: Controller, call: Call) -> None:
        await start(call)
        assert len((await call("/work-items", {**ROLLOUT, "want": 3})).json()["work_items"]) == 3
        await call("/register", {"name": "rollout-1", "incarnation": "c", "role": "rollout", "pid": 3})
        await call("/unregister", {**ROLLOUT, "reason": "done", "published": [0, 1]})
        answer = (await call("/work-items", {"name": "rollout-1", "incarnation": "c", "want": 2})).json()
        assert [index for index, _ in answer["work_items"]] == [2, 3]

    ask(spec, story)


def test_outcome_is_recorded_once_when_it_is_decided(spec: JobSpec) -> None:
    recorded: list[models.Status] = []
    controller = Controller(spec, recorded.append)

    async def story() -> None:
        controller.membership.register("policy-0", Role.POLICY, "b", 2)
        await controller.reap_once()
        assert recorded == []
        controller.membership.stop("solved", "score 5")
        await controller.reap_once()
        await controller.interrupt("SIGTERM")

    asyncio.run(story())
    (status,) = recorded
    assert status.outcome is not None
    assert (status.outcome.kind, status.phase) == ("solved", "draining")


def test_recorded_status_is_strict_json_and_read_as_it_was(spec: JobSpec) -> None:
    controller = Controller(spec)
    controller.membership.register("policy-0", Role.POLICY, "b", 2)
    report = models.ProgressReport(
        doing="training",
        seconds=0.0,
        counters={"mean_return": float("inf")},
        metrics={"loss": float("-inf")},
        warnings=["x"],
    )
    controller.membership.note_request("policy-0", "b", report)
    status = controller.status()
    spec.folder.run.mkdir()
    record_status(spec.folder, status)
    json.loads(spec.folder.outcome.read_text(), parse_constant=pytest.fail)
    assert recorded_status(spec.folder) == status


def test_stall_is_on_the_status_page_and_in_the_log(spec: JobSpec, caplog: pytest.LogCaptureFixture) -> None:
    async def story(controller: Controller, call: Call) -> None:
        await start(call)
        waiting = {**PROGRESS, "doing": "waiting for 2 of 2 payloads", "seconds": 31.0}
        await call("/heartbeat", {**POLICY, "progress": {**waiting, "waits_for": "the rollout replicas"}})
        await controller.reap_once()
        stall = (await call("/status")).json()["stall"]
        words = "policy-0 waits for the rollout replicas, for 2 of 2 payloads, since 31.0 s;"
        assert stall["line"].startswith(words)
        assert f"stall: {stall['line']}" in caplog.text
        assert 'dray_stalled_seconds{job="small"} 31.' in (await call("/metrics")).text
        await call("/heartbeat", {**POLICY, "progress": PROGRESS})
        await controller.reap_once()
        assert (await call("/status")).json()["stall"] is None
        assert 'dray_stalled_seconds{job="small"} 0.0' in (await call("/metrics")).text

    ask(spec, story)
