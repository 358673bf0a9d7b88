"""Which consumer gets which payload: `Delivery` with a ring and a clock made by hand."""

import math
from pathlib import Path

import interruptions
import pytest
from stream_parts import ConsumerEnd, Stream

from dray.errors import BufferClosedError
from dray.protocol.streams import Given
from dray.streams import delivery as module
from dray.streams.delivery import BEGIN_SECONDS, RECHECK_SECONDS, TRANSITIONS, Event, Item, State

BOTH = pytest.mark.parametrize("direct", [False, True], ids=["frames", "words"])


def taken(stream: Stream, *consumers: ConsumerEnd) -> list[int]:
    """The payloads that consumers hold, as the producer knows it."""
    return sorted(sequence for consumer in consumers for sequence in consumer.recipient.items)


# --- the table --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", Event)
def test_the_table_states_what_each_event_does_in_each_state(state: State, event: Event) -> None:
    wanted = {
        (State.WAITING, Event.GIVE): State.GIVEN,
        (State.WAITING, Event.FINISH): State.DONE,
        (State.GIVEN, Event.BEGIN): State.BEGUN,
        (State.GIVEN, Event.COME_BACK): State.WAITING,
        (State.GIVEN, Event.FINISH): State.DONE,
        (State.BEGUN, Event.COME_BACK): State.WAITING,
        (State.BEGUN, Event.FINISH): State.DONE,
    }
    item = Item(0, 0, 0, state)
    if (state, event) in wanted:
        item.apply(event)
        assert item.state is wanted[state, event] is TRANSITIONS[state][event]
    else:
        with pytest.raises(KeyError):
            item.apply(event)
        assert item.state is state


@BOTH
def test_a_payload_goes_through_every_state(direct: bool) -> None:
    stream = Stream()
    stream.add(0)
    (item,) = stream.delivery.groups[0].waiting
    assert item.state is State.WAITING
    consumer = stream.consumer(1, direct=direct)
    assert item.state is State.GIVEN
    assert not consumer.recipient.has_begun(item)
    assert consumer.begin(consumer.announced[0])
    assert consumer.recipient.has_begun(item)
    assert item.state is State.BEGUN
    stream.finish(0)
    consumer.recipient.end()
    assert item.state is State.DONE


@BOTH
@pytest.mark.parametrize("begun", [False, True])
def test_a_payload_whose_consumer_ends_waits_again(direct: bool, begun: bool) -> None:
    stream = Stream()
    stream.add(0)
    consumer = stream.consumer(1, direct=direct)
    (item,) = consumer.recipient.items.values()
    if begun:
        consumer.begin(consumer.announced[0])
    consumer.recipient.end()
    assert item.state is State.WAITING
    other = stream.consumer(1, direct=direct)
    assert other.sequences == [0]
    assert other.announced[0].deliveries == 2
    assert stream.delivery.groups[0].redelivered == 1


def test_a_payload_that_is_dropped_while_it_waits_is_handed_out_to_no_consumer() -> None:
    stream = Stream()
    stream.add(0, 1, 2)
    stream.finish(0, 1)
    assert stream.consumer(3).sequences == [2]
    assert stream.delivery.groups[0].dropped == 2


# --- order and credit -------------------------------------------------------------------------------------------


@BOTH
def test_payloads_are_handed_out_in_their_order_up_to_the_credit(direct: bool) -> None:
    stream = Stream()
    consumer = stream.consumer(2, direct=direct)
    stream.add(0, 1, 2, 3)
    assert consumer.sequences == [0, 1]
    assert consumer.announced[0] == Given(0, 0, 100, 1, 1)
    consumer.raise_credit(1)
    stream.delivery.serve()
    assert consumer.sequences == [0, 1, 2]
    assert [each.number for each in consumer.announced] == [1, 2, 3]


def test_payloads_that_threads_add_in_another_order_are_handed_out_in_the_order_of_their_numbers() -> None:
    stream = Stream()
    stream.add(1, 3, 0, 2)
    assert stream.consumer(4).sequences == [0, 1, 2, 3]


@BOTH
def test_what_comes_back_is_handed_out_before_what_waits(direct: bool) -> None:
    stream = Stream()
    first = stream.consumer(3, direct=direct)
    stream.add(0, 1, 2, 3, 4)
    first.raise_credit(-2)
    for given in (first.announced[2], first.announced[1]):
        first.give_back(given)
    second = stream.consumer(9, direct=direct)
    assert second.sequences == [1, 2, 3, 4]


