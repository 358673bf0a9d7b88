from dray.jobs.controller.work_queue import WorkQueue, work_item_seed


def test_no_more_work_items_are_given_than_may_be_in_flight() -> None:
    ledger = WorkQueue(in_flight=3)
    assert ledger.assign("a", 2) == [0, 1]
    assert ledger.assign("b", 2) == [2]
    ledger.published("a", [0, 1])
    assert ledger.assign("a", 2) == []
    ledger.finished([0])
    assert ledger.assign("a", 2) == [3]


def test_work_items_of_a_dead_holder_are_given_first_and_published_ones_are_not() -> None:
    ledger = WorkQueue(in_flight=4, first=10)
    ledger.assign("a", 3)
    ledger.assign("b", 1)
    ledger.published("a", [10])
    assert ledger.release("a") == [11, 12]
    assert ledger.assign("b", 4) == [13, 11, 12]
    assert ledger.statistics()["given_again"] == 2
    ledger.finished([10, 11, 12, 13])
    assert ledger.under_way().unfinished == []


def test_published_by_a_replica_that_does_not_hold_it_is_ignored() -> None:
    ledger = WorkQueue(in_flight=1)
    ledger.assign("a", 1)
    ledger.published("b", [0])
    assert ledger.release("a") == [0]


def test_work_items_whose_reply_was_lost_are_given_to_the_same_holder_once_more() -> None:
    ledger = WorkQueue(in_flight=8)
    assert ledger.assign("a", 2) == [0, 1]
    assert ledger.assign("a", 2) == [0, 1]
    ledger.published("a", [0])
    assert ledger.assign("a", 2) == [1, 2]


def test_work_item_that_finished_is_not_given_again() -> None:
    ledger = WorkQueue(in_flight=2)
    ledger.assign("a", 2)
    ledger.release("a")
    ledger.finished([0])
    assert ledger.assign("b", 2) == [1, 2]


def test_replica_that_still_works_on_a_work_item_is_not_given_it_again() -> None:
    ledger = WorkQueue(in_flight=8)
    assert ledger.assign("a", 2) == [0, 1]
    assert ledger.assign("a", 2, working=[0]) == [1, 2]
    assert ledger.assign("a", 1, working=[0, 1, 2]) == [3]


def test_work_item_that_failed_is_tried_by_another_replica_first() -> None:
    ledger = WorkQueue(in_flight=2, max_attempts=3)
    assert ledger.assign("a", 2) == [0, 1]
    assert not ledger.failed("a", 0, 1)
    assert ledger.assign("a", 1, working=[1], others=["b"]) == []
    assert ledger.assign("b", 1, others=["a"]) == [0]
    assert ledger.attempt(0) == 2
    assert not ledger.failed("b", 0, 2)
    assert ledger.assign("a", 1, working=[1], others=["b"]) == [0]


def test_work_item_that_failed_is_tried_by_the_only_replica() -> None:
    ledger = WorkQueue(in_flight=1)
    ledger.assign("a", 1)
    ledger.failed("a", 0, 1)
    assert ledger.assign("a", 1) == [0]


def test_work_item_is_given_up_after_its_last_attempt_and_makes_room() -> None:
    ledger = WorkQueue(in_flight=1, max_attempts=2)
    ledger.assign("a", 1)
    assert not ledger.failed("a", 0, 1)
    ledger.assign("a", 1)
    assert ledger.failed("a", 0, 2)
    assert (ledger.under_way().unfinished, ledger.under_way().next) == ([], 1)
    assert ledger.assign("a", 1) == [1]
    assert (ledger.failed_attempts, ledger.given_up, ledger.given_up_in_a_row) == (2, 1, 1)
    ledger.published("a", [1])
    assert (ledger.given_up, ledger.given_up_in_a_row) == (1, 0)


def test_failure_that_is_reported_twice_counts_once() -> None:
    ledger = WorkQueue(in_flight=1, max_attempts=2)
    ledger.assign("a", 1)
    ledger.failed("a", 0, 1)
    ledger.assign("a", 1)
    assert not ledger.failed("a", 0, 1)
    assert ledger.failed_attempts == 1
    assert ledger.attempt(0) == 2


def test_work_item_with_several_payloads_is_finished_with_the_last_of_them() -> None:
    ledger = WorkQueue(in_flight=1)
    ledger.assign("a", 1)
    ledger.finished_parts([(0, 1, 3)])
    ledger.published("a", [0])
    ledger.finished_parts([(0, 0, 3), (0, 1, 3)])
    assert ledger.assign("b", 1) == []
    assert ledger.under_way().finished_parts == [(0, 0, 3), (0, 1, 3)]
    ledger.finished_parts([(0, 2, 3)])
    assert ledger.under_way().finished_parts == []
    assert ledger.assign("b", 1) == [1]


def test_payloads_of_a_finished_work_item_are_ignored() -> None:
    ledger = WorkQueue(in_flight=1)
    ledger.assign("a", 1)
    ledger.finished([0])
    ledger.finished_parts([(0, 0, 2)])
    assert ledger.under_way().finished_parts == []


def test_seeds_differ_by_index_and_by_job_and_stay_the_same() -> None:
    seeds = {work_item_seed(job, index) for job in range(3) for index in range(100)}
    assert len(seeds) == 300
    assert work_item_seed(0, 0) == work_item_seed(0, 0)
    assert all(0 <= seed < 2**31 for seed in seeds)
