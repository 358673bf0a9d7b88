"""The rollout stream of a job, from rollout replicas to the policy group: its entries, and the producer's end.

```
RolloutProducer: attach → publish … publish     StreamLostError → attach, publish all payloads again
RolloutConsumer: receive → train → commit       or discard what is too old
```

Delivery is at least once. An entry is in the stream from `publish` to `commit` or `discard`, is given to one
consumer of the group at a time, and changes hands only when it is claimed. A consumer never hands out what it
holds or has ended already, so that publishing again after Redis was restarted empty gives no payload twice.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from redis.exceptions import ResponseError

from dray.clock import Deadline
from dray.errors import ConfigError, ProtocolError
from dray.identifiers import PayloadId
from dray.jobs.queue import scripts
from dray.jobs.queue.connection import (
    BacklogFullError,
    ControlPlaneStopped,
    RedisClient,
    RedisConnection,
    StreamLostError,
    block_ms,
    paired,
)
from dray.jobs.queue.scripts import JobKeys, Script
from dray.protocol import PayloadRef

# --- entry -------------------------------------------------------------------------------------------------------

_PRODUCER = re.compile(r"[0-9a-f]{32}")
_MAX_NUMBER = 2**64 - 1


@dataclass(frozen=True, slots=True)
class RolloutEntry:
    """One payload on its way to the policy: a reference to it, its bytes, or both where it is small.

    (producer, sequence) is its identity: published twice, it is in the stream once. With a reference they are
    those of the `PayloadRef`; for bytes alone, a random id of the replica and a counter of its own. It is payload
    number `part` of the `parts` of its work item, made with weights of version `weight_version`.

    Args:
        reference: JSON of the `PayloadRef`.
        payload: the packed payload itself; with a reference, a copy that spares readers the way to the producer.
        metadata: a JSON object, for the trainer; empty for none.

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
    part: int = 0
    parts: int = 1
    metadata: str = field(default="", repr=False)
    id: PayloadId = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not _PRODUCER.fullmatch(self.producer):
            raise ConfigError("entry.producer", self.producer, "32 hexadecimal digits in lower case")
        for name in ("sequence", "weight_version", "work_item"):
            value = getattr(self, name)
            if not 0 <= value <= _MAX_NUMBER:
                raise ConfigError(f"entry.{name}", value, "an integer from 0 to 2**64 - 1")
        if not 0 <= self.part < self.parts <= _MAX_NUMBER:
            raise ConfigError("entry.part", self.part, f"a number below entry.parts, which is {self.parts}")
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

    def to_fields(self) -> list[Any]:
        """Names and values for XADD, one after the other. Scripts know some of the names, too."""
        names = ["producer", "sequence", "weight_version", "replica", "work_item"]
        if self.parts > 1:
            names += ["part", "parts"]
        if self.metadata:
            names.append("metadata")
        names += [name for name in ("reference", "payload") if getattr(self, name) is not None]
        return [part for name in names for part in (name, getattr(self, name))]

    @classmethod
    def from_fields(cls, fields: Mapping[bytes, bytes]) -> RolloutEntry:
        """The entry that `to_fields` wrote.

        Raises:
            ProtocolError: a field is missing or malformed.
        """
        reference = fields.get(b"reference")
        try:
            return cls(
                producer=fields[b"producer"].decode(),
                sequence=int(fields[b"sequence"]),
                weight_version=int(fields[b"weight_version"]),
                replica=fields[b"replica"].decode(),
                work_item=int(fields[b"work_item"]),
                reference=None if reference is None else reference.decode(),
                payload=fields.get(b"payload"),
                part=int(fields.get(b"part", 0)),
                parts=int(fields.get(b"parts", 1)),
                metadata=_checked_metadata(fields.get(b"metadata", b"")),
            )
        except KeyError as error:
            raise ProtocolError(f"an entry of the rollout stream has no field {error}") from error
        except ValueError as error:  # one of this class's own among them
            raise ProtocolError(f"an entry of the rollout stream is malformed: {error}") from error


def _checked_metadata(text: bytes) -> str:
    """`text`, which must be empty or a JSON object."""
    try:
        if text and not isinstance(json.loads(text), dict):
            raise ValueError("its metadata is no JSON object")
    except RecursionError as error:
        raise ValueError("its metadata is nested too deeply") from error
    return text.decode()


# --- what calls return -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Delivery:
    """An entry that a consumer was given, for the `deliveries`-th time; a commit or a discard must end it."""

    entry: RolloutEntry
    deliveries: int
    entry_id: str


@dataclass(frozen=True, slots=True)
class CommitOutcome:
    """The ends of the deliveries of one commit or discard.

    Attributes:
        ended: acknowledged and removed by this call, and counted.
        unknown: not in the stream: ended before (also by a call whose answer was lost), or lost with the stream.
        refused: given to another consumer meanwhile; it is that one's to end.
    """

    ended: tuple[Delivery, ...]
    unknown: tuple[Delivery, ...]
    refused: tuple[Delivery, ...]


