"""A job records what it trains on; a job whose payloads come from the recording has the same batches."""

import json
from pathlib import Path

import numpy as np
from job_runner import CLASSES, LIMITED, job_settings, running

from dray.recording import Recording

BATCHES = """
import hashlib
class Batches(Trainer):
    def train_step(self, trajectories):
        hashes = [hashlib.sha256(each.arrays["observations"].tobytes()).hexdigest() for each in trajectories]
        with (self.output / "batches.jsonl").open("a") as file:
            print(json.dumps(hashes), file=file)
        self.steps += 1
        return {"score": float(self.steps)}
"""


def batches(output: Path) -> list[list[str]]:
    return [json.loads(line) for line in (output / "batches.jsonl").read_text().splitlines()]


def test_a_recording_of_a_job_gives_another_one_the_same_batches(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    classes = CLASSES + BATCHES
    settings = job_settings("policy.trainer=small.py:Batches", "job.max_steps=6")
    with running(tmp_path / "first", *settings, *job_settings("policy.record=recording"), classes=classes) as job:
        assert job.end() == 1, job.story()
        recorded = batches(job.output)
        recording = Recording(job.output / "recording")
    assert len(recording) == 6 * 8
    assert [each.about["step"] for each in recording] == [step for step in range(1, 7) for _ in range(8)]
    for each in recording:
        assert each.about["work_item"] == int(each.values["work_item"])
        assert each.about["weight_version"] == int(each.values["version"])
        assert np.array_equal(each.values["rewards"], np.ones(8))
    replayed = job_settings("rollout.replicas=1", f"work.replay={recording.folder}")
    with running(tmp_path / "second", *settings, *replayed, classes=classes) as job:
        assert job.end() == 1, job.story()
        assert batches(job.output) == recorded


def test_a_job_whose_recording_cannot_be_written_continues_without_it(tmp_path: Path) -> None:
    settings = job_settings("policy.record=recording", "policy.trainer=small.py:Limited", "job.max_steps=3")
    wide_worker = """
class Wide(Worker):
    def rollout(self, work_item):
        return {"x": np.zeros(16384), **super().rollout(work_item)}
"""
    wide = job_settings("rollout.worker=small.py:Wide", "rollout.slot_bytes=200000")
    with running(tmp_path, *settings, *wide, classes=LIMITED + wide_worker) as job:
        assert job.end() == 1, job.story()
        assert "nothing more is recorded, from step 1" in job.text
        assert job.summary()["steps"] == 3