@BOTH
def test_credit_that_falls_takes_nothing_back_and_gives_nothing_more(direct: bool) -> None:
    stream = Stream()
    consumer = stream.consumer(3, direct=direct)
    stream.add(0, 1)
    consumer.raise_credit(-2)
    stream.add(2, 3)
    assert consumer.sequences == [0, 1]
    consumer.raise_credit(2)
    stream.delivery.serve()
    assert consumer.sequences == [0, 1, 2]


def test_a_payload_goes_to_the_consumer_with_the_most_credit_among_equals_to_the_one_served_longest_ago() -> None:
    stream = Stream()
    large, small = stream.consumer(3), stream.consumer(1)
    stream.add(0, 1, 2, 3)
    assert large.sequences == [0, 1, 3]
    assert small.sequences == [2]
    consumers = [stream.consumer(2) for _ in range(3)]
    stream.add(4, 5, 6, 7, 8, 9)
    assert all(each.sequences[1] - each.sequences[0] == 3 for each in consumers)


def test_a_consumer_gets_nothing_before_it_knows_that_it_has_subscribed() -> None:
    stream = Stream()
    consumer = ConsumerEnd(stream.delivery, direct=True)
    consumer.raise_credit(5)
    stream.add(0)
    stream.delivery.serve()
    assert consumer.sequences == []
    consumer.recipient.start()
    assert consumer.sequences == [0]


def test_a_credit_word_with_garbage_is_bounded() -> None:
    stream = Stream()
    consumer = stream.consumer(direct=True)
    assert consumer.words is not None
    consumer.words.credit = 2**64 - 1
    assert consumer.recipient.allowance == module.MAX_CREDIT
    stream.add(0)
    assert consumer.sequences == [0]


def test_a_consumer_with_many_hand_outs_that_are_done_keeps_only_the_others() -> None:
    stream = Stream()
    consumer = stream.consumer(60)
    stream.add(*range(17))
    stream.finish(*range(10))
    stream.add(17)
    assert taken(stream, consumer) == list(range(10, 18))


# --- the wake-up ------------------------------------------------------------------------------------------------


def test_consumers_know_whether_payloads_wait_for_credit() -> None:
    stream = Stream()
    consumer, frames = stream.consumer(1, direct=True), stream.consumer()
    assert consumer.words is not None
    stream.add(0)
    assert not consumer.words.pending
    stream.add(1)
    assert consumer.words.pending
    assert stream.ring.barriers == 1
    late = stream.consumer(direct=True)
    assert late.words is not None
    assert late.words.pending
    consumer.raise_credit(1)
    stream.delivery.serve()
    assert not consumer.words.pending
    assert not late.words.pending
    assert frames.sequences == []


def test_credit_that_comes_before_the_barrier_is_seen_after_it() -> None:
    stream = Stream()
    consumer = stream.consumer(direct=True)
    stream.ring.at_barrier = lambda: consumer.raise_credit(1)
    stream.add(0)
    assert consumer.sequences == [0]
    assert consumer.words is not None
    assert not consumer.words.pending


def test_after_a_barrier_that_has_failed_the_credit_is_checked_again() -> None:
    stream = Stream()
    consumer = stream.consumer(direct=True)
    stream.ring.barriers_fail = True
    stream.add(0)
    consumer.raise_credit(1)  # too late for the second check; pending was not seen
    assert stream.delivery.remaining == RECHECK_SECONDS
    stream.later(RECHECK_SECONDS)
    assert consumer.sequences == [0]


def test_without_shared_words_there_is_no_barrier() -> None:
    stream = Stream()
    stream.consumer()
    stream.add(0, 1)
    assert stream.ring.barriers == 0


# --- return, dead letters ---------------------------------------------------------------------------------------


@BOTH
def test_a_return_of_what_was_not_begun_is_no_delivery(direct: bool) -> None:
    stream = Stream(max_deliveries=1)
    consumer = stream.consumer(3, direct=direct)
    stream.add(0)
    consumer.give_back(consumer.announced[0])
    consumer.give_back(consumer.announced[1])
    assert [each.deliveries for each in consumer.announced] == [1, 1, 1]
    assert stream.delivery.groups[0].returned == 2
    assert stream.delivery.groups[0].redelivered == 0


