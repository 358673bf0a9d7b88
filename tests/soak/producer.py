"""A producer of the soak: a ring, a server, and references published through the control plane.

``python -m soak.producer JSON``, started by the supervisor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import socket
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from soak import proxy
from soak.ledger import Kind, Ledger, Operation
from soak.member import REDIS_SECONDS, Member
from soak.payloads import Content

from dray.clock import MONOTONIC
from dray.errors import BufferFullError
from dray.jobs.queue import RedisUnavailableError, RolloutEntry, RolloutProducer, StreamLostError
from dray.protocol import PayloadRef
from dray.ring import SharedRingBuffer
from dray.transport import PayloadServer

ON_FULL = ("block", "error", "overwrite")
CLAIM_SECONDS = 0.3
CHECK_EVERY = 0.5
PACES = (0.2, 1.0, 1.0, 10.0)
"""How fast payloads come for a few seconds, by the plan's rate: the last one fills the ring."""
ORPHAN_AFTER = 1.0
RAW = 1
"""`work_item` of an entry whose payload is raw bytes; 0 for an image."""


class Producer:
    """Puts payloads into the ring, publishes them, and takes back those that the stream no longer lists."""

    def __init__(self, member: Member, ring: SharedRingBuffer, server: PayloadServer, ledger: Ledger) -> None:
        self._member = member
        self._ring = ring
        self._server = server
        self._ledger = ledger
        self._rng = random.Random(member.spec["seed"])
        self._queue = RolloutProducer(member.redis, member.keys)
        self._replaced: dict[str, str] = {}
        self._unpublished: deque[RolloutEntry] = deque()
        self._entries: dict[int, RolloutEntry] = {}
        self._published_at: dict[int, float] = {}
        self._next_check = 0.0

    def reach_through(self, direct: str, proxied: str) -> None:
        """References name `proxied` in the place of `direct`."""
        self._replaced[direct] = proxied

    def run(self) -> None:
        """Run until SIGTERM, then until the ring is empty or the drain deadline has passed."""
        rate, until = 0.0, 0.0
        while not self._member.stop.is_set():
            if MONOTONIC.now() >= until:
                rate = self._member.spec["rate"] * self._rng.choice(PACES)
                until = MONOTONIC.now() + self._rng.uniform(1.0, 6.0)
            self._put()
            self._keep_published()
            self._member.stop.wait(self._rng.expovariate(rate))
        deadline = self._member.drain_deadline()
        while self._ring.ready(leased=True) and not deadline.expired:
            self._keep_published()
            self._snapshot()
            self._member.pause(0.05)
        for left in self._ring.ready(leased=True):
            self._write(Kind.LEFT, left.sequence, slot=left.slot)
        self._snapshot()

    # --- putting ----------------------------------------------------------------------------------------------

    def _put(self) -> None:
        content = Content.draw(self._rng, self._ring.slot_bytes)
        try:
            with self._ledger.waiting(Operation.CLAIM, CLAIM_SECONDS):
                slot = self._ring.claim(content.nbytes, CLAIM_SECONDS)
        except BufferFullError:
            self._write(Kind.FULL)
            self._snapshot()
            return
        with slot:
            content.write(slot.buffer, self._ring.producer_id, slot.sequence)
            if self._rng.random() < 0.02:
                return  # without commit: the claim is given back
            self._write(Kind.WRITING, slot.sequence, slot=slot.slot, nbytes=content.nbytes)
            slot.commit()
        self._snapshot(Kind.COMMITTED, slot.sequence, slot.slot, content.nbytes)
        reference = self._through(self._server.ref(slot.slot, slot.sequence, content.nbytes))
        entry = RolloutEntry(
            producer=reference.producer.hex(),
            sequence=reference.sequence,
            weight_version=0,
            replica=self._member.spec["name"],
            work_item=RAW if content.raw else 0,
            reference=reference.to_json(),
        )
        self._entries[entry.sequence] = entry
        self._unpublished.append(entry)
        if len(self._entries) > 2 * self._ring.slots:
            there = {each.sequence for each in self._ring.ready(leased=True)}
            for gone in self._entries.keys() - there:
                del self._entries[gone]
                self._published_at.pop(gone, None)

    def _through(self, ref: PayloadRef) -> PayloadRef:
        endpoints = tuple(self._replaced.get(endpoint, endpoint) for endpoint in ref.endpoints)
        return dataclasses.replace(ref, endpoints=endpoints)

    # --- publishing -------------------------------------------------------------------------------------------

    def _keep_published(self) -> None:
        """Publish what is due; now and then, see whether the stream is still the same and lists everything."""
        now = MONOTONIC.now()
        with contextlib.suppress(RedisUnavailableError):
            if now >= self._next_check:
                self._next_check = now + CHECK_EVERY
                self._attach()
                self._reclaim(now)
            try:
                while self._unpublished:
                    self._publish(self._unpublished[0])
                    self._unpublished.popleft()
            except StreamLostError:
                self._attach()

    def _publish(self, entry: RolloutEntry) -> None:
        self._write(Kind.PUBLISHING, entry.sequence)
        with self._ledger.waiting(Operation.PUBLISH, REDIS_SECONDS):
            self._queue.publish(entry, timeout=REDIS_SECONDS)
        self._write(Kind.PUBLISHED, entry.sequence)
        self._published_at[entry.sequence] = MONOTONIC.now()

    def _attach(self) -> None:
        with self._ledger.waiting(Operation.ATTACH, REDIS_SECONDS):
            lost = self._queue.attach(timeout=REDIS_SECONDS)
        if lost:
            waiting = {entry.sequence for entry in self._unpublished}
            there = [each.sequence for each in self._ring.ready(leased=True)]
            self._unpublished.extend(self._entries[each] for each in there if each not in waiting)

    def _reclaim(self, now: float) -> None:
        """Free payloads that were published a while ago and are no longer listed: no consumer requests them."""
        due = {entry.sequence for entry in self._unpublished}
        old = {
            each.sequence: each.slot
            for each in self._ring.ready()
            if each.sequence not in due and now - self._published_at.get(each.sequence, now) > ORPHAN_AFTER
        }
        if not old:
            return
        with self._ledger.waiting(Operation.LOOK_UP, REDIS_SECONDS), contextlib.suppress(StreamLostError):
            orphans = self._queue.publish_trimmed([self._entries[each] for each in old], timeout=REDIS_SECONDS)
            for orphan in orphans:
                if self._ring.consume(old[orphan.sequence], orphan.sequence):
                    self._write(Kind.RECLAIMED, orphan.sequence)

    # --- records ----------------------------------------------------------------------------------------------

    def _write(self, kind: Kind, sequence: int = 0, *, slot: int = 0, nbytes: int = 0) -> None:
        self._ledger.write(kind, self._ring.producer_id, sequence, slot=slot, nbytes=nbytes)

    def _snapshot(self, kind: Kind = Kind.SNAPSHOT, sequence: int = 0, slot: int = 0, nbytes: int = 0) -> None:
        # `live` is read first: a payload consumed between the two calls is in both figures, never in neither.
        live = sum(1 << each.slot for each in self._ring.ready(leased=True))
        counted = self._ring.statistics()
        self._ledger.write(
            kind, self._ring.producer_id, sequence, slot=slot, nbytes=nbytes, live=live,
            consumed=counted.consumed, dropped=counted.dropped_unread + counted.dropped_delivered,
        )  # fmt: skip


