"""A consumer of the soak: receives references from the stream, reads, commits, and claims the deliveries of
dead consumers.

``python -m soak.consumer JSON``, started by the supervisor.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections import deque
from collections.abc import Iterable
from pathlib import Path

from soak.ledger import Given, Kind, Ledger, Operation, Outcome
from soak.member import FENCED, REDIS_SECONDS, DeadMembers, Member
from soak.readers import ROLES, PendingDelivery, Reader, free

from dray.clock import MONOTONIC
from dray.errors import DrayError, StaleSlotError
from dray.jobs.queue import Delivery, RedisUnavailableError, RolloutConsumer, RolloutEntry
from dray.protocol import PayloadRef
from dray.transport import PayloadClient

BATCH = 8
MAX_PENDING = 24
RECEIVE_SECONDS = 0.3
RETRY_AFTER = 0.3
SEEN = 200
READ_AGAIN = 0.1
"""How often an old reference is redeemed once more: it is stale, or gives the payload it named."""
GIVE_UP_AFTER = 25.0
SLOWNESS = (0.0, 0.0, 0.02, 0.2, 1.0)
"""Seconds between two batches, on average, for a few seconds each."""


class Consumer:
    """Reads the payloads of received references, in one of the ways of `soak.readers`."""

    def __init__(self, member: Member, client: PayloadClient, reader: Reader, ledger: Ledger) -> None:
        self._member = member
        self._client = client
        self._reader = reader
        self._ledger = ledger
        self._rng = random.Random(member.spec["seed"])
        self._name: str = member.spec["consumer"]
        self._queue = RolloutConsumer(member.redis, member.keys, self._name)
        self._dead_members = DeadMembers(Path(member.spec["dead_members"]))
        self._inherited: set[str] = set()
        self._held: dict[tuple[bytes, int], PendingDelivery] = {}
        self._to_commit: dict[tuple[bytes, int], PendingDelivery] = {}
        self._to_give_up: dict[tuple[bytes, int], tuple[PendingDelivery, Given]] = {}
        self._seen: deque[PendingDelivery] = deque(maxlen=SEEN)

    def run(self) -> bool:
        """Run until SIGTERM; then finish what was received, until the drain deadline. False once declared dead."""
        slowness, until = 0.0, 0.0
        while not self._member.stop.is_set():
            if not self._round(receiving=True):
                return False
            if MONOTONIC.now() >= until:
                slowness = self._rng.choice(SLOWNESS)
                until = MONOTONIC.now() + self._rng.uniform(1.0, 6.0)
            if slowness:
                self._member.stop.wait(self._rng.uniform(0.0, 2 * slowness))
        deadline = self._member.drain_deadline()
        while (self._held or self._to_commit or self._to_give_up) and not deadline.expired:
            if not self._round(receiving=False):
                return False
        return True

    def _round(self, *, receiving: bool) -> bool:
        with contextlib.suppress(RedisUnavailableError):
            self._report_results()
        self._dead_members.refresh()
        with contextlib.suppress(RedisUnavailableError):
            if not self._inherit():
                return False
        if receiving and len(self._held) < MAX_PENDING:
            with self._ledger.waiting(Operation.RECEIVE, RECEIVE_SECONDS):
                received = self._queue.receive(BATCH, timeout=RECEIVE_SECONDS)
            self._accept(received)
        now = MONOTONIC.now()
        due = [held for held in self._held.values() if held.again <= now][:BATCH]
        if not due:
            self._member.pause(0.02)
        for held, error in self._reader.read(due):
            self._note(held, error)
        if self._seen and self._rng.random() < READ_AGAIN:
            self._reader.read_again(self._rng.choice(self._seen))
        return True

    # --- what comes ---------------------------------------------------------------------------------------------

    def _accept(self, deliveries: Iterable[Delivery]) -> None:
        for delivery in deliveries:
            ref = PayloadRef.from_json(delivery.entry.reference or "")
            self._ledger.write(Kind.RECEIVED, *ref.identity, nbytes=delivery.deliveries)
            self._held[ref.identity] = held = PendingDelivery(delivery, ref)
            self._seen.append(held)

    def _inherit(self) -> bool:
        """Claim the deliveries of dead consumers; False if this process was declared dead."""
        for death in self._dead_members.consumers:
            if death in self._inherited:
                continue
            name = death.partition("#")[0]
            if name == self._name:
                return False
            with self._ledger.waiting(Operation.CLAIM_FROM, REDIS_SECONDS):
                claimed = self._queue.claim_from(name, timeout=REDIS_SECONDS)
            self._inherited.add(death)
            self._accept(claimed)
        self._free_dead_letters(self._queue.take_dead_letters())
        return True

    def _free_dead_letters(self, entries: Iterable[RolloutEntry]) -> None:
        for entry in entries:
            ref = PayloadRef.from_json(entry.reference or "")
            self._ledger.write(Kind.GIVING_UP, *ref.identity, reason=Given.DEAD_LETTER)
            free(self._client, self._ledger, [ref])

    # --- results ------------------------------------------------------------------------------------------------

    def _note(self, held: PendingDelivery, error: DrayError | None) -> None:
        identity = held.ref.identity
        if identity not in self._held:
            return  # a late result of a delivery that was given up
        if error is None:
            self._to_commit[identity] = self._held.pop(identity)
            return
        if isinstance(error, StaleSlotError):
            given = Given.STALE
        elif held.ref.producer in self._dead_members.producers:
            given = Given.LOST
        elif MONOTONIC.now() - held.since > GIVE_UP_AFTER:
            given = Given.UNREACHABLE
        else:
            held.again = MONOTONIC.now() + RETRY_AFTER
            return
        self._to_give_up[identity] = self._held.pop(identity), given

    def _report_results(self) -> None:
        """Report to the stream, then to the producers, what was delivered and what was given up."""
        if self._to_commit:
            committing = list(self._to_commit.values())
            with self._ledger.waiting(Operation.COMMIT, REDIS_SECONDS):
                outcome = self._queue.commit([held.delivery for held in committing], timeout=REDIS_SECONDS)
            refused = {delivery.entry.identity for delivery in outcome.refused}
            unknown = {delivery.entry.identity for delivery in outcome.unknown}
            for held in committing:
                name = held.delivery.entry.identity
                end = Outcome.REFUSED if name in refused else Outcome.UNKNOWN if name in unknown else Outcome.ENDED
                self._ledger.write(Kind.ENDED_IN_STREAM, *held.ref.identity, reason=end)
            self._to_commit.clear()
            self._reader.committed([held for held in committing if held.delivery.entry.identity not in refused])
        if self._to_give_up:
            giving_up = list(self._to_give_up.values())
            for held, given in giving_up:
                self._ledger.write(Kind.GIVING_UP, *held.ref.identity, reason=given)
            with self._ledger.waiting(Operation.DISCARD, REDIS_SECONDS):
                outcome = self._queue.discard([held.delivery for held, _ in giving_up], timeout=REDIS_SECONDS)
            refused = {delivery.entry.identity for delivery in outcome.refused}
            self._to_give_up.clear()
            for held, given in giving_up:
                if given is Given.UNREACHABLE and held.delivery.entry.identity not in refused:
                    free(self._client, self._ledger, [held.ref])


def main() -> None:
    member = Member()
    spec = member.spec
    with contextlib.ExitStack() as opened:
        ledger = opened.enter_context(Ledger(Path(spec["ledger"])))
        opened.enter_context(member.redis)
        client = PayloadClient(lane=spec["lane"], secret=member.secret, idle_seconds=5.0, quarantine_seconds=2.0)
        reader = ROLES[spec["role"]](client, ledger, random.Random(spec["seed"]))
        opened.enter_context(contextlib.closing(reader))
        ledger.write(Kind.BEGAN)
        alive = Consumer(member, client, reader, ledger).run()
        ledger.write(Kind.ENDED)
    if not alive:
        sys.exit(FENCED)


if __name__ == "__main__":
    main()
