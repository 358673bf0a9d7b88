"""Reporting consumed payloads to their producers: one request each, again after a pause, given up at last."""

from prefetch_fixtures import HERE, REFUSED, THERE, TIMEOUT, refs

from dray.errors import SlotError
from dray.prefetch import Free, Freeing, Pause

THIRD = b"c" * 16


def request(freeing: Freeing, now: float = 0.0) -> Free:
    action = freeing.next(now)
    assert isinstance(action, Free)
    return action


def test_each_producer_gets_one_request_at_a_time() -> None:
    freeing = Freeing()
    freeing.add([*refs(2), *refs(1, THERE), *refs(2)])
    assert (len(freeing.waiting()), freeing.wanted) == (3, 2)
    first, second = request(freeing), request(freeing)
    assert first.refs == tuple(refs(2, HERE))
    assert second.refs == tuple(refs(1, THERE))
    freeing.add(refs(1, first=9))
    assert freeing.next(0.0) is None
    assert freeing.report(first, None, 0.0) == 0
    assert request(freeing).refs == tuple(refs(1, first=9))


def test_producers_that_do_not_answer_hold_two_threads_at_most() -> None:
    freeing = Freeing()
    freeing.add([*refs(1), *refs(1, THERE), *refs(1, THIRD)])
    first = request(freeing)
    request(freeing)
    assert freeing.next(0.0) is None
    freeing.report(first, None, 0.0)
    assert request(freeing).refs == tuple(refs(1, THIRD))


def test_a_failed_request_is_made_three_times_a_second_apart_and_then_given_up() -> None:
    freeing = Freeing()
    freeing.add(refs(2))
    for now in (0.0, 1.0):
        assert freeing.report(request(freeing, now), TIMEOUT, now) == 0
        assert freeing.next(now) == Pause(now + 1.0)
    assert freeing.report(request(freeing, 2.0), TIMEOUT, 2.0) == 2
    assert not freeing.waiting()
    assert freeing.next(9.0) is None


def test_a_refusal_is_final_and_with_a_lost_producer_nothing_is_left_to_free() -> None:
    for error, given_up in ((SlotError("the ring is closed"), 2), (REFUSED, 0)):
        freeing = Freeing()
        freeing.add(refs(2))
        assert freeing.report(request(freeing), error, 0.0) == given_up
        assert not freeing.waiting()


def test_in_a_hurry_nothing_waits_and_nothing_is_tried_again() -> None:
    freeing = Freeing()
    freeing.add(refs(1))
    freeing.report(request(freeing), TIMEOUT, 0.0)
    freeing.hurry()
    assert freeing.report(request(freeing, 0.0), TIMEOUT, 0.0) == 1
