"""What limits a job, and the key of the job file that changes it: one table of rules.

The policy replica's time is divided into waiting for payloads, reading them, training, publishing weights, writing
checkpoints, and the rest, most of it commits. The largest part is the bottleneck.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from dray.jobs.config import JobConfig
from dray.jobs.controller.state import FIRST_POLICY
from dray.jobs.messages.models import Role, Status
from dray.jobs.replica.stages import Stage

MIN_STEPS: Final = 3
"""Steps after the first one that a verdict needs; the first one waits for the start of the rollout replicas."""

MIN_SECONDS: Final = 3.0
"""Seconds that these steps must have taken."""

Part = Literal["wait", "read", "train", "weights", "checkpoint", "rest"]


@dataclass(frozen=True, slots=True)
class Figures:
    """What the rules read.

    Attributes:
        parts: the share of the policy replica's time, from 0 to 1, that each part takes.
        generating: the share of their time that the rollout replicas are inside `rollout`.
        handing_on: seconds of packing and handing over a payload, in relation to those of its rollout.
        too_old: the share of payloads that was dropped as too old.
        lane: the lanes that payloads were read over, joined by ``+``; empty if they were read over none.
        in_redis: whether payloads are in Redis itself.
        asynchronous: whether the rollout replicas work on several work items at once.
        bounded: whether the bound on staleness is what limits the number of work items in flight.
    """

    parts: Mapping[Part, float]
    generating: float = 1.0
    handing_on: float = 0.0
    too_old: float = 0.0
    lane: str = "shm"
    in_redis: bool = False
    asynchronous: bool = False
    bounded: bool = False

    @property
    def largest(self) -> Part:
        """The largest part."""
        return max(self.parts, key=lambda part: self.parts[part])


@dataclass(frozen=True, slots=True)
class Rule:
    """A bottleneck.

    Attributes:
        holds: whether it is that of a job with these figures.
        finding: what it is, with figures as ``{name:.0%}``.
        advice: what to change.
        keys: the keys of the job file that `advice` names.
    """

    holds: Callable[[Figures], bool]
    finding: str
    advice: str
    keys: tuple[str, ...]


RULES: Final[Sequence[Rule]] = (
    Rule(
        lambda of: of.too_old >= 0.1,
        "{too_old:.0%} of the payloads were dropped as too old",
        "lower rollout.work_items_in_flight, or raise policy.max_staleness",
        ("rollout.work_items_in_flight", "policy.max_staleness"),
    ),
    Rule(
        lambda of: of.largest == "wait" and of.handing_on >= 1,
        "packing a payload and handing it over takes {handing_on:.1f} times as long as its rollout; the trainer "
        "waits for payloads {wait:.0%} of the time",
        "raise rollout.replicas",
        ("rollout.replicas",),
    ),
    Rule(
        lambda of: of.largest == "wait" and of.generating >= 0.5 and of.asynchronous,
        "rollouts are slower than the trainer, which waits for payloads {wait:.0%} of the time",
        "raise rollout.concurrency or rollout.replicas",
        ("rollout.concurrency", "rollout.replicas"),
    ),
    Rule(
        lambda of: of.largest == "wait" and of.generating >= 0.5,
        "rollouts are slower than the trainer, which waits for payloads {wait:.0%} of the time",
        "raise rollout.replicas",
        ("rollout.replicas",),
    ),
    Rule(
        lambda of: of.largest == "wait" and of.bounded,
        "the trainer waits for payloads {wait:.0%} of the time, and rollout replicas generate only "
        "{generating:.0%} of theirs, as the limit on staleness holds work items back",
        "raise policy.max_staleness",
        ("policy.max_staleness",),
    ),
    Rule(
        lambda of: of.largest == "wait",
        "the trainer waits for payloads {wait:.0%} of the time, and rollout replicas generate only "
        "{generating:.0%} of theirs",
        "raise rollout.work_items_in_flight",
        ("rollout.work_items_in_flight",),
    ),
    Rule(
        lambda of: of.largest == "read" and of.in_redis,
        "the trainer waits {read:.0%} of the time until payloads are read out of Redis",
        'set job.transfer = "reference"',
        ("job.transfer",),
    ),
    Rule(
        lambda of: of.largest == "read" and "tcp" in of.lane,
        "the trainer waits {read:.0%} of the time until payloads are read over tcp",
        'set job.lane = "ucx" between hosts, or "auto" on one host',
        ("job.lane",),
    ),
    Rule(
        lambda of: of.largest == "read",
        "the trainer waits {read:.0%} of the time until payloads are read",
        "set policy.in_place = true, or raise policy.replicas: each reads its part of a batch",
        ("policy.in_place", "policy.replicas"),
    ),
    Rule(
        lambda of: of.largest == "weights",
        "the policy replica publishes weights {weights:.0%} of the time",
        'set policy.weights = "sparse", or raise policy.batch_size for fewer steps',
        ("policy.weights", "policy.batch_size"),
    ),
    Rule(
        lambda of: of.largest == "checkpoint",
        "the policy replica writes checkpoints {checkpoint:.0%} of the time",
        "raise policy.checkpoint_every",
        ("policy.checkpoint_every",),
    ),
    Rule(
        lambda of: of.largest == "rest",
        "commits and what else is between two steps take {rest:.0%} of the policy replica's time",
        "raise policy.batch_size for fewer steps, or use a nearer server in redis.url",
        ("policy.batch_size", "redis.url"),
    ),
    Rule(
        lambda of: of.largest == "train",
        "training takes {train:.0%} of the policy replica's time; rollout replicas generate {generating:.0%} of "
        "theirs",
        "raise policy.replicas, or make train_step faster",
        ("policy.replicas",),
    ),
)
"""The first rule that holds is the bottleneck."""


def bottleneck(figures: Figures) -> str:
    """The line about what limits a job with these figures."""
    rule = next(rule for rule in RULES if rule.holds(figures))
    values: dict[str, float] = {
        **{str(part): share for part, share in figures.parts.items()},
        "generating": figures.generating,
        "handing_on": figures.handing_on,
        "too_old": figures.too_old,
    }
    return f"bottleneck: {rule.finding.format_map(values)}: {rule.advice}"


def figures_of(
    config: JobConfig,
    status: Status,
    steps: Sequence[Mapping[str, Any]],
    stages: Mapping[str, Mapping[str, float]],
) -> Figures | None:
    """The figures of a run; None if it was too short for them.

    Args:
        status: the last one.
        steps: the lines of `metrics.jsonl` of this run.
        stages: the table of stages.
    """
    if len(steps) <= MIN_STEPS:
        return None
    seconds = steps[-1]["seconds"] - steps[0]["seconds"]
    if seconds < MIN_SECONDS:
        return None
    rows = len(steps) - 1
    spent: dict[Part, float] = {
        "wait": _sum(steps[1:], "waited_seconds"),
        "read": _sum(steps[1:], "read_seconds"),
        "train": _sum(steps[1:], "train_seconds"),
        "weights": rows * _mean(stages, Stage.WEIGHTS),
        "checkpoint": rows / config.policy.checkpoint_every * _mean(stages, Stage.CHECKPOINT),
    }
    spent["rest"] = max(0.0, seconds - sum(spent.values()))
    policy = status.progress(FIRST_POLICY)
    rollouts = [member.progress.counters for member in status.members if member.role is Role.ROLLOUT]
    places = len(rollouts) * config.rollout.concurrency
    generated = sum(counters.get("rollout_seconds", 0.0) for counters in rollouts)
    rollout = _mean(stages, Stage.ROLLOUT)
    dropped = policy.count("too_old")
    return Figures(
        parts={part: value / seconds for part, value in spent.items()},
        generating=min(1.0, generated / (places * seconds)) if places else 1.0,
        handing_on=(_mean(stages, Stage.PACK) + _mean(stages, Stage.HAND_OVER)) / rollout if rollout else 0.0,
        too_old=dropped / max(1, dropped + policy.count("payloads")),
        lane=policy.labels.get("lane", ""),
        in_redis=config.job.transfer == "inline",
        asynchronous=config.rollout.concurrency > 1,
        bounded=config.in_order,
    )


def _sum(steps: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(sum(line.get(name, 0.0) for line in steps))


def _mean(stages: Mapping[str, Mapping[str, float]], stage: Stage) -> float:
    return stages.get(stage, {}).get("mean", 0.0)
