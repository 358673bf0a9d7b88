"""The trace events of a job follow their schema: slices of a thread never overlap, each payload has a flow."""

import json
from pathlib import Path

from traces import checked_events, write_spans

from dray.jobs.folder import JobFolder
from dray.jobs.launch.stage_table import read_trace
from dray.jobs.launch.trace_events import trace_events
from dray.jobs.replica.stages import Span, Stage


def test_payloads_of_two_processes_are_slices_and_flows(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    for replica in range(2):
        spans = []
        for number in range(replica, 8, 2):
            about = (number, f"{replica}:{number}")
            # Rollouts of an asynchronous worker overlap.
            spans += [
                Span(Stage.ROLLOUT, number, number + 3.0, *about),
                Span(Stage.PACK, number + 3.0, number + 3.25, *about),
                Span(Stage.HAND_OVER, number + 3.25, number + 3.5, *about),
            ]
        write_spans(folder, f"rollout-{replica}", spans)
    given = []
    for number in range(8):
        times = [20.0, 21.0, 22.0 + number, 31.0, 32.0, 33.0]
        stages = (Stage.READ, Stage.WAIT_IN_BATCH, Stage.TRAIN, Stage.COMMIT, Stage.FREE)
        for stage, begin, end in zip(stages, times, times[1:], strict=False):
            given.append(Span(stage, begin, end, number, f"{number % 2}:{number}"))
    write_spans(folder, "policy-0", [*given, Span(Stage.WEIGHTS, 33, 34, step=1)])
    document = json.loads(json.dumps(trace_events(read_trace(folder))))
    events = checked_events(document)
    assert {each["args"]["name"] for each in events if each["name"] == "process_name"} == {
        "policy-0 (pid 7)",
        "rollout-0 (pid 7)",
        "rollout-1 (pid 7)",
    }
    begun = [each for each in events if each["ph"] == "s"]
    assert len(begun) == 8, "one flow for each payload"
    rollout = next(each for each in events if each["ph"] == "X" and each["args"].get("work_item") == 1)
    assert (rollout["name"], rollout["ts"], rollout["dur"]) == ("read", 20_000_000, 1_000_000)
    own = [each["name"] for each in events if each["ph"] == "X" and each["args"].get("payload") == "1:3"]
    assert sorted(own) == sorted(stage for stage in Stage if stage not in (Stage.WEIGHTS, Stage.CHECKPOINT))


def test_trace_of_nothing_is_empty() -> None:
    assert checked_events(trace_events([])) == []
