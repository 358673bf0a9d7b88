from dray.jobs.queue import Delivery, RolloutEntry
from dray.jobs.replica.ranks import Batch


def delivery(sequence: int) -> Delivery:
    entry = RolloutEntry("ab" * 16, sequence, 0, "rollout-0", sequence, reference="{}")
    return Delivery(entry, 1, f"{sequence}-0")


def test_payloads_are_dealt_in_equal_parts_until_each_is_full() -> None:
    batch = Batch(6, parts=2)
    first = [delivery(sequence) for sequence in range(4)]
    dealt = batch.deal(first)
    assert dealt == [first[:3], first[3:]]
    batch.add(0, first[:2])  # the third could not be read
    batch.add(1, first[3:])
    assert batch.missing == 3
    more = [delivery(sequence) for sequence in range(4, 7)]
    assert batch.deal(more) == [more[:1], more[1:]]
    batch.add(0, more[:1])
    batch.add(1, more[1:])
    assert batch.missing == 0
    assert [each.entry.sequence for each in batch.by_part()[1]] == [3, 5, 6]
    assert [each.entry.sequence for each in batch.deliveries] == [0, 1, 4, 3, 5, 6]
