"""The soak: a short one as `make soak` runs it, a long one, and an accountant that sees what is wrong."""

import faulthandler
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from soak.accounts import Account, account
from soak.leaks import growths
from soak.ledger import Failure, Given, Kind, Ledger, Operation, Outcome, Wrong, count_kinds, read_ledger
from soak.payloads import Content, check_arrays, check_raw
from soak.plan import Fault, Plan
from soak.processes import Footprint, ProcessRun

from dray.errors import MessageTruncated, ProtocolError
from dray.payload import unpack
from dray.protocol import PayloadRef

TESTS = Path(__file__).parents[1]
LENGTHS = [
    pytest.param(1 / 3, marks=pytest.mark.timeout(300), id="short"),
    pytest.param(10.0, marks=[pytest.mark.endurance, pytest.mark.timeout(1200)], id="long"),
]
P = bytes(range(16))
SECOND = 10**9


@pytest.mark.parametrize("minutes", LENGTHS)
def test_under_random_faults_every_payload_is_right_and_accounted_for(minutes: float, tmp_path: Path) -> None:
    faulthandler.cancel_dump_traceback_later()  # it is meant to take longer than pytest waits with its stacks
    report = tmp_path / "soak.json"
    command = [sys.executable, "-m", "soak", "--minutes", str(minutes), "--json", str(report)]
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "COLUMNS": "110"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout
    found = json.loads(report.read_text())["account"]
    assert found["committed"] > 0
    assert found["delivered_once"] > 0
    assert found["wrong"] == found["unaccounted"] == found["overdue"] == found["unexplained"] == 0


# --- plans ------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_plan_again_and_every_kind_of_fault() -> None:
    plan = Plan(17, 600.0, namespaces=True)
    assert plan == Plan(17, 600.0, namespaces=True)
    assert plan.events != Plan(18, 600.0, namespaces=True).events
    assert {event.fault for event in plan.events} == set(Fault)
    assert json.loads(json.dumps(plan.document()))["seed"] == 17


def test_a_plan_for_a_machine_without_namespaces_cuts_no_network() -> None:
    faults = {event.fault for event in Plan(17, 600.0, namespaces=False).events}
    assert faults == set(Fault) - {Fault.BLACKHOLE, Fault.REJECT}


def test_processes_that_must_show_leaks_are_not_killed() -> None:
    plan = Plan(3, 600.0, namespaces=True)
    steady = {member.name for members in (plan.producers, plan.consumers) for member in members if member.steady}
    assert steady
    assert not steady & {event.target for event in plan.events if event.fault in (Fault.KILL, Fault.END)}


# --- payloads ---------------------------------------------------------------------------------------------------


def written(content: Content, producer: bytes, sequence: int) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    target = bytearray(content.nbytes)
    content.write(memoryview(target), producer, sequence)
    return np.frombuffer(target, np.uint8)


def test_payloads_of_every_size_are_recognised_and_those_of_others_are_not() -> None:
    rng = random.Random(1)
    drawn = [Content.draw(rng, 1 << 16) for _ in range(200)]
    assert {content.raw for content in drawn} == {True, False}
    assert min(content.nbytes for content in drawn) == 0
    assert max(content.nbytes for content in drawn) <= 1 << 16
    for sequence, content in enumerate(drawn):
        ref = PayloadRef(P, 0, sequence, content.nbytes, ())
        mine, other = written(content, P, sequence), written(content, P, sequence + 1)
        if content.raw:
            assert check_raw(ref, mine) is None
            assert check_raw(ref, mine[:-1]) == (Wrong.SIZE if content.nbytes else None)
            assert check_raw(ref, other) == (Wrong.BYTES if content.nbytes > 7 else check_raw(ref, other))
        else:
            assert check_arrays(ref, unpack(mine)) is None
            assert check_arrays(ref, unpack(other)) is Wrong.IDENTITY


@pytest.mark.parametrize("place", [0.5, 1.0])
def test_one_wrong_byte_is_noticed(place: float) -> None:
    content = next(c for c in (Content.draw(random.Random(n), 1 << 16) for n in itertools.count()) if not c.raw)
    image = written(content, P, 5)
    image[int(place * (image.nbytes - 1))] ^= 1
    ref = PayloadRef(P, 0, 5, content.nbytes, ())
    assert check_arrays(ref, unpack(image)) in (Wrong.CHECKSUM, Wrong.IDENTITY)


# --- records ----------------------------------------------------------------------------------------------------


