import socket
import threading
from collections.abc import Iterator

import pytest

from dray.jobs.messages.channel import Channel, GroupLostError, RankCommand, RankReply
from dray.jobs.process import StopFlag
from dray.jobs.queue import Delivery, RolloutEntry
from dray.jobs.replica.ranks import Batch, Ranks

Pair = tuple[Channel, Channel, StopFlag]


@pytest.fixture
def pair() -> Iterator[Pair]:
    one, other = socket.socketpair()
    stop = StopFlag()
    with Channel(one, "policy-1", stop, 0.2) as first, Channel(other, "policy-0", StopFlag(), 5.0) as second:
        yield first, second, stop


def delivery(sequence: int) -> Delivery:
    entry = RolloutEntry("ab" * 16, sequence, 4, "rollout-0", sequence, reference=f"ref {sequence}")
    return Delivery(entry, "policy-0", 1, f"{sequence}-0")


def test_messages_arrive_whole_and_in_order(pair: Pair) -> None:
    first, second, _ = pair
    orders = [
        RankCommand(what="share", text="x" * 300_000),
        RankCommand(what="read", references=["a", "b"], versions=[1, 2]),
    ]
    sender = threading.Thread(target=lambda: [second.send(order) for order in orders])
    sender.start()
    assert [first.receive(RankCommand), first.receive(RankCommand)] == orders
    sender.join()


def test_end_of_the_peer_is_noticed_while_waiting_for_it(pair: Pair) -> None:
    first, second, _ = pair
    assert not first.lost
    threading.Timer(0.05, second.close).start()
    with pytest.raises(GroupLostError, match="policy-1 is gone"):
        first.receive(RankReply)
    assert first.lost
    with pytest.raises(GroupLostError, match="takes no messages"):
        first.send(RankReply())


def test_peer_has_a_bounded_time_once_the_process_is_to_end(pair: Pair) -> None:
    first, _, stop = pair
    threading.Timer(0.05, stop.set, ("enough",)).start()
    with pytest.raises(GroupLostError, match="did not answer before the end"):
        first.receive(RankReply)


def test_what_is_no_message_ends_the_conversation(pair: Pair) -> None:
    first, second, stop = pair
    second.send(RankCommand(what="end"))
    with pytest.raises(GroupLostError, match="something else"):
        first.receive(RankReply)
    one, other = socket.socketpair()
    with other, Channel(one, "policy-1", stop, 0.2) as channel:
        other.sendall(b"\xff\xff\xff\xff")
        with pytest.raises(GroupLostError, match="4294967295 bytes"):
            channel.receive(RankReply)


def test_readers_of_one_part_are_told_the_same_and_failures_of_all_count() -> None:
    ends = [socket.socketpair() for _ in range(3)]
    stop = StopFlag()
    channels = [Channel(end[0], f"policy-{rank}", stop, 5.0) for rank, end in enumerate(ends, start=1)]
    others = [Channel(end[1], "policy-0", stop, 5.0) for end in ends]
    ranks = Ranks(channels, readers=2)
    assert ranks.parts == 2
    batch = Batch(4, parts=2)
    dealt = batch.deal([delivery(sequence) for sequence in range(4)])
    ranks.read(dealt)
    told = [other.receive(RankCommand) for other in others]
    assert [each.references for each in told] == [["ref 0", "ref 1"], ["ref 2", "ref 3"], ["ref 2", "ref 3"]]
    assert told[0].versions == [4, 4]
    for other, failed in zip(others, ({"a:1": "lost"}, {}, {"a:2": "stale"}), strict=True):
        other.send(RankReply.model_validate({"failed": failed}))
    assert ranks.failures() == {"a:1": "lost", "a:2": "stale"}
    others[1].close()
    with pytest.raises(GroupLostError, match="policy-2 is gone"):
        ranks.check()
    for channel in (*channels, *others):
        channel.close()
