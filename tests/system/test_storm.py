"""The storm: a short one as `make storm` runs it, a long one, and a checker that sees what is wrong."""

import contextlib
import faulthandler
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from soak.streams import content
from soak.streams.checker import Account, check
from soak.streams.journal import Journal, read
from soak.streams.members import Member
from soak.streams.plan import ConsumerPlan, ProducerPlan

TESTS = Path(__file__).parents[1]
LENGTHS = [
    pytest.param(0.1, marks=pytest.mark.timeout(240), id="short"),
    pytest.param(20.0, marks=[pytest.mark.endurance, pytest.mark.timeout(2400)], id="long"),
]
P = "00112233445566778899aabbccddeeff"
SECOND = 10**9


@pytest.mark.parametrize("minutes", LENGTHS)
def test_under_kills_every_payload_is_acknowledged_once_or_redelivered_with_a_reason(
    minutes: float, tmp_path: Path
) -> None:
    faulthandler.cancel_dump_traceback_later()  # it is meant to take longer than pytest waits with its stacks
    report = tmp_path / "streams.json"
    command = [sys.executable, "-m", "soak.streams", "--minutes", str(minutes), "--json", str(report)]
    path = os.pathsep.join(filter(None, (str(TESTS), *sys.path)))
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "150"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout
    found = json.loads(report.read_text())
    assert found["counts"]["payloads put"] > 0
    assert found["counts"]["acknowledged"] > 0
    assert not found["problems"]


# --- payloads ---------------------------------------------------------------------------------------------------


