"""Every name that dray uses in Redis. No other module spells a key or a field.

======================================  ======  ==================================================================
key (``{job}`` with its braces)          type    what it holds
======================================  ======  ==================================================================
``dray:{job}:rollouts``                 stream  one entry per payload that no commit has ended; group ``policy``
``dray:{job}:rollouts:index``           hash    ``producer:sequence`` → id of the entry, while the entry is there
``dray:{job}:rollouts:epoch``           string  random token of the stream; absent or changed: lost
``dray:{job}:rollouts:group_epoch``     string  integer, rises when the policy group restarts; fences commits
``dray:{job}:rollouts:counters``        hash    published, trained, and others: see `QueueStatistics`
``dray:{job}:rollouts:room``            stream  newest end of entries (one entry); wakes publishers that wait
``dray:{job}:rollouts:dead``            stream  the last 1000 dead letters
``dray:{job}:weights``                  stream  the reference of the newest weights (one entry)
======================================  ======  ==================================================================

Fields of an entry of ``rollouts``: ``producer`` (32 hex digits), ``sequence``, ``weight_version``, ``replica``,
``work_item``, and either ``reference`` (JSON of a `PayloadRef`) or ``payload`` (bytes). An entry of a work item
with several payloads has ``part`` and ``parts``, too, and one with metadata ``metadata`` (a JSON object). A dead
letter has the same fields but for ``payload``, whose length stands in ``payload_bytes``, and adds ``consumer``,
``deliveries`` and
``reason``. A command has ``name``, ``fields`` (JSON object of strings) and ``token`` (random, marks a repeated
send). Weights have ``reference`` and ``version``.

Every key ends `KEY_LIFETIME` seconds after the last change that the job made through it.

The braces make all keys of a job fall into one hash slot, so that scripts work on a Redis cluster too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from dray.errors import ConfigError

GROUP = "policy"
DEAD_LETTERS_KEPT = 1000
KEY_LIFETIME = 86_400
"""Seconds after its last use by a script that changes it at which a key ends: the job is gone then."""

# Fields of an entry of the rollout stream; scripts.py names PRODUCER, SEQUENCE and PAYLOAD as well.
PRODUCER = b"producer"
SEQUENCE = b"sequence"
WEIGHT_VERSION = b"weight_version"
REPLICA = b"replica"
WORK_ITEM = b"work_item"
PART = b"part"
PARTS = b"parts"
METADATA = b"metadata"
REFERENCE = b"reference"
PAYLOAD = b"payload"
# Fields of a command.
# Fields of the weights' entry, besides REFERENCE.
VERSION = b"version"

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, slots=True)
class JobKeys:
    """The keys of one job.

    Args:
        job: name of the job, unique on its Redis server.

    Raises:
        ConfigError: the name is not 1 to 64 letters, digits, dots, dashes or underscores.
    """

    job: str

    def __post_init__(self) -> None:
        check_name("job.name", self.job)

    @property
    def prefix(self) -> str:
        return f"dray:{{{self.job}}}:"

    @property
    def rollouts(self) -> str:
        return self.prefix + "rollouts"

    @property
    def index(self) -> str:
        return self.prefix + "rollouts:index"

    @property
    def stream_epoch(self) -> str:
        return self.prefix + "rollouts:epoch"

    @property
    def group_epoch(self) -> str:
        return self.prefix + "rollouts:group_epoch"

    @property
    def counters(self) -> str:
        return self.prefix + "rollouts:counters"

    @property
    def room(self) -> str:
        return self.prefix + "rollouts:room"

    @property
    def dead(self) -> str:
        return self.prefix + "rollouts:dead"

    @property
    def weights(self) -> str:
        return self.prefix + "weights"

    @property
    def fixed(self) -> tuple[str, ...]:
        """Every key but the command streams."""
        return (
            self.rollouts,
            self.index,
            self.stream_epoch,
            self.group_epoch,
            self.counters,
            self.room,
            self.dead,
            self.weights,
        )


def check_name(key: str, name: str) -> str:
    """`name`, if it can be part of a key.

    Raises:
        ConfigError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(key, name, "1 to 64 letters, digits, dots, dashes or underscores")
    return name
