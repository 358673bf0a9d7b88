"""Joins the records of all processes of a soak: the end of every payload, and how long every call took.

Of a payload that a producer has recorded as committed, exactly one of these is true:

delivered once            one consumer read it, with the right bytes
delivered again           more than once. The reason: between the receipt of one delivery and a later delivery, its
                          receiver ended or was declared dead, or Redis was restarted empty; or the payload was
                          published again because Redis had not answered. Without a reason it is an error
dropped by policy         not delivered, and overwritten (`on_full = "overwrite"`), reclaimed by its producer as an
                          orphan, given up by a consumer, or there when its producer was ended before the soak
taken by a dead consumer  not delivered; a consumer that was killed was about to read it in a way that consumes
lost with its producer    not delivered; its producer was killed, and had it in its ring at its last snapshot
unaccounted               none of these: an error

A payload that was read with other bytes is wrong, whatever line it is in.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from soak.ledger import Failure, Given, Kind, Operation, Outcome, Record, Wrong, read_ledger
from soak.member import REDIS_ANSWER_SECONDS
from soak.processes import ProcessRun
from soak.producer import ON_FULL

from dray.prefetch.reader import GRACE_SECONDS

Identity = tuple[bytes, int]

SLACK = 1.5
"""Seconds by which a call may overrun its deadline on a machine that has more to do than processors."""

_REDIS = (
    Operation.ATTACH, Operation.PUBLISH, Operation.LOOK_UP, Operation.RECEIVE, Operation.COMMIT, Operation.DISCARD,
    Operation.CLAIM_FROM,
)  # fmt: skip
PROMISED = {
    **dict.fromkeys(Operation, 0.0),
    # A call may outlive its deadline by the time that one command may take to answer; see `RedisConnection`.
    **dict.fromkeys(_REDIS, REDIS_ANSWER_SECONDS),
    Operation.BATCH: GRACE_SECONDS,
}
"""Seconds after its deadline by which a call must return, according to its documentation."""


@dataclass(frozen=True, slots=True)
class Wait:
    """The calls of one kind. Seconds, without those in which their process was stopped or had no processor."""

    operation: str
    calls: int
    limit: float
    longest: float
    overrun: float
    overdue: int


@dataclass(slots=True)
class Account:
    """The result of a soak."""

    committed: int = 0
    bytes_committed: int = 0
    delivered_once: int = 0
    delivered_again: int = 0
    unexplained: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    taken_by_dead_consumers: int = 0
    lost_with_producer: int = 0
    wrong: int = 0
    unaccounted: int = 0
    waits: list[Wait] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    crashed: list[str] = field(default_factory=list)
    full: int = 0
    remarks: list[str] = field(default_factory=list)

    @property
    def overdue(self) -> int:
        return sum(wait.overdue for wait in self.waits)


@dataclass(slots=True)
class _Payload:
    """What the records contain about one payload."""

    run: ProcessRun
    slot: int
    nbytes: int
    at: int
    publications: int = 0
    reclaimed: bool = False
    left: bool = False
    was_live: bool = False
    deliveries: list[tuple[int, int, ProcessRun]] = field(default_factory=list)  # received, delivered, by
    taken: list[ProcessRun] = field(default_factory=list)  # without an end
    given_up: list[tuple[Given, ProcessRun]] = field(default_factory=list)


def account(runs: Iterable[ProcessRun], redis_lost: list[int]) -> Account:
    """Join the ledgers of `runs`; `redis_lost` is when Redis was killed, in monotonic nanoseconds."""
    return _Join(list(runs), redis_lost).run()


class _Join:
    def __init__(self, runs: list[ProcessRun], redis_lost: list[int]) -> None:
        self._runs = runs
        self._redis_lost = redis_lost
        self._found = Account()
        self._payloads: dict[Identity, _Payload] = {}
        self._overwrites: dict[bytes, int] = {}  # how many payloads each such ring had dropped
        self._waits: defaultdict[int, list[tuple[float, float]]] = defaultdict(list)

    def run(self) -> Account:
        for run in self._runs:
            if run.how in ("crashed", ""):
                why = "does not end" if run.how == "" else f"exit code {run.code}"
                self._found.crashed.append(f"{run.name}: {why}, see {run.log}")
        records = [(run, read_ledger(run.ledger)) for run in self._runs]
        for run, each in records:
            self._note_waits(run, each)
            if run.producer and each:
                self._note_producer(run, each)
        for run, each in records:
            if not run.producer:
                self._note_consumer(run, each)
        candidates: defaultdict[bytes, list[Identity]] = defaultdict(list)
        for identity, payload in self._payloads.items():
            if self._judge(identity, payload):
                candidates[identity[0]].append(identity)
        for producer, gone in candidates.items():
            self._judge_overwritten(producer, gone)
        self._found.waits = [self._wait(operation) for operation in Operation if self._waits[operation]]
        return self._found

    # --- reading the records ----------------------------------------------------------------------------------

    def _note_producer(self, run: ProcessRun, records: list[Record]) -> None:
        producer = records[0].producer
        at_slot: dict[int, int] = {}
        last: Record | None = None
        for record in records:
            payload = self._payloads.get(record.identity)
            match record.kind:
                case Kind.COMMITTED:
                    self._payloads[record.identity] = _Payload(run, record.slot, record.nbytes, record.time)
                    self._found.committed += 1
                    self._found.bytes_committed += record.nbytes
                    at_slot[record.slot] = record.sequence
                case Kind.PUBLISHING if payload:
                    payload.publications += 1
                case Kind.RECLAIMED if payload:
                    payload.reclaimed = True
                case Kind.LEFT if payload:
                    payload.left = True
                case Kind.FULL:
                    self._found.full += 1
            if record.kind in (Kind.COMMITTED, Kind.SNAPSHOT):
                last = record  # each commit is recorded with the state of the ring: no later record has a commit
        if last is None:
            return
        for slot, sequence in at_slot.items():
            self._payloads[producer, sequence].was_live = bool(last.live >> slot & 1)
        if ON_FULL[records[0].reason] == "overwrite":
            self._overwrites[producer] = last.dropped

    def _note_consumer(self, run: ProcessRun, records: list[Record]) -> None:
        received: dict[Identity, int] = {}
        taking: dict[Identity, bool] = {}
        for record in records:
            identity = record.identity
            payload = self._payloads.get(identity)
            match record.kind:
                case Kind.RECEIVED:
                    received[identity] = record.time
                case Kind.TAKING:
                    taking[identity] = True
                case Kind.DELIVERED:
                    taking.pop(identity, None)
                    if payload is None or payload.nbytes != record.nbytes:
                        self._remark_wrong(run, record, "was never committed so")
                    else:
                        payload.deliveries.append((received.get(identity, record.time), record.time, run))
                case Kind.WRONG:
                    taking.pop(identity, None)
                    self._remark_wrong(run, record, Wrong(record.reason).name.lower())
                case Kind.NOT_TAKEN:
                    taking.pop(identity, None)
                case Kind.FAILED:
                    taking.pop(identity, None)
                    self._found.failures[Failure(record.reason).name.lower()] += 1
                case Kind.GIVING_UP if payload:
                    payload.given_up.append((Given(record.reason), run))
                case Kind.ENDED_IN_STREAM:
                    self._found.outcomes[Outcome(record.reason).name.lower()] += 1
        for identity in taking:
            if identity in self._payloads and run.how == "killed":
                self._payloads[identity].taken.append(run)

    def _remark_wrong(self, run: ProcessRun, record: Record, what: str) -> None:
        self._found.wrong += 1
        self._found.remarks.append(f"wrong: {run.name} read {_named(record.identity)}: {what}")

    # --- judging ----------------------------------------------------------------------------------------------

    def _judge(self, identity: Identity, payload: _Payload) -> bool:
        """Put a payload where it belongs; True if it may have been overwritten, which only their number shows."""
        found, run = self._found, payload.run
        if payload.deliveries:
            if len(payload.deliveries) == 1:
                found.delivered_once += 1
            else:
                found.delivered_again += 1
                self._explain(identity, payload)
        elif payload.left and not run.final:
            found.dropped["still there when its producer was ended"] += 1
        elif payload.reclaimed:
            found.dropped["reclaimed as orphans"] += 1
        elif payload.was_live and run.how == "killed":
            found.lost_with_producer += 1
        elif any(given is Given.UNREACHABLE for given, _ in payload.given_up):
            found.dropped["given up as unreachable"] += 1
        elif any(given is Given.DEAD_LETTER for given, _ in payload.given_up):
            found.dropped["dead letters"] += 1
        elif payload.taken:
            found.taken_by_dead_consumers += 1
        elif identity[0] in self._overwrites:
            return True
        else:
            self._unaccounted(identity, payload)
        return False

    def _judge_overwritten(self, producer: bytes, gone: list[Identity]) -> None:
        dropped = min(len(gone), self._overwrites[producer])
        self._found.dropped["overwritten"] += dropped
        for identity in gone[dropped:]:
            self._unaccounted(identity, self._payloads[identity])

    def _unaccounted(self, identity: Identity, payload: _Payload) -> None:
        self._found.unaccounted += 1
        story = [f"committed by {payload.run.name} ({payload.run.how}) at {payload.at / 1e9:.3f}"]
        story += [f"published {payload.publications} times"]
        story += [f"given up by {run.name}: {given.name.lower()}" for given, run in payload.given_up]
        story += ["left as the ring was closed"] * payload.left
        self._found.remarks.append(f"unaccounted: {_named(identity)}, {', '.join(story)}")

    def _explain(self, identity: Identity, payload: _Payload) -> None:
        deliveries = sorted(payload.deliveries)
        for index, (_, delivered, _) in enumerate(deliveries[1:], start=1):
            earlier = deliveries[:index]
            if not (payload.publications > 1 or any(self._passed_on(*each, delivered) for each in earlier)):
                self._found.unexplained += 1
                names = ", ".join(f"{run.name} at {at / 1e9:.3f}" for _, at, run in deliveries)
                self._found.remarks.append(f"delivered again without a reason: {_named(identity)} to {names}")
                return

    def _passed_on(self, received: int, _delivered: int, by: ProcessRun, until: int) -> bool:
        ends = [end for end in (by.ended, by.declared_dead) if end is not None]
        return any(received <= moment <= until for moment in (*ends, *self._redis_lost))

    # --- waits ------------------------------------------------------------------------------------------------

    def _note_waits(self, run: ProcessRun, records: list[Record]) -> None:
        for record in records:
            if record.kind == Kind.WAIT:
                began = record.time - record.elapsed
                stopped = sum(max(0, min(to, record.time) - max(start, began)) for start, to in run.stops)
                elapsed = (record.elapsed - stopped - record.delayed) / 1e9
                self._waits[record.reason].append((elapsed, record.limit / 1e9))
                overrun = elapsed - record.limit / 1e9 - PROMISED[Operation(record.reason)]
                if overrun > SLACK:
                    what = f"{Operation(record.reason).name.lower()} of {run.name} at {record.time / 1e9:.3f}"
                    self._found.remarks.append(
                        f"overdue: {what} took {elapsed:.2f} s, {record.limit / 1e9:g} s allowed"
                    )

    def _wait(self, operation: Operation) -> Wait:
        calls = self._waits[operation]
        overruns = [elapsed - limit - PROMISED[operation] for elapsed, limit in calls]
        return Wait(
            operation.name.lower().replace("_", " "),
            len(calls),
            max(limit for _, limit in calls) + PROMISED[operation],
            max(elapsed for elapsed, _ in calls),
            max(overruns),
            sum(overrun > SLACK for overrun in overruns),
        )


def document(found: Account) -> dict[str, object]:
    """The account in JSON's types."""
    fields = {each.name: getattr(found, each.name) for each in dataclasses.fields(found)}
    return {**fields, "waits": [dataclasses.asdict(wait) for wait in found.waits], "overdue": found.overdue}


def _named(identity: Identity) -> str:
    return f"{identity[0].hex()[:8]}:{identity[1]}"