@BOTH
def test_a_hand_out_names_the_returns_that_were_known_before_it(direct: bool) -> None:
    stream = Stream()
    consumer = stream.consumer(3, direct=direct)
    stream.add(0, 1, 2)
    for each in (1, 2):
        consumer.give_back(consumer.announced[each])
    assert [(each.sequence, each.returns) for each in consumer.announced] == [
        (0, 0),
        (1, 0),
        (2, 0),
        (1, 1),
        (2, 2),
    ]


@BOTH
def test_a_return_of_what_was_begun_is_a_delivery(direct: bool) -> None:
    stream = Stream()
    consumer = stream.consumer(2, direct=direct)
    stream.add(0)
    assert consumer.begin(consumer.announced[0])
    consumer.give_back(consumer.announced[0], begun=True)
    assert [each.deliveries for each in consumer.announced] == [1, 2]


def test_a_return_that_denies_what_its_words_show_is_a_delivery() -> None:
    stream = Stream()
    consumer = stream.consumer(2, direct=True)
    stream.add(0)
    assert consumer.begin(consumer.announced[0])
    consumer.give_back(consumer.announced[0], begun=False)
    assert [each.deliveries for each in consumer.announced] == [1, 2]


@pytest.mark.parametrize("field", ["slot", "sequence", "number"])
def test_a_return_of_another_hand_out_is_ignored(field: str) -> None:
    stream = Stream()
    consumer = stream.consumer(2)
    stream.add(0)
    given = consumer.announced[0]
    consumer.give_back(given._replace(**{field: getattr(given, field) + 1}))
    consumer.recipient.begin(*given._replace(**{field: getattr(given, field) + 1})[:2], given.number + 1)
    assert len(consumer.announced) == 1
    assert consumer.recipient.items[0].state is State.GIVEN


def test_a_return_of_what_is_consumed_already_is_the_end_of_the_payload() -> None:
    stream = Stream()
    consumer = stream.consumer(2)
    stream.add(0)
    stream.finish(0)
    consumer.give_back(consumer.announced[0])
    assert len(consumer.announced) == 1
    assert taken(stream, consumer) == []


@BOTH
def test_a_payload_that_was_handed_out_too_often_is_given_up(direct: bool) -> None:
    stream = Stream(max_deliveries=2)
    stream.add(0, 1)
    for number in (1, 2):
        consumer = stream.consumer(1, direct=direct)
        assert consumer.announced == [Given(0, 0, 100, number, number)]
        consumer.recipient.end()
    assert [tuple(item) for item in stream.delivery.dead] == [(0, 0, 0, 100, 2)]
    assert stream.delivery.groups[0].dead == 1
    assert stream.consumer(2).sequences == [1]


# --- what is not begun in time ----------------------------------------------------------------------------------


@BOTH
def test_what_is_not_begun_in_time_goes_to_another_consumer_that_has_credit(direct: bool) -> None:
    stream = Stream()
    slow, other = stream.consumer(3, direct=direct), stream.consumer(direct=direct)
    stream.add(0, 1, 2)
    slow.begin(slow.announced[0])
    other.raise_credit(1)
    stream.delivery.serve()
    assert stream.delivery.remaining == BEGIN_SECONDS
    stream.later(BEGIN_SECONDS - 0.01)
    assert other.sequences == []
    stream.later(0.02)
    assert other.sequences == [1]
    assert other.announced[0].deliveries == 2
    assert stream.delivery.groups[0].taken_back == 1
    assert taken(stream, slow) == [0, 2]
    assert stream.delivery.remaining == RECHECK_SECONDS
    assert [each.sequence for each in slow.lost] == ([] if direct else [1])
    if direct:  # then it learns from the words
        assert not slow.begin(slow.announced[1])
        assert slow.begin(slow.announced[2])


@BOTH
def test_what_is_not_begun_stays_while_no_other_consumer_has_credit(direct: bool) -> None:
    stream = Stream()
    slow = stream.consumer(1, direct=direct)
    stream.add(0)
    for _ in range(3):
        stream.later(BEGIN_SECONDS)
        assert stream.delivery.remaining == RECHECK_SECONDS
    other = stream.consumer(1, direct=direct)
    stream.later(RECHECK_SECONDS)
    assert other.sequences == [0]
    assert taken(stream, slow) == []


