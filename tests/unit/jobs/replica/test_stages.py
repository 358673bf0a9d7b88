"""What a process writes about the stages of payloads: sampled, bounded, also after a kill, or on a full disk."""

from itertools import pairwise
from pathlib import Path

import pytest
from traces import spans_in

from dray.jobs.folder import JobFolder
from dray.jobs.launch.stage_table import read_trace
from dray.jobs.queue import Delivery, RolloutEntry
from dray.jobs.replica.delivery import PayloadEvent, PayloadTracker
from dray.jobs.replica.stages import PayloadStages, Span, Stage, StageLog, handed_on
from dray.jobs.replica.user_code import RolloutPayload


class SteppingClock:
    """A second passes with every call."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        self.time += 1.0
        return self.time


class Log:
    """A log of stages in a folder, and what it warns of."""

    def __init__(self, root: Path, *, every: int = 1, max_bytes: int = 1 << 20) -> None:
        self.folder = JobFolder(root)
        self.warnings: list[str] = []
        self.log = StageLog(
            self.folder.trace,
            "policy-0",
            every=every,
            max_bytes=max_bytes,
            warn=self.warnings.append,
            clock=SteppingClock(),
        )

    def stages(self) -> list[tuple[str, int]]:
        return [(each.span.stage.value, each.span.work_item) for each in read_trace(self.folder)]


def span(number: int) -> Span:
    return Span(Stage.TRAIN, number, number + 0.5, number, f"p:{number}")


def delivery(work_item: int) -> Delivery:
    return Delivery(RolloutEntry("0f" * 16, work_item, 1, "rollout-0", work_item, payload=b"x"), 1, "1-0")


def test_payloads_of_every_nth_work_item_are_sampled(tmp_path: Path) -> None:
    with Log(tmp_path, every=3).log as log:
        assert [index for index in range(10) if log.samples(index)] == [0, 3, 6, 9]
    with Log(tmp_path, every=0).log as log:
        assert not any(map(log.samples, range(10)))
        log.add([span(1)])
        with log.measuring(Stage.WEIGHTS, 1):
            pass
    assert list(tmp_path.iterdir()) == [], "nothing is written with 0"


def test_rollout_is_written_once_and_the_rest_for_each_payload(tmp_path: Path) -> None:
    made = Log(tmp_path, every=2)
    with made.log as log:
        for work_item in (1, 2):
            for part in range(2):
                payload = RolloutPayload({}, work_item, 0, part=part, parts=2, times=(0.1, 0.2))
                log.add(handed_on(log, payload, f"p:{part}", 0.3, 0.4))
    expected = [("rollout", 2), *2 * [("pack", 2)], *2 * [("hand_over", 2)]]
    assert made.stages() == expected


def test_stages_of_a_payload_follow_its_life_cycle(tmp_path: Path) -> None:
    made = Log(tmp_path)
    with made.log as log:
        stages = PayloadStages(log)
        tracker, one, other = PayloadTracker(stages.changed), delivery(1), delivery(2)
        ids, lost = [one.entry.id], [other.entry.id]
        tracker.receive([one, other])
        stages.reading([one, other])
        tracker.apply(PayloadEvent.READ, ids)
        tracker.apply(PayloadEvent.FAIL, lost)
        tracker.apply(PayloadEvent.BEGIN, ids)
        tracker.apply(PayloadEvent.TRAIN, ids)
        tracker.apply(PayloadEvent.COMMIT, ids)
        stages.freed(ids)
        tracker.apply(PayloadEvent.FREE, ids + lost)
        with log.measuring(Stage.CHECKPOINT, 1):
            pass
    assert [stage for stage, _ in made.stages()] == [
        "read",
        "wait_in_batch",
        "train",
        "commit",
        "free",
        "checkpoint",
    ]
    spans = [each.span for each in read_trace(made.folder)]
    assert all(before.end == after.begin for before, after in pairwise(spans[:5]))


def test_newest_spans_are_kept_within_the_limit(tmp_path: Path) -> None:
    made = Log(tmp_path, max_bytes=20_000)
    with made.log as log:
        for number in range(1000):
            log.add([span(number)])
            assert sum(path.stat().st_size for path in made.folder.trace.iterdir()) <= 20_000 + 400
    kept = [number for _, number in made.stages()]
    assert kept == list(range(kept[0], 1000))
    assert len(kept) > 50


def test_line_that_a_kill_has_cut_does_not_hide_the_next_process(tmp_path: Path) -> None:
    first = Log(tmp_path)
    with first.log as log:
        log.add([span(1)])
    (path,) = first.folder.trace.iterdir()
    with path.open("a") as file:
        file.write('{"stage":"train","begin":2.0')
    second = Log(tmp_path)
    with second.log as log:
        log.add([span(3)])
    assert second.stages() == [("train", 1), ("train", 3)]


@pytest.mark.parametrize("in_the_way", ["trace", "trace/policy-0.jsonl"])
def test_log_that_cannot_be_written_is_one_warning(tmp_path: Path, in_the_way: str) -> None:
    made = Log(tmp_path)
    if in_the_way == "trace":
        (tmp_path / "trace").touch()
    else:
        (tmp_path / in_the_way).mkdir(parents=True)
    with made.log as log:
        log.add([span(1)])
        log.add([span(2)])
        assert not log.samples(0)
        log.close()
    (warning,) = made.warnings
    assert warning.startswith("no more stages of payloads are written to policy-0.jsonl: ")


def test_log_that_is_closed_writes_nothing(tmp_path: Path) -> None:
    made = Log(tmp_path)
    made.log.add([span(1)])
    made.log.close()
    made.log.close()
    made.log.add([span(2)])
    assert len(spans_in(made.folder.trace / "policy-0.jsonl")) == 1
    assert made.warnings == []
