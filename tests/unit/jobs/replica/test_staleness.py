import random

from dray.jobs.controller.work_queue import WorkQueue
from dray.jobs.replica.delivery import StalenessWindow


def test_lowest_work_items_that_are_not_finished_are_due() -> None:
    order = StalenessWindow([3, 5], 7)
    assert [order.last_due(count) for count in (1, 2, 3, 4)] == [3, 5, 7, 8]
    order.finished([5, 9])
    assert [order.last_due(count) for count in (1, 2, 3, 4)] == [3, 7, 8, 10]
    order.finished([3, 7, 8, 9])
    assert order.last_due(1) == 10


def test_work_items_with_several_payloads_are_due_until_there_are_enough() -> None:
    order = StalenessWindow([0, 1, 2], 3)
    order.found([(0, 0, 3), (1, 2, 3)])
    assert [order.last_due(count) for count in (3, 4, 6, 7, 8)] == [0, 1, 1, 2, 3]
    order.finished_payloads([(0, 0, 3), (0, 1, 3)])
    assert [order.last_due(count) for count in (1, 2, 4, 5)] == [0, 1, 1, 2]
    order.finished_payloads([(0, 2, 3)])
    assert order.last_due(1) == 1


def test_number_of_payloads_that_is_known_beforehand_counts_for_work_items_that_have_not_come() -> None:
    order = StalenessWindow([0], 1, 4)
    assert [order.last_due(count) for count in (4, 5, 8, 9)] == [0, 1, 1, 2]


def test_work_items_that_were_given_up_are_not_waited_for() -> None:
    order = StalenessWindow([0, 1], 2)
    order.compare([1, 3], 4)
    assert [order.last_due(count) for count in (1, 2, 3)] == [1, 3, 4]


def test_no_payload_that_is_trained_on_in_order_is_too_old() -> None:
    chance = random.Random(5)
    for _ in range(200):
        batch, most = chance.randint(1, 4), chance.randint(0, 3)
        ledger, order = WorkQueue((most + 1) * batch), StalenessWindow((), 0)
        version = 0
        made_by: dict[int, int] = {}
        published: set[int] = set()
        for _ in range(200):
            action = chance.randrange(4)
            if action == 0:
                for index in ledger.assign("a", chance.randint(1, 3)):
                    made_by.setdefault(index, version)
                ledger.published("a", made_by)
            elif action == 1 and made_by and chance.random() < 0.2:
                lost = chance.choice(list(made_by))
                del made_by[lost]
                published.discard(lost)
                order.finished([lost])
                ledger.finished([lost])
            elif action == 2 and made_by.keys() - published:
                published.add(chance.choice(sorted(made_by.keys() - published)))
            else:
                last = order.last_due(batch)
                step = [index for index in sorted(published) if index <= last]
                assert len(step) <= batch
                if len(step) == batch:
                    assert all(version - made_by.pop(index) <= most for index in step)
                    published -= set(step)
                    version += 1
                    order.finished(step)
                    ledger.finished(step)
