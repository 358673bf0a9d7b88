"""The table of bottlenecks: which rule holds for which figures, and that its advice names keys that exist."""

from typing import Any

import pytest

from dray.jobs.config import TABLES, JobConfig
from dray.jobs.launch.bottleneck import RULES, Figures, bottleneck, figures_of
from dray.jobs.messages.models import MemberState, MemberStatus, Phase, ProgressReport, Role, Status

NOTHING = {"wait": 0.1, "read": 0.1, "train": 0.1, "weights": 0.1, "checkpoint": 0.1, "rest": 0.1}

EXPECTED: list[tuple[dict[str, Any], str]] = [
    (
        {"wait": 0.7, "too_old": 0.25},
        "25% of the payloads were dropped as too old: lower rollout.work_items_in_flight",
    ),
    (
        {"wait": 0.7, "handing_on": 2.5},
        "takes 2.5 times as long as its rollout; the trainer waits for payloads 70%",
    ),
    ({"wait": 0.7, "asynchronous": True}, "raise rollout.concurrency or rollout.replicas"),
    (
        {"wait": 0.7},
        "rollouts are slower than the trainer, which waits for payloads 70% of the time: raise rollout",
    ),
    ({"wait": 0.7, "generating": 0.2, "bounded": True}, "generate only 20% of theirs, as the limit on staleness"),
    ({"wait": 0.7, "generating": 0.2}, "raise rollout.work_items_in_flight"),
    ({"read": 0.7, "in_redis": True, "lane": ""}, 'set job.transfer = "reference"'),
    ({"read": 0.7, "lane": "shm+tcp"}, 'set job.lane = "ucx"'),
    ({"read": 0.7}, "set policy.in_place = true"),
    ({"weights": 0.7}, 'set policy.weights = "sparse"'),
    ({"checkpoint": 0.7}, "raise policy.checkpoint_every"),
    ({"rest": 0.7}, "raise policy.batch_size for fewer steps"),
    (
        {"train": 0.7, "generating": 0.3},
        "training takes 70% of the policy replica's time; rollout replicas generate 30%",
    ),
]
"""For each rule, in their order, figures that it holds for, and a part of the line."""


def figures(given: dict[str, Any]) -> Figures:
    parts = {name: given.get(name, share) for name, share in NOTHING.items()}
    return Figures(parts=parts, **{name: value for name, value in given.items() if name not in NOTHING})  # type: ignore[arg-type]


@pytest.mark.parametrize(("rule", "given", "words"), [(r, *e) for r, e in zip(RULES, EXPECTED, strict=True)])
def test_each_rule_is_the_first_that_holds_for_some_job(rule: Any, given: dict[str, Any], words: str) -> None:
    of = figures(given)
    assert next(each for each in RULES if each.holds(of)) is rule
    assert words in bottleneck(of)


@pytest.mark.parametrize("rule", RULES)
def test_advice_names_keys_of_the_job_file(rule: Any) -> None:
    assert rule.keys
    for key in rule.keys:
        table, _, name = key.partition(".")
        assert name in TABLES[table].model_fields
        assert key in rule.advice


def config_of(**tables: dict[str, Any]) -> JobConfig:
    required: dict[str, dict[str, Any]] = {
        "job": {"name": "small", "max_steps": 3},
        "rollout": {"worker": "job.py:Worker"},
        "policy": {"trainer": "job.py:Trainer", "batch_size": 4},
    }
    return JobConfig.model_validate({name: {**required[name], **tables.get(name, {})} for name in required})


def status_of(policy: dict[str, float], *rollouts: dict[str, float]) -> Status:
    def member(name: str, role: Role, counters: dict[str, float]) -> MemberStatus:
        progress = ProgressReport(doing="", seconds=0.0, counters=counters, labels={"lane": "shm"})
        return MemberStatus(
            name=name, role=role, state=MemberState.LEFT, reason="", pid=1, silence=0.0, progress=progress
        )

    members = [member("policy-0", Role.POLICY, policy)]
    members += [member(f"rollout-{number}", Role.ROLLOUT, each) for number, each in enumerate(rollouts)]
    return Status(job="small", phase=Phase.DONE, seconds=3.0, outcome=None, members=members, work_items={})


def steps(count: int, seconds: float, **each: float) -> list[dict[str, float]]:
    """Lines of `metrics.jsonl`, of steps that take so many seconds each; the first has waited for more."""
    lines = [{"step": number, "seconds": 100 + number * seconds, **each} for number in range(count)]
    return [{**lines[0], "waited_seconds": 100.0}, *lines[1:]]


def test_figures_are_shares_of_the_time_after_the_first_step() -> None:
    lines = steps(11, 1.0, waited_seconds=0.5, read_seconds=0.1, train_seconds=0.2)
    stages = {
        "rollout": {"mean": 2.0},
        "pack": {"mean": 0.3},
        "hand_over": {"mean": 0.1},
        "weights": {"mean": 0.05},
        "checkpoint": {"mean": 0.5},
    }
    status = status_of({"payloads": 75, "too_old": 25}, {"rollout_seconds": 4.0}, {"rollout_seconds": 2.0})
    found = figures_of(config_of(policy={"checkpoint_every": 10}), status, lines, stages)
    assert found is not None
    expected = {"wait": 0.5, "read": 0.1, "train": 0.2, "weights": 0.05, "checkpoint": 0.05, "rest": 0.1}
    assert found.parts == pytest.approx(expected)
    assert (found.generating, found.handing_on, found.too_old) == pytest.approx((0.3, 0.2, 0.25))
    assert (found.lane, found.in_redis, found.asynchronous, found.bounded) == ("shm", False, False, False)


def test_figures_of_a_job_without_a_status_take_the_rollouts_as_busy() -> None:
    status = Status(job="small", phase=Phase.FAILED, seconds=0.0, outcome=None, members=[], work_items={})
    config = config_of(policy={"max_staleness": 1}, job={"transfer": "inline"})
    found = figures_of(config, status, steps(11, 1.0, waited_seconds=0.9), {})
    assert found is not None
    assert (found.generating, found.in_redis, found.bounded, found.largest) == (1.0, True, True, "wait")


@pytest.mark.parametrize(("count", "seconds"), [(0, 1.0), (3, 60.0), (100, 0.01)])
def test_run_of_few_steps_or_seconds_has_no_figures(count: int, seconds: float) -> None:
    lines = steps(count, seconds) if count else []
    assert figures_of(config_of(), status_of({}), lines, {}) is None
