"""Which consumer gets which payload: the decisions of one producer's stream. No I/O, no waits.

Each payload belongs to every group. Within a group it is in one of these states, which `TRANSITIONS` relates:

| state | meaning |
|---|---|
| WAITING | no consumer has it; it waits for credit |
| GIVEN | it has been announced to one consumer |
| BEGUN | that consumer's program has got it |
| DONE | consumed, dropped by the ring, or given up |

New payloads wait at the end of the queue of their group, those that come back at its head, in the order of their
sequence numbers. A payload goes to the consumer with the most credit, among equals to the one that was served the
longest time ago.

Whether a payload is consumed is known to the ring alone. `Delivery` asks it when a consumer ends, and when a
payload was given long ago.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final, NamedTuple, Protocol

from dray.clock import MONOTONIC, Clock
from dray.errors import BufferClosedError
from dray.protocol.streams import Given, Returned
from dray.ring.shared_words import SharedWords
from dray.ring.stream_words import MAX_CREDIT, StreamWords

logger = logging.getLogger("dray.streams")

BEGIN_SECONDS: Final = 30.0
"""A payload that was given to a consumer and not begun for so long goes to another one that has credit."""

RECHECK_SECONDS: Final = 1.0
"""Time between two checks while such a payload waits for another consumer's credit."""

_MAX_RECENT: Final = 16_384
"""Hand-outs that a consumer may return: far more than it can have unbegun."""

_PRUNE_FROM: Final = 16
"""A consumer's hand-outs are checked for those that are done when it has more, and when they have doubled."""


class State(IntEnum):
    """What a group has done with a payload."""

    WAITING = 0
    GIVEN = 1
    BEGUN = 2
    DONE = 3


class Event(IntEnum):
    """What happens to a payload in a group."""

    GIVE = 0
    """It is announced to a consumer with credit."""
    BEGIN = 1
    """The consumer's program gets it."""
    COME_BACK = 2
    """The consumer has returned it, has ended, or has not begun it in time."""
    FINISH = 3
    """It is consumed, dropped by the ring, or has been handed out too often."""


TRANSITIONS: Final[Mapping[State, Mapping[Event, State]]] = {
    State.WAITING: {Event.GIVE: State.GIVEN, Event.FINISH: State.DONE},
    State.GIVEN: {Event.BEGIN: State.BEGUN, Event.COME_BACK: State.WAITING, Event.FINISH: State.DONE},
    State.BEGUN: {Event.COME_BACK: State.WAITING, Event.FINISH: State.DONE},
    State.DONE: {},
}


class RingView(Protocol):
    """What `Delivery` asks of the ring."""

    def has_finished(self, slot: int, sequence: int, reader: int) -> bool:
        """The payload is consumed by the group, or gone."""
        ...

    def barrier(self) -> bool:
        """Order the stores of this process before its next loads, as consumers see them; False if that failed."""
        ...


class Connection(Protocol):
    """The connection to a consumer."""

    def announce(self, given: Given) -> None:
        """Announce a payload to it."""
        ...

    def take_back(self, slot: int, sequence: int, number: int) -> None:
        """Notify it that it has lost the payload of a hand-out that it has not begun."""
        ...

    def drain(self) -> None:
        """Notify it that nothing more is put, and nothing waits."""
        ...

    def end(self, lost: int) -> None:
        """Notify it that the stream has ended, with the number of payloads that are lost."""
        ...

    def abort(self) -> None:
        """Let the connection fail: it is not known what the consumer has received."""
        ...


@dataclass(slots=True, eq=False)
class Item:
    """A payload in one group.

    Attributes:
        slot, sequence, nbytes: the payload.
        state: see the module.
        deliveries: how often it was given to a consumer and not returned untouched.
        number: the hand-out, while it is GIVEN or BEGUN.
        since: when it was given.
    """

    slot: int
    sequence: int
    nbytes: int
    state: State = State.WAITING
    deliveries: int = 0
    number: int = 0
    since: float = 0.0

    def apply(self, event: Event) -> None:
        """Follow the table."""
        self.state = TRANSITIONS[self.state][event]


class DeadItem(NamedTuple):
    """A payload that was handed out too often."""

    reader: int
    slot: int
    sequence: int
    nbytes: int
    deliveries: int


