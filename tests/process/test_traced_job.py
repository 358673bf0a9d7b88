"""A job writes where the time of its payloads goes, also when its processes are killed or its disk is full."""

import json
import re
import subprocess
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest
from job_runner import LIMITED, JobRun, job_settings, running
from traces import checked_events, spans_in

from dray.jobs.folder import JobFolder
from dray.jobs.launch.stage_table import Traced, read_trace
from dray.jobs.replica.stages import STEP_STAGES, Stage

OF_A_PAYLOAD = [stage for stage in Stage if stage not in STEP_STAGES]


def by_payload(spans: list[Traced]) -> dict[str, list[Traced]]:
    found: dict[str, list[Traced]] = defaultdict(list)
    for each in spans:
        if each.span.payload:
            found[each.span.payload].append(each)
    return found


def work_items(job: JobRun) -> set[int]:
    """Those that have contributed to the weights of the checkpoint."""
    _, seen, _ = json.loads((job.output / "checkpoint" / "trainer" / "trainer.json").read_text())
    return set(seen)


@pytest.mark.parametrize("transfer", ["reference", "inline"])
def test_every_sampled_payload_has_every_stage_in_order(tmp_path: Path, transfer: str) -> None:
    settings = job_settings(
        "job.trace=3", f"job.transfer={transfer}", "job.max_steps=12", "rollout.args.pause=0.01"
    )
    with running(tmp_path, *settings) as job:
        assert job.end() == 1, job.story()
        seen, summary = work_items(job), job.summary()
    folder = JobFolder(job.output)
    spans = read_trace(folder)
    assert {each.span.work_item % 3 for each in spans if each.span.payload} == {0}
    trained = {
        payload: found
        for payload, found in by_payload(spans).items()
        if any(each.span.stage is Stage.TRAIN for each in found)
    }
    assert {found[0].span.work_item for found in trained.values()} == {each for each in seen if each % 3 == 0}
    whole = 0
    for found in trained.values():
        stages = [each.span.stage for each in sorted(found, key=lambda each: OF_A_PAYLOAD.index(each.span.stage))]
        # Its producer may end before it has confirmed that the last payloads are freed.
        assert stages in (OF_A_PAYLOAD, OF_A_PAYLOAD[:-1])
        whole += stages == OF_A_PAYLOAD
        ordered = sorted((each.span for each in found), key=lambda span: OF_A_PAYLOAD.index(span.stage))
        assert all(before.end <= after.begin + 1e-6 for before, after in pairwise(ordered))
        # The stages are all of the time between its begin and its end, but for the bookkeeping around `rollout`.
        spent = sum(span.end - span.begin for span in ordered)
        passed = ordered[-1].end - ordered[0].begin
        assert passed - (ordered[1].begin - ordered[0].end) == pytest.approx(spent, abs=1e-4)
    assert whole > 0
    assert list(summary["stages"]) == list(Stage)
    assert summary["stages"]["train"]["count"] == len(trained)
    assert summary["stages"]["train"]["p50"] >= 0.03, "what the trainer of the test takes"
    assert summary["stages"]["rollout"]["mean"] >= 0.01, "what its worker takes"
    assert summary["stages"]["weights"]["count"] == 13, "before the first step, and after each of them"


def test_trace_of_a_job_is_one_file_for_a_viewer(tmp_path: Path) -> None:
    with running(tmp_path, *job_settings("job.trace=1", "job.max_steps=5")) as job:
        job.wait_until(lambda: job.step() >= 2, "some steps")
        command = [sys.executable, "-m", "dray.cli.app", "trace", str(job.output)]
        during = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert job.end() == 1, job.story()
    assert (during.returncode, during.stderr) == (0, "")
    after = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (after.returncode, after.stderr) == (0, "")
    events = checked_events(json.loads((job.output / "trace.json").read_text()))
    processes = {each["args"]["name"].split()[0] for each in events if each["name"] == "process_name"}
    assert processes == {"policy-0", "rollout-0", "rollout-1"}
    assert len({each["id"] for each in events if "id" in each}) >= 5 * 8, "a flow for each payload"
    assert [line.split()[0] for line in after.stdout.splitlines()[1:-1]] == [stage.value for stage in Stage]


def test_job_that_is_not_traced_has_no_stages_and_no_trace(tmp_path: Path) -> None:
    with running(tmp_path, *job_settings("job.trace=0", "job.max_steps=3")) as job:
        assert job.end() == 1, job.story()
    assert not (job.output / "trace").exists()
    assert job.summary()["stages"] == {}
    command = [sys.executable, "-m", "dray.cli.app", "trace", str(job.output)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1
    assert "must be the output folder of a job with job.trace above 0" in found.stderr


def test_trace_survives_the_kill_of_a_rollout_and_of_the_policy(tmp_path: Path) -> None:
    settings = job_settings(
        *("job.trace=1", "job.max_steps=60", "stop.at_least=1000"),
        *("rollout.restarts=3", "policy.checkpoint_every=5"),
        *("rollout.args.restarts=true", "policy.args.restarts=true", "policy.args.repeats=true"),
    )
    with running(tmp_path, *settings) as job:
        job.wait_until(lambda: job.step() >= 6, "some steps")
        for process in job.processes("dray.jobs.replica.rollout")[:1]:
            process.kill()
        job.wait_until(lambda: job.step() >= 12, "steps after the kill of a rollout")
        job.only("dray.jobs.replica.policy").kill()
        assert job.end() == 1, job.story()
    spans = read_trace(JobFolder(job.output))
    pids = defaultdict(set)
    for each in spans:
        pids[each.process.name].add(each.process.pid)
    assert sorted(map(len, pids.values())) == [1, 2, 2], "each process, and those after a restart"
    assert len(spans_in(job.output / "trace" / "policy-0.jsonl")) > 50 * 8
    trained = [each.span for each in spans if each.span.stage is Stage.TRAIN]
    assert {span.work_item for span in trained} >= work_items(job)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            ["rollout.args.pause=0.2", "policy.args.pause=0"],
            r"bottleneck: rollouts are slower than the trainer, .*: raise rollout\.replicas",
        ),
        (
            ["policy.args.pause=0.8"],
            r"bottleneck: training takes .*: raise policy\.replicas, or make train_step faster",
        ),
    ],
)
def test_job_names_its_bottleneck_before_its_last_line(tmp_path: Path, settings: list[str], line: str) -> None:
    with running(tmp_path, *job_settings("job.trace=1", "job.max_steps=8", *settings)) as job:
        assert job.end() == 1, job.story()
    assert re.fullmatch(line, job.lines[-3]), job.lines
    assert job.lines[-2].startswith("not solved")


def test_job_whose_trace_cannot_be_written_continues_without_it(tmp_path: Path) -> None:
    settings = job_settings(
        *("job.trace=1", "policy.trainer=small.py:Limited", "job.max_steps=40", "stop.at_least=1000")
    )
    with running(tmp_path, *settings, classes=LIMITED) as job:
        assert job.end() == 1, job.story()
    assert job.text.count("no more stages of payloads are written to policy-0.jsonl") == 1
    assert job.summary()["steps"] == 40
    assert (job.output / "trace" / "policy-0.jsonl").stat().st_size == 65536
    assert job.summary()["stages"]["train"]["count"] < 40 * 8
    assert job.summary()["stages"]["rollout"]["count"] >= 40 * 8, "the other processes write theirs"
