"""What a worker may return and be, as whole jobs: several payloads of a work item, asynchronous rollouts, rows."""

import json
import re
from pathlib import Path

import pytest
from job_runner import job_settings, running

SEVERAL = """
import json, os
import numpy as np
import small
from dray import Ragged
from dray.jobs import Rollout

class Worker(small.Worker):
    def payloads(self, work_item):
        count = self.args.get("payloads") or 1 + work_item.index % 3
        return [
            Rollout(
                {"rewards": np.ones(8, np.float32), "version": np.array(self.version),
                 "uid": np.frombuffer(os.urandom(8), np.uint64), "text": f"item {work_item.index}",
                 "turns": Ragged.from_rows([np.arange(part), np.arange(3)]), "info": {"seed": work_item.seed}},
                {"part": part, "parts": count, "work_item": work_item.index},
            )
            for part in range(count)
        ]
    def rollout(self, work_item):
        return self.payloads(work_item)

class AsyncWorker(Worker):
    async def load_weights(self, weights, version):
        super().load_weights(weights, version)
    async def rollout(self, work_item):
        return self.payloads(work_item)

class Trainer(small.Trainer):
    def setup(self, context):
        super().setup(context)
        self.parts = []
    def train_step(self, trajectories):
        for each in trajectories:
            assert each.metadata["work_item"] == each.work_item
            assert int(each.arrays["version"]) == each.weight_version
            assert each.arrays["text"] == f"item {each.work_item}"
            assert [len(row) for row in each.arrays["turns"]] == [each.metadata["part"], 3]
            assert type(each.arrays["info"]["seed"]) is int
            self.parts.append([each.work_item, each.metadata["part"], each.metadata["parts"]])
        self.steps += 1
        return {"score": float(self.steps)}
    def save(self, folder):
        super().save(folder)
        (folder / "parts.json").write_text(json.dumps(self.parts))
"""


def parts_of(output: Path, rank: int = 0) -> list[tuple[int, int, int]]:
    folder = output / "checkpoint" / (f"trainer-{rank}" if rank else "trainer")
    return [tuple(each) for each in json.loads((folder / "parts.json").read_text())]


