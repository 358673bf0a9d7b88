"""The message channel over a socket pair: no process is started."""

import io
import socket
import threading
from collections.abc import Iterator

import pytest

from dray.jobs.messages.channel import MAX_MESSAGE, Frames, FramingError, GroupLostError, MessageChannel, framed
from dray.jobs.messages.models import (
    KillReplica,
    RankCommand,
    RankReply,
    ReplicaEnded,
    ReplicasRunning,
    SendSignal,
    Shutdown,
)
from dray.jobs.process import StopFlag
from dray.jobs.queue import Delivery, RolloutEntry
from dray.jobs.replica.ranks import Batch, Ranks

Pair = tuple[MessageChannel, MessageChannel, StopFlag]


@pytest.fixture
def pair() -> Iterator[Pair]:
    one, other = socket.socketpair()
    stop = StopFlag()
    with (
        MessageChannel(one, "policy-1", stop, 0.2) as first,
        MessageChannel(other, "policy-0", StopFlag(), 5.0) as second,
    ):
        yield first, second, stop


def sent_message(message: RankCommand | Shutdown) -> bytes:
    return framed(message.model_dump_json().encode())


def delivery(sequence: int) -> Delivery:
    entry = RolloutEntry("ab" * 16, sequence, 4, "rollout-0", sequence, reference=f"ref {sequence}")
    return Delivery(entry, 1, f"{sequence}-0")


# --- framing ------------------------------------------------------------------------------------------------


def test_messages_are_split_wherever_the_stream_was_cut() -> None:
    messages = [RankCommand(what="share", text=f"text {number}") for number in range(3)]
    stream = b"".join(map(sent_message, messages))
    for size in (1, 3, 7, len(stream)):
        frames, found = Frames(1000), []
        for begin in range(0, len(stream), size):
            frames.feed(stream[begin : begin + size])
            while (body := frames.next()) is not None:
                found.append(RankCommand.model_validate_json(body))
        assert found == messages


def test_message_that_is_too_large_is_refused_before_it_comes() -> None:
    frames = Frames(1000)
    frames.feed((1001).to_bytes(4, "big"))
    with pytest.raises(FramingError, match="1001 bytes"):
        frames.next()
    with pytest.raises(FramingError, match="1001 bytes"):
        _ = frames.missing


def test_message_is_received_without_what_follows_it() -> None:
    stream, frames = io.BytesIO(framed(b"first") + framed(b"second")), Frames(1000)
    while (body := frames.next()) is None:
        frames.feed(stream.read(frames.missing))
    assert body == b"first"
    assert stream.read() == framed(b"second")


# --- ranks: send and receive wait, and raise ----------------------------------------------------------------


def test_messages_arrive_whole_and_in_order(pair: Pair) -> None:
    first, second, _ = pair
    commands = [
        RankCommand(what="share", text="x" * 300_000),
        RankCommand(what="read", references=["a", "b"], versions=[1, 2]),
    ]
    sender = threading.Thread(target=lambda: [second.send(command) for command in commands])
    sender.start()
    assert [first.receive(RankCommand), first.receive(RankCommand)] == commands
    sender.join()


def test_end_of_the_peer_is_noticed_while_waiting_for_it(pair: Pair) -> None:
    first, second, _ = pair
    assert not first.lost
    threading.Timer(0.05, second.close).start()
    with pytest.raises(GroupLostError, match="policy-1 is gone"):
        first.receive(RankReply)
    assert first.lost
    with pytest.raises(GroupLostError, match="does not accept messages"):
        first.send(RankReply())


def test_messages_that_were_sent_before_the_end_of_the_peer_are_received(pair: Pair) -> None:
    first, second, _ = pair
    second.send(RankReply(failed={"a:1": "lost"}))
    second.close()
    assert first.receive(RankReply).failed == {"a:1": "lost"}
    with pytest.raises(GroupLostError, match="policy-1 is gone"):
        first.receive(RankReply)


def test_peer_has_a_bounded_time_once_the_process_is_to_end(pair: Pair) -> None:
    first, _, stop = pair
    threading.Timer(0.05, stop.set, ("enough",)).start()
    with pytest.raises(GroupLostError, match="did not answer before the end"):
        first.receive(RankReply)


