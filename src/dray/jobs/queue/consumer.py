"""The policy replica's end of the rollout stream."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from dray.clock import MONOTONIC, Deadline
from dray.errors import ConfigError, ControlPlaneError, ProtocolError
from dray.jobs.queue import scripts
from dray.jobs.queue.connection import OldEpochError, RedisClient, RedisConnection, block_ms, paired
from dray.jobs.queue.producer import CommitOutcome, Delivery, RolloutEntry, RolloutQueue
from dray.jobs.queue.scripts import GROUP, JobKeys, check_name

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
        self._held: dict[str, tuple[Delivery, float]] = {}
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
                if identity not in self._held:
                    fresh.append(delivery)
                held, since = self._held.get(identity, (delivery, now))
                self._held[identity] = replace(held, entry_id=delivery.entry_id), since
        return fresh

    def end(self, identities: Iterable[str]) -> None:
        """These were trained on or discarded: recognise them if they come again."""
        with self._lock:
            for identity in identities:
                self._held.pop(identity, None)
                self._ended[identity] = None
            while len(self._ended) > self._remembered:
                self._ended.popitem(last=False)

    def drop(self, identities: Iterable[str]) -> None:
        """These are another consumer's now."""
        with self._lock:
            for identity in identities:
                self._held.pop(identity, None)

    @property
    def oldest_since(self) -> float | None:
        """Since when that is held which has been held longest."""
        with self._lock:
            return next((since for _, since in self._held.values()), None)

    def held_ids(self) -> set[str]:
        """Stream ids of what is held."""
        with self._lock:
            return {delivery.entry_id for delivery, _ in self._held.values()}


# --- consumer ----------------------------------------------------------------------------------------------------

logger = logging.getLogger("dray.jobs.queue")

_PAGE = 200
# What the script FINISH returns for an entry; -1 is one that another consumer was given.
_ENDED, _NOT_THERE = 1, 0

_Given = tuple[bytes, int, Any]
"""What the server has given to a consumer: the entry's id, how often it was delivered, its fields."""


