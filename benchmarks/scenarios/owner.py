"""What direct leases cost the owner of a ring: barriers beside consumers that run, and reads of lease words.

The rows have no target of their own. They belong to what a producer notices of its readers: P12.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

from benchmarks.exchange import timed
from benchmarks.figures import Figure, Row
from benchmarks.partner import Partner
from benchmarks.plan import Plan
from benchmarks.scenario import Progress, Scenario, Skipped
from dray import PayloadClient, PayloadRef, PayloadServer, SharedRingBuffer
from dray.ring.direct import MAX_ATTACHMENTS_OF_PROCESS, direct_problem

NAME = "owner"
PAYLOAD_BYTES = 64
SPINNING = (0, 1, 4, 16)
"""Processes of consumers that run while the owner passes barriers."""

CONSUMERS, LEASES = 64, 8
"""Consumers that have all their leases in use, and how many these are."""

_ROOM = 64
"""Slots that no consumer holds."""
_PASSED = 500
"""Barriers of one block at least: as many as the ring's own 99th percentile is made of."""


def run(plan: Plan, progress: Progress) -> Iterator[Row | Skipped]:
    """Measure the barriers, then the reads of lease words."""
    if why := direct_problem():
        yield Skipped("what direct leases cost the owner of a ring", why)
        return
    yield from _barriers(plan, progress)
    yield from _looks(plan, progress)


class _Owner:
    """A ring in this process with a server through which consumers attach, this process among them.

    Args:
        held: slots for payloads that consumers hold.
        overwrite: a claim drops the oldest payload that no consumer holds.
        opened: closes it.
    """

    def __init__(self, held: int, opened: ExitStack, *, overwrite: bool) -> None:
        self.ring = opened.enter_context(
            SharedRingBuffer(
                held + _ROOM, PAYLOAD_BYTES, on_full="overwrite" if overwrite else "block", prefault=True
            )
        )
        self._server = opened.enter_context(
            PayloadServer(self.ring, lane=("shm",), max_leases=LEASES, threads=1, checksum=False)
        )
        self._client = opened.enter_context(PayloadClient(lane="shm"))
        self._unread: deque[tuple[int, int]] = deque(maxlen=_ROOM)
        self.claim()
        self.consume()

    def claim(self) -> None:
        """The ring's part of a put: a slot is claimed and committed."""
        with self.ring.claim(PAYLOAD_BYTES, 0) as writer:
            writer.commit()
        self._unread.append((writer.slot, writer.sequence))

    def consume(self) -> None:
        """Consume directly what was claimed; the slots are due then."""
        for ref in self._take_refs():
            with self._client.lease_bytes(ref):
                pass

    def lend(self, consumers: int, partner: Partner) -> None:
        """Let a process attach as several consumers, which hold as many payloads as they can."""
        for _ in range(consumers):
            for _ in range(LEASES):
                self.claim()
            partner.ask("hold", refs=[[ref.to_json() for ref in self._take_refs()]])

    def _take_refs(self) -> Iterator[PayloadRef]:
        while self._unread:
            slot, sequence = self._unread.popleft()
            yield self._server.ref(slot, sequence, PAYLOAD_BYTES)


# --- barriers -----------------------------------------------------------------------------------------------


@dataclass
class _Passed:
    """What the owner measured beside some spinning processes, round by round."""

    claims: list[list[float]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)


def _barriers(plan: Plan, progress: Progress) -> Iterator[Row]:
    """Claims in a full ring, each of which drops a payload and for that passes a barrier."""
    counts = SPINNING[:-1] if plan.quick else SPINNING
    operations = max(_PASSED, plan.most_operations)
    found = {count: _Passed() for count in counts}
    with ExitStack() as opened:
        progress.step(f"starting {counts[-1]} consumers")
        owner = _Owner(counts[-1] * LEASES, opened, overwrite=True)
        partners = [opened.enter_context(Partner("holding")) for _ in range(counts[-1])]
        for partner in partners:
            owner.lend(1, partner)
        for _ in range(_ROOM):
            owner.claim()
        for index in range(plan.rounds):
            progress.step(f"barriers, round {index + 1} of {plan.rounds}")
            for count, passed in found.items():
                _pass_beside(partners[:count], owner, operations, passed)
    limit = Figure.of(found[0].claims)
    for count, passed in found.items():
        beside = f"{count} of {counts[-1]} consumers running"
        subject = f"claim that drops a payload, {beside}"
        against = ("", None) if count == 0 else ("none running", limit)
        yield Row(NAME, subject, None, Figure.of(passed.claims), "s", *against)
        barriers = operations * plan.rounds
        yield Row(NAME, f"barriers, {beside}", None, Figure(tuple(passed.rates), None, barriers), "/s")
        yield Row(NAME, f"p99 of a barrier, {beside}", None, Figure(tuple(passed.p99), None, barriers))


def _pass_beside(partners: list[Partner], owner: _Owner, operations: int, passed: _Passed) -> None:
    for partner in partners:
        partner.ask("spin")
    before = owner.ring.statistics().barriers
    block = timed(owner.claim, operations)
    after = owner.ring.statistics()
    for partner in partners:
        partner.ask("rest")
    passed.claims.append(block)
    passed.rates.append((after.barriers - before) / sum(block))
    passed.p99.append(after.barrier_p99 or 0.0)


# --- looks --------------------------------------------------------------------------------------------------


def _looks(plan: Plan, progress: Progress) -> Iterator[Row]:
    """Claims and looks in a ring whose consumers have all their leases in use, beside one where none is."""
    cycles = max(1, plan.most_operations // (_ROOM // 2))
    held, calm = f"{CONSUMERS} consumers with {LEASES} leases each", "no lease"
    claims: dict[str, list[list[float]]] = {calm: [], held: []}
    looks: dict[str, list[list[float]]] = {calm: [], held: []}
    with ExitStack() as opened:
        progress.step(f"starting {CONSUMERS} consumers")
        owners = {each: _Owner(CONSUMERS * LEASES, opened, overwrite=False) for each in claims}
        for _ in range(0, CONSUMERS, MAX_ATTACHMENTS_OF_PROCESS):
            owners[held].lend(MAX_ATTACHMENTS_OF_PROCESS, opened.enter_context(Partner("holding")))
        for index in range(plan.rounds):
            progress.step(f"observations, round {index + 1} of {plan.rounds}")
            for each, owner in owners.items():
                claimed, looked = [], []
                for _ in range(cycles):
                    claimed += timed(owner.claim, _ROOM // 2)
                    owner.consume()
                    looked += timed(owner.ring.observe, 1)
                claims[each].append(claimed)
                looks[each].append(looked)
    for what, blocks in (("claim", claims), (f"look that frees {_ROOM // 2} slots", looks)):
        limit = Figure.of(blocks[calm])
        yield Row(NAME, f"{what}, {calm}", None, limit)
        yield Row(NAME, f"{what}, {held}", None, Figure.of(blocks[held]), "s", calm, limit)


SCENARIO = Scenario(NAME, "Direct leases, the owner's side", ("P12",), lambda plan: 2 + 2 * plan.rounds, run)
