"""The policy replica's end of the rollout stream."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from dray.clock import Deadline
from dray.errors import ConfigError, ControlPlaneError, ProtocolError
from dray.jobs.queue import scripts
from dray.jobs.queue.connection import OldEpochError, RedisConnection, block_ms
from dray.jobs.queue.keys import GROUP, JobKeys, check_name
from dray.jobs.queue.producer import CommitOutcome, Delivery, RolloutEntry, RolloutQueue
from dray.jobs.queue.redis_client import RedisClient, paired

# --- ledger ------------------------------------------------------------------------------------------------------


class DeliveryLedger:
    """The deliveries of one consumer, by identity; thread-safe.

    ::

        (unknown) ── hold ──► held ── end ──► ended ── `remembered` others ended later ──► (unknown)
                                └──── drop ──► (unknown)

    Args:
        remembered: how many ended identities are kept.
    """

    def __init__(self, remembered: int) -> None:
        self._remembered = remembered
        self._lock = threading.Lock()
        self._held: dict[str, Delivery] = {}
        self._since: dict[str, float] = {}
        self._ended: OrderedDict[str, None] = OrderedDict()

    def split_ended(self, deliveries: Iterable[Delivery]) -> tuple[list[Delivery], list[Delivery]]:
        """Those that were not ended before, and those that were."""
        current: list[Delivery] = []
        repeated: list[Delivery] = []
        with self._lock:
            for delivery in deliveries:
                (repeated if delivery.entry.identity in self._ended else current).append(delivery)
        return current, repeated

    def hold(self, deliveries: Iterable[Delivery], now: float = 0.0) -> list[Delivery]:
        """Hold `deliveries` since `now`; returns those that were not held already.

        One that is held and comes again under another id (published again after a restart) keeps the new id.
        """
        fresh: list[Delivery] = []
        with self._lock:
            for delivery in deliveries:
                identity = delivery.entry.identity
                held = self._held.get(identity)
                if held is None:
                    fresh.append(delivery)
                    self._since[identity] = now
                self._held[identity] = replace(held or delivery, entry_id=delivery.entry_id)
        return fresh

    def end(self, deliveries: Iterable[Delivery]) -> None:
        """These were trained on or discarded: recognise them if they come again."""
        self.remember(delivery.entry.identity for delivery in deliveries)

    def remember(self, identities: Iterable[str]) -> None:
        """As `end`, for what may never have been held here."""
        with self._lock:
            for identity in identities:
                self._forget(identity)
                self._ended[identity] = None
            while len(self._ended) > self._remembered:
                self._ended.popitem(last=False)

    def drop(self, deliveries: Iterable[Delivery]) -> None:
        """These are another consumer's now."""
        with self._lock:
            for delivery in deliveries:
                self._forget(delivery.entry.identity)

    def _forget(self, identity: str) -> None:
        self._held.pop(identity, None)
        self._since.pop(identity, None)

    @property
    def oldest_since(self) -> float | None:
        """Since when that is held which has been held longest."""
        with self._lock:
            return next(iter(self._since.values()), None)

    def held_ids(self) -> set[str]:
        """Stream ids of what is held."""
        with self._lock:
            return {delivery.entry_id for delivery in self._held.values()}

    def __len__(self) -> int:
        """How many deliveries are held."""
        with self._lock:
            return len(self._held)


# --- consumer ----------------------------------------------------------------------------------------------------

logger = logging.getLogger("dray.jobs.queue")

_PAGE = 200
_ENDED, _NOT_THERE = 1, 0


