"""What a job file may contain: its tables, their keys, and the rules between them.

Every key has a sentence with what is allowed; `docs/reference/configuration.md` has the same sentences.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from dray.errors import ConfigError
from dray.identifiers import DEFAULT_AGENT_KEEP, DEFAULT_AGENT_MEMORY, LANE_NAMES, MAX_SLOT_BYTES

JOB_NAME_FORM: Final = "1 to 63 letters, digits, '.', '_' or '-'"
ENTRY_POINT_FORM: Final = '"file.py:Class" (the file beside the job file) or "package.module:Class"'
MAX_NUMBER: Final = 2**63 - 1
"""No integer in a job file is larger."""

REPLAY_WORKER: Final = "dray.jobs.replay:ReplayWorker"
"""The worker of a job with `work.replay`."""

LogLevel = Literal["debug", "info", "warning", "error"]
"""How much the processes of a job log."""

_ENTRY_POINT = r"^[^:\s]+:[A-Za-z_][A-Za-z0-9_]*$"
_JOB_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"


def is_job_name(text: str) -> bool:
    """Whether a job may be called `text`."""
    return re.fullmatch(_JOB_NAME, text) is not None


class Table(BaseModel):
    """A table of the job file: no unknown keys, no conversions between types, immutable."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, hide_input_in_errors=True
    )


def _text(default: Any = ..., *, pattern: str | None = None, allowed: str, shown: bool = True) -> Any:
    return Field(default, pattern=pattern, min_length=1, description=allowed, repr=shown)


WORK_ITEMS_FORM: Final = (
    '"file.jsonl" (beside the job file, one JSON object per line), "file.py:iterable" or "package.module:iterable"'
)
_WORK_ITEMS = r"^(.+\.jsonl|[^:\s]+:[A-Za-z_][A-Za-z0-9_]*)$"


def _count(default: Any = ..., *, least: int = 1, most: int = MAX_NUMBER) -> Any:
    upper = "" if most == MAX_NUMBER else f" and at most {most}"
    return Field(default, ge=least, le=most, description=f"a whole number, at least {least}{upper}")


def _seconds(default: float | None) -> Any:
    return Field(default, gt=0, le=86_400, description="a number of seconds, above 0 and at most 86400")


_LANE_NAMES = f'"auto" or one of {", ".join(LANE_NAMES)}'


def _lane(name: str) -> str:
    if name != "auto" and name not in LANE_NAMES:
        raise ValueError(_LANE_NAMES)
    return name


class JobTable(Table):
    """`[job]`: what the job is called, where it writes, and how payloads travel."""

    name: str = _text(pattern=_JOB_NAME, allowed=JOB_NAME_FORM)
    seed: int = Field(default=0, ge=0, lt=2**31, description="a whole number from 0 to 2147483647")
    output: str | None = _text(None, allowed="a folder; by default a new numbered one under outputs/<job.name>/")
    plot: str = Field(
        "returns.png",
        pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]{0,62}\.png)?$",
        description="a file name of letters, digits, '.', '_' or '-' that ends in .png, or \"\" for no plot",
    )
    max_steps: int = _count()
    transfer: Literal["reference", "inline"] = Field(default="reference", description='"reference" or "inline"')
    lane: Annotated[str, AfterValidator(_lane)] = Field(default="auto", description=_LANE_NAMES)
    log_level: LogLevel = Field(default="info", description='"debug", "info", "warning" or "error"')
    trace: int = _count(17, least=0)


MAX_ROLLOUT_REPLICAS = 1024
"""Rollout replicas of a job, those included that are started by hand."""


class RolloutTable(Table):
    """`[rollout]`: the replicas that generate trajectories, and their rings."""

    worker: str = _text(pattern=_ENTRY_POINT, allowed=ENTRY_POINT_FORM)
    replicas: int = _count(2, most=MAX_ROLLOUT_REPLICAS)
    slots: int = _count(64, most=1 << 20)
    slot_bytes: int = _count(1 << 20, least=64, most=MAX_SLOT_BYTES)
    server_threads: int = _count(1, most=4)
    inline_bytes: int = _count(4096, least=0, most=16384)
    work_item_batch: int = _count(4, most=4096)
    work_items_in_flight: int | None = _count(None)
    payloads_per_work_item: int | None = _count(None, most=1 << 20)
    concurrency: int = _count(1, most=4096)
    timeout: float | None = _seconds(None)
    max_attempts: int = _count(3, most=1000)
    max_failures: int = _count(16)
    restarts: int = _count(0, least=0, most=1000)
    args: dict[str, Any] = Field(default_factory=dict, description="a table, given to the worker's setup as it is")


