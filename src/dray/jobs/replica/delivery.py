"""The life cycle of a payload in a job, from its receipt by the policy group to the reuse of its slot.

`PayloadTracker` is the state machine: one table, no I/O and no clock. `Deliveries` acts on it: it receives
references from the queue, ends each of them in a commit or a discard under the group's epoch, and
then has the payload freed at its producer. A group that was replaced has an older epoch: its commits are refused.

With ``policy.ack = "step"`` a payload is committed after the step that trained on it, with ``"checkpoint"`` when a
checkpoint has that step.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Final, Literal

from dray.clock import MONOTONIC, Clock, Deadline
from dray.files import read_private_file, write_json
from dray.identifiers import PayloadId
from dray.jobs.config import JobConfig
from dray.jobs.messages.models import PartlyFinished, PayloadPart, UnfinishedWork
from dray.jobs.queue import Delivery, RolloutConsumer, RolloutEntry
from dray.jobs.replica.checkpoint import CheckpointState
from dray.jobs.replica.heartbeat import Heartbeat

_LOG = logging.getLogger("dray.jobs.replica.delivery")
_CLAIM_INTERVAL = 2.0
_STATISTICS_INTERVAL = 1.0


# --- the life cycle of a payload ---------------------------------------------------------------------------------


class PayloadState(StrEnum):
    """Where a payload is in its life cycle."""

    RECEIVED = "received"  # its reference is here
    READ = "read"  # its arrays are, too, for the next training step
    TRAINING = "training"  # the step that uses it has begun
    TRAINED = "trained"  # the weights have it; its commit is not confirmed
    COMMITTED = "committed"
    LOST = "lost"  # it cannot be read any more
    TOO_OLD = "too old"  # made by weights that are too many versions behind
    DEAD_LETTER = "dead letter"  # given out too often without an end
    TAKEN = "taken"  # another consumer has it: that one ends it
    FREED = "freed"  # its slot may be reused


class PayloadEvent(StrEnum):
    """What happens to a payload."""

    READ = "read"
    FAIL = "fail"
    AGE = "age"
    BEGIN = "begin"
    TRAIN = "train"
    COMMIT = "commit"
    REFUSE = "refuse"
    GIVE_UP = "give up"
    FREE = "free"


_S, _E = PayloadState, PayloadEvent

TRANSITIONS: Final[Mapping[tuple[PayloadState, PayloadEvent], PayloadState]] = {
    (_S.RECEIVED, _E.READ): _S.READ,
    (_S.RECEIVED, _E.FAIL): _S.LOST,
    (_S.RECEIVED, _E.AGE): _S.TOO_OLD,
    (_S.RECEIVED, _E.GIVE_UP): _S.DEAD_LETTER,
    (_S.READ, _E.FAIL): _S.LOST,  # another rank could not read it
    (_S.READ, _E.BEGIN): _S.TRAINING,
    (_S.TRAINING, _E.TRAIN): _S.TRAINED,
    (_S.TRAINED, _E.COMMIT): _S.COMMITTED,
    (_S.TRAINED, _E.REFUSE): _S.TAKEN,
    (_S.COMMITTED, _E.FREE): _S.FREED,
    (_S.LOST, _E.FREE): _S.FREED,
    (_S.TOO_OLD, _E.FREE): _S.FREED,
    (_S.DEAD_LETTER, _E.FREE): _S.FREED,
}
"""What each event does. An event that is not here for a state is an internal error."""

ENDED: Final = (_S.COMMITTED, _S.LOST, _S.TOO_OLD, _S.DEAD_LETTER)
"""The states of a payload that only waits for its producer to free it."""


class IllegalPayloadTransition(Exception):
    """An event came for a payload in a state that does not allow it."""


def diagram() -> str:
    """The table as a Mermaid diagram."""
    lines = ["stateDiagram-v2", "    [*] --> received"]
    named = {state: state.value.replace(" ", "_") for state in PayloadState}
    lines += [f"    {named[before]} --> {named[after]}: {event}" for (before, event), after in TRANSITIONS.items()]
    return "\n".join([*lines, "    freed --> [*]", "    taken --> [*]"])


class PayloadTracker:
    """The payloads of a policy group that are not freed; thread-safe.

    Args:
        changed: called with a state and the payloads that have just come to it.
    """

    def __init__(
        self, changed: Callable[[PayloadState, Sequence[Delivery]], None] = lambda state, come: None
    ) -> None:
        self._changed = changed
        self._lock = threading.Lock()
        self._states: dict[PayloadId, PayloadState] = {}
        self._within: dict[PayloadState, dict[PayloadId, Delivery]] = {state: {} for state in PayloadState}

    def receive(self, deliveries: Iterable[Delivery]) -> list[Delivery]:
        """These were given to this consumer; returns those that were not here yet."""
        fresh = []
        with self._lock:
            for delivery in deliveries:
                each = delivery.entry.id
                if each not in self._states:
                    self._states[each] = PayloadState.RECEIVED
                    self._within[PayloadState.RECEIVED][each] = delivery
                    fresh.append(delivery)
        self._changed(PayloadState.RECEIVED, fresh)
        return fresh

    def apply(self, event: PayloadEvent, ids: Iterable[PayloadId]) -> None:
        """Something happened to these payloads. One that is freed, or another consumer's, is forgotten.

        Raises:
            IllegalPayloadTransition: the table does not have this event for the state of one of them.
        """
        come: dict[PayloadState, list[Delivery]] = {}
        with self._lock:
            for each in ids:
                before = self._states.get(each)
                after = None if before is None else TRANSITIONS.get((before, event))
                if before is None or after is None:
                    state = "unknown" if before is None else before.value
                    raise IllegalPayloadTransition(f"payload {each} is {state}: it cannot {event.value}")
                delivery = self._within[before].pop(each)
                come.setdefault(after, []).append(delivery)
                if after in (PayloadState.FREED, PayloadState.TAKEN):
                    del self._states[each]
                else:
                    self._states[each] = after
                    self._within[after][each] = delivery
        for state, deliveries in come.items():
            self._changed(state, deliveries)

    def within(self, *states: PayloadState) -> list[Delivery]:
        """The payloads in these states, state by state, the first to come to it first."""
        with self._lock:
            return [delivery for state in states for delivery in self._within[state].values()]


# --- staleness ---------------------------------------------------------------------------------------------------


class StalenessWindow:
    """Which work items' payloads a training step has to use so that none becomes too old.

    With at most (s + 1) batches of work items under way, and each step using those with the lowest indices, no
    payload is trained on by weights more than s versions newer than those it was made with: work item i is given
    out when all but (s + 1) batches of those before it are finished and the weights trained on them are published,
    and it is trained on when all before it are.

    Args:
        unfinished: the work items that were given out and are not finished.
        following: index of the first one that was not given out.
        payloads_each: how many payloads a work item has at least.
    """

    def __init__(self, unfinished: Iterable[int], following: int, payloads_each: int = 1) -> None:
        self._unfinished = set(unfinished)
        self._following = following
        self._payloads_each = payloads_each
        self._parts = PartlyFinished()
        self._in_use: Counter[int] = Counter()  # payloads of a step that has begun, by work item

    def last_due(self, count: int) -> int:
        """The index of the last of the lowest unfinished work items that have `count` payloads together which are
        neither finished nor used by a step that has begun."""
        for index in sorted(self._unfinished):
            count -= max(0, self._parts.remaining(index, self._payloads_each) - self._in_use[index])
            if count <= 0:
                return index
        return self._following - (-count // self._payloads_each) - 1

    def found(self, payloads: Iterable[PayloadPart]) -> None:
        """These were received: they have the numbers of payloads of their work items."""
        for index, _, parts in payloads:
            if parts > 1 and (index in self._unfinished or index >= self._following):
                self._parts.found(index, parts)

    def begin(self, payloads: Iterable[PayloadPart]) -> None:
        """A step on these payloads begins."""
        for index, _, _ in payloads:
            self._give_out(index + 1)
            self._in_use[index] += 1

    def finished(self, indices: Iterable[int]) -> None:
        """These are trained on, or never will be; those that were not given out as far as known are now."""
        for index in indices:
            self._give_out(index + 1)
            self._unfinished.discard(index)
            self._parts.forget(index)
            self._in_use.pop(index, None)

    def finished_payloads(self, payloads: Iterable[PayloadPart]) -> None:
        """These payloads are trained on, or never will be; a work item is finished with the last of its own."""
        for payload in payloads:
            index = payload[0]
            self._give_out(index + 1)
            if self._in_use[index] > 1:
                self._in_use[index] -= 1
            else:
                self._in_use.pop(index, None)
            if index in self._unfinished and self._parts.finish(payload):
                self.finished([index])

    def compare(self, unfinished: Iterable[int], following: int) -> None:
        """The controller knows of no others that are `unfinished`, among those before `following`."""
        self._give_out(following)
        known = set(unfinished)
        self.finished({index for index in self._unfinished if index < following} - known)

    def _give_out(self, following: int) -> None:
        """All before `following` were given out."""
        self._unfinished.update(range(self._following, following))
        self._following = max(self._following, following)


# --- acting on it ------------------------------------------------------------------------------------------------


class Deliveries:
    """The payloads that the policy group is given, from receipt to end. Used by the first rank only; thread-safe.

    Args:
        queue: where references come from; its consumer has this epoch alone.
        free: has payloads freed at their producers, without waiting for it.
        work: reports ends to the controller, and asks it which work items are not finished.
        state: the checkpoint that the weights come from.
        recorded: payloads that were committed before, by the lines of the metrics.
        epoch_file: where the group's epoch is kept beside Redis.
        count: adds to a counter of the replica: `discarded`, `too_old` or `dead_letters`.
        ending: whether the replica must end.
        payloads: their states.

    Attributes:
        contributed: payloads that the weights are trained on.
        committed: payloads whose commit is confirmed, over all epochs of the group.
        rolled_back: those of `committed` that the weights of the checkpoint do not have.
    """

    def __init__(
        self,
        queue: RolloutConsumer,
        free: Callable[[Sequence[RolloutEntry]], None],
        work: Heartbeat,
        config: JobConfig,
        state: CheckpointState,
        *,
        recorded: int,
        epoch_file: Path,
        count: Callable[[str, int], None],
        ending: Callable[[], bool],
        payloads: PayloadTracker | None = None,
        clock: Clock = MONOTONIC,
    ) -> None:
        self._queue = queue
        self._free = free
        self._work = work
        self._config = config
        self._state = state
        self._recorded = recorded
        self._epoch_file = epoch_file
        self._count = count
        self._ending = ending
        self._given_up = 0
        # Seconds for which a payload is waited for: the work item of a dead replica is given out again by then.
        self._patience = 2 * config.controller.dead_after
        self._timeout = config.timeouts.redis
        self._clock = clock
        self.payloads = PayloadTracker() if payloads is None else payloads
        self._window: StalenessWindow  # since `open`
        self._window_lock = threading.Lock()
        self._overdue = self._starving = Deadline.after(self._patience, clock)
        self._next_claim = Deadline.after(_CLAIM_INTERVAL, clock)
        self._next_statistics = Deadline.after(0, clock)
        self.contributed = state.contributed
        self.committed = state.committed
        self.rolled_back = 0

    # --- the beginning of an epoch -----------------------------------------------------------------------------

    def open(self) -> None:
        """Begin an epoch, claim what was held in earlier epochs, and commit what the weights already have.

        Raises:
            ControlPlaneError: Redis or the controller does not answer, or refuses.
        """
        self._queue.attach(self._timeout)
        self._begin_epoch()
        # First, so that none of them comes again: what a checkpoint has must not be trained on twice.
        trained = self._queue.commit_trained(self._state.unconfirmed, self._timeout, counter="trained")
        repeated = self._queue.commit_trained(self._state.unfreed, self._timeout, counter="repeated")
        self._free([*trained, *repeated])
        claimed = self.payloads.receive(self._queue.claim_others(self._timeout))
        self._count_rolled_back()
        known = self._unfinished()
        self._window = StalenessWindow(known.unfinished, known.next, self._config.payloads_of_work_item)
        self._window.finished_payloads(known.finished_parts)
        self._finish_ended(known)
        self._end_dead_letters()
        if trained or claimed:
            words = "%d payloads that the checkpoint has are committed; %d others are delivered again"
            _LOG.info(words, len(trained), len(claimed))

    def _begin_epoch(self) -> None:
        # The number is kept beside Redis, too: one that was restarted empty must not give out the same one again.
        known = json.loads(read_private_file(self._epoch_file, "the epoch")) if self._epoch_file.exists() else {}
        self._recorded = max(self._recorded, known.get("committed", 0))
        epoch = self._queue.begin_epoch(known.get("epoch", 0), self._timeout)
        self._write_epoch(epoch)
        _LOG.info("the policy group begins epoch %d", epoch)

    def _write_epoch(self, epoch: int | None) -> None:
        write_json(self._epoch_file, {"epoch": epoch, "committed": self._recorded}, mode=0o600)

    def _count_rolled_back(self) -> None:
        counters = self._queue.statistics(self._timeout).counters
        # The weights have what was unconfirmed, also where the server that would have known of it is gone.
        kept = self._state.committed + len(self._state.unconfirmed)
        self.committed = max(counters.get("trained", 0), kept, self._recorded)
        self.rolled_back = max(0, self.committed - self.contributed)
        new = self.rolled_back - max(counters.get("rolled_back", 0), kept - self.contributed)
        if new > 0:
            _LOG.warning("%d payloads were trained on after the last checkpoint: they are rolled back", new)
        # Before anything else is committed: the server's counter continues from that of earlier runs.
        self._raise_counters()
        self._recorded = self.committed
        self._write_epoch(self._queue.epoch)

    def _raise_counters(self) -> None:
        if self.committed or self.rolled_back:
            self._queue.raise_counters({"trained": self.committed, "rolled_back": self.rolled_back}, self._timeout)

    def _unfinished(self) -> UnfinishedWork:
        """Ask the controller what is unfinished: it alone knows which work items were given up."""
        self._given_up = self._work.given_up
        return self._work.unfinished()

    def _finish_ended(self, known: UnfinishedWork) -> None:
        """Finish work items that were published and are not in the stream: those of which no end was reported."""
        if known.published:
            listed = set(self._queue.listed_work_items(self._timeout))
            self._finish(index for index in known.published if index not in listed)

    def _compare_window(self) -> UnfinishedWork:
        known = self._unfinished()
        with self._window_lock:
            self._window.compare(known.unfinished, known.next)
        return known

    # --- receiving --------------------------------------------------------------------------------------------

    def receive(self, count: int, version: int, timeout: float) -> list[Delivery]:
        """Up to `count` payloads that a step of weights of `version` may use, as soon as there is one.

        Raises:
            OldEpochError: the group has a newer epoch.
            ControlPlaneError: Redis is lost, or refuses.
        """
        if self._next_claim.expired and not self._ending():
            # A process of an earlier epoch that was paused in a call may have been given something since.
            self.payloads.receive(self._queue.claim_others(self._timeout))
            self._next_claim = Deadline.after(_CLAIM_INTERVAL, self._clock)
        if self._config.in_order and self._given_up != self._work.given_up:
            self._compare_window()
        due = self._due(count)
        if not due:
            received = self._queue.receive(count, timeout)
            self.payloads.receive(received)
            due = self._due(count)
            self._check_for_lost_entries(received)
        self._end_dead_letters()
        most = self._config.policy.max_staleness
        if most is None:
            return due
        old = [each for each in due if version - each.entry.weight_version > most]
        self._discard(old, PayloadEvent.AGE)
        return [each for each in due if version - each.entry.weight_version <= most]

    def _due(self, count: int) -> list[Delivery]:
        """Up to `count` of the payloads that were received which the next step may use."""
        found = self.payloads.within(PayloadState.RECEIVED)
        if not self._config.in_order:
            return found[:count]
        found.sort(key=lambda each: each.entry.work_item)
        with self._window_lock:
            self._window.found(_parts(found))
            last = self._window.last_due(self._config.policy.batch_size)
        due = [each for each in found if each.entry.work_item <= last][:count]
        if due:
            self._overdue = Deadline.after(self._patience, self._clock)
        elif len(found) >= count and self._overdue.expired:
            # The one that is missing may never come: if it comes after all, it is too old.
            words = "no payload for work items <= %d in the last %g s; training on newer ones"
            _LOG.warning(words, last, self._patience)
            due = found[:count]
        return due

    def _check_for_lost_entries(self, received: Sequence[Delivery]) -> None:
        # Redis was restarted empty, or another client has removed entries, and a producer has died before it could
        # publish again: its payloads are gone, and their work items would count as under way permanently.
        if received:
            self._starving = Deadline.after(self._patience, self._clock)
        elif self._starving.expired and not self._ending():
            self._starving = Deadline.after(self._patience, self._clock)
            self._queue.drop_trimmed(self._timeout)
            self._finish_ended(self._compare_window())

    # --- from reading to the end of each payload --------------------------------------------------------------

    def read(self, deliveries: Iterable[Delivery]) -> None:
        """The arrays of these are here, for the next step."""
        self.payloads.apply(PayloadEvent.READ, _ids(deliveries))

    def lost(self, deliveries: Sequence[Delivery]) -> None:
        """These cannot be read any more.

        Raises:
            OldEpochError, ControlPlaneError: as `receive`.
        """
        self._discard(deliveries, PayloadEvent.FAIL)

    def begin(self, deliveries: Sequence[Delivery]) -> None:
        """A training step on these begins."""
        self.payloads.apply(PayloadEvent.BEGIN, _ids(deliveries))
        with self._window_lock:
            self._window.begin(_parts(deliveries))

    def trained(self, deliveries: Sequence[Delivery]) -> None:
        """The weights are trained on these; commit them now unless that waits for the checkpoint.

        Raises:
            OldEpochError, ControlPlaneError: as `receive`; they stay unconfirmed.
        """
        self.payloads.apply(PayloadEvent.TRAIN, _ids(deliveries))
        self.contributed += len(deliveries)
        if self._config.policy.ack == "step":
            self.commit()

    def commit(self) -> None:
        """Commit everything that the weights are trained on, and have it freed.

        Raises:
            OldEpochError, ControlPlaneError: as `receive`; they stay unconfirmed.
        """
        trained = self.payloads.within(PayloadState.TRAINED)
        if not trained:
            return
        outcome = self._queue.commit(trained, self._timeout)
        for each in outcome.refused:
            _LOG.error("payload %s is another consumer's under the same epoch", each.entry.id)
        ended = outcome.ended + outcome.unknown
        self.payloads.apply(PayloadEvent.REFUSE, _ids(outcome.refused))
        self.payloads.apply(PayloadEvent.COMMIT, _ids(ended))
        self.committed += len(ended)
        self._free([each.entry for each in ended])

    def finished(self, deliveries: Sequence[Delivery]) -> None:
        """Report that these are trained on, after their weights were published: a replica that is given a work
        item from then on acts with them."""
        self._finish_payloads([each.entry for each in deliveries])

    def freed(self, waiting: Collection[PayloadId]) -> None:
        """Of the payloads that are done with, all but those in `waiting` are freed."""
        ended = _ids(self.payloads.within(*ENDED))
        self.payloads.apply(PayloadEvent.FREE, [each for each in ended if each not in waiting])

    @property
    def unconfirmed(self) -> tuple[str, ...]:
        """What a checkpoint of the weights as they are must have as trained on and not committed."""
        return tuple(each.entry.identity for each in self.payloads.within(PayloadState.TRAINED))

    def statistics(self, *, now: bool = False) -> dict[str, float]:
        """The stream's counters, at most once a second unless `now`, for the last time; empty in between.

        Raises:
            ControlPlaneError: Redis does not answer, or refuses.
        """
        if not (now or self._next_statistics.expired):
            return {}
        self._next_statistics = Deadline.after(_STATISTICS_INTERVAL, self._clock)
        if now:  # the last time: what was removed from the stream comes no more
            self._queue.drop_trimmed(self._timeout, held=True)
        self._raise_counters()  # a server that was restarted empty has forgotten them
        found = self._queue.statistics(self._timeout)
        counters = {f"stream_{name}": float(value) for name, value in found.counters.items()}
        return {
            **counters,
            "stream_backlog": found.backlog,
            "stream_pending": found.pending,
            "stream_oldest_seconds": found.oldest_age or 0.0,
        }

    def _discard(
        self, deliveries: Sequence[Delivery], event: Literal[PayloadEvent.FAIL, PayloadEvent.AGE]
    ) -> None:
        if not deliveries:
            return
        counter: Literal["discarded", "too_old"] = "discarded" if event is PayloadEvent.FAIL else "too_old"
        self._queue.discard(deliveries, self._timeout, counter=counter)
        self.payloads.apply(event, _ids(deliveries))
        self._end([each.entry for each in deliveries], counter)

    def _end_dead_letters(self) -> None:
        letters = self._queue.take_dead_letters()
        if letters:
            # They were not given to this consumer: they are tracked from here to their end.
            self.payloads.receive(Delivery(each, 0, "") for each in letters)
            self.payloads.apply(PayloadEvent.GIVE_UP, [each.id for each in letters])
            self._end(letters, "dead_letters")

    def _end(self, entries: Sequence[RolloutEntry], counter: str) -> None:
        self._free(entries)
        self._finish_payloads(entries)
        self._count(counter, len(entries))

    def _finish_payloads(self, entries: Sequence[RolloutEntry]) -> None:
        payloads = [(each.work_item, each.part, each.parts) for each in entries]
        with self._window_lock:
            self._window.finished_payloads(payloads)
        self._work.finished_payloads(payloads)

    def _finish(self, work_items: Iterable[int]) -> None:
        indices = list(work_items)
        with self._window_lock:
            self._window.finished(indices)
        self._work.finished(indices)


def _ids(deliveries: Iterable[Delivery]) -> list[PayloadId]:
    return [each.entry.id for each in deliveries]


def _parts(deliveries: Iterable[Delivery]) -> list[PayloadPart]:
    return [(each.entry.work_item, each.entry.part, each.entry.parts) for each in deliveries]