@dataclass(frozen=True, slots=True)
class QueueStatistics:
    """The queue as it was at one moment; counters begin at 0 when Redis is restarted empty.

    Attributes:
        backlog: entries that no commit has ended.
        pending: how many of them were given to a consumer.
        oldest_age: age of the oldest entry in seconds, by the server's clock; None if there is none.
        counters: ``published``; ``duplicates``, refused as published already; ``trained``, committed;
            ``discarded``, lost with their producer; ``too_old``; ``repeated``, published again after they had been
            ended; ``trimmed``, removed from the stream by another client; ``dead_letters``; ``rolled_back``, those
            of ``trained`` whose weights were lost in a crash.
    """

    backlog: int
    pending: int
    oldest_age: float | None
    counters: dict[str, int]


# --- rollout queue -----------------------------------------------------------------------------------------------

logger = logging.getLogger("dray.jobs.queue")

T = TypeVar("T")


class RolloutQueue:
    """What producers, consumers and mere observers of the stream share; thread-safe.

    Every call raises `ControlPlaneError` if Redis refuses, or does not answer within `timeout` seconds. The
    connection's shutdown event ends every wait.
    """

    def __init__(self, connection: RedisConnection, keys: JobKeys) -> None:
        self._connection = connection
        self._keys = keys
        self._stream_epoch: str | None = None
        self.epoch: int | None = None  # of the policy group, to put back if Redis has lost it

    def attach(self, timeout: float | None = 30.0) -> bool:
        """Make the stream and its group if they are missing, and take up the stream's epoch.

        True if this is another stream than before: payloads that are READY or being read must be published again.
        """
        before = self._stream_epoch
        self._connection.call("attach to the rollout stream", self._attach, Deadline.after(timeout))
        return before is not None and before != self._stream_epoch

    def statistics(self, timeout: float | None = 30.0) -> QueueStatistics:
        """What the stream holds and has seen, over all producers and consumers."""
        reply = self._run("read statistics", scripts.STATISTICS, [], Deadline.after(timeout))
        backlog, pending, oldest, now_ms, counters = reply
        return QueueStatistics(
            backlog=backlog,
            pending=pending,
            oldest_age=None if not oldest else max(0.0, (now_ms - int(oldest.split(b"-")[0])) / 1000),
            counters={name.decode(): int(value) for name, value in paired(counters).items()},
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._keys.job} at {self._connection.address}>"

    def _run(self, what: str, script: Script, arguments: Sequence[str | bytes | int], deadline: Deadline) -> Any:
        def run(client: RedisClient) -> Any:
            return script.run(client, self._keys, *arguments)

        return self._connection.call(what, run, deadline, reads_only=script.reads_only)

    def _attach(self, client: RedisClient) -> bool:
        """Whether anything was missing."""
        epoch = "" if self.epoch is None else self.epoch
        stream_epoch, made = scripts.ATTACH.run(client, self._keys, secrets.token_hex(8), epoch)
        self._stream_epoch = stream_epoch.decode()
        return bool(made)

    def _healing(self, operation: Callable[[RedisClient], T]) -> Callable[[RedisClient], T]:
        # NOGROUP has no exception class of its own. It shows when attaching finds something missing, or another
        # epoch than before, because another client has made the stream again meanwhile.
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

# What the script LISTED returns for an entry; 1 is listed.
_ENDED, _TRIMMED = 0, 2


class RolloutProducer(RolloutQueue):
    """Publishes entries; thread-safe.

    Args:
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
            timeout: seconds to wait for Redis and, with `max_backlog`, for room; None: until shutdown.

        Returns:
            Whether it was added.

        Raises:
            StreamLostError: Redis was restarted empty; nothing was published.
            BacklogFullError: there was no room until the deadline.
            ControlPlaneStopped: there was no room when shutdown began.
        """
        deadline = Deadline.after(timeout)
        if self._stream_epoch is None:
            self._connection.call("attach to the rollout stream", self._attach, deadline)
        arguments = [self._stream_epoch or "", entry.identity, self._max_backlog or 0, *entry.to_fields()]
        what = f"publish {entry.identity}"
        while True:
            status, *after = self._run(what, scripts.PUBLISH, arguments, deadline)
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
            BacklogFullError, ControlPlaneStopped: as `publish`.
        """
        while self.attach():
            # Another restart meanwhile makes another stream, which `attach` notices: all of it again.
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
            BacklogFullError, ControlPlaneStopped: as `publish`.
        """
        deadline = Deadline.after(timeout)
        arguments = [self._stream_epoch or "", *(entry.identity for entry in entries)]
        status, *states = self._run("look entries up", scripts.LISTED, arguments, deadline)
        if status == b"lost":
            raise StreamLostError("look entries up: Redis was restarted empty")
        found = list(zip(entries, states[0], strict=True))
        trimmed = [entry for entry, state in found if state == _TRIMMED]
        if trimmed:
            logger.warning(
                "another client has removed %d entries from the rollout stream of job %s; publishing them again",
                len(trimmed), self._keys.job,
            )  # fmt: skip
        for entry in trimmed:
            self.publish(entry, deadline.timeout)
        return [entry for entry, state in found if state == _ENDED]

    def _wait_for_room(self, after: bytes, deadline: Deadline) -> None:
        def wait(client: RedisClient) -> None:
            client.do("XREAD", "COUNT", 1, "BLOCK", block_ms(deadline), "STREAMS", self._keys.room, after)

        self._connection.poll("wait for room in the stream", wait, deadline, None, reads_only=True)