@BOTH
def test_what_was_begun_is_never_taken_back_by_time(direct: bool) -> None:
    stream = Stream()
    slow, other = stream.consumer(1, direct=direct), stream.consumer(direct=direct)
    stream.add(0)
    other.raise_credit(5)
    assert slow.begin(slow.announced[0])
    stream.later(1000.0)
    assert other.sequences == []
    assert stream.delivery.remaining == math.inf


def test_a_payload_that_is_begun_at_the_last_moment_stays() -> None:
    stream = Stream()
    slow, other = stream.consumer(2, direct=True), stream.consumer(direct=True)
    stream.add(0, 1)
    other.raise_credit(2)
    begun: list[bool] = []
    stream.ring.at_barrier = lambda: begun.append(slow.begin(slow.announced[0]))
    stream.later(BEGIN_SECONDS)
    assert begun == [False]  # it saw that the payload is taken back; the producer saw that it is begun
    assert taken(stream, slow) == [0]
    assert other.sequences == [1]
    slow.give_back(slow.announced[0])  # so the consumer returns it
    assert taken(stream, slow) == []
    assert other.sequences == [1, 0]


def test_nothing_is_taken_back_with_a_barrier_that_has_failed() -> None:
    stream = Stream()
    slow, other = stream.consumer(1, direct=True), stream.consumer(direct=True)
    stream.add(0)
    other.raise_credit(1)
    stream.ring.barriers_fail = True
    stream.later(BEGIN_SECONDS)
    assert other.sequences == []
    assert stream.delivery.remaining == RECHECK_SECONDS
    assert slow.begin(slow.announced[0])
    stream.later(RECHECK_SECONDS)
    assert other.sequences == []


def test_the_server_is_woken_when_the_first_hand_out_sets_a_time() -> None:
    stream = Stream()
    woken: list[float] = []
    stream.delivery.wake = lambda: woken.append(stream.delivery.remaining)
    consumer = stream.consumer(3)
    stream.add(0, 1)
    assert woken == [BEGIN_SECONDS]
    stream.finish(0, 1)
    stream.later(BEGIN_SECONDS)
    assert stream.delivery.remaining == math.inf
    stream.add(2)
    assert woken == [BEGIN_SECONDS] * 2
    assert consumer.sequences == [0, 1, 2]


@BOTH
def test_a_consumer_that_has_not_begun_in_time_gets_nothing_until_its_credit_changes(direct: bool) -> None:
    stream = Stream()
    slow, other = stream.consumer(3, direct=direct), stream.consumer(direct=direct)
    stream.add(0)
    other.raise_credit(1)
    stream.later(BEGIN_SECONDS)
    assert other.sequences == [0]
    stream.add(1)
    assert slow.sequences == [0]
    slow.raise_credit(1)
    stream.delivery.serve()
    assert slow.sequences == [0, 1]


def test_no_more_is_taken_back_than_the_others_have_credit_for() -> None:
    stream = Stream()
    slow = stream.consumer(5)
    stream.add(0, 1, 2, 3, 4)
    first, second = stream.consumer(1), stream.consumer(2)
    stream.later(BEGIN_SECONDS)
    assert sorted(first.sequences + second.sequences) == [0, 1, 2]
    assert taken(stream, slow) == [3, 4]


def test_time_does_not_take_payloads_from_one_group_for_another() -> None:
    stream = Stream(groups=2)
    slow, other = stream.consumer(1, reader=0), stream.consumer(reader=1)
    stream.add(0)
    other.raise_credit(1)
    stream.later(BEGIN_SECONDS)
    assert taken(stream, slow) == [0]
    assert other.sequences == [0]


# --- groups, ends -----------------------------------------------------------------------------------------------


def test_each_group_gets_every_payload() -> None:
    stream = Stream(groups=2)
    first = [stream.consumer(1, reader=0), stream.consumer(1, reader=0)]
    second = stream.consumer(2, reader=1)
    stream.add(0, 1)
    assert sorted(first[0].sequences + first[1].sequences) == [0, 1]
    assert second.sequences == [0, 1]
    stream.finish(0, reader=0)
    second.recipient.end()
    assert stream.consumer(2, reader=1).sequences == [0, 1]


def test_a_slow_group_delays_no_other_one() -> None:
    stream = Stream(groups=2)
    fast = stream.consumer(9, reader=0)
    stream.consumer(0, reader=1)
    stream.add(*range(5))
    assert fast.sequences == list(range(5))
    assert len(stream.delivery.groups[1].waiting) == 5