class PolicyTable(Table):
    """`[policy]`: the replicas that learn, and what they promise about each payload."""

    trainer: str = _text(pattern=_ENTRY_POINT, allowed=ENTRY_POINT_FORM)
    replicas: int = _count(1, most=64)
    readers: int = _count(1, most=64)
    batch_size: int = _count(most=1 << 20)
    checkpoint_every: int = _count(50)
    ack: Literal["step", "checkpoint"] = Field(default="step", description='"step" or "checkpoint"')
    max_deliveries: int = _count(3)
    max_staleness: int | None = _count(None, least=0)
    staleness: Literal["admission", "drop"] = Field(default="admission", description='"admission" or "drop"')
    in_place: bool = Field(default=True, description="true or false")
    weights: Literal["full", "sparse"] = Field(default="full", description='"full" or "sparse"')
    record: str | None = _text(None, allowed="a folder, beside the files of the job unless it is absolute")
    restarts: int = _count(3, least=0, most=1000)
    args: dict[str, Any] = Field(
        default_factory=dict, description="a table, given to the trainer's setup as it is"
    )


class AgentTable(Table):
    """`[agent]`: how much is kept of rollout replicas that die, on each machine, and for how long."""

    memory: int = _count(DEFAULT_AGENT_MEMORY, least=0)
    keep: float = _seconds(DEFAULT_AGENT_KEEP)


class RedisTable(Table):
    """`[redis]`: a running server to use; without one the job starts its own."""

    url: str | None = _text(
        None,
        pattern=r"^(rediss?|unix)://\S+$",
        allowed="the redis://, rediss:// or unix:// URL of a server that answers",
        shown=False,  # it may hold a password
    )


class ControllerTable(Table):
    """`[controller]`: where the controller listens, and when silence counts as death."""

    host: str = _text("127.0.0.1", pattern=r"^\S+$", allowed="a host name or address of this machine")
    port: int = Field(default=0, ge=0, le=65535, description="a port number from 0 (any free port) to 65535")
    token_file: str | None = _text(None, allowed="a file for its owner only, or one that does not exist yet")
    heartbeat_interval: float = _seconds(1.0)
    dead_after: float = _seconds(15.0)


class WorkTable(Table):
    """`[work]`: the data set whose rows the work items carry, or a recording in the place of rollouts."""

    items: str | None = _text(None, pattern=_WORK_ITEMS, allowed=WORK_ITEMS_FORM)
    shuffle: bool = Field(default=False, description="true or false")
    replay: str | None = _text(
        None, allowed="the folder of a recording, beside the job file unless it is absolute"
    )


class StopTable(Table):
    """`[stop]`: the metric of a training step, and the value at which the job counts as solved."""

    metric: str = _text(allowed="the name of a metric that train_step returns")
    at_least: float = Field(description="a number")


class TimeoutsTable(Table):
    """`[timeouts]`: the bounds of every wait, in seconds."""

    start: float = _seconds(120.0)
    read: float = _seconds(30.0)
    http: float = _seconds(10.0)
    redis: float = _seconds(10.0)
    controller_lost: float = _seconds(15.0)
    shutdown: float = _seconds(8.0)
    stall: float = _seconds(30.0)


_Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
_Option = Annotated[str, Field(pattern=r"^-[^\r\n]+$")]
_Line = Annotated[str, Field(pattern=r"^[^\r\n]+$")]


class SlurmTable(Table):
    """`[slurm]`: how many nodes a job takes on a Slurm cluster, and how it is submitted there."""

    partition: str | None = _text(None, pattern=r"^[^\s-]\S*$", allowed="the name of a partition")
    account: str | None = _text(None, pattern=r"^[^\s-]\S*$", allowed="the name of an account")
    time: str = _text(
        "01:00:00",
        pattern=r"^(\d{1,4}-)?\d{1,3}:[0-5]\d:[0-5]\d$",
        allowed='the time limit as "HH:MM:SS" or "D-HH:MM:SS"',
    )
    policy_nodes: int = _count(1, most=64)
    rollout_nodes: int = _count(1, least=0, most=1024)
    gpus_per_node: int = _count(0, least=0, most=64)
    interface: str | None = _text(
        None, pattern=r"^[^\s/]{1,15}$", allowed="the name of a network interface that every node has"
    )
    retries: int = _count(2, least=0, most=1000)
    pre_timeout: int = _count(120, most=65_535)
    sbatch_args: list[_Option] = Field(
        default_factory=list, description='a list of options, each with a "-" first'
    )
    container_image: str | None = _text(None, pattern=r"^[^\s-]\S*$", allowed="the name of an image")
    container_mounts: list[_Line] = Field(default_factory=list, description="a list of text, one for each mount")
    environment: dict[_Name, str] = Field(default_factory=dict, description="a table of names, each with text")
    snapshot: bool = Field(default=True, description="true or false")


