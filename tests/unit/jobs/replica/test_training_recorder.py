"""What the policy replica records, by its configuration and by orders that come with the answers to heartbeats."""

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_heartbeat import BOUNDS, register, served
from waiting import wait_until

from dray.jobs.api import Trajectory
from dray.jobs.folder import JobFolder, JobSpec
from dray.jobs.job_file import parse_job
from dray.jobs.messages.controller_client import ControllerClient
from dray.jobs.messages.models import RecordingOrder, RecordingState, Role
from dray.jobs.process import StopFlag
from dray.jobs.replica.heartbeat import Activity, Heartbeat
from dray.jobs.replica.recording import TrainingRecorder
from dray.recording import Recorder, Recording

BATCH = [Trajectory({"x": np.full(3, number)}, number, number, {}) for number in range(4)]


class Policy:
    """A policy replica whose controller is there, with the recorder of its training thread."""

    def __init__(
        self, client: ControllerClient, activity: Activity, heartbeat: Heartbeat, record: Path | None
    ) -> None:
        self.client = client
        self.activity = activity
        self.heartbeat = heartbeat
        self.recorder = TrainingRecorder(record, activity, heartbeat)

    def order(self, folder: Path, *, end: bool = False, **fields: Any) -> Callable[[], RecordingState]:
        """Give an order, and return a function that sends it again. The replica has it then."""
        order = RecordingOrder(
            **{
                "id": secrets.token_hex(4),
                "folder": str(folder),
                "max_bytes": 1 << 30,
                "file_bytes": 1 << 20,
                **fields,
            }
        )
        self.client.post("/recording", order, RecordingState)
        wait_until(lambda: self.heartbeat.recording is not None, "the order")
        return lambda: self.client.post("/recording", order, RecordingState)

    def train(self, step: int) -> None:
        self.recorder.follow_order()
        self.recorder.add(BATCH, step)
        self.recorder.flush()


@contextmanager
def policy(tmp_path: Path, record: Path | None = None, interval: float = 0.05) -> Iterator[Policy]:
    tables = {"rollout": {"worker": "a.py:A"}, "policy": {"trainer": "a.py:B", "batch_size": 2}}
    config = parse_job({"job": {"name": "small", "max_steps": 3}, **tables})
    folder = JobFolder(tmp_path)
    spec = JobSpec(config, tmp_path / "job.toml", folder, b"s" * 32, "unix:///x", "small-1", False, 0)
    activity = Activity()
    with served(spec) as (_, client):
        register(client, Role.ROLLOUT)
        member = register(client, Role.POLICY)
        with Heartbeat(
            member, activity, StopFlag(), interval=interval, lost_after=30.0, bounds=BOUNDS
        ) as heartbeat:
            replica = Policy(client, activity, heartbeat, record)
            with replica.recorder:
                yield replica


def steps_in(folder: Path) -> list[int]:
    return [each.about["step"] for each in Recording(folder)]


def test_an_order_records_whole_steps_until_it_has_its_payloads(tmp_path: Path) -> None:
    folder = tmp_path / "recording"
    with policy(tmp_path) as replica:
        replica.train(1)
        again = replica.order(folder, payloads=6)
        for step in (2, 3, 4):
            replica.train(step)
        wait_until(lambda: again().ended, "the end of the recording")
        state = again()
        assert (state.payloads, state.confirmed, state.problem) == (8, True, "")
    assert steps_in(folder) == [2] * 4 + [3] * 4
    assert [each.about["work_item"] for each in Recording(folder)] == [0, 1, 2, 3] * 2


def test_the_next_order_begins_when_the_one_before_has_ended(tmp_path: Path) -> None:
    with policy(tmp_path) as replica:
        for number in (1, 2):
            again = replica.order(tmp_path / str(number), payloads=4)
            replica.train(number)
            wait_until(lambda again=again: again().ended, "the end of the recording")  # type: ignore[misc]
            wait_until(lambda: replica.heartbeat.recording is None, "the end of the order")
    assert [steps_in(tmp_path / str(number)) for number in (1, 2)] == [[1] * 4, [2] * 4]


def test_a_restarted_replica_counts_what_the_one_before_has_written(tmp_path: Path) -> None:
    folder = tmp_path / "recording"
    with Recorder(folder) as recorder:
        for _ in range(7):
            recorder.append({"x": np.zeros(3)})
    for end, payloads in ((True, 5), (False, 9)):
        with policy(tmp_path, interval=1000.0) as replica:
            order = RecordingOrder(
                id="a", folder=str(folder), max_bytes=1 << 30, file_bytes=1 << 20, first=2, end=end
            )
            replica.heartbeat.recording = order
            replica.train(1)
            report = replica.activity.report().recording
            assert report is not None
            assert (report.first, report.payloads, report.ended) == (2, payloads, end)


def test_a_recording_of_an_order_ends_with_the_replica_and_is_reported(tmp_path: Path) -> None:
    folder = tmp_path / "recording"
    with policy(tmp_path) as replica:
        again = replica.order(folder)
        replica.train(1)
        replica.recorder.close()
        replica.recorder.close()
        wait_until(lambda: again().ended, "the end of the recording")
        assert again().payloads == len(Recording(folder)) == 4


@pytest.mark.parametrize("ordered", [True, False])
def test_payloads_that_no_file_can_hold_end_the_recording_and_not_the_training(
    tmp_path: Path, ordered: bool
) -> None:
    nested: Any = np.zeros(3)
    for _ in range(64):
        nested = {"a": nested}
    folder = tmp_path / "recording"
    with policy(tmp_path, None if ordered else folder) as replica:
        again = replica.order(folder) if ordered else None
        replica.train(1)
        replica.recorder.add([Trajectory(nested, 0, 0, {})], 2)
        replica.recorder.flush()
        replica.train(3)
        assert steps_in(folder) == [1] * 4
        if again is None:
            (line,) = replica.activity.report().warnings
            assert line.startswith("nothing more is recorded, from step 2: ")
        else:
            wait_until(lambda: again().ended, "the end of the recording")
            assert again().payloads == 4
            assert "deep" in again().problem
            assert replica.activity.report().warnings == []
