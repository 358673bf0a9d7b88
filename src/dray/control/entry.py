"""What the rollout stream carries, and how it becomes fields of a stream entry and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from dray.control import names
from dray.errors import ConfigError, ProtocolError

_PRODUCER = re.compile(r"[0-9a-f]{32}")
_LARGEST = 2**64 - 1


@dataclass(frozen=True, slots=True)
class RolloutEntry:
    """One payload on its way to the policy: a reference to it, its bytes, or both where it is small.

    (producer, sequence) is its identity: published twice, it is in the stream once. With a reference they are
    those of the `PayloadRef`; for bytes alone, a random id of the replica and a counter of its own.

    Args:
        producer: 32 hexadecimal digits, in lower case.
        sequence: 0 … 2**64 - 1.
        weight_version: version of the weights that the payload was made with.
        replica: name of the rollout replica.
        prompt: index of the prompt.
        reference: JSON of the `PayloadRef`.
        payload: the packed payload itself; with a reference, a copy that spares readers the way to the producer.

    Raises:
        ConfigError: a field is out of its range, or there is neither reference nor payload.
    """

    producer: str
    sequence: int
    weight_version: int
    replica: str
    prompt: int
    reference: str | None = None
    payload: bytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not _PRODUCER.fullmatch(self.producer):
            raise ConfigError("entry.producer", self.producer, "32 hexadecimal digits in lower case")
        for name in ("sequence", "weight_version", "prompt"):
            value = getattr(self, name)
            if not 0 <= value <= _LARGEST:
                raise ConfigError(f"entry.{name}", value, "an integer from 0 to 2**64 - 1")
        if self.reference is None and self.payload is None:
            raise ConfigError("entry", None, "must have a reference, a payload, or both", "is empty")

    @property
    def identity(self) -> str:
        """``producer:sequence``."""
        return f"{self.producer}:{self.sequence}"

    def to_fields(self) -> list[bytes | str | int]:
        """Names and values for XADD, one after the other."""
        fields: list[bytes | str | int] = [
            names.PRODUCER, self.producer,
            names.SEQUENCE, self.sequence,
            names.WEIGHT_VERSION, self.weight_version,
            names.REPLICA, self.replica,
            names.PROMPT, self.prompt,
        ]  # fmt: skip
        if self.reference is not None:
            fields += [names.REFERENCE, self.reference]
        if self.payload is not None:
            fields += [names.PAYLOAD, self.payload]
        return fields

    @classmethod
    def from_fields(cls, fields: Mapping[bytes, bytes]) -> RolloutEntry:
        """The entry that `to_fields` wrote.

        Raises:
            ProtocolError: a field is missing or malformed.
        """
        reference = fields.get(names.REFERENCE)
        try:
            return cls(
                producer=fields[names.PRODUCER].decode(),
                sequence=int(fields[names.SEQUENCE]),
                weight_version=int(fields[names.WEIGHT_VERSION]),
                replica=fields[names.REPLICA].decode(),
                prompt=int(fields[names.PROMPT]),
                reference=None if reference is None else reference.decode(),
                payload=fields.get(names.PAYLOAD),
            )
        except KeyError as error:
            raise ProtocolError(f"an entry of the rollout stream has no field {error}") from error
        except ValueError as error:  # one of this class's own among them
            raise ProtocolError(f"an entry of the rollout stream is malformed: {error}") from error


@dataclass(frozen=True, slots=True)
class Delivery:
    """An entry that was given to a consumer and that a commit or a discard must end.

    Args:
        entry: what was published.
        consumer: whom it was given to.
        deliveries: how often it has been given to a consumer, this time included.
        entry_id: its id in the stream.
    """

    entry: RolloutEntry
    consumer: str
    deliveries: int
    entry_id: str


@dataclass(frozen=True, slots=True)
class CommitOutcome:
    """What became of the deliveries of one commit or discard.

    Args:
        ended: acknowledged and removed by this call, and counted.
        unknown: not in the stream: ended before (also by a call whose answer was lost), or lost with the stream.
        refused: given to another consumer meanwhile; it is that one's to end.
    """

    ended: tuple[Delivery, ...]
    unknown: tuple[Delivery, ...]
    refused: tuple[Delivery, ...]


@dataclass(frozen=True, slots=True)
class QueueStatistics:
    """The queue as it was at one moment; counters start again when Redis is restarted empty.

    Args:
        backlog: entries that no commit has ended.
        pending: how many of them were given to a consumer.
        dead_letters: dead letters kept.
        oldest_age: age of the oldest entry in seconds, by the server's clock; None if there is none.
        counters: ``published``; ``duplicates``, refused as published already; ``trained``, committed;
            ``discarded``, lost with their producer; ``too_old``; ``repeated``, published again after they had been
            ended; ``trimmed``, removed from the stream by another client; ``dead_letters``; ``rolled_back``, those
            of ``trained`` whose weights were lost in a crash.
    """

    backlog: int
    pending: int
    dead_letters: int
    oldest_age: float | None
    counters: dict[str, int]
