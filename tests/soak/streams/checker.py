"""Decides from the journals of a round whether its payloads have gone as they should.

The checker knows for each hand-out when its use began and when it ended: by an acknowledgement, by being given
back, by the end of its session, or by the death of its process. It compares these times with those of the next
hand-out of the same payload in the same group. Times of all processes of a host are comparable.

An act that was begun and whose end is not in the journal may have happened or not: neither counts against dray.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from soak.streams.journal import read
from soak.streams.members import Member
from soak.streams.plan import ConsumerPlan

TAKEN_BACK_SECONDS: Final = 29
"""A consumer that was stopped for so long may have lost what it had not begun."""

NOTICED_NS: Final = 2_000_000_000
"""Within this time, a producer that is not stopped has learned that a consumer has ended."""

Identity: TypeAlias = tuple[str, int]
"""The producer's id and the sequence number of a payload."""


@dataclass(slots=True, eq=False)
class Session:
    """One consumer, from its opening to its close.

    Attributes:
        member: its process.
        group: its group.
        direct: it leases in place.
        about: what it does.
        uses: what it has got, in order.
    """

    member: Member
    group: str
    direct: bool
    about: str
    began: int
    closed: int | None = None
    gone: int | None = None
    uses: dict[Identity, Use] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.member.name} ({self.about})"


@dataclass(slots=True, eq=False)
class Use:
    """A payload in the hands of one session.

    Attributes:
        got: when `get` had returned it.
        deliveries: the number of its hand-out.
        left: when the session began to acknowledge it or to give it back.
        acknowledged: when the acknowledgement had returned, unless another thread had begun to close the session.
        maybe: an acknowledgement had begun.
    """

    session: Session
    got: int
    deliveries: int
    left: int | None = None
    acknowledged: int | None = None
    maybe: bool = False

    @property
    def until(self) -> float:
        """When the session's right to it ended, at the earliest."""
        ends = [each for each in (self.left, self.session.closed, self.session.member.killed) if each is not None]
        return min(ends, default=float("inf"))

    def __str__(self) -> str:
        ends = [f"got {_time(self.got)} as delivery {self.deliveries}"]
        if self.left is not None:
            ends.append(f"{'acknowledging' if self.maybe else 'giving back'} {_time(self.left)}")
        if self.acknowledged is not None:
            ends.append(f"acknowledged {_time(self.acknowledged)}")
        if self.session.closed is not None:
            ends.append(f"closing {_time(self.session.closed)}")
        if self.session.member.killed is not None:
            ends.append(f"killed {_time(self.session.member.killed)}")
        return f"{self.session}: {', '.join(ends)}"


@dataclass(slots=True, eq=False)
class Source:
    """One producer."""

    member: Member
    id: str = ""
    overwrites: bool = False
    begun: dict[int, int] = field(default_factory=dict)  # number -> when `put` began
    put: dict[int, tuple[int, int]] = field(default_factory=dict)  # sequence -> (number, when `put` had returned)
    refused: set[int] = field(default_factory=set)
    closing: int | None = None
    closed: int | None = None
    lost: int = 0
    why: str = ""


@dataclass(slots=True)
class Account:
    """What a round has shown; `problems` is empty if all is well."""

    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    longest_drain: float = 0.0


def check(members: Iterable[Member], groups: tuple[str, ...]) -> Account:
    """Check the round that the processes have ended, or have ended their part of."""
    return _Check(list(members), groups).account