def test_the_end_of_a_consumer_is_noted_once() -> None:
    stream = Stream()
    consumer, other = stream.consumer(1), stream.consumer(1)
    stream.add(0)
    (holder,) = (each for each in (consumer, other) if each.sequences)
    holder.recipient.end()
    holder.recipient.end()
    rest = other if holder is consumer else consumer
    assert rest.sequences == [0]
    assert stream.delivery.groups[0].subscribed == 2


def test_close_ends_every_consumer_and_hands_out_nothing_more() -> None:
    stream = Stream(groups=2)
    consumers = [stream.consumer(1, reader=0), stream.consumer(1, reader=1, direct=True)]
    stream.add(0, 1)
    stream.delivery.close(3)
    assert [each.ended for each in consumers] == [3, 3]
    with pytest.raises(BufferClosedError):
        stream.add(2)
    for consumer in consumers:
        consumer.give_back(consumer.announced[0])
        consumer.recipient.end()
    stream.later(BEGIN_SECONDS)
    assert [each.sequences for each in consumers] == [[0], [0]]


def test_a_consumer_whose_answer_has_not_left_when_the_stream_closes_is_ended_behind_it() -> None:
    stream = Stream()
    early = ConsumerEnd(stream.delivery)
    stream.delivery.close(2)
    assert early.ended is None
    early.recipient.start()
    assert early.ended == 2
    assert stream.consumer().ended == 2


# --- exceptions of signal handlers ------------------------------------------------------------------------------

FOLDER = Path(module.__file__).parent


def interrupted_add(moment: int, *, direct: bool) -> bool:
    """`add` of a second payload while one waits, with an exception at a moment; false if it has fewer."""
    stream = Stream()
    first, second = stream.consumer(direct=direct), stream.consumer(direct=True)
    stream.add(0)
    if direct:
        first.raise_credit(2)  # the producer is not woken: `add` hands out both payloads
    interrupted = interruptions.interrupted(FOLDER, lambda: stream.add(1), moment)
    if interrupted:
        stream.finish(1)  # the producer withdraws it
    assert not stream.delivery.lock.locked()
    second.raise_credit(5)
    stream.delivery.serve()
    for consumer in (first, second):
        if consumer.aborted:  # its connection fails, so it ends
            consumer.recipient.end()
    assert taken(stream, first, second).count(0) == 1
    (holder,) = (each for each in (first, second) if 0 in each.recipient.items)
    assert holder.sequences.count(0) == 1
    for consumer in (first, second):
        consumer.recipient.end()
    assert stream.consumer(5, direct=direct).sequences == ([0] if interrupted else [0, 1])
    stream.later(BEGIN_SECONDS)
    return interrupted


@BOTH
def test_an_exception_at_any_moment_of_add_loses_nothing_and_gives_nothing_twice(direct: bool) -> None:
    moments = 1
    while interrupted_add(moments, direct=direct):
        moments += 1
    assert moments > 10


def interrupted_prune(moment: int) -> bool:
    """`add` while hand-outs are forgotten that are done, with an exception at a moment; false if it has fewer."""
    stream = Stream()
    consumer = stream.consumer(60)
    stream.add(*range(17))
    stream.finish(0, 1)
    interrupted = interruptions.interrupted(FOLDER, lambda: stream.add(17), moment)
    if interrupted:
        stream.finish(17)
    stream.add(18)
    stream.later(BEGIN_SECONDS)
    consumer.recipient.end()
    wanted = [each for each in range(2, 19) if each != 17 or not interrupted]
    assert stream.consumer(60).sequences == wanted
    return interrupted


def test_an_exception_while_hand_outs_are_forgotten_harms_no_later_call() -> None:
    moments = 1
    while interrupted_prune(moments):
        moments += 1
    assert moments > 10


def interrupted_close(moment: int) -> bool:
    """`close` with an exception at a moment, and `close` again; false if there are fewer."""
    stream = Stream()
    consumer = stream.consumer(1)
    stream.add(0, 1)
    interrupted = interruptions.interrupted(FOLDER, lambda: stream.delivery.close(2), moment)
    assert not stream.delivery.lock.locked()
    if interrupted and consumer.ended is None:
        stream.delivery.close(2)
    assert consumer.ended == 2
    return interrupted


def test_a_close_that_an_exception_has_ended_can_be_repeated() -> None:
    moments = 1
    while interrupted_close(moments):
        moments += 1
    assert moments > 1
