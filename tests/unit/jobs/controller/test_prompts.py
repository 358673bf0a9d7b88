from dray.jobs.controller.state import WorkQueue, work_item_seed


def test_no_more_work_items_are_given_than_may_be_in_flight() -> None:
    ledger = WorkQueue(in_flight=3)
    assert ledger.take("a", 2) == [0, 1]
    assert ledger.take("b", 2) == [2]
    ledger.published("a", [0, 1])
    assert ledger.take("a", 2) == []
    ledger.settled([0])
    assert ledger.take("a", 2) == [3]


def test_work_items_of_a_dead_holder_are_given_first_and_published_ones_are_not() -> None:
    ledger = WorkQueue(in_flight=4, first=10)
    ledger.take("a", 3)
    ledger.take("b", 1)
    ledger.published("a", [10])
    assert ledger.release("a") == [11, 12]
    assert ledger.take("b", 4) == [13, 11, 12]
    assert ledger.statistics()["given_again"] == 2
    ledger.settled([10, 11, 12, 13])
    assert ledger.outstanding == 0


def test_published_by_someone_who_does_not_hold_it_is_ignored() -> None:
    ledger = WorkQueue(in_flight=1)
    ledger.take("a", 1)
    ledger.published("b", [0])
    assert ledger.release("a") == [0]


def test_work_items_whose_reply_was_lost_are_given_to_the_same_holder_once_more() -> None:
    ledger = WorkQueue(in_flight=8)
    assert ledger.take("a", 2) == [0, 1]
    assert ledger.take("a", 2) == [0, 1]
    ledger.published("a", [0])
    assert ledger.take("a", 2) == [1, 2]


def test_work_item_that_settled_is_not_given_again() -> None:
    ledger = WorkQueue(in_flight=2)
    ledger.take("a", 2)
    ledger.release("a")
    ledger.settled([0])
    assert ledger.take("b", 2) == [1, 2]


def test_seeds_differ_by_index_and_by_job_and_stay_the_same() -> None:
    seeds = {work_item_seed(job, index) for job in range(3) for index in range(100)}
    assert len(seeds) == 300
    assert work_item_seed(0, 0) == work_item_seed(0, 0)
    assert all(0 <= seed < 2**31 for seed in seeds)