def test_peer_that_does_not_read_has_a_bounded_time_for_a_message(pair: Pair) -> None:
    first, _, _ = pair
    with pytest.raises(GroupLostError, match="does not accept messages"):
        first.send(RankCommand(what="share", text="x" * (8 << 20)))


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (sent_message(RankCommand(what="end")), "sent 'end', which is not expected here"),
        (b"\xff\xff\xff\xff", f"4294967295 bytes was announced; at most {MAX_MESSAGE}"),
        (b"\0\0\0\2{}", "violates the protocol"),
        (b"\0\0\0\4what", "violates the protocol"),
    ],
)
def test_what_is_not_the_message_that_is_awaited_ends_the_conversation(sent: bytes, reason: str) -> None:
    one, other = socket.socketpair()
    with other, MessageChannel(one, "policy-1", StopFlag(), 0.2) as channel:
        other.sendall(sent)
        with pytest.raises(GroupLostError, match=reason):
            channel.receive(RankReply)


def test_channel_may_be_closed_twice_and_before_the_process_is_to_end(pair: Pair) -> None:
    first, _, stop = pair
    first.close()
    first.close()
    stop.set("enough")
    assert first.lost


# --- nodes: post and poll neither wait nor raise ------------------------------------------------------------


def test_poll_returns_what_has_come_and_nothing_twice(pair: Pair) -> None:
    first, second, _ = pair
    assert first.poll() == []
    second.post(SendSignal(name="rollout-0", number=15))
    second.post(KillReplica(name="rollout-1"))
    assert first.poll() == [SendSignal(name="rollout-0", number=15), KillReplica(name="rollout-1")]
    assert first.poll() == []
    assert not first.lost


def test_poll_returns_the_last_messages_of_an_end_that_is_gone(pair: Pair) -> None:
    first, second, _ = pair
    second.post(ReplicaEnded(name="rollout-0", code=0))
    second.close()
    assert first.poll() == [ReplicaEnded(name="rollout-0", code=0)]
    assert first.lost


def test_end_that_finishes_sending_is_gone_for_the_other_and_still_receives(pair: Pair) -> None:
    first, second, _ = pair
    first.post(Shutdown())
    first.finish_sending()
    assert second.poll() == [Shutdown()]
    assert second.lost
    assert not first.lost


def test_end_that_does_not_read_counts_as_gone_without_a_wait(pair: Pair) -> None:
    first, _, _ = pair
    for _ in range(10_000):
        first.post(ReplicasRunning(names=["rollout-0"] * 100))
    assert first.lost


@pytest.mark.parametrize("sent", [b"\xff\xff\xff\xff", b"\0\0\0\2{}"])
def test_node_of_another_version_counts_as_gone(sent: bytes) -> None:
    one, other = socket.socketpair()
    with other, MessageChannel(one, "node b") as channel:
        other.sendall(sent_message(Shutdown()) + sent)
        assert channel.poll() == [Shutdown()]
        assert channel.lost


# --- the first rank and the others --------------------------------------------------------------------------


def test_readers_of_one_part_get_the_same_references_and_failures_of_all_count() -> None:
    ends = [socket.socketpair() for _ in range(3)]
    stop = StopFlag()
    channels = [MessageChannel(end[0], f"policy-{rank}", stop, 5.0) for rank, end in enumerate(ends, start=1)]
    others = [MessageChannel(end[1], "policy-0", stop, 5.0) for end in ends]
    ranks = Ranks(channels, readers=2)
    assert ranks.parts == 2
    batch = Batch(4, parts=2)
    dealt = batch.deal([delivery(sequence) for sequence in range(4)])
    ranks.read(dealt)
    commands = [other.receive(RankCommand) for other in others]
    assert [each.references for each in commands] == [["ref 0", "ref 1"], ["ref 2", "ref 3"], ["ref 2", "ref 3"]]
    assert commands[0].versions == [4, 4]
    for other, failed in zip(others, ({"a:1": "lost"}, {}, {"a:2": "stale"}), strict=True):
        other.send(RankReply.model_validate({"failed": failed}))
    assert ranks.failures() == {"a:1": "lost", "a:2": "stale"}
    others[1].close()
    with pytest.raises(GroupLostError, match="policy-2 is gone"):
        ranks.check()
    for channel in (*channels, *others):
        channel.close()