class Recipient:
    """A consumer that has subscribed. All methods need the lock of its `Delivery`, except those of the connection.

    Args:
        delivery: what it belongs to.
        reader: the reader id of its group.
        connection: the connection to it.
        pid: its process; None if that is not known.
        words: shared memory, where it leases directly.
    """

    def __init__(
        self,
        delivery: Delivery,
        reader: int,
        connection: Connection,
        *,
        pid: int | None = None,
        words: StreamWords | None = None,
    ) -> None:
        self.reader = reader
        self.pid = pid
        self.connection = connection
        self.stream_words = words
        self.active = self.knows_drain = False
        self.stalled: int | None = None  # its credit when it did not begin a payload in time
        self.given = self.returns = 0  # hand-outs; those that came back before they were begun
        self.prune_from = _PRUNE_FROM
        self.recent: dict[int, None] = {}  # hand-outs that it has not returned
        self.items: dict[int, Item] = {}  # by sequence number, in the order in which they were given
        self._delivery = delivery
        self._credit = 0

    @property
    def words(self) -> SharedWords | None:
        """The memory to share with the consumer."""
        return None if self.stream_words is None else self.stream_words.shared

    @property
    def credit(self) -> int:
        """How many payloads it may have been given so far."""
        return self._credit if self.stream_words is None else self.stream_words.credit

    @property
    def allowance(self) -> int:
        """How many payloads it may be given now."""
        credit = self.credit
        if self.stalled is not None and self.stalled != credit:
            self.stalled = None
        return 0 if not self.active or self.stalled is not None else min(credit - self.given, MAX_CREDIT)

    def has_begun(self, item: Item) -> bool:
        """Its program has got the payload."""
        words = self.stream_words
        if item.state is State.GIVEN and words is not None and words.has_begun(item.slot, item.number):
            item.apply(Event.BEGIN)
        return item.state is State.BEGUN

    # --- called by its connection, without the lock -----------------------------------------------------------

    def start(self) -> None:
        """Its subscription has been confirmed."""
        delivery = self._delivery
        with delivery.lock:
            self.active = True
            if delivery.lost is not None:
                self.connection.end(delivery.lost)
        delivery.serve()

    def set_credit(self, total: int) -> None:
        """It may have been given `total` payloads so far."""
        with self._delivery.lock:
            self._credit = total
        self._delivery.serve()

    def begin(self, slot: int, sequence: int, number: int) -> None:
        """Its program gets the payload of a hand-out."""
        with self._delivery.lock:
            item = self.items.get(sequence)
            if item is not None and item.number == number and item.slot == slot and item.state is State.GIVEN:
                item.apply(Event.BEGIN)

    def take_back(self, returned: Returned) -> None:
        """It returns the payload of a hand-out."""
        self._delivery.take_back(self, returned)

    def end(self) -> None:
        """It has ended: others get what it had."""
        self._delivery.remove(self)

    def __repr__(self) -> str:
        return f"<Recipient pid {self.pid} of group {self.reader}, {len(self.items)} payloads>"


@dataclass(slots=True, eq=False)
class ConsumerGroup:
    """The consumers of one group and the payloads that wait for them."""

    reader: int
    waiting: deque[Item] = field(default_factory=deque)
    recipients: list[Recipient] = field(default_factory=list)  # the one served last comes last
    marked: bool = False  # consumers know that payloads wait
    subscribed: int = 0
    given: int = 0
    redelivered: int = 0
    returned: int = 0
    taken_back: int = 0
    dropped: int = 0
    dead: int = 0


