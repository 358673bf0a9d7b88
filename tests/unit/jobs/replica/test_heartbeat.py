import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn

from dray.jobs.controller.app import Controller
from dray.jobs.controller.listener import bind
from dray.jobs.folder import JobFolder, JobSpec
from dray.jobs.job_file import parse_job
from dray.jobs.messages import models
from dray.jobs.messages.controller_client import ControllerClient
from dray.jobs.messages.models import Role
from dray.jobs.process import StopFlag
from dray.jobs.replica.heartbeat import Activity, EndBounds, Heartbeat, Member

INTERVAL = 0.4
BOUNDS = EndBounds.of(20.0)


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    rollout, policy = {"worker": "a.py:A", "replicas": 1}, {"trainer": "a.py:B", "batch_size": 2}
    config = parse_job({"job": {"name": "small", "max_steps": 3}, "rollout": rollout, "policy": policy})
    return JobSpec(config, tmp_path / "job.toml", JobFolder(tmp_path), b"s" * 32, "unix:///x", "small-1", False, 0)


@contextmanager
def served(spec: JobSpec) -> Iterator[tuple[Controller, ControllerClient]]:
    """A controller behind a real port."""
    controller = Controller(spec)
    server = uvicorn.Server(uvicorn.Config(controller.application, log_config=None, lifespan="off", ws="none"))
    with bind("127.0.0.1", 0) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            with ControllerClient(url, spec.token, 5.0) as client:
                yield controller, client
        finally:
            server.should_exit = True
            thread.join()


def register(client: ControllerClient, role: Role) -> Member:
    member = Member(client, f"{role.value}-0")
    member.post("/register", models.Register, models.Directive, role=role, pid=1)
    return member


def test_replica_that_watches_its_readers_is_notified_of_the_last_one_before_the_next_beat(spec: JobSpec) -> None:
    stop = StopFlag()
    with served(spec) as (_, client):
        rollout, policy = register(client, Role.ROLLOUT), register(client, Role.POLICY)
        with Heartbeat(
            rollout,
            Activity(),
            stop,
            interval=INTERVAL,
            lost_after=5.0,
            bounds=BOUNDS,
        ) as heartbeat:
            heartbeat.watch_readers()
            policy.post("/finish", models.Finish, models.Directive, kind="solved", reason="enough")
            assert heartbeat.job_over.wait(5.0)
            assert not heartbeat.unread.is_set()
            policy.post("/unregister", models.Unregister, models.Directive, reason="done")
            assert heartbeat.unread.wait(5.0)
    assert stop.reason == "the job is draining"


def test_held_answers_take_the_place_of_the_interval_and_make_no_busy_loop(spec: JobSpec) -> None:
    with served(spec) as (controller, client):
        rollout, _ = register(client, Role.ROLLOUT), register(client, Role.POLICY)
        beats: list[float] = []
        note = controller.membership.note_request
        controller.membership.note_request = lambda *given: (beats.append(time.monotonic()), note(*given))[1]  # type: ignore[method-assign]
        with Heartbeat(
            rollout,
            Activity(),
            StopFlag(),
            interval=INTERVAL,
            lost_after=5.0,
            bounds=BOUNDS,
        ) as heartbeat:
            heartbeat.watch_readers()
            time.sleep(4 * INTERVAL)
        assert 3 <= len(beats) <= 8


def test_work_items_that_do_not_fit_one_heartbeat_come_with_the_next_and_end_no_replica(spec: JobSpec) -> None:
    stop, several = StopFlag(), range(10**15, 10**15 + 3 * models.MAX_REPORTED + 1)
    with served(spec) as (controller, client):
        rollout = register(client, Role.ROLLOUT)
        reported: list[int] = []
        controller.membership.work_items.finished = reported.extend  # type: ignore[method-assign]
        with Heartbeat(
            rollout,
            Activity(),
            stop,
            interval=600,
            lost_after=600,
            bounds=BOUNDS,
        ) as heartbeat:
            heartbeat.finished(several)
    assert reported == list(several)
    assert not stop.is_set


def test_replica_that_is_to_end_does_not_serve_for_a_controller_that_is_gone(spec: JobSpec) -> None:
    stop = StopFlag()
    with served(spec) as (_, client):
        rollout = register(client, Role.ROLLOUT)
        url = client.url
    with ControllerClient(url, spec.token, 600, hurried=600) as client:
        rollout.client = client
        stop.on_set(client.hurry)
        with Heartbeat(
            rollout,
            Activity(),
            stop,
            interval=600,
            lost_after=600,
            bounds=BOUNDS,
        ) as heartbeat:
            stop.set("received SIGTERM", 143)
            assert heartbeat.unread.wait(20.0)
            assert heartbeat.over_at is not None
            assert not heartbeat.job_over.is_set()
    assert stop.exit_code == 143


def test_controller_that_is_gone_stops_the_replica_with_its_own_code(spec: JobSpec) -> None:
    stop = StopFlag()
    with served(spec) as (_, client):
        rollout = register(client, Role.ROLLOUT)
        url = client.url
    with ControllerClient(url, spec.token, 1.0) as client:
        rollout.client = client
        with Heartbeat(
            rollout,
            Activity(),
            stop,
            interval=0.1,
            lost_after=0.5,
            bounds=BOUNDS,
        ) as heartbeat:
            assert stop.event.wait(10.0)
            assert not heartbeat.job_over.is_set()
    assert stop.exit_code == 11