def test_payloads_of_every_size_are_recognised_and_one_wrong_byte_is_noticed() -> None:
    rng = random.Random(1)
    sizes = {content.draw_size(rng) for _ in range(500)}
    assert {0, content.MAX_BYTES} <= sizes
    for number, size in enumerate(sorted(sizes)[::20]):
        arrays = content.make(3, number, size)
        content.check(arrays)
        assert content.identity(arrays) == (3, number)
        if size:
            arrays["body"] = np.array(arrays["body"])
            arrays["body"][size // 2] ^= 1
            with pytest.raises(content.WrongPayload):
                content.check(arrays)
    other = content.make(3, 1, 100) | {"body": content.make(3, 2, 100)["body"]}
    with pytest.raises(content.WrongPayload):
        content.check(other)


# --- the checker ------------------------------------------------------------------------------------------------


class Story:
    """Journals that a test writes: one producer, and consumers. Each line is a second later than the last."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._now = itertools.count(SECOND, SECOND)
        self._keys = itertools.count(1)
        self.producer = Member(ProducerPlan(0, "s", "scope", ("default",), 0), folder)
        self._journals: dict[Member, Journal] = {self.producer: Journal(self.producer.journal)}
        self.line(self.producer, "B", P, 8, 0)

    def line(self, member: Member, kind: str, *fields: object) -> int:
        at = next(self._now)
        self._journals[member].write(kind, *fields, at=at)
        return at

    def put(self, *sequences: int) -> None:
        for sequence in sequences:
            self.line(self.producer, "?", sequence, 100)
            self.line(self.producer, "P", sequence, sequence)

    def end(self, lost: int = 0) -> None:
        self.line(self.producer, "C")
        self.line(self.producer, "E", lost)

    def consumer(self, direct: bool = True) -> Member:
        member = Member(ConsumerPlan(next(self._keys), "s", "scope", "default", 0), self._folder)
        self._journals[member] = Journal(member.journal)
        self.line(member, "O", "default", int(direct), "about")
        return member

    def get(self, member: Member, sequence: int, deliveries: int = 1, number: int | None = None) -> None:
        self.line(member, "G", P, sequence, deliveries, 0, sequence if number is None else number)

    def acknowledge(self, member: Member, sequence: int) -> None:
        self.line(member, "a", P, sequence)
        self.line(member, "A", P, sequence)

    def kill(self, member: Member) -> None:
        member.killed, member.ended = next(self._now), next(self._now)

    def check(self) -> Account:
        return check(list(self._journals), ("default",))

    def kinds(self) -> set[str]:
        return {problem.split(":")[0] for problem in self.check().problems}

    def close(self) -> None:
        for journal in self._journals.values():
            journal.close()


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Story]:
    with contextlib.closing(Story(tmp_path)) as story:
        yield story


def test_payloads_that_are_acknowledged_once_are_no_problem(story: Story) -> None:
    one = story.consumer()
    story.put(0, 1)
    for sequence in (0, 1):
        story.get(one, sequence)
        story.acknowledge(one, sequence)
    story.line(one, "x")
    story.end()
    account = story.check()
    assert account.problems == []
    assert account.counts["acknowledged"] == 2


def test_a_payload_that_no_consumer_has_acknowledged_is_found(story: Story) -> None:
    story.put(0)
    story.end()
    assert story.kinds() == {"never acknowledged"}


def test_what_dies_with_its_producer_is_no_problem_and_what_an_orderly_end_loses_is_one(story: Story) -> None:
    story.put(0)
    story.kill(story.producer)
    assert story.kinds() == set()
    story.producer.killed = None
    story.end(lost=1)
    assert story.kinds() == {"never acknowledged", "lost at an orderly end"}


def test_a_payload_that_was_not_put_is_found(story: Story) -> None:
    one = story.consumer()
    story.line(story.producer, "?", 0, 100)
    story.line(story.producer, "F", 0)
    story.get(one, 0)
    story.acknowledge(one, 0)
    assert story.kinds() == {"payloads never put"}


def test_a_payload_goes_to_another_consumer_if_its_consumer_has_died_and_not_otherwise(story: Story) -> None:
    one, other = story.consumer(), story.consumer()
    story.put(0)
    story.get(one, 0)
    story.kill(one)
    story.get(other, 0, deliveries=2)
    story.acknowledge(other, 0)
    story.end()
    assert story.kinds() == set()
    one.killed = None
    assert story.kinds() == {"used by two at once"}


def test_a_second_hand_out_without_a_mark_is_found(story: Story) -> None:
    one, other = story.consumer(), story.consumer()
    story.put(0)
    story.get(one, 0)
    story.kill(one)
    story.get(other, 0, deliveries=1)
    story.acknowledge(other, 0)
    assert story.kinds() == {"redelivered without a mark"}


def test_a_mark_needs_a_consumer_that_has_ended(story: Story) -> None:
    one, other = story.consumer(), story.consumer()
    story.put(0)
    story.get(other, 0, deliveries=2)
    story.acknowledge(other, 0)
    assert story.kinds() == {"redelivered without a reason"}
    one.killed = 7 * SECOND  # after the payload was put
    one.ended = None
    other_kinds = story.kinds()
    one.killed = 5 * SECOND
    assert (other_kinds, story.kinds()) == ({"redelivered without a reason"}, set())


def test_a_payload_that_comes_back_after_its_acknowledgement_is_found(story: Story) -> None:
    one, other = story.consumer(), story.consumer()
    story.put(0)
    story.get(one, 0)
    story.acknowledge(one, 0)
    story.kill(one)
    story.get(other, 0, deliveries=2)
    story.acknowledge(other, 0)
    assert story.kinds() == {"handed out after its acknowledgement", "acknowledged twice"}


def test_an_acknowledgement_that_a_kill_has_cut_off_counts_either_way(story: Story) -> None:
    one = story.consumer()
    story.put(0)
    story.get(one, 0)
    story.line(one, "a", P, 0)
    story.kill(one)
    story.end()
    assert story.kinds() == set()
    other = story.consumer()
    story.get(other, 0, deliveries=2)
    story.acknowledge(other, 0)
    assert story.kinds() == set()


def test_a_single_consumer_gets_payloads_in_order_at_the_first_hand_out(story: Story) -> None:
    one = story.consumer()
    story.put(0, 1, 2)
    for sequence in (1, 0, 2):
        story.get(one, sequence)
        story.acknowledge(one, sequence)
    assert story.kinds() == {"out of order"}


def test_a_line_that_a_kill_has_cut_off_is_ignored(story: Story) -> None:
    story.put(0)
    with story.producer.journal.open("ab") as file:
        file.write(b"P 123 1")
    assert [line.kind for line in read(story.producer.journal)] == ["B", "?", "P"]