class RolloutConsumer(RolloutQueue):
    """One member of the policy group; thread-safe.

    Args:
        max_deliveries: an entry given to this many consumers is not claimed again but becomes a dead letter;
            0 for no limit.
        remembered: how many ended identities are kept to recognise what is published again; at least the slots
            of all producers' rings.

    Attributes:
        epoch: epoch of the policy group that commits are made under; None: they are not fenced.

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
        remembered: int = 65536,
    ) -> None:
        if max_deliveries < 0:
            raise ConfigError("max_deliveries", max_deliveries, "at least 0")
        super().__init__(connection, keys)
        self.consumer = check_name("consumer", consumer)
        self._max_deliveries = max_deliveries
        self._ledger = DeliveryLedger(remembered)
        self._lock = threading.Lock()
        self._dead_letters: list[RolloutEntry] = []
        # Entries may be pending for this consumer without being held: those of an earlier process of it, and those
        # whose delivery was lost on the way.
        self._may_have_unseen = True
        self._found: list[Delivery] = []

    # --- receiving -----------------------------------------------------------------------------------------------

    def receive(self, count: int = 1, timeout: float | None = 0.0) -> list[Delivery]:
        """Up to `count` entries for this consumer, as soon as there is one.

        What an earlier process of the same name left unfinished comes first. A missing stream is made. There are
        none when the time has passed, when shutdown has begun, and during an outage that is shorter than the
        connection's patience.
        """
        if count < 1:
            raise ConfigError("count", count, "at least 1")
        deadline = Deadline.after(timeout)
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

    def claim_from(self, dead_consumer: str, timeout: float | None = 30.0) -> list[Delivery]:
        """Take over everything that was given to a consumer which was declared dead, and forget that consumer.

        What was given to `max_deliveries` consumers becomes a dead letter instead: see `take_dead_letters`.
        """
        check_name("dead_consumer", dead_consumer)
        return self._claim_all(f"claim what {dead_consumer} left", lambda _: [dead_consumer], timeout)

    def claim_others(self, timeout: float | None = 30.0) -> list[Delivery]:
        """`claim_from` every other consumer: for a group of one reader, all others belong to older epochs."""

        def others(client: RedisClient) -> list[str]:
            consumers = client.do("XINFO", "CONSUMERS", self._keys.rollouts, GROUP)
            names = [paired(fields)[b"name"].decode() for fields in consumers]
            return [name for name in names if name != self.consumer]

        return self._claim_all("claim what others left", others, timeout)

    def take_dead_letters(self) -> list[RolloutEntry]:
        """The entries that this consumer has made dead letters since the last call; their payloads can go."""
        with self._lock:
            found, self._dead_letters = self._dead_letters, []
        return found

    @property
    def oldest_held(self) -> float | None:
        """Seconds since the oldest delivery that is not ended was received; None if there is none."""
        since = self._ledger.oldest_since
        return None if since is None else MONOTONIC.now() - since

    def _claim_all(
        self, what: str, sources: Callable[[RedisClient], list[str]], timeout: float | None
    ) -> list[Delivery]:
        claimed: list[Delivery] = []  # outside: what one attempt was given, the next would not be given again

        def claim(client: RedisClient) -> None:
            for source in sources(client):
                claimed.extend(self._claim_pending(client, source))
                if source != self.consumer:
                    scripts.FORGET_CONSUMER.run(client, self._keys, source)

        self._connection.call(what, self._healing(claim), Deadline.after(timeout))
        return claimed

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
        moved: list[_Given] = []
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
    ) -> list[_Given]:
        """Moves entries to this consumer, and returns them, or makes them dead letters."""
        if not ids:
            return []
        moved: list[_Given] = []
        reply = scripts.CLAIM.run(client, self._keys, source, self.consumer, limit, reason, *ids)
        for entry_id, deliveries, dead, fields in reply:
            if not dead:
                moved.append((entry_id, deliveries, fields))
                continue
            message = "entry %s is a dead letter after %d deliveries: %s"
            logger.warning(message, entry_id.decode(), deliveries, reason)
            try:
                entry = RolloutEntry.from_fields(paired(fields))
            except ProtocolError:
                continue  # it does not name a payload that could be freed
            with self._lock:
                self._dead_letters.append(entry)
        return moved

    def _accept(self, client: RedisClient, delivered: list[_Given]) -> list[Delivery]:
        """The new ones among what the server has given to this consumer; ends those that were ended before."""
        deliveries: list[Delivery] = []
        malformed: list[bytes] = []
        for entry_id, count, fields in delivered:
            try:
                entry = RolloutEntry.from_fields(paired(fields or []))
            except ProtocolError as error:
                logger.warning("%s", error)
                malformed.append(entry_id)
            else:
                deliveries.append(Delivery(entry, count, entry_id.decode()))
        current, repeated = self._ledger.split_ended(deliveries)
        end_malformed = partial(self._claim, source=self.consumer, limit=1, reason="malformed", ids=malformed)
        self._healing(end_malformed)(client)
        if repeated:
            scripts.FINISH.run(client, self._keys, "", "repeated", self.consumer, *_identities(repeated))
        # Held only now: had one of the commands failed, the caller would not have been given them.
        return self._ledger.hold(current, MONOTONIC.now())

    # --- ending --------------------------------------------------------------------------------------------------

    def commit(self, deliveries: Iterable[Delivery], timeout: float | None = 30.0) -> CommitOutcome:
        """End deliveries that were trained on: acknowledge, remove and count them, all at once.

        Safe to repeat. After it, the payloads may be freed (`CONSUME`) but for those that were refused.

        Raises:
            OldEpochError: the group has a newer epoch; nothing was committed.
        """
        return self._finish("trained", list(deliveries), timeout)

    def discard(
        self,
        deliveries: Iterable[Delivery],
        timeout: float | None = 30.0,
        *,
        counter: Literal["discarded", "too_old"] = "discarded",
    ) -> CommitOutcome:
        """End deliveries that will not be trained on, and count them as `counter`; else as `commit`."""
        return self._finish(counter, list(deliveries), timeout)

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
            counter: what they are counted as; ``"repeated"`` for those that had been committed.

        Returns:
            The entries of those that had not been ended before, so that the payloads can be freed.
        """
        if not identities:
            return []
        what = "look up what was trained on"
        found = self._run(what, scripts.ENTRIES, list(identities), Deadline.after(timeout))
        self._end(counter, "", list(identities), timeout)
        self._ledger.end(identities)
        return [RolloutEntry.from_fields(paired(fields)) for fields in found]

    def drop_trimmed(self, timeout: float | None = 30.0, *, held: bool = False) -> int:
        """Count payloads whose entries another client removed from the stream, and forget them; returns how many.

        Their producers publish such payloads again while they live: this is for those that are gone.

        Args:
            held: those too that this consumer was given, which a commit would end: at the end of a job.
        """

        def drop(client: RedisClient) -> int:
            return int(scripts.DROP_TRIMMED.run(client, self._keys, self.consumer if held else ""))

        what = "count what was removed from the stream"
        return self._connection.call(what, self._healing(drop), Deadline.after(timeout))

    def _finish(self, counter: str, deliveries: list[Delivery], timeout: float | None) -> CommitOutcome:
        if not deliveries:
            return CommitOutcome((), (), ())
        codes = self._end(counter, self.consumer, _identities(deliveries), timeout)
        outcome = CommitOutcome(
            ended=tuple(d for d, code in zip(deliveries, codes, strict=True) if code == _ENDED),
            unknown=tuple(d for d, code in zip(deliveries, codes, strict=True) if code == _NOT_THERE),
            refused=tuple(d for d, code in zip(deliveries, codes, strict=True) if code < _NOT_THERE),
        )
        self._ledger.end(_identities(outcome.ended + outcome.unknown))
        self._ledger.drop(_identities(outcome.refused))
        return outcome

    def _end(self, counter: str, consumer: str, identities: list[str], timeout: float | None) -> list[int]:
        """The answer of the script for each; `consumer` is the only one that may hold them, if it is not empty."""
        epoch: int | str = "" if self.epoch is None else self.epoch

        def finish(client: RedisClient) -> Any:
            reply = scripts.FINISH.run(client, self._keys, epoch, counter, consumer, *identities)
            if reply[0] != b"lost":
                return reply
            self._attach(client)
            return scripts.FINISH.run(client, self._keys, epoch, counter, consumer, *identities)

        what = f"end {len(identities)} deliveries as {counter}"
        status, answer = self._connection.call(what, self._healing(finish), Deadline.after(timeout))
        if status == b"old":
            raise OldEpochError(
                f"the policy group has epoch {int(answer)}; {self.consumer} still has epoch {epoch}"
            )
        if status != b"done":
            raise ControlPlaneError(f"the epoch of the policy group of job {self._keys.job} keeps being lost")
        return list(answer)

    # --- epochs --------------------------------------------------------------------------------------------------

    def begin_epoch(self, after: int = 0, timeout: float | None = 30.0) -> int:
        """Begin a new epoch of the policy group, and of this consumer: commits under an older one are refused.

        Args:
            after: an epoch known from elsewhere that the new one must exceed.
        """
        reply = self._run("begin an epoch", scripts.BEGIN_EPOCH, [after], Deadline.after(timeout))
        self.epoch = int(reply)
        return self.epoch

    def check_epoch(self, timeout: float | None = 30.0) -> None:
        """Make sure that the group has no newer epoch.

        Raises:
            OldEpochError: it has a newer one.
        """
        self._end("trained", "", [], timeout)

    def listed_work_items(self, timeout: float | None = 30.0) -> list[int]:
        """The work item of every entry of the stream."""
        work_items = self._run("list work items", scripts.LISTED_WORK_ITEMS, [], Deadline.after(timeout))
        return [int(work_item) for work_item in work_items if work_item.isdigit()]

    def raise_counters(self, least: Mapping[str, int], timeout: float | None = 30.0) -> None:
        """Put counters that are lower, as after a restart of Redis, at what the caller knows."""
        arguments = [part for counter in least.items() for part in counter]
        self._run("raise counters", scripts.RAISE_COUNTERS, arguments, Deadline.after(timeout))


def _identities(deliveries: Iterable[Delivery]) -> list[str]:
    return [each.entry.identity for each in deliveries]
