from dray.jobs.queue import Delivery, RolloutEntry
from dray.jobs.queue.consumer import DeliveryLedger


def delivery(sequence: int, entry_id: str = "1-0") -> Delivery:
    return Delivery(RolloutEntry("ab" * 16, sequence, 0, "r", 0, reference="{}"), 1, entry_id)


def identities(*sequences: int) -> list[str]:
    return [delivery(sequence).entry.identity for sequence in sequences]


def test_what_is_held_is_not_handed_out_again() -> None:
    ledger = DeliveryLedger(10)
    first, second = delivery(0, "1-0"), delivery(1, "2-0")
    assert ledger.hold([first, first, second]) == [first, second]
    assert ledger.hold([second]) == []
    assert ledger.held_ids() == {"1-0", "2-0"}


def test_what_is_held_and_published_again_is_known_by_its_new_id() -> None:
    ledger = DeliveryLedger(10)
    ledger.hold([delivery(0, "1-0")])
    ledger.hold([delivery(0, "2-0")])
    assert ledger.held_ids() == {"2-0"}


def test_what_was_ended_is_recognised_until_enough_others_were() -> None:
    ledger = DeliveryLedger(2)
    ledger.hold([delivery(0), delivery(1), delivery(2)])
    ledger.end(identities(0, 1))
    assert ledger.split_ended([delivery(0), delivery(2)]) == ([delivery(2)], [delivery(0)])
    ledger.end(identities(2))
    assert ledger.split_ended([delivery(0)]) == ([delivery(0)], [])
    assert not ledger.held_ids()


def test_what_another_consumer_took_may_come_back() -> None:
    ledger = DeliveryLedger(2)
    ledger.hold([delivery(0)])
    ledger.drop(identities(0))
    assert ledger.split_ended([delivery(0)]) == ([delivery(0)], [])
    assert ledger.hold([delivery(0)]) == [delivery(0)]


def test_age_of_what_is_held_longest_is_known() -> None:
    ledger = DeliveryLedger(10)
    assert ledger.oldest_since is None
    ledger.hold([delivery(0)], 5.0)
    ledger.hold([delivery(1), delivery(0)], 6.0)
    assert ledger.oldest_since == 5.0
    ledger.end(identities(0))
    assert ledger.oldest_since == 6.0
    ledger.drop(identities(1))
    assert ledger.oldest_since is None
