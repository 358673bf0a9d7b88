"""The policy group's end of the rollout stream: what it is given, and what becomes of each payload.

::

    received ──► read ──► trained ──► committed ──► freed
       │           └─► lost                            "step": committed after the step
       └─► too old, dead letter                        "checkpoint": committed when the checkpoint has it

Everything ends in a commit or a discard under the epoch of this life of the group, then the payload is freed at
its producer. A life that was replaced has its commit refused.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from typing import Literal

from dray.clock import Deadline
from dray.jobs.files import read_private_file, write_json
from dray.jobs.messages import models
from dray.jobs.messages.work_item_parts import PartlySettled, PayloadPart
from dray.jobs.queue import Delivery, RolloutConsumer, RolloutEntry
from dray.jobs.replica.base import Replica
from dray.jobs.replica.checkpoint import CheckpointState
from dray.jobs.replica.transfer import TrajectoryReader

# --- intake ------------------------------------------------------------------------------------------------------

_LOG = logging.getLogger("dray.jobs.replica.delivery")
_CLAIM_INTERVAL = 2.0
_LOOK_INTERVAL = 1.0


class Intake:
    """See the module. Used by the first rank of the policy group only.

    Args:
        state: the checkpoint that the weights come from.
        recorded: payloads that were committed before, according to the lines of the metrics.

    Attributes:
        contributed: payloads that the weights are trained on.
        committed: payloads whose commit is confirmed, over all lives of the group.
    """

    def __init__(
        self, replica: Replica, inlet: TrajectoryReader, state: CheckpointState, recorded: int = 0
    ) -> None:
        config = replica.spec.config
        self._replica = replica
        self._inlet = inlet
        self._state = state
        self._recorded = recorded
        self._policy = config.policy
        self._timeout = config.timeouts.redis
        # A name for this life alone: an earlier one that wakes is given nothing that would be taken for ours.
        self._queue = RolloutConsumer(
            replica.redis,
            replica.keys,
            f"{replica.name}.{replica.incarnation}",
            max_deliveries=config.policy.max_deliveries,
            remembered=max(65536, config.rollout.slots * config.rollout.replicas),
        )
        self._backlog: list[Delivery] = []
        self._trained: list[Delivery] = []
        self._order: StalenessWindow | None = None
        self._in_order = config.in_order
        self._payloads_each = config.payloads_of_work_item
        self._given_up = 0
        # A work item whose replica has died is given out again by then.
        self._patience = 2 * config.controller.dead_after
        self._overdue = self._starving = Deadline.after(self._patience)
        self._next_claim = Deadline.after(_CLAIM_INTERVAL)
        self._next_look = Deadline.after(0)
        self.contributed = state.contributed
        self.committed = state.committed
        self.rolled_back = 0

    # --- the beginning of a life ------------------------------------------------------------------------------

    def open(self) -> None:
        """Begin an epoch, take over what earlier lives held, and commit what the weights were trained on already.

        Raises:
            ControlPlaneError: Redis or the controller does not answer, or refuses.
        """
        self._queue.attach(self._timeout)
        self._begin_epoch()
        # First, so that none of them comes again: what a checkpoint has must not be trained on twice.
        trained = self._queue.commit_trained(self._state.unconfirmed, self._timeout)
        repeated = self._queue.commit_trained(self._state.unfreed, self._timeout, counter="repeated")
        self._inlet.consume([*trained, *repeated])
        self._backlog = self._queue.claim_others(self._timeout)
        self._count_rolled_back()
        self._settle_ended()
        self._bury()
        if trained or self._backlog:
            words = "%d payloads that the checkpoint has are committed; %d others of an earlier life come again"
            _LOG.info(words, len(trained), len(self._backlog))

    def _begin_epoch(self) -> None:
        # The number is kept beside Redis, too: one that was restarted empty must not give out the same one again.
        place = self._replica.spec.folder.group_epoch
        known = json.loads(read_private_file(place, "the epoch")) if place.exists() else {}
        self._recorded = max(self._recorded, known.get("committed", 0))
        epoch = self._queue.begin_epoch(known.get("epoch", 0), self._timeout)
        self._write_epoch(epoch)
        _LOG.info("the policy group begins epoch %d", epoch)

    def _write_epoch(self, epoch: int | None) -> None:
        place = self._replica.spec.folder.group_epoch
        write_json(place, {"epoch": epoch, "committed": self._recorded}, mode=0o600)

    def _count_rolled_back(self) -> None:
        counters = self._queue.statistics(self._timeout).counters
        # The weights have what was unconfirmed, also where the server that would have known of it is gone.
        kept = self._state.committed + len(self._state.unconfirmed)
        self.committed = max(counters.get("trained", 0), kept, self._recorded)
        self.rolled_back = max(0, self.committed - self.contributed)
        new = self.rolled_back - max(counters.get("rolled_back", 0), kept - self.contributed)
        if new > 0:
            _LOG.warning("%d payloads were trained on after the last checkpoint: they are rolled back", new)
        # Before anything else is committed: the server's counter goes on from that of earlier runs.
        self._raise_counters()
        self._recorded = self.committed
        self._write_epoch(self.epoch)

    def _raise_counters(self) -> None:
        if self.committed or self.rolled_back:
            self._queue.raise_counters({"trained": self.committed, "rolled_back": self.rolled_back}, self._timeout)

    def _look_after_starving(self, received: Sequence[Delivery]) -> None:
        # Redis was restarted empty, or another client has removed entries, and a producer has died before it could
        # publish again: its payloads are gone, and their work items would count as under way for ever.
        if received:
            self._starving = Deadline.after(self._patience)
        elif self._starving.expired and not self._replica.stop.is_set:
            self._starving = Deadline.after(self._patience)
            self._queue.drop_trimmed(self._timeout)
            self._settle_ended()

    def _settle_ended(self) -> None:
        """Settle work items that were handed on, and are not in the stream: those of which no end was reported."""
        work_items = self._compare_order()
        if work_items.published:
            listed = set(self._queue.listed_work_items(self._timeout))
            self._settle(index for index in work_items.published if index not in listed)

    def _compare_order(self) -> models.UnsettledWork:
        """Ask the controller what is unsettled: it alone knows which work items were given up."""
        self._given_up = self._replica.heartbeat.given_up
        body = models.Caller(name=self._replica.name, incarnation=self._replica.incarnation)
        work_items = self._replica.client.post("/under-way", body, models.UnsettledWork)
        if self._order is None:
            self._order = StalenessWindow(work_items.unsettled, work_items.next, self._payloads_each)
            self._order.settled_payloads(work_items.settled_parts)
        else:
            self._order.compare(work_items.unsettled, work_items.next)
        return work_items

    # --- from receiving to the end of each payload ------------------------------------------------------------

    def receive(self, count: int, version: int, timeout: float) -> list[Delivery]:
        """Up to `count` payloads that may be trained on by weights of `version`, as soon as there is one.

        Raises:
            OldEpochError: the group goes on without this replica.
            ControlPlaneError: Redis is gone for good, or refuses.
        """
        if self._next_claim.expired and not self._replica.stop.is_set:
            # An earlier life that was paused in the middle of a call may have been given something since.
            self._backlog += self._queue.claim_others(self._timeout)
            self._next_claim = Deadline.after(_CLAIM_INTERVAL)
        if self._in_order and self._given_up != self._replica.heartbeat.given_up:
            self._compare_order()
        due, later = self._split_due(self._backlog, count)
        if not due:
            received = self._queue.receive(count, timeout)
            due, later = self._split_due([*later, *received], count)
            self._look_after_starving(received)
        self._backlog = later
        self._bury()
        most = self._policy.max_staleness
        if most is None:
            return due
        old = [each for each in due if version - each.entry.weight_version > most]
        self._discard(old, "too_old")
        return [each for each in due if version - each.entry.weight_version <= most]

    def _split_due(self, found: list[Delivery], count: int) -> tuple[list[Delivery], list[Delivery]]:
        """Up to `count` of `found` that this step may take, and the rest."""
        if not self._in_order or self._order is None:
            return found[:count], found[count:]
        found = sorted(found, key=lambda each: each.entry.work_item)
        self._order.found((each.entry.work_item, each.entry.part, each.entry.parts) for each in found)
        last = self._order.last_due(self._policy.batch_size)
        due = [each for each in found if each.entry.work_item <= last][:count]
        if due:
            self._overdue = Deadline.after(self._patience)
        elif len(found) >= count and self._overdue.expired:
            # Nobody knows what became of the one that is waited for: should it come after all, it is too old.
            _LOG.warning("payloads of work items up to %d have not come for %g s", last, self._patience)
            due = found[:count]
        return due, found[len(due) :]

    def lost(self, deliveries: Sequence[Delivery]) -> None:
        """These cannot be had any more.

        Raises:
            OldEpochError, ControlPlaneError: as `receive`.
        """
        self._discard(deliveries, "discarded")

    def trained(self, deliveries: Sequence[Delivery]) -> None:
        """The weights are trained on these; commit them now unless that waits for the checkpoint.

        Raises:
            OldEpochError, ControlPlaneError: as `receive`; they stay unconfirmed.
        """
        self._trained += deliveries
        self.contributed += len(deliveries)
        if self._policy.ack == "step":
            self.commit()

    def commit(self) -> None:
        """Commit everything that the weights are trained on, and have it freed.

        Raises:
            OldEpochError, ControlPlaneError: as `receive`; they stay unconfirmed.
        """
        if not self._trained:
            return
        outcome = self._queue.commit(self._trained, self._timeout)
        for each in outcome.refused:
            _LOG.error("payload %s is another consumer's under the same epoch", each.entry.identity)
        ended = outcome.ended + outcome.unknown
        self.committed += len(ended)
        self._inlet.consume([each.entry for each in ended])
        self._trained.clear()

    def settled(self, deliveries: Sequence[Delivery]) -> None:
        """Report that these are trained on, after their weights were published: a replica that is given a work
        item from then on acts with them."""
        self._settle_payloads([each.entry for each in deliveries])

    def check_epoch(self) -> None:
        """Make sure that the group does not go on without this replica.

        Raises:
            OldEpochError: it does.
            ControlPlaneError: Redis does not answer, or refuses.
        """
        self._queue.check_epoch(self._timeout)

    @property
    def oldest_held(self) -> float | None:
        """Seconds since the oldest reference that is not acknowledged was received."""
        return self._queue.oldest_held

    @property
    def epoch(self) -> int | None:
        """The epoch of this life."""
        return self._queue.epoch

    @property
    def unconfirmed(self) -> tuple[str, ...]:
        """What a checkpoint of the weights as they are must say is trained on and not committed."""
        return tuple(each.entry.identity for each in self._trained)

    def statistics(self, *, now: bool = False) -> dict[str, float]:
        """The stream's counters, at most once a second unless `now`, for the last time; empty in between.

        Raises:
            ControlPlaneError: Redis does not answer, or refuses.
        """
        if not (now or self._next_look.expired):
            return {}
        self._next_look = Deadline.after(_LOOK_INTERVAL)
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

    def _discard(self, deliveries: Sequence[Delivery], counter: Literal["discarded", "too_old"]) -> None:
        if not deliveries:
            return
        self._queue.discard(deliveries, self._timeout, counter=counter)
        self._forget([each.entry for each in deliveries])
        self._replica.activity.counters.add(counter, len(deliveries))

    def _bury(self) -> None:
        letters = self._queue.take_dead_letters()
        if letters:
            self._forget(letters)
            self._replica.activity.counters.add("dead_letters", len(letters))

    def _forget(self, entries: Sequence[RolloutEntry]) -> None:
        self._inlet.consume(entries)
        self._settle_payloads(entries)

    def _settle_payloads(self, entries: Sequence[RolloutEntry]) -> None:
        payloads = [(each.work_item, each.part, each.parts) for each in entries]
        if self._order is not None:
            self._order.settled_payloads(payloads)
        self._replica.heartbeat.settled_payloads(payloads)

    def _settle(self, work_items: Iterable[int]) -> None:
        indices = list(work_items)
        if self._order is not None:
            self._order.settled(indices)
        self._replica.heartbeat.settled(indices)


# --- delivery ----------------------------------------------------------------------------------------------------

# Which work items' payloads a training step has to take so that none of them becomes too old. No I/O and no clock.
#
# With at most (s + 1) batches of work items under way, and each step taking those with the lowest indices, no
# payload is
# trained on by weights more than s versions newer than those it was made with: work item i is given out when all
# but
# (s + 1) batches of those before it are settled and the weights trained on them are published, and it is trained
# on when all before it are.


class StalenessWindow:
    """The work items that are not settled.

    Args:
        unsettled: those given out already.
        following: index of the first one that was not given out.
        payloads_each: how many payloads a work item has at least.
    """

    def __init__(self, unsettled: Iterable[int], following: int, payloads_each: int = 1) -> None:
        self._unsettled = set(unsettled)
        self._following = following
        self._payloads_each = payloads_each
        self._parts = PartlySettled()

    def last_due(self, count: int) -> int:
        """The index of the last of the lowest unsettled work items that have `count` unsettled payloads
        together."""
        for index in sorted(self._unsettled):
            count -= self._parts.remaining(index, self._payloads_each)
            if count <= 0:
                return index
        return self._following - (-count // self._payloads_each) - 1

    def found(self, payloads: Iterable[PayloadPart]) -> None:
        """These payloads have come, and say how many their work items have."""
        for index, _, parts in payloads:
            if parts > 1 and (index in self._unsettled or index >= self._following):
                self._parts.found(index, parts)

    def settled(self, indices: Iterable[int]) -> None:
        """These are trained on, or never will be; those that were not given out as far as known are now."""
        for index in indices:
            self._give_out(index + 1)
            self._unsettled.discard(index)
            self._parts.forget(index)

    def settled_payloads(self, payloads: Iterable[PayloadPart]) -> None:
        """These payloads are trained on, or never will be; a work item is settled with the last of its own."""
        for payload in payloads:
            self._give_out(payload[0] + 1)
            if payload[0] in self._unsettled and self._parts.settle(payload):
                self.settled([payload[0]])

    def compare(self, unsettled: Iterable[int], following: int) -> None:
        """The controller knows of no others that are `unsettled`, among those before `following`."""
        self._give_out(following)
        known = set(unsettled)
        gone = {index for index in self._unsettled if index < following} - known
        self.settled(gone)

    def _give_out(self, following: int) -> None:
        """All before `following` were given out."""
        self._unsettled.update(range(self._following, following))
        self._following = max(self._following, following)