class JobConfig(Table):
    """A whole job file."""

    job: JobTable = Field(description="the table [job]")
    rollout: RolloutTable = Field(description="the table [rollout]")
    policy: PolicyTable = Field(description="the table [policy]")
    agent: AgentTable = Field(default=AgentTable(), description="the table [agent]")
    redis: RedisTable = Field(default=RedisTable(), description="the table [redis]")
    controller: ControllerTable = Field(default=ControllerTable(), description="the table [controller]")
    work: WorkTable = Field(default=WorkTable(), description="the table [work]")
    stop: StopTable | None = Field(default=None, description="the table [stop]")
    timeouts: TimeoutsTable = Field(default=TimeoutsTable(), description="the table [timeouts]")
    slurm: SlurmTable | None = Field(default=None, description="the table [slurm]")

    @property
    def worker(self) -> str:
        """The class that generates payloads: that of the job file, or the one that replays a recording."""
        return self.rollout.worker if self.work.replay is None else REPLAY_WORKER

    @property
    def work_items_in_flight(self) -> int:
        """How many work items may be given out and not yet trained on; bounds staleness and memory."""
        each = self.payloads_of_work_item
        configured = self.rollout.work_items_in_flight or -(-2 * self.policy.batch_size // each)
        if not self.in_order:
            return configured
        assert self.policy.max_staleness is not None
        # As many as are certain to have payloads for these batches and no more, but enough for one batch.
        most = (self.policy.max_staleness + 1) * self.policy.batch_size // each
        return min(configured, max(most, -(-self.policy.batch_size // each)))

    @property
    def payloads_of_work_item(self) -> int:
        """How many payloads a work item has at least."""
        return self.rollout.payloads_per_work_item or 1

    @property
    def in_order(self) -> bool:
        """Whether payloads are trained on in the order of their work items, so that none becomes too old."""
        return self.policy.max_staleness is not None and self.policy.staleness == "admission"

    @property
    def payloads_held(self) -> int:
        """How many payloads are read, and not yet committed, when a step begins to train."""
        steps = self.policy.checkpoint_every if self.policy.ack == "checkpoint" else 1
        return steps * self.policy.batch_size


TABLES: Final[dict[str, type[Table]]] = {
    "job": JobTable,
    "rollout": RolloutTable,
    "policy": PolicyTable,
    "agent": AgentTable,
    "redis": RedisTable,
    "controller": ControllerTable,
    "work": WorkTable,
    "stop": StopTable,
    "timeouts": TimeoutsTable,
    "slurm": SlurmTable,
}


Rule = Callable[[JobConfig], Iterator[ConfigError]]
RULES: Final[list[tuple[frozenset[str], Rule]]] = []
"""Every rule about more than one key, with the keys that it reads."""


def broken_rules(config: JobConfig, unusable: Collection[str] = ()) -> Iterator[ConfigError]:
    """What `config` breaks of the rules about more than one key.

    Args:
        unusable: keys that have no value of their own in `config`: rules that read one are left out.
    """
    for keys, rule in RULES:
        if keys.isdisjoint(unusable):
            yield from rule(config)


def _rule(*keys: str) -> Callable[[Rule], Rule]:
    """Add a rule, which reads these keys and no others, to `RULES`."""

    def add(rule: Rule) -> Rule:
        RULES.append((frozenset(keys), rule))
        return rule

    return add


_HELD = ("job.transfer", "policy.ack", "policy.batch_size", "policy.checkpoint_every")


@_rule(*_HELD, "rollout.slots")
def _enough_slots(config: JobConfig) -> Iterator[ConfigError]:
    # Payloads keep their slots until they are committed: with fewer, one replica alone could not continue.
    if config.job.transfer == "reference" and config.rollout.slots < config.payloads_held:
        allowed = f"must be at least {_held_name(config)}, which is {config.payloads_held}"
        yield ConfigError("rollout.slots", config.rollout.slots, allowed)


@_rule(
    *_HELD,
    "rollout.work_items_in_flight",
    "rollout.payloads_per_work_item",
    "policy.max_staleness",
    "policy.staleness",
)
def _enough_work_items_in_flight(config: JobConfig) -> Iterator[ConfigError]:
    held, what = config.payloads_held, _held_name(config)
    if config.job.transfer == "reference":
        held, what = config.policy.batch_size, "policy.batch_size"
    each = config.payloads_of_work_item
    if config.work_items_in_flight * each < held:
        allowed = f"must be at least {what}, which is {held}"
        if each > 1:
            allowed += f", divided by rollout.payloads_per_work_item, which is {each}"
        yield ConfigError("rollout.work_items_in_flight", config.work_items_in_flight, allowed)


@_rule(
    "job.transfer",
    "rollout.slots",
    "rollout.concurrency",
    "rollout.work_items_in_flight",
    "rollout.payloads_per_work_item",
    "policy.batch_size",
    "policy.max_staleness",
    "policy.staleness",
)
def _slots_for_all_in_flight(config: JobConfig) -> Iterator[ConfigError]:
    # Rollouts end in any order: payloads of later work items must not take the room of those that are trained on
    # first.
    if config.job.transfer != "reference" or config.rollout.concurrency == 1 or not config.in_order:
        return
    needed = config.work_items_in_flight * config.payloads_of_work_item
    if config.rollout.slots < needed:
        allowed = (
            f"must be at least {needed}, for all payloads in flight, with rollout.concurrency above 1 and "
            'policy.staleness = "admission"'
        )
        yield ConfigError("rollout.slots", config.rollout.slots, allowed)


@_rule("job.transfer", "policy.replicas")
def _group_by_reference(config: JobConfig) -> Iterator[ConfigError]:
    replicas = config.policy.replicas
    if replicas > 1 and config.job.transfer == "inline":
        yield ConfigError("policy.replicas", replicas, 'must be 1 with job.transfer = "inline"')


@_rule("job.transfer", "policy.weights")
def _sparse_by_reference(config: JobConfig) -> Iterator[ConfigError]:
    if config.policy.weights == "sparse" and config.job.transfer == "inline":
        yield ConfigError("policy.weights", config.policy.weights, 'must be "full" with job.transfer = "inline"')


@_rule("policy.replicas", "policy.record")
def _recorded_by_one(config: JobConfig) -> Iterator[ConfigError]:
    if config.policy.record is not None and config.policy.replicas > 1:
        yield ConfigError("policy.replicas", config.policy.replicas, "must be 1 with policy.record")


@_rule("work.items", "work.replay")
def _work_from_one_place(config: JobConfig) -> Iterator[ConfigError]:
    items, replay = config.work.items, config.work.replay
    if items is not None and replay is not None:
        yield ConfigError("work.items", items, "must be left out with work.replay")


@_rule("work.items", "work.shuffle")
def _rows_to_shuffle(config: JobConfig) -> Iterator[ConfigError]:
    items, shuffle = config.work.items, config.work.shuffle
    if shuffle and items is None:
        yield ConfigError("work.shuffle", shuffle, "must be false without work.items")


@_rule("work.replay", "rollout.replicas")
def _replayed_by_one(config: JobConfig) -> Iterator[ConfigError]:
    # With several replicas, batches would not be those of the recording.
    replay, replicas = config.work.replay, config.rollout.replicas
    if replay is not None and replicas > 1:
        yield ConfigError("rollout.replicas", replicas, "must be 1 with work.replay")


@_rule("policy.replicas", "policy.readers")
def _readers_divide_replicas(config: JobConfig) -> Iterator[ConfigError]:
    policy = config.policy
    if policy.replicas % policy.readers:
        allowed = f"must divide policy.replicas, which is {policy.replicas}"
        yield ConfigError("policy.readers", policy.readers, allowed)


@_rule("policy.replicas", "policy.readers", "policy.batch_size")
def _batch_in_equal_parts(config: JobConfig) -> Iterator[ConfigError]:
    policy = config.policy
    parts, rest = divmod(policy.replicas, policy.readers)
    if not rest and policy.batch_size % parts:
        allowed = f"must be a multiple of policy.replicas / policy.readers, which is {parts}"
        yield ConfigError("policy.batch_size", policy.batch_size, allowed)


@_rule("controller.dead_after", "controller.heartbeat_interval")
def _dead_after_several_heartbeats(config: JobConfig) -> Iterator[ConfigError]:
    interval = config.controller.heartbeat_interval
    if config.controller.dead_after < 3 * interval:
        allowed = f"must be at least three times controller.heartbeat_interval, which is {interval:g}"
        yield ConfigError("controller.dead_after", config.controller.dead_after, allowed)


def _held_name(config: JobConfig) -> str:
    """What `payloads_held` is called in the job file."""
    if config.policy.ack == "checkpoint":
        return 'policy.batch_size * policy.checkpoint_every with policy.ack = "checkpoint"'
    return "policy.batch_size"