@contextlib.contextmanager
def _proxied(producer: Producer, server: PayloadServer, control: str | None, name: str) -> Iterator[None]:
    """The server's first tcp endpoint is reached through the proxy, for as long as this process runs."""
    if control is None:
        yield
        return
    direct = next(endpoint for endpoint in server.endpoints if endpoint.startswith("tcp:"))
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(control)
        producer.reach_through(direct, proxy.ask_for_route(connection, name, direct))
        yield


def main() -> None:
    member = Member()
    spec = member.spec
    with contextlib.ExitStack() as opened:
        ledger = opened.enter_context(Ledger(Path(spec["ledger"])))
        opened.enter_context(member.redis)
        ring = opened.enter_context(SharedRingBuffer(spec["slots"], spec["slot_bytes"], on_full=spec["on_full"]))
        server = opened.enter_context(
            PayloadServer(
                ring, host=spec["host"], port=spec["port"], threads=spec["threads"], secret=member.secret,
                idle_timeout=8.0, lease_timeout=5.0, drain_timeout=1.0,
            )
        )  # fmt: skip
        Path(spec["endpoints"]).write_text("\n".join(server.endpoints), encoding="utf-8")
        producer = Producer(member, ring, server, ledger)
        opened.enter_context(_proxied(producer, server, spec["proxy"], spec["name"]))
        on_full = ON_FULL.index(ring.on_full)
        ledger.write(Kind.BEGAN, ring.producer_id, slot=ring.slots, nbytes=ring.slot_bytes, reason=on_full)
        producer.run()
        ledger.write(Kind.ENDED, ring.producer_id)


if __name__ == "__main__":
    main()
