"""``python -m stress.consumer``: leases payloads in place, and compares every byte at both ends of a lease."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

from stress.barriers import Build
from stress.books import CHOSEN, END, NEWEST, PRODUCED, Books, Count, end_with_parent, nbytes_of, payload_of

from dray import PayloadClient, PayloadRef
from dray.errors import BufferClosedError, DrayError, StaleSlotError
from dray.ring.attachment import Attachment
from dray.transport.lanes.base import Network
from dray.transport.leases import DirectInPlaceLease, InPlaceLease, LeasedBytes
from dray.transport.polling import CloseEvent

TIMEOUT = 60.0
MAX_COMPLAINTS = 10
_UNCONFIRMED = 64
"""Payloads whose ACKs may have been lost with a killed consumer, if it consumed them over a connection."""


class Consumer:
    """One consumer of a run.

    Args:
        plan: as the supervisor has made it.
        index: which consumer.
    """

    def __init__(self, plan: dict[str, Any], index: int) -> None:
        self._books = Books(Path(plan["folder"]), **plan["books"])
        self._producer = bytes.fromhex(plan["producer"])
        self._endpoints = tuple(plan["endpoints"])
        self._reader = plan["reader_of"][index]
        self._counts = self._books.counts[index]
        self._checked, self._done = self._books.checked[index], self._books.done[index]
        self._gone = self._books.gone[self._reader]
        self._hold = plan["hold"]
        self._fork_every = plan["fork_every"]
        self._may_drop = plan["on_full"] == "overwrite" or plan["retain"] == "newest"
        self._consumes = plan["retain"] != "newest"
        self._rng = random.Random(plan["seed"] * 1000 + index * 10 + os.getpid())
        self._client = PayloadClient(
            reader=self._reader, lane="shm", inline_bytes=0, direct=index not in plan["exchanging"]
        )
        self._complaints = 0

    def run(self) -> None:
        """Consume until the run ends."""
        head, counts = self._books.head, self._counts
        with self._client:
            self._attach()
            counts[Count.CURSOR] = max(0, counts[Count.CURSOR] - _UNCONFIRMED)
            while not (head[END] and (self._may_drop or counts[Count.CURSOR] >= head[PRODUCED])):
                if self._may_drop:
                    self._choose()
                else:
                    self._next_in_order()

    def _attach(self) -> None:
        """A first read, of a payload that never existed: it brings the attachment."""
        try:
            self._client.read_bytes(self._ref(0, (1 << 62) - 1), timeout=TIMEOUT)
        except StaleSlotError:
            print("attached", flush=True)

    # --- what to lease ----------------------------------------------------------------------------------------

    def _next_in_order(self) -> None:
        """Consume the next payload, which nothing drops; before it, perhaps others that are gone or not there."""
        cursor = self._counts[Count.CURSOR]
        chance = self._rng.random()
        if chance < 0.05 and cursor:
            self._try(self._rng.randrange(max(0, cursor - 64), cursor), consume=False)
        elif chance < 0.1:
            self._guess(cursor)
        if cursor >= self._books.head[PRODUCED]:
            os.sched_yield()
            return
        for _ in range(self._rng.choice((0, 1, 4, 16))):
            self._try(cursor, consume=False)
        if self._try(cursor, consume=True) or self._checked[cursor]:
            self._counts[Count.CURSOR] = cursor + 1

    def _choose(self) -> None:
        """Lease a payload that is, or was a moment ago, in the ring."""
        chance = self._rng.random()
        if not self._consumes:
            newest = self._books.head[NEWEST]
            if self._books.head[PRODUCED]:
                self._try(newest >> 16, consume=True)
            return
        found = self._books.current
        oldest = chance < 0.25  # it is dropped next
        sequence = (min(found) if oldest else found[self._rng.randrange(len(found))]) - 1
        if sequence < 0:
            os.sched_yield()
        elif 0.24 < chance < 0.26:
            self._guess(sequence)
        else:
            for _ in range(self._rng.choice((0, 1, 4, 16))):
                if not self._try(sequence, consume=False):
                    return
            self._try(sequence, consume=chance > 0.8)

    def _guess(self, near: int) -> None:
        """Lease what is perhaps not committed yet, in the slot where it may be put."""
        sequence = near + self._rng.randint(0, 4)
        if sequence >= self._books.payloads:
            return
        slot = self._rng.randrange(len(self._books.current))
        try:
            with self._client.lease_bytes(self._ref(slot, sequence), timeout=TIMEOUT) as found:
                self._compare(found, payload_of(sequence), Count.WRONG_BYTES)
                self._counts[Count.GUESSED] += 1
                raise _Release
        except (StaleSlotError, _Release):
            return

    def run_close(self) -> None:
        """Lease each payload that is about to be dropped, at that moment, and compare its bytes for a while."""
        books, counts, head = self._books, self._counts, self._books.head
        attach = _Attaching()
        with PayloadClient(reader=self._reader, lane="shm", network=attach) as self._client:
            self._attach()
            leased = attach.attachment.lease
            chosen = 0
            while not head[END]:
                if head[CHOSEN] == chosen:
                    continue
                chosen = head[CHOSEN]
                sequence = chosen - 1
                try:
                    lease = leased(books.slots[sequence], sequence, nbytes_of(sequence))
                except StaleSlotError:
                    counts[Count.STALE] += 1
                    continue
                if lease is None:  # too late
                    continue
                counts[Count.LEASES] += 1
                counts[Count.DIRECT] += 1
                expected = payload_of(sequence)
                for _ in range(self._hold):
                    if bytes(lease.buffer) != expected:
                        counts[Count.CHANGED_BYTES] += 1
                        break
                lease.end(consumed=False)

    # --- a lease ----------------------------------------------------------------------------------------------

    def _try(self, sequence: int, *, consume: bool) -> bool:
        """Lease a payload and end the lease; True if it could be leased."""
        counts, gone = self._counts, self._gone[sequence]
        ref = self._ref(self._books.slots[sequence], sequence)
        try:
            lease = self._client.lease_bytes(ref, timeout=TIMEOUT)
        except StaleSlotError:
            counts[Count.STALE] += 1
            if not (self._may_drop or self._checked[sequence]):
                counts[Count.LOST] += 1
                self._complain(f"payload {sequence} is stale, and was not consumed")
                self._checked[sequence] = 1  # once is enough
            self._gone[sequence] = 1
            return False
        if gone:
            counts[Count.GIVEN_AGAIN] += 1
            self._complain(f"payload {sequence} was leased after it was gone")
        counts[Count.LEASES] += 1
        direct = isinstance(lease, DirectInPlaceLease)
        counts[Count.DIRECT] += direct
        found = lease.__enter__()
        expected = payload_of(sequence)
        right = self._compare(found, expected, Count.WRONG_BYTES)
        for _ in range(self._hold if self._rng.random() < 0.9 else 8 * self._hold):
            if right:
                right = self._compare(found, expected, Count.CHANGED_BYTES)
        if self._fork_every and counts[Count.LEASES] % self._fork_every == 0:
            self._fork(lease, ref)
            right = right and self._compare(found, expected, Count.CHANGED_BYTES)
        if consume:
            self._checked[sequence] = 1
        lease.finish(consume)
        if consume and self._consumes:
            counts[Count.CONSUMED] += 1
            if direct:  # the ACK of another lease travels for a while, and is lost with this process
                self._done[sequence] = 1
                self._gone[sequence] = 1
        return True

    def _compare(self, found: LeasedBytes, expected: bytes, kind: Count) -> bool:
        data = found.data.tobytes()
        if data == expected:
            return True
        self._counts[kind] += 1
        instead = int.from_bytes(data[:8], "little")
        self._complain(f"{kind.name}: payload {int.from_bytes(expected[:8], 'little')}, found {instead}")
        return False

    def _fork(self, lease: InPlaceLease[LeasedBytes], ref: PayloadRef) -> None:
        """Fork under a lease; the child tries to lease, ends its copy of the lease, and exits."""
        self._counts[Count.FORKS] += 1
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                lease.finish(consumed=True)
                self._client.lease_bytes(ref, timeout=TIMEOUT)
            except BufferClosedError:
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        if status:
            self._counts[Count.FAULTY_CHILDREN] += 1

    def _ref(self, slot: int, sequence: int) -> PayloadRef:
        return PayloadRef(self._producer, slot, sequence, nbytes_of(sequence), self._endpoints)

    def _complain(self, what: str) -> None:
        self._complaints += 1
        if self._complaints <= MAX_COMPLAINTS:
            print(f"reader {self._reader}, pid {os.getpid()}: {what}", file=sys.stderr, flush=True)


class _Attaching(Network):
    """The network of this machine; keeps the attachment that a client makes over it."""

    attachment: Attachment

    def __init__(self) -> None:
        super().__init__(CloseEvent())

    def open_attachment(self, *arguments: Any, **options: Any) -> Attachment:
        self.attachment = super().open_attachment(*arguments, **options)
        return self.attachment


class _Release(Exception):
    """Ends a block whose payload is not consumed."""


def main() -> None:
    """Consume; the plan and the index come as arguments."""
    end_with_parent()
    plan, index = json.loads(sys.argv[1]), int(sys.argv[2])
    if plan["cpus"]:
        os.sched_setaffinity(0, plan["cpus"])
    consumer = Consumer(plan, index)
    try:
        if Build(plan["build"]).close:
            consumer.run_close()
        else:
            consumer.run()
    except DrayError:
        consumer._counts[Count.OTHER_ERRORS] += 1  # noqa: SLF001
        raise


if __name__ == "__main__":
    main()