def test_records_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    with Ledger(path) as ledger:
        ledger.write(Kind.COMMITTED, P, 7, slot=3, nbytes=2**40, live=2**63, consumed=5, dropped=6)
        with ledger.waiting(Operation.READ, 1.5):
            pass
    committed, wait = read_ledger(path)
    assert committed.identity == (P, 7)
    assert (committed.slot, committed.nbytes, committed.live, committed.consumed) == (3, 2**40, 2**63, 5)
    assert (wait.reason, wait.limit) == (Operation.READ, 1_500_000_000)
    assert count_kinds(path, 0) == ({Kind.COMMITTED: 1, Kind.WAIT: 1}, 256)
    assert count_kinds(path, 256) == ({}, 256)
    assert count_kinds(tmp_path / "none", 0) == ({}, 0)


def test_an_error_that_no_fault_explains_is_not_taken_for_a_failed_read() -> None:
    assert Failure.of(MessageTruncated("cut")) is Failure.TRUNCATED
    with pytest.raises(ProtocolError):
        Failure.of(ProtocolError("nonsense"))


# --- accounts ---------------------------------------------------------------------------------------------------


class Story:
    """Runs of processes with the records that a test writes for them. The ring of the producer has 8 slots."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs: list[ProcessRun] = []
        self.redis_lost: list[int] = []

    def run(
        self, name: str, how: str, *, final: bool = False, producer: bool = False
    ) -> tuple[ProcessRun, Ledger]:
        run = ProcessRun(name, producer, name, name, self.folder / name, self.folder / "log", how=how, final=final)
        self.runs.append(run)
        return run, Ledger(run.ledger)

    def producer(
        self, *acts: Callable[[Ledger], None], how: str = "ended", final: bool = True, on_full: int = 0
    ) -> None:
        run, ledger = self.run(f"p{len(self.runs)}", how, final=final, producer=True)
        with ledger:
            ledger.write(Kind.BEGAN, P, slot=8, reason=on_full)
            for act in acts:
                act(ledger)
        run.ended = read_ledger(run.ledger)[-1].time + 1

    def consumer(self, *acts: Callable[[Ledger], None], how: str = "ended") -> ProcessRun:
        run, ledger = self.run(f"c{len(self.runs)}", how)
        with ledger:
            ledger.write(Kind.BEGAN)
            for act in acts:
                act(ledger)
        run.ended = read_ledger(run.ledger)[-1].time + 1
        return run

    def account(self) -> Account:
        return account(self.runs, self.redis_lost)


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return Story(tmp_path)


def commit(sequence: int, live: int = 0, dropped: int = 0) -> Callable[[Ledger], None]:
    return lambda ledger: ledger.write(
        Kind.COMMITTED, P, sequence, slot=sequence % 8, nbytes=100, live=live, dropped=dropped
    )


def act(kind: Kind, sequence: int, reason: int = 0, nbytes: int = 100) -> Callable[[Ledger], None]:
    return lambda ledger: ledger.write(kind, P, sequence, reason=reason, nbytes=nbytes)


def test_a_payload_that_no_process_had_is_unaccounted(story: Story) -> None:
    story.producer(commit(0), commit(1))
    story.consumer(act(Kind.RECEIVED, 0), act(Kind.DELIVERED, 0))
    found = story.account()
    assert (found.committed, found.delivered_once, found.unaccounted) == (2, 1, 1)
    assert len(found.remarks) == 1


def test_a_stale_payload_of_a_ring_that_does_not_overwrite_is_unaccounted(story: Story) -> None:
    story.producer(commit(0))
    story.consumer(act(Kind.RECEIVED, 0), act(Kind.GIVING_UP, 0, Given.STALE))
    assert story.account().unaccounted == 1


def test_no_more_payloads_are_overwritten_than_the_ring_has_dropped(story: Story) -> None:
    story.producer(commit(0), commit(1), commit(2, dropped=2), on_full=2)
    found = story.account()
    assert (found.dropped["overwritten"], found.unaccounted) == (2, 1)


def test_a_killed_producer_takes_with_it_what_was_in_its_ring_and_nothing_else(story: Story) -> None:
    story.producer(commit(0), commit(1, live=0b10), how="killed", final=False)
    found = story.account()
    assert (found.lost_with_producer, found.unaccounted) == (1, 1)


def test_what_is_left_counts_as_dropped_only_before_the_end(story: Story) -> None:
    story.producer(commit(0, live=1), act(Kind.LEFT, 0), final=False)
    assert story.account().dropped.total() == 1
    story.runs[0].final = True
    assert story.account().unaccounted == 1


@pytest.mark.parametrize(("how", "taken"), [("killed", 1), ("ended", 0)])
def test_only_a_killed_consumer_takes_a_payload_without_a_record(story: Story, how: str, taken: int) -> None:
    story.producer(commit(0))
    story.consumer(act(Kind.RECEIVED, 0), act(Kind.TAKING, 0), how=how)
    found = story.account()
    assert (found.taken_by_dead_consumers, found.unaccounted) == (taken, 1 - taken)


@pytest.mark.parametrize(
    ("kind", "reason", "name"),
    [
        (Kind.GIVING_UP, Given.UNREACHABLE, "given up as unreachable"),
        (Kind.GIVING_UP, Given.DEAD_LETTER, "dead letters"),
    ],
)
def test_what_consumers_give_up_is_dropped_by_policy(story: Story, kind: Kind, reason: int, name: str) -> None:
    story.producer(commit(0))
    story.consumer(act(kind, 0, reason))
    found = story.account()
    assert (found.dropped[name], found.unaccounted) == (1, 0)


def test_what_its_producer_reclaims_is_dropped_by_policy(story: Story) -> None:
    story.producer(commit(0), act(Kind.RECLAIMED, 0))
    assert story.account().dropped["reclaimed as orphans"] == 1


def test_wrong_bytes_and_payloads_that_were_never_committed_are_wrong(story: Story) -> None:
    story.producer(commit(0), commit(1))
    story.consumer(act(Kind.WRONG, 0, Wrong.BYTES), act(Kind.DELIVERED, 1, nbytes=99), act(Kind.DELIVERED, 2))
    assert story.account().wrong == 3


def test_a_second_delivery_needs_a_reason(story: Story) -> None:
    story.producer(commit(0))
    first = story.consumer(act(Kind.RECEIVED, 0), act(Kind.DELIVERED, 0))
    first.ended = None
    second = story.consumer(act(Kind.RECEIVED, 0), act(Kind.DELIVERED, 0))
    found = story.account()
    assert (found.delivered_once, found.delivered_again, found.unexplained) == (0, 1, 1)
    first.declared_dead = read_ledger(second.ledger)[1].time
    assert story.account().unexplained == 0


def test_a_restart_of_redis_or_a_second_publication_is_a_reason(story: Story) -> None:
    story.producer(commit(0), act(Kind.PUBLISHING, 0))
    once = story.consumer(
        act(Kind.RECEIVED, 0), act(Kind.DELIVERED, 0), act(Kind.RECEIVED, 0), act(Kind.DELIVERED, 0)
    )
    once.ended = None
    assert story.account().unexplained == 1
    story.redis_lost = [read_ledger(once.ledger)[2].time]
    assert story.account().unexplained == 0
    story.redis_lost = []
    story.producer(commit(1), act(Kind.PUBLISHING, 0))
    assert story.account().unexplained == 0


def test_a_wait_beyond_its_deadline_is_overdue_unless_its_process_was_stopped(story: Story) -> None:
    def wait(elapsed: float, delayed: float = 0.0) -> Callable[[Ledger], None]:
        return lambda ledger: ledger.write(
            Kind.WAIT,
            reason=Operation.READ,
            elapsed=int(elapsed * SECOND),
            limit=SECOND,
            delayed=int(delayed * SECOND),
        )

    run = story.consumer(wait(1), wait(4, delayed=3), wait(5))
    found = story.account()
    assert (found.overdue, found.waits[0].calls, found.waits[0].longest) == (1, 3, 5.0)
    end = read_ledger(run.ledger)[-1].time
    run.stops = [[end - 4 * SECOND, end - SECOND]]
    assert story.account().overdue == 0


def test_a_crash_is_one_whatever_was_asked(story: Story) -> None:
    story.consumer(how="crashed")
    assert len(story.account().crashed) == 1


def test_outcomes_and_failures_are_counted(story: Story) -> None:
    story.producer(commit(0))
    story.consumer(
        act(Kind.FAILED, 0, Failure.TIMEOUT), act(Kind.DELIVERED, 0), act(Kind.ENDED_IN_STREAM, 0, Outcome.REFUSED)
    )
    found = story.account()
    assert (found.failures["timeout"], found.outcomes["refused"]) == (1, 1)


def test_what_grows_is_a_leak_and_what_goes_up_and_down_is_not(tmp_path: Path) -> None:
    def run(name: str, descriptors: Callable[[int], int]) -> ProcessRun:
        made = ProcessRun(name, False, name, name, tmp_path / name, tmp_path / "log", steady=True)
        made.footprints = [Footprint(2.0 * n, 50.0, descriptors(n), 5, 4, 2) for n in range(60)]
        return made

    grows = run("grows", lambda n: 10 + n)
    grown, steady = growths([grows, run("stays", lambda n: 10 + n % 7)])
    assert grown.leaks == ("descriptors",)
    assert steady.leaks == ()
    del grows.footprints[40:]
    assert growths([grows]) == []  # it has not run long enough for a verdict