class RolloutConsumer(RolloutQueue):
    """One member of the policy group; thread-safe.

    Args:
        connection: shared with others; its shutdown event ends every wait here.
        keys: the job's names.
        consumer: the member's name.
        max_deliveries: an entry given to this many consumers is not claimed again but becomes a dead letter;
            0 for no limit.
        epoch: epoch of the policy group that commits are made under; None: not fenced, until `begin_epoch`.
        remembered: how many ended identities are kept to recognise what is published again; at least the slots
            of all producers' rings.

    Raises:
        ConfigError: the name cannot be one, or `max_deliveries` is negative.
    """

    def __init__(
        self,
        connection: RedisConnection,
        keys: JobKeys,
        consumer: str,
        *,
        max_deliveries: int = 3,
        epoch: int | None = None,
        remembered: int = 65536,
    ) -> None:
        if max_deliveries < 0:
            raise ConfigError("max_deliveries", max_deliveries, "at least 0")
        super().__init__(connection, keys, epoch=epoch)
        self.consumer = check_name("consumer", consumer)
        self._max_deliveries = max_deliveries
        self._ledger = DeliveryLedger(remembered)
        self._lock = threading.Lock()
        self._dead_letters: list[RolloutEntry] = []
        # Entries may be pending for this consumer without being held: those of an earlier process of it, and those
        # whose delivery was lost on the way.
        self._may_have_unseen = True
        self._found: list[Delivery] = []

    def receive(self, count: int = 1, timeout: float | None = 0.0) -> list[Delivery]:
        """Up to `count` entries for this consumer, as soon as there is one.

        What an earlier process of the same name left unfinished comes first. A missing stream is made.

        Args:
            count: at least 1.
            timeout: seconds to wait for the first one; None: until shutdown.

        Returns:
            The deliveries; none when the time has passed, when shutdown has begun, and during an outage that is
            shorter than the connection's patience.

        Raises:
            ControlPlaneError: Redis is lost, or refuses.
        """
        if count < 1:
            raise ConfigError("count", count, "at least 1")
        deadline = self._deadline(timeout)
        while True:
            found: list[Delivery] = []
            if self._may_have_unseen:
                found = self._connection.poll("look for lost deliveries", self._take_unseen, deadline, [])
            if not found:
                found = self._connection.poll("receive", partial(self._read, count, deadline), deadline, [])
            with self._lock:
                self._found += found
                deliveries, self._found = self._found[:count], self._found[count:]
            if deliveries or deadline.expired or self._connection.shutdown.is_set():
                return deliveries

    def commit(self, deliveries: Iterable[Delivery], timeout: float | None = 30.0) -> CommitOutcome:
        """End deliveries that were trained on: acknowledge, remove and count them, all at once.

        Safe to repeat. After it, the payloads may be freed (`CONSUME`) but for those that were refused.

        Raises:
            OldEpochError: the group has a newer epoch; nothing was committed.
            ControlPlaneError: Redis does not answer, or refuses.
        """
        return self._finish("trained", list(deliveries), timeout)

    def commit_trained(
        self,
        identities: Collection[str],
        timeout: float | None = 30.0,
        *,
        counter: Literal["trained", "repeated"] = "trained",
    ) -> list[RolloutEntry]:
        """End payloads that weights were trained on in an earlier epoch of the group, whichever consumer
        holds them; as `commit`.

        What comes of them later, published again, is not handed out.

        Args:
            identities: ``producer:sequence`` of each.
            counter: what they are counted as; ``"repeated"`` for those that had been committed.

        Returns:
            The entries of those that had not been ended before, so that the payloads can be freed.
        """
        if not identities:
            return []
        keys = [self._keys.rollouts, self._keys.index]
        found = self._connection.call(
            "look up what was trained on",
            lambda client: scripts.ENTRIES.run(client, keys, list(identities)),
            self._deadline(timeout),
            reads_only=True,
        )
        self._end_pairs(counter, [(identity, "") for identity in identities], timeout)
        self._ledger.remember(identities)
        return [RolloutEntry.from_fields(paired(fields)) for fields in found]

    def discard(
        self,
        deliveries: Iterable[Delivery],
        timeout: float | None = 30.0,
        *,
        counter: Literal["discarded", "too_old"] = "discarded",
    ) -> CommitOutcome:
        """End deliveries that will not be trained on, and count them as `counter`; else as `commit`."""
        return self._finish(counter, list(deliveries), timeout)

    def claim_from(self, dead_consumer: str, timeout: float | None = 30.0) -> list[Delivery]:
        """Take over everything that was given to a consumer which was declared dead, and forget that consumer.

        What was given to `max_deliveries` consumers becomes a dead letter instead: see `take_dead_letters`.

        Raises:
            ControlPlaneError: Redis does not answer, or refuses.
        """
        check_name("dead_consumer", dead_consumer)
        claimed: list[Delivery] = []  # outside: what one attempt was given, the next would not be given again

        def claim(client: RedisClient) -> None:
            self._claim_all(client, dead_consumer, claimed)

        self._connection.call(f"claim what {dead_consumer} left", self._healing(claim), self._deadline(timeout))
        return claimed

    def claim_others(self, timeout: float | None = 30.0) -> list[Delivery]:
        """`claim_from` every other consumer: for a group of one reader, all others belong to older epochs.

        Raises:
            ControlPlaneError: Redis does not answer, or refuses.
        """
        claimed: list[Delivery] = []

        def claim(client: RedisClient) -> None:
            for fields in client.do("XINFO", "CONSUMERS", self._keys.rollouts, GROUP):
                name = paired(fields)[b"name"].decode()
                if name != self.consumer:
                    self._claim_all(client, name, claimed)

        self._connection.call("claim what others left", self._healing(claim), self._deadline(timeout))
        return claimed

    def take_dead_letters(self) -> list[RolloutEntry]:
        """The entries that became dead letters at this consumer's hands since the last call, so that the caller
        can free their payloads."""
        with self._lock:
            found, self._dead_letters = self._dead_letters, []
        return found

    def begin_epoch(self, after: int = 0, timeout: float | None = 30.0) -> int:
        """Begin a new epoch of the policy group: commits under an older one are refused from now on.

        Args:
            after: an epoch known from elsewhere that the new one must exceed.

        Returns:
            The new epoch, which is this queue's from now on.

        Raises:
            ControlPlaneError: Redis does not answer, or refuses.
        """
        self._epoch = int(
            self._connection.call(
                "begin an epoch",
                lambda client: scripts.BEGIN_EPOCH.run(client, [self._keys.group_epoch], [after]),
                self._deadline(timeout),
            )
        )
        return self._epoch

    def drop_trimmed(self, timeout: float | None = 30.0, *, held: bool = False) -> int:
        """Count payloads whose entries another client removed from the stream, and forget them; returns how many.

        Their producers publish such payloads again while they live: this is for those that are gone.

        Args:
            held: those too that this consumer was given, which a commit would end: at the end of a job.

        Raises:
            ControlPlaneError: Redis does not answer, or refuses.
        """
        keys = [self._keys.rollouts, self._keys.index, self._keys.counters]

        def drop(client: RedisClient) -> int:
            return int(scripts.DROP_TRIMMED.run(client, keys, [GROUP, self.consumer if held else ""]))

        return self._connection.call(
            "count what was removed from the stream", self._healing(drop), self._deadline(timeout)
        )

    def check_epoch(self, timeout: float | None = 30.0) -> None:
        """Make sure that the group has no newer epoch.

        Raises:
            OldEpochError: it has a newer one.
            ControlPlaneError: Redis does not answer, or refuses.
        """
        self._end_pairs("trained", [], timeout)

    @property
    def epoch(self) -> int | None:
        """The epoch that this queue commits under."""
        return self._epoch

    @property
    def held(self) -> int:
        """How many deliveries this consumer was given and has not ended."""
        return len(self._ledger)

    @property
    def oldest_held(self) -> float | None:
        """Seconds since the oldest delivery that is not ended was received; None if there is none."""
        since = self._ledger.oldest_since
        return None if since is None else self._connection.clock.now() - since

    def __repr__(self) -> str:
        return f"<RolloutConsumer {self.consumer} of {self._keys.job} at {self._connection.address}>"

    def _claim_all(self, client: RedisClient, source: str, claimed: list[Delivery]) -> None:
        claimed += self._claim_pending(client, source)
        if source != self.consumer:
            scripts.FORGET_CONSUMER.run(client, [self._keys.rollouts], [GROUP, source])

    def _read(self, count: int, deadline: Deadline, client: RedisClient) -> list[Delivery]:
        if self._found:
            return []
        block: list[str | int] = [] if deadline.expired else ["BLOCK", block_ms(deadline)]
        read: list[str | int] = ["XREADGROUP", "GROUP", GROUP, self.consumer, "COUNT", count]
        command = [*read, *block, "STREAMS", self._keys.rollouts, ">"]
        with self._noting_interruption():
            reply = self._healing(lambda client: client.do(*command))(client)
            return [] if not reply else self._accept(client, [(i, 1, fields) for i, fields in reply[0][1]])

    def _take_unseen(self, client: RedisClient) -> list[Delivery]:
        self._may_have_unseen = False
        return self._healing(lambda client: self._claim_pending(client, self.consumer))(client)

    @contextmanager
    def _noting_interruption(self) -> Iterator[None]:
        # What is interrupted may have come between the server's giving and the arrival here.
        try:
            yield
        except BaseException:
            self._may_have_unseen = True
            raise

    def _claim_pending(self, client: RedisClient, source: str) -> list[Delivery]:
        held = self._ledger.held_ids()
        moved: list[tuple[bytes, int, list[bytes]]] = []
        start = "-"
        with self._noting_interruption():
            while True:
                page = client.do("XPENDING", self._keys.rollouts, GROUP, start, "+", _PAGE, source)
                ids = [pending[0] for pending in page if pending[0].decode() not in held]
                moved += self._claim(client, source, self._max_deliveries, "deliveries", ids)
                if len(page) < _PAGE:
                    return self._accept(client, moved)
                start = "(" + page[-1][0].decode()

    def _claim(
        self, client: RedisClient, source: str, limit: int, reason: str, ids: Sequence[bytes]
    ) -> list[tuple[bytes, int, list[bytes]]]:
        """Moves entries to this consumer, or makes them dead letters.

        Returns (id, deliveries, fields) of those that moved.
        """
        if not ids:
            return []
        keys = [self._keys.rollouts, self._keys.index, self._keys.counters, self._keys.dead, self._keys.room]
        moved = scripts.CLAIM.run(client, keys, [GROUP, source, self.consumer, limit, reason, *ids])
        for entry_id, deliveries, dead, fields in moved:
            if dead:
                self._note_dead_letter(entry_id, deliveries, reason, fields)
        return [(entry_id, deliveries, fields) for entry_id, deliveries, dead, fields in moved if not dead]

    def _note_dead_letter(self, entry_id: bytes, deliveries: int, reason: str, fields: list[bytes]) -> None:
        logger.warning("entry %s is a dead letter after %d deliveries: %s", entry_id.decode(), deliveries, reason)
        try:
            entry = RolloutEntry.from_fields(paired(fields))
        except ProtocolError:
            return  # it does not name a payload that could be freed
        with self._lock:
            self._dead_letters.append(entry)

    def _accept(self, client: RedisClient, delivered: list[tuple[bytes, int, Any]]) -> list[Delivery]:
        """The new ones among what the server has given to this consumer; ends those that were ended before."""
        deliveries: list[Delivery] = []
        malformed: list[bytes] = []
        for entry_id, count, fields in delivered:
            try:
                deliveries.append(
                    Delivery(
                        RolloutEntry.from_fields(paired(fields or [])), self.consumer, count, entry_id.decode()
                    )
                )
            except ProtocolError as error:
                logger.warning("%s", error)
                malformed.append(entry_id)
        current, repeated = self._ledger.split_ended(deliveries)
        end_malformed = partial(self._claim, source=self.consumer, limit=1, reason="malformed", ids=malformed)
        self._healing(end_malformed)(client)
        if repeated:
            pairs = [(delivery.entry.identity, delivery.consumer) for delivery in repeated]
            self._run_finish(client, "repeated", pairs, "")
        # Held only now: had one of the commands failed, the caller would not have been given them.
        return self._ledger.hold(current, self._connection.clock.now())

    def _finish(self, counter: str, deliveries: list[Delivery], timeout: float | None) -> CommitOutcome:
        if not deliveries:
            return CommitOutcome((), (), ())
        pairs = [(delivery.entry.identity, delivery.consumer) for delivery in deliveries]
        codes = self._end_pairs(counter, pairs, timeout)
        outcome = CommitOutcome(
            ended=tuple(d for d, code in zip(deliveries, codes, strict=True) if code == _ENDED),
            unknown=tuple(d for d, code in zip(deliveries, codes, strict=True) if code == _NOT_THERE),
            refused=tuple(d for d, code in zip(deliveries, codes, strict=True) if code < _NOT_THERE),
        )
        self._ledger.end(outcome.ended + outcome.unknown)
        self._ledger.drop(outcome.refused)
        return outcome

    def _end_pairs(self, counter: str, pairs: list[tuple[str, str]], timeout: float | None) -> list[int]:
        """The answer of the script for each (identity, consumer)."""
        epoch: int | str = "" if self._epoch is None else self._epoch

        def finish(client: RedisClient) -> Any:
            reply = self._run_finish(client, counter, pairs, epoch)
            if reply[0] == b"lost":
                self._attach(client)
                reply = self._run_finish(client, counter, pairs, epoch)
            return reply

        status, answer = self._connection.call(
            f"end {len(pairs)} deliveries as {counter}", self._healing(finish), self._deadline(timeout)
        )
        if status == b"old":
            raise OldEpochError(
                f"the policy group has epoch {int(answer)}; {self.consumer} still has epoch {epoch}"
            )
        if status != b"done":
            raise ControlPlaneError(f"the epoch of the policy group of job {self._keys.job} keeps being lost")
        return list(answer)

    def _run_finish(
        self, client: RedisClient, counter: str, pairs: list[tuple[str, str]], epoch: int | str
    ) -> Any:
        keys = [getattr(self._keys, name) for name in ("rollouts", "index", "group_epoch", "counters", "room")]
        parts = [part for pair in pairs for part in pair]
        return scripts.FINISH.run(client, keys, [GROUP, epoch, counter, *parts])