class Delivery:
    """The hand-out of one producer's payloads. Thread-safe.

    Args:
        groups: how many groups there are; their reader ids are 0 … groups - 1.
        ring: the ring of the payloads.
        max_deliveries: a payload that has been handed out so often, and comes back, is given up; None for no
            limit.
        clock: the source of time.
        lock: guards everything here; a new one by default.

    Attributes:
        lock: guards everything here.
        groups: by reader id.
        dead: payloads that were given up, which the owner fetches.
        lost: once it is closed, how many payloads are lost.
        wake: called with the lock when `serve` is due earlier than before.
    """

    def __init__(
        self,
        groups: int,
        ring: RingView,
        *,
        max_deliveries: int | None = None,
        clock: Clock = MONOTONIC,
        lock: threading.Lock | None = None,
    ) -> None:
        self.lock = threading.Lock() if lock is None else lock
        self.groups = [ConsumerGroup(reader) for reader in range(groups)]
        self.dead: deque[DeadItem] = deque()
        self._ring = ring
        self._max_deliveries = max_deliveries
        self._clock = clock
        self._numbers = itertools.count(1)
        self._due = math.inf
        self.lost: int | None = None
        self._draining = False
        self.wake: Callable[[], None] = lambda: None

    # --- payloads ---------------------------------------------------------------------------------------------

    def add(self, slot: int, sequence: int, nbytes: int) -> None:
        """Hand out a payload that was committed."""
        with self.lock:
            if self.lost is not None:
                raise BufferClosedError("the stream is closed")
            for group in self.groups:
                item = Item(slot, sequence, nbytes)
                waiting = group.waiting
                if waiting and waiting[-1].sequence > sequence:  # threads may commit in another order
                    group.waiting = deque(sorted((*waiting, item), key=_sequence))
                else:
                    waiting.append(item)
                self._give(group, item)

    def serve(self) -> None:
        """Hand out what waits, and take back what was not begun in time."""
        with self.lock:
            if self._due <= self._clock.now():
                self._take_back_unbegun()
            for group in self.groups:
                if group.waiting:
                    self._give(group)
                if self._draining:
                    self._announce_drain(group)

    @property
    def remaining(self) -> float:
        """Seconds until `serve` is due; ``inf`` if nothing depends on the time."""
        return math.inf if self._due == math.inf else max(0.0, self._due - self._clock.now())

    def drain(self) -> None:
        """Nothing more is added: the consumers of a group are notified once nothing waits in it."""
        with self.lock:
            self._draining = True
        self.serve()

    def close(self, lost: int) -> None:
        """Hand out nothing any more, and notify the consumers, with the number of payloads that are lost."""
        with self.lock:
            self.lost = lost
            for group in self.groups:
                group.waiting.clear()
                for recipient in group.recipients:
                    if recipient.active:  # the others get it behind the answer to SUBSCRIBE
                        recipient.connection.end(lost)

    # --- consumers --------------------------------------------------------------------------------------------

    def subscribe(
        self,
        reader: int,
        connection: Connection,
        *,
        pid: int | None = None,
        words: StreamWords | None = None,
    ) -> Recipient:
        """A new consumer of a group, which is given payloads from its `start` on; see `Recipient`."""
        recipient = Recipient(self, reader, connection, pid=pid, words=words)
        with self.lock:
            group = self.groups[reader]
            group.recipients.insert(0, recipient)
            group.subscribed += 1
            if words is not None:
                words.pending = group.marked
        return recipient

    def remove(self, recipient: Recipient) -> None:
        """A consumer has ended: others get what it had and has not consumed. Twice is fine."""
        with self.lock:
            group = self.groups[recipient.reader]
            if recipient not in group.recipients:
                return
            group.recipients.remove(recipient)
            items = list(recipient.items.values())
            recipient.items.clear()
            self._come_back(group, items)
            self._give(group)
            if recipient.stream_words is not None:
                recipient.stream_words.close()

    def take_back(self, recipient: Recipient, returned: Returned) -> None:
        """See `Recipient.take_back`."""
        slot, sequence, number, begun = returned
        with self.lock:
            recipient.returns += not begun
            if not begun and number in recipient.recent:
                del recipient.recent[number]
                recipient.given -= 1  # only now it may be given another one: this one may come before it
            group = self.groups[recipient.reader]
            item = recipient.items.get(sequence)
            if item is not None and item.number == number and item.slot == slot:
                del recipient.items[sequence]
                group.returned += 1
                if not begun and not recipient.has_begun(item):
                    item.deliveries -= 1
                self._come_back(group, [item])
            # Otherwise it was taken back already, or is done.
            self._give(group)

    # --- inside, with the lock --------------------------------------------------------------------------------

    def _give(self, group: ConsumerGroup, fresh: Item | None = None) -> None:
        """Hand out payloads while a consumer has credit; then let consumers know whether any are left."""
        waiting = group.waiting
        while True:
            while waiting:
                item = waiting[0]
                if item.state is State.WAITING and (item is fresh or not self._is_done(group, item)):
                    recipient = _most_credit(group)
                    if recipient is None:
                        break
                    self._hand_out(group, item, recipient)
                # An exception of a signal handler may have come before this line.
                waiting.popleft()
            left = bool(waiting)
            if left is group.marked:
                return
            direct = [each.stream_words for each in group.recipients if each.stream_words is not None]
            for words in direct:
                words.pending = left
            group.marked = left
            if not (left and direct):
                return
            if not self._ring.barrier():
                self._serve_by(self._clock.now() + RECHECK_SECONDS)
            # Then read the credit once more.

    def _announce_drain(self, group: ConsumerGroup) -> None:
        for recipient in group.recipients if not group.waiting else ():
            if recipient.active and not recipient.knows_drain:
                recipient.knows_drain = True
                recipient.connection.drain()

    def _hand_out(self, group: ConsumerGroup, item: Item, recipient: Recipient) -> None:
        if len(recipient.items) > recipient.prune_from:
            self._prune(recipient)
        try:
            recipient.items[item.sequence] = item
            item.apply(Event.GIVE)
            item.number = next(self._numbers)
            item.since = self._clock.now()
            item.deliveries += 1
            recipient.given += 1
            recipient.recent[item.number] = None
            if len(recipient.recent) > _MAX_RECENT:
                for number in list(recipient.recent)[: _MAX_RECENT // 2]:
                    del recipient.recent[number]
            group.given += 1
            group.redelivered += item.deliveries > 1
            if len(group.recipients) > 1:
                # In one step: an exception of a signal handler must not lose it.
                group.recipients.sort(key=lambda each: each is recipient)
            self._serve_by(item.since + BEGIN_SECONDS)
            if recipient.stream_words is not None:
                recipient.stream_words.give(item.slot, item.number)
            recipient.connection.announce(
                Given(item.slot, item.sequence, item.nbytes, item.number, item.deliveries, recipient.returns)
            )
        except BaseException:
            if item.state is State.WAITING:  # it still waits, for another consumer
                recipient.items.pop(item.sequence, None)
            recipient.connection.abort()
            raise

    def _serve_by(self, due: float) -> None:
        if due < self._due:
            self._due = due
            self.wake()

    def _is_done(self, group: ConsumerGroup, item: Item) -> bool:
        """A payload that has waited may have been dropped, or consumed by reference."""
        if not self._ring.has_finished(item.slot, item.sequence, group.reader):
            return False
        item.apply(Event.FINISH)
        group.dropped += 1
        return True

    def _prune(self, recipient: Recipient) -> None:
        """Forget hand-outs that are done."""
        finished = self._ring.has_finished
        for item in list(recipient.items.values()):
            if finished(item.slot, item.sequence, recipient.reader):
                del recipient.items[item.sequence]  # first: an exception of a signal handler may come in between
                item.apply(Event.FINISH)
        recipient.prune_from = max(_PRUNE_FROM, 2 * len(recipient.items))

    def _come_back(self, group: ConsumerGroup, items: Sequence[Item]) -> None:
        """Put payloads at the head of the queue, unless they are done or were handed out too often."""
        if self.lost is not None:
            return
        back = []
        for item in items:
            if self._ring.has_finished(item.slot, item.sequence, group.reader):
                item.apply(Event.FINISH)
            elif item.state is State.WAITING:
                back.append(item)
            elif self._max_deliveries is not None and item.deliveries >= self._max_deliveries:
                item.apply(Event.FINISH)
                group.dead += 1
                self.dead.append(DeadItem(group.reader, item.slot, item.sequence, item.nbytes, item.deliveries))
            else:
                item.apply(Event.COME_BACK)
                item.number = 0
                back.append(item)
        if back:
            waiting = {item.sequence: item for item in (*back, *group.waiting)}
            group.waiting = deque(sorted(waiting.values(), key=_sequence))

    def _take_back_unbegun(self) -> None:
        """Take payloads from consumers that have not begun them in time, if another consumer has credit."""
        now = self._clock.now()
        self._due = math.inf
        for group in self.groups:
            late: list[tuple[Recipient, Item]] = []
            for recipient in group.recipients:
                self._prune(recipient)
                for item in recipient.items.values():
                    if not recipient.has_begun(item):
                        due = item.since + BEGIN_SECONDS
                        if due <= now:
                            late.append((recipient, item))
                        else:
                            self._due = min(self._due, due)
            if late:
                self._due = min(self._due, now + RECHECK_SECONDS)
                self._take_back_late(group, late)

    def _take_back_late(self, group: ConsumerGroup, late: Sequence[tuple[Recipient, Item]]) -> None:
        slow = {recipient for recipient, _ in late}
        room = sum(max(0, each.allowance) for each in group.recipients if each not in slow)
        taken = late[:room]
        for recipient, item in taken:
            if recipient.stream_words is not None:
                recipient.stream_words.give(item.slot, 0)
        direct = any(recipient.stream_words is not None for recipient, _ in taken)
        ordered = not direct or self._ring.barrier()
        back = []
        for recipient, item in taken:
            words = recipient.stream_words
            if words is not None and (not ordered or recipient.has_begun(item)):  # perhaps it has begun meanwhile
                words.give(item.slot, item.number)
                continue
            del recipient.items[item.sequence]
            if words is None:
                recipient.connection.take_back(item.slot, item.sequence, item.number)
            group.taken_back += 1
            logger.warning(
                "payload %d was given to process %s %.0f s ago, which has not begun with it: it goes to another",
                item.sequence, recipient.pid, self._clock.now() - item.since,
            )  # fmt: skip
            recipient.stalled = recipient.credit
            back.append(item)
        self._come_back(group, back)


def _most_credit(group: ConsumerGroup) -> Recipient | None:
    best, most = None, 0
    for recipient in group.recipients:
        if (allowance := recipient.allowance) > most:
            best, most = recipient, allowance
    return best


def _sequence(item: Item) -> int:
    return item.sequence
