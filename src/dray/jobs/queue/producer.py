"""The rollout stream of a job, from rollout replicas to the policy group: its entries, and the producer's end."""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from redis.exceptions import ResponseError

from dray.clock import Deadline
from dray.errors import ConfigError, ProtocolError
from dray.identifiers import PayloadId
from dray.jobs.queue import keys, scripts
from dray.jobs.queue.connection import (
    BacklogFullError,
    ControlPlaneStopped,
    RedisConnection,
    StreamLostError,
    block_ms,
)
from dray.jobs.queue.keys import GROUP, JobKeys
from dray.jobs.queue.redis_client import RedisClient, paired
from dray.protocol import PayloadRef

# --- entry -------------------------------------------------------------------------------------------------------

_PRODUCER = re.compile(r"[0-9a-f]{32}")
_MAX_NUMBER = 2**64 - 1


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
        work item: index of the work item.
        reference: JSON of the `PayloadRef`.
        payload: the packed payload itself; with a reference, a copy that spares readers the way to the producer.

    Attributes:
        id: the payload's identity; slot and size are 0 where no reference has them.

    Raises:
        ConfigError: a field is out of its range, or there is neither reference nor payload.
    """

    producer: str
    sequence: int
    weight_version: int
    replica: str
    work_item: int
    reference: str | None = None
    payload: bytes | None = field(default=None, repr=False)
    id: PayloadId = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not _PRODUCER.fullmatch(self.producer):
            raise ConfigError("entry.producer", self.producer, "32 hexadecimal digits in lower case")
        for name in ("sequence", "weight_version", "work_item"):
            value = getattr(self, name)
            if not 0 <= value <= _MAX_NUMBER:
                raise ConfigError(f"entry.{name}", value, "an integer from 0 to 2**64 - 1")
        if self.reference is None and self.payload is None:
            raise ConfigError("entry", None, "must have a reference, a payload, or both", "is empty")
        slot = nbytes = 0
        if self.reference is not None:
            with contextlib.suppress(ProtocolError):  # reading the payload fails with it
                found = PayloadRef.from_json(self.reference)
                slot, nbytes = found.slot, found.nbytes
        object.__setattr__(self, "id", PayloadId(bytes.fromhex(self.producer), self.sequence, slot, nbytes))

    @property
    def identity(self) -> str:
        """``producer:sequence``."""
        return self.id.key

    def to_fields(self) -> list[bytes | str | int]:
        """Names and values for XADD, one after the other."""
        fields: list[bytes | str | int] = [
            keys.PRODUCER, self.producer,
            keys.SEQUENCE, self.sequence,
            keys.WEIGHT_VERSION, self.weight_version,
            keys.REPLICA, self.replica,
            keys.WORK_ITEM, self.work_item,
        ]  # fmt: skip
        if self.reference is not None:
            fields += [keys.REFERENCE, self.reference]
        if self.payload is not None:
            fields += [keys.PAYLOAD, self.payload]
        return fields

    @classmethod
    def from_fields(cls, fields: Mapping[bytes, bytes]) -> RolloutEntry:
        """The entry that `to_fields` wrote.

        Raises:
            ProtocolError: a field is missing or malformed.
        """
        reference = fields.get(keys.REFERENCE)
        try:
            return cls(
                producer=fields[keys.PRODUCER].decode(),
                sequence=int(fields[keys.SEQUENCE]),
                weight_version=int(fields[keys.WEIGHT_VERSION]),
                replica=fields[keys.REPLICA].decode(),
                work_item=int(fields[keys.WORK_ITEM]),
                reference=None if reference is None else reference.decode(),
                payload=fields.get(keys.PAYLOAD),
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


# --- rollout queue -----------------------------------------------------------------------------------------------

# The rollout stream of a job: from rollout replicas to the policy group.
#
# ::
#
#     RolloutProducer: attach → publish … publish     StreamLostError → attach, publish all payloads again
#     RolloutConsumer: receive → train → commit       or discard what is too old
#
# Delivery is at least once. An entry is in the stream from `publish` to `commit` or `discard`, is given to one
# consumer of the group at a time, and changes hands only by `claim_from`, when its consumer was declared dead. A
# consumer never hands out what it holds or has ended already, so that publishing again after Redis was restarted
# empty gives no payload twice.

logger = logging.getLogger("dray.jobs.queue")

T = TypeVar("T")


class RolloutQueue:
    """What producers, consumers and mere observers of the stream share; thread-safe.

    Args:
        connection: shared with others; its shutdown event ends every wait here.
        keys: the job's names.
        epoch: epoch of the policy group to put back if Redis has lost it.
    """

    def __init__(self, connection: RedisConnection, keys: JobKeys, *, epoch: int | None = None) -> None:
        self._connection = connection
        self._keys = keys
        self._epoch = epoch
        self._stream_epoch: str | None = None

    def attach(self, timeout: float | None = 30.0) -> bool:
        """Make the stream and its group if they are missing, and take up the stream's epoch.

        Returns:
            True if this is another stream than before: every payload that is READY or being read must be published
            again.

        Raises:
            ControlPlaneError: Redis does not answer, or refuses.
        """
        before = self._stream_epoch
        self._connection.call("attach to the rollout stream", self._attach, self._deadline(timeout))
        return before is not None and before != self._stream_epoch

    def backlog(self, timeout: float | None = 30.0) -> int:
        """Entries in the stream: published and not ended.

        Raises:
            ControlPlaneError: Redis does not answer, or refuses.
        """
        return int(
            self._connection.call(
                "measure the backlog",
                lambda client: client.do("XLEN", self._keys.rollouts),
                self._deadline(timeout),
                reads_only=True,
            )
        )

    def statistics(self, timeout: float | None = 30.0) -> QueueStatistics:
        """What the stream holds and has seen, over all producers and consumers.

        Raises:
            ControlPlaneError: Redis does not answer, or refuses.
        """
        keys = [self._keys.rollouts, self._keys.counters, self._keys.dead]
        backlog, pending, dead, oldest, now_ms, counters = self._connection.call(
            "read statistics",
            lambda client: scripts.STATISTICS.run(client, keys, [GROUP]),
            self._deadline(timeout),
            reads_only=True,
        )
        return QueueStatistics(
            backlog=backlog,
            pending=pending,
            dead_letters=dead,
            oldest_age=None if not oldest else max(0.0, (now_ms - int(oldest.split(b"-")[0])) / 1000),
            counters={name.decode(): int(value) for name, value in paired(counters).items()},
        )

    def listed_work_items(self, timeout: float | None = 30.0) -> list[int]:
        """The work item of every entry of the stream.

        Raises:
            ControlPlaneError: Redis does not answer, or refuses.
        """
        work_items = self._connection.call(
            "list work items",
            lambda client: scripts.LISTED_WORK_ITEMS.run(client, [self._keys.rollouts], []),
            self._deadline(timeout),
            reads_only=True,
        )
        return [int(work_item) for work_item in work_items if work_item.isdigit()]

    def raise_counters(self, least: Mapping[str, int], timeout: float | None = 30.0) -> None:
        """Put counters that are lower, as after a restart of Redis, at what the caller knows.

        Raises:
            ControlPlaneError: Redis does not answer, or refuses.
        """
        arguments = [part for counter in least.items() for part in counter]
        self._connection.call(
            "raise counters",
            lambda client: scripts.RAISE_COUNTERS.run(client, [self._keys.counters], arguments),
            self._deadline(timeout),
        )

    def dead_letters(self, count: int = 100, timeout: float | None = 30.0) -> list[dict[str, str]]:
        """The newest `count` dead letters, newest first, with the fields that `names` lists.

        Raises:
            ControlPlaneError: Redis does not answer, or refuses.
        """
        letters = self._connection.call(
            "read dead letters",
            lambda client: client.do("XREVRANGE", self._keys.dead, "+", "-", "COUNT", count),
            self._deadline(timeout),
            reads_only=True,
        )
        return [
            {name.decode(): value.decode(errors="replace") for name, value in paired(fields).items()}
            for _, fields in letters
        ]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._keys.job} at {self._connection.address}>"

    def _deadline(self, timeout: float | None) -> Deadline:
        return Deadline.after(timeout, self._connection.clock)

    def _attach(self, client: RedisClient) -> bool:
        """Whether anything was missing."""
        keys = [self._keys.rollouts, self._keys.index, self._keys.stream_epoch, self._keys.group_epoch]
        epoch = "" if self._epoch is None else self._epoch
        stream_epoch, made = scripts.ATTACH.run(client, keys, [GROUP, secrets.token_hex(8), epoch])
        self._stream_epoch = stream_epoch.decode()
        return bool(made)

    def _healing(self, operation: Callable[[RedisClient], T]) -> Callable[[RedisClient], T]:
        # NOGROUP has no exception class of its own. What tells it: attaching finds something missing, or another
        # epoch than before, because somebody else has made the stream again meanwhile.
        def healed(client: RedisClient) -> T:
            while True:
                before = self._stream_epoch
                try:
                    return operation(client)
                except ResponseError:
                    made = self._attach(client)
                    if not made and self._stream_epoch == before:
                        raise
                    if before is not None:
                        logger.warning("the rollout stream of job %s was lost and made again", self._keys.job)

        return healed


# --- rollout producer --------------------------------------------------------------------------------------------

# What the script LISTED returns for an entry.
_ENDED, _LISTED, _TRIMMED = range(3)


class RolloutProducer(RolloutQueue):
    """Publishes entries; thread-safe.

    Args:
        connection: shared with others; its shutdown event ends every wait here.
        keys: the job's names.
        max_backlog: `publish` waits while the stream holds this many entries; None for references, which the
            producers' rings bound.

    Raises:
        ConfigError: `max_backlog` is less than 1.
    """

    def __init__(self, connection: RedisConnection, keys: JobKeys, *, max_backlog: int | None = None) -> None:
        if max_backlog is not None and max_backlog < 1:
            raise ConfigError("max_backlog", max_backlog, "at least 1, or None")
        super().__init__(connection, keys)
        self._max_backlog = max_backlog

    def publish(self, entry: RolloutEntry, timeout: float | None = 30.0) -> bool:
        """Put `entry` into the stream, unless its identity is there and no other client has removed it.

        Args:
            entry: what to publish.
            timeout: seconds to wait for Redis and, with `max_backlog`, for room; None: until shutdown.

        Returns:
            True if it was added, False if it was there.

        Raises:
            StreamLostError: Redis was restarted empty; nothing was published.
            BacklogFullError: there was no room until the deadline.
            ControlPlaneStopped: there was no room when shutdown began.
            ControlPlaneError: Redis does not answer, or refuses.
        """
        deadline = self._deadline(timeout)
        if self._stream_epoch is None:
            self._connection.call("attach to the rollout stream", self._attach, deadline)
        keys = [getattr(self._keys, name) for name in ("rollouts", "index", "stream_epoch", "counters", "room")]
        arguments = [self._stream_epoch or "", entry.identity, GROUP, self._max_backlog or 0, *entry.to_fields()]
        what = f"publish {entry.identity}"
        while True:
            status, *after = self._connection.call(
                what, lambda client: scripts.PUBLISH.run(client, keys, arguments), deadline
            )
            if status == b"lost":
                raise StreamLostError(f"{what}: Redis was restarted empty; payloads must be published again")
            if status != b"full":
                return bool(status == b"added")
            if self._connection.shutdown.is_set():
                raise ControlPlaneStopped(f"{what}: shutdown began while the stream was full")
            if deadline.expired:
                raise BacklogFullError(
                    f"{what}: the stream holds {self._max_backlog} entries that were not trained on",
                    elapsed=deadline.elapsed,
                )
            self._wait_for_room(after[0], deadline)

    def restore(self, waiting: Callable[[], Iterable[RolloutEntry]]) -> None:
        """Make the stream if it is missing; if it is another one than before, publish again what is `waiting`.

        Raises:
            ControlPlaneError: Redis does not answer, or refuses; or as `publish`.
        """
        while self.attach():
            # Another restart meanwhile makes another stream, which `attach` tells: all of it again.
            with contextlib.suppress(StreamLostError):
                for entry in waiting():
                    self.publish(entry)

    def publish_trimmed(self, entries: Sequence[RolloutEntry], timeout: float | None = 30.0) -> list[RolloutEntry]:
        """Publish again those of `entries`, all published by this process, whose stream entries another client has
        removed (XTRIM, XDEL) and that no consumer holds.

        Returns:
            Those of `entries` that the stream no longer lists because they were ended: a READY payload among them
            is an orphan that no consumer will ask for.

        Raises:
            StreamLostError: Redis was restarted empty, so that the index proves nothing.
            ControlPlaneError: Redis does not answer, or refuses; or as `publish`.
        """
        deadline = self._deadline(timeout)
        keys = [self._keys.rollouts, self._keys.index, self._keys.stream_epoch]
        arguments = [self._stream_epoch or "", GROUP, *(entry.identity for entry in entries)]
        status, *states = self._connection.call(
            "look entries up",
            lambda client: scripts.LISTED.run(client, keys, arguments),
            deadline,
            reads_only=True,
        )
        if status == b"lost":
            raise StreamLostError("look entries up: Redis was restarted empty")
        by_state: dict[int, list[RolloutEntry]] = {_ENDED: [], _LISTED: [], _TRIMMED: []}
        for entry, state in zip(entries, states[0], strict=True):
            by_state[state].append(entry)
        if trimmed := by_state[_TRIMMED]:
            logger.warning(
                "another client has removed %d entries from the rollout stream of job %s; publishing them again",
                len(trimmed), self._keys.job,
            )  # fmt: skip
        for entry in trimmed:
            self.publish(entry, deadline.timeout)
        return by_state[_ENDED]

    def _wait_for_room(self, after: bytes, deadline: Deadline) -> None:
        self._connection.poll(
            "wait for room in the stream",
            lambda client: client.do(
                "XREAD", "COUNT", 1, "BLOCK", block_ms(deadline), "STREAMS", self._keys.room, after
            ),
            deadline,
            None,
            reads_only=True,
        )