SETTINGS = ("rollout.worker=several.py:Worker", "policy.trainer=several.py:Trainer", "stop.at_least=30")


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("rollout.worker=several.py:AsyncWorker", "rollout.concurrency=4"),
        ("job.transfer=inline",),
        ("policy.ack=checkpoint", "policy.checkpoint_every=2"),
        (
            "policy.max_staleness=1",
            "rollout.args.payloads=3",
            "rollout.payloads_per_work_item=3",
            "rollout.slots=32",
        ),
    ],
    ids=["sync", "async", "redis", "checkpoint", "admission"],
)
def test_every_payload_of_a_work_item_is_trained_on_once(tmp_path: Path, settings: tuple[str, ...]) -> None:
    (tmp_path / "several.py").write_text(SEVERAL)
    with running(tmp_path, *job_settings(*SETTINGS, *settings)) as job:
        assert job.end() == 0, job.story()
        parts = parts_of(job.output)
        assert len(parts) == len(set(parts)) == 30 * 8
        # All payloads of early work items were trained on: nothing is kept back permanently.
        last = max(index for index, _, _ in parts)
        counts = {index: sum(each[0] == index for each in parts) for index in range(last // 2)}
        assert counts == {index: count for index, _, count in parts if index < last // 2}
        assert job.summary()["delivery"]["too_old"] == 0


def test_ranks_of_a_policy_group_get_work_items_and_metadata(tmp_path: Path) -> None:
    (tmp_path / "several.py").write_text(SEVERAL)
    settings = job_settings(*SETTINGS, "policy.replicas=2", "policy.readers=2", "stop.at_least=5")
    with running(tmp_path, *settings) as job:
        assert job.end() == 0, job.story()
        assert parts_of(job.output) == parts_of(job.output, 1) != []


def test_policy_that_is_killed_continues_with_the_rest_of_each_work_item(
    tmp_path: Path,
) -> None:
    (tmp_path / "several.py").write_text(SEVERAL)
    settings = job_settings(*SETTINGS, "policy.max_staleness=3", "rollout.args.restarts=true", "stop.at_least=60")
    with running(tmp_path, *settings, "--set", "policy.checkpoint_every=1") as job:
        job.wait_for("  step ")
        job.only("dray.jobs.replica.policy").kill()
        assert job.end() == 0, job.story()
        assert "have not come" not in job.log("policy-0")


ROLLOUTS = """
import asyncio
import small

class Worker(small.Worker):
    async def rollout(self, work_item):
        if work_item.index == 5:
            await asyncio.sleep(600)
        if work_item.index == 7:
            raise ValueError("the environment broke")
        await asyncio.sleep(0)
        return super().rollout(work_item)

class Hanging(small.Worker):
    async def rollout(self, work_item):
        while work_item.index == 5:
            try:
                await asyncio.sleep(600)
            except asyncio.CancelledError:
                pass
        return super().rollout(work_item)
"""


def test_asynchronous_rollout_that_takes_too_long_is_cancelled_and_fails_alone(tmp_path: Path) -> None:
    (tmp_path / "rollouts.py").write_text(ROLLOUTS)
    settings = ("rollout.worker=rollouts.py:Worker", "rollout.concurrency=4", "rollout.timeout=0.5")
    with running(tmp_path, *job_settings(*settings, "stop.at_least=60", "policy.args.pause=0.1")) as job:
        assert job.end() == 0, job.story()
        assert (
            "Worker.rollout() of rollouts.py took longer than rollout.timeout = 0.5 s for work item 5" in job.text
        )
        assert re.search(
            r"Worker\.rollout\(\) raised ValueError: the environment broke \(rollouts\.py:\d+ in", job.text
        )
        assert job.summary()["work_items"]["given_up"] == 2
        assert "ended early" not in job.text


def test_replica_ends_whose_rollout_continues_although_it_was_cancelled(tmp_path: Path) -> None:
    (tmp_path / "rollouts.py").write_text(ROLLOUTS)
    settings = (
        "rollout.worker=rollouts.py:Hanging", "rollout.concurrency=4", "rollout.timeout=0.5",
        "timeouts.shutdown=3", "rollout.max_attempts=1", "rollout.restarts=1", "policy.args.repeats=true",
        "stop.at_least=60", "policy.args.pause=0.1",
    )  # fmt: skip
    with running(tmp_path, *job_settings(*settings)) as job:
        job.wait_for("(restart 1 of 1)")
        assert "did not end within 1.5 s after it was cancelled" in job.text
        assert job.end() == 0, job.story()
        assert job.summary()["work_items"]["given_up"] == 1


def test_mistake_in_the_data_set_starts_nothing(tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text('{"a": 1}\n{"a": \n')
    with running(tmp_path, *job_settings("work.items=items.jsonl")) as job:
        assert job.end() == 2
        assert "work.items = 'items.jsonl' cannot be used: " in job.text
        assert "items.jsonl, line 2 is not JSON" in job.text
        assert not job.output.exists()


def test_rows_are_those_of_the_index_also_after_a_resume(tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text("".join(json.dumps({"n": number}) + "\n" for number in range(7)))
    (tmp_path / "rows.py").write_text(
        "import small\n"
        "class Worker(small.Worker):\n"
        "    def rollout(self, work_item):\n"
        "        assert work_item.row == {'n': work_item.index % 7}\n"
        "        return super().rollout(work_item)\n"
    )
    settings = ("work.items=items.jsonl", "rollout.worker=rows.py:Worker", "rollout.max_failures=1")
    with running(tmp_path, *job_settings(*settings, "stop.at_least=5")) as job:
        assert job.end() == 0, job.story()
    with running(tmp_path, "--resume", *job_settings(*settings, "stop.at_least=10")) as job:
        assert job.end() == 0, job.story()