class _Check:
    def __init__(self, members: list[Member], groups: tuple[str, ...]) -> None:
        self.account = Account()
        self._groups = groups
        self._sources: dict[int, Source] = {}
        self._sessions: list[Session] = []
        self._uses: dict[tuple[str, Identity], list[Use]] = defaultdict(list)
        self._consumers = [member for member in members if not member.is_producer]
        for member in sorted(members, key=lambda each: not each.is_producer):
            if member.journal.exists():
                if member.is_producer:
                    self._read_producer(member)
                else:
                    self._read_consumer(member)
        self._by_id = {source.id: source for source in self._sources.values()}
        for uses in self._uses.values():
            uses.sort(key=lambda use: use.got)
        self._check_hand_outs()
        self._check_order()
        self._check_payloads()

    def _problem(self, kind: str, text: str, uses: Iterable[Use] = (), source: Source | None = None) -> None:
        self.account.counts[kind] += 1
        history = [f"    {use}" for use in uses]
        if source is not None:
            state = "killed " + _time(source.member.killed) if source.member.killed else "not killed"
            history.insert(
                0, f"    {source.member.name}: {state}, closed {_time(source.closed)}, lost {source.lost}"
            )
        self.account.problems.append("\n".join([f"{kind}: {text}", *history]))

    # --- journals ---------------------------------------------------------------------------------------------

    def _read_producer(self, member: Member) -> None:
        source = self._sources[member.plan.key] = Source(member)
        counts = self.account.counts
        if member.offset:
            source.id, source.overwrites = _opening(member)
        for kind, at, fields in read(member.journal, member.offset):
            if kind == "B":
                source.id, source.overwrites = fields[0], fields[2] == "1"
            elif kind == "?":
                source.begun[int(fields[0])] = at
            elif kind == "P":
                source.put[int(fields[1])] = int(fields[0]), at
                counts["payloads put"] += 1
            elif kind == "F":
                source.refused.add(int(fields[0]))
                counts["puts refused by a full ring"] += 1
            elif kind == "C":
                source.closing = at
            elif kind == "E":
                source.closed, source.lost, source.why = at, int(fields[0]), " ".join(fields[1:])

    def _read_consumer(self, member: Member) -> None:
        session: Session | None = None
        counts = self.account.counts
        if member.offset:
            assert isinstance(member.plan, ConsumerPlan)
            session = Session(member, member.plan.group, True, "steady", member.began)
            self._sessions.append(session)
        for kind, at, fields in read(member.journal, member.offset):
            if kind == "O":
                session = Session(member, fields[0], fields[1] == "1", fields[2], at)
                self._sessions.append(session)
                counts["sessions"] += 1
                continue
            if kind == "W":
                self._problem("wrong payloads", f"{member.name}: {' '.join(fields)}")
                continue
            assert session is not None
            if kind == "x":
                session.closed = session.closed or at
            elif kind in "GaArR":
                self._note(session, kind, at, fields)
            else:
                assert kind == "X", kind
                session.gone = at

    def _note(self, session: Session, kind: str, at: int, fields: list[str]) -> None:
        payload = fields[0], int(fields[1])
        counts = self.account.counts
        if kind == "G":
            use = Use(session, at, int(fields[2]))
            counts["hand-outs"] += 1
            counts["  redelivered"] += use.deliveries > 1
            self._check_identity(session, payload, int(fields[3]), int(fields[4]))
            self._uses[session.group, payload].append(use)
            session.uses[payload] = use
            return
        if payload not in session.uses:
            assert session.member.offset, "only a round that has ended has the beginning"
            return
        use = session.uses[payload]
        if kind in "ar":
            use.left, use.maybe = at, kind == "a"
        elif kind == "A":
            if session.closed is None:
                use.acknowledged = at
            counts["acknowledged"] += 1

    def _check_identity(self, session: Session, payload: Identity, key: int, number: int) -> None:
        source = self._sources.get(key)
        known = source is not None and number in source.begun and number not in source.refused
        if not known:
            self._problem("payloads never put", f"{session} got payload {number} of producer {key}: {payload}")

    # --- checks -----------------------------------------------------------------------------------------------

    def _check_hand_outs(self) -> None:
        for (group, payload), uses in self._uses.items():
            source = self._by_id.get(payload[0])
            first = uses[0]
            if first.deliveries > 1 and not self._has_reason(group, source, payload, first):
                text = f"{payload} of group {group} is marked, and no consumer has had it before"
                self._problem("redelivered without a reason", text, uses, source)
            for before, after in itertools.pairwise(uses):
                self._check_pair(group, payload, before, after)
            if sum(use.acknowledged is not None for use in uses) > 1:
                self._problem("acknowledged twice", f"{payload} of group {group}", uses, source)

    def _check_pair(self, group: str, payload: Identity, before: Use, after: Use) -> None:
        source = self._by_id.get(payload[0])
        text = f"{payload} of group {group}"
        uses = self._uses[group, payload]
        if after.deliveries <= before.deliveries:
            self._problem("redelivered without a mark", text, uses, source)
        if _was_taken_back(before) or _was_taken_back(after):
            self.account.counts["taken back from stopped consumers"] += 1
        elif before.acknowledged is not None:
            self._problem("handed out after its acknowledgement", text, uses, source)
        elif before.until > after.got:
            self._problem("used by two at once", text, uses, source)

    def _has_reason(self, group: str, source: Source | None, payload: Identity, use: Use) -> bool:
        """A consumer was given the payload, and has ended or was stopped before the journal could record it."""
        put = 0
        if source is not None:
            number, _ = source.put.get(payload[1], (-1, 0))
            stopped = sum(stop[1] - stop[0] for stop in source.member.stops if len(stop) == 2)
            put = source.begun.get(number, 0) - NOTICED_NS - stopped  # it may have learned late of an end
        closed = [
            (each.closed, each.gone or each.member.ended)
            for each in self._sessions
            if each.group == group and each is not use.session
        ]
        members = [
            each for each in self._consumers if isinstance(each.plan, ConsumerPlan) and each.plan.group == group
        ]
        killed = [(each.killed, each.ended) for each in members]
        return any(
            begin is not None and begin <= use.got and (end is None or put <= end)
            for begin, end in (*closed, *killed)
        ) or any(_seconds(stop) >= TAKEN_BACK_SECONDS for each in members for stop in each.stops)

    def _check_order(self) -> None:
        for session in self._sessions:
            last: dict[str, Use] = {}
            newest: dict[str, int] = {}
            for (producer, sequence), use in session.uses.items():
                if use.deliveries > 1:
                    continue
                if sequence < newest.get(producer, -1):
                    if self._was_alone(session, last[producer].got, use.got):
                        both = f"{producer}/{sequence} after {newest[producer]}, both for the first time"
                        text = f"{session} got {both}"
                        self._problem("out of order", text, [last[producer], use])
                    else:
                        self.account.counts["overtaken among several consumers"] += 1
                newest[producer], last[producer] = sequence, use

    def _was_alone(self, session: Session, begin: int, end: int) -> bool:
        """No other consumer of the group can have been given a payload meanwhile, and have returned it."""
        margin = 1_000_000_000
        return not any(
            other.group == session.group
            and other.began <= end
            and (other.gone or other.member.ended or end) >= begin - margin
            for other in self._sessions
            if other is not session
        )

    def _check_payloads(self) -> None:
        counts = self.account.counts
        for source in self._sources.values():
            if source.closing and source.closed:
                self.account.longest_drain = max(
                    self.account.longest_drain, (source.closed - source.closing) / 1e9
                )
            if source.closed and source.lost:
                self._problem("lost at an orderly end", f"{source.member.name}: {source.lost}: {source.why}")
            last = max(source.begun, default=-1)
            for sequence, (number, _) in source.put.items():
                for group in self._groups:
                    uses = self._uses.get((group, (source.id, sequence)), [])
                    if any(use.maybe for use in uses):
                        continue
                    if source.member.killed is not None:
                        counts["lost with their producer"] += 1
                    elif source.overwrites and number < last:
                        counts["dropped"] += 1
                    else:
                        text = f"{source.id}/{sequence}, number {number} of {source.member.name}, by group {group}"
                        self._problem("never acknowledged", text, uses, source)


def _was_taken_back(use: Use) -> bool:
    """Without direct leases, a consumer does not learn in time that it has lost a payload while it was stopped."""
    return not use.session.direct and any(
        _seconds(stop) >= TAKEN_BACK_SECONDS for stop in use.session.member.stops
    )


def _opening(member: Member) -> tuple[str, bool]:
    """The id of a producer that runs through several rounds, and whether it overwrites."""
    kind, _, fields = next(read(member.journal))
    assert kind == "B"
    return fields[0], fields[2] == "1"


def _seconds(stop: list[int]) -> float:
    return (stop[1] - stop[0]) / 1e9 if len(stop) == 2 else float("inf")


def _time(at: int | None) -> str:
    return "never" if at is None else f"{at / 1e9:.6f}"
