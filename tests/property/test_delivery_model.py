"""`Delivery` beside a model of one page: any order of payloads, consumers, credit, returns, time and ends."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from stream_parts import SLOTS, ConsumerEnd, Stream

from dray.protocol.streams import Given
from dray.streams.delivery import BEGIN_SECONDS

MAX_DELIVERIES = 4


class Holder:
    """A consumer, as the model knows it.

    Attributes:
        end: the consumer.
        given: what it was given and has neither returned nor lost, by hand-out.
        begun: the hand-outs that its program has got.
        read: how many announcements the model has taken in.
        returned: how many of these went back at once, which gives the credit back.
        most: the highest credit so far.
    """

    def __init__(self, end: ConsumerEnd, reader: int) -> None:
        self.end = end
        self.reader = reader
        self.given: dict[int, Given] = {}
        self.begun: set[int] = set()
        self.read = self.returned = 0
        self.most = end.total


class DeliveryModel(RuleBasedStateMachine):
    """Checks what the module promises: one holder, nothing lost, order, counted deliveries, credit."""

    @initialize(groups=st.integers(1, 2), limited=st.booleans())
    def begin(self, groups: int, limited: bool) -> None:
        self.groups = groups
        self.limit = MAX_DELIVERIES if limited else None
        self.stream = Stream(groups, self.limit)
        self.next = 0
        self.holders: list[Holder] = []
        self.live: list[set[int]] = [set() for _ in range(groups)]  # neither consumed, dropped nor given up
        self.first: list[list[int]] = [[] for _ in range(groups)]  # payloads in the order of their first hand-out
        self.deliveries: list[dict[int, int]] = [{} for _ in range(groups)]
        self.dead = 0

    # --- what happens -----------------------------------------------------------------------------------------

    @rule(count=st.integers(1, 3))
    def put(self, count: int) -> None:
        if self.next + count > SLOTS:
            return
        for live in self.live:
            live.update(range(self.next, self.next + count))
        numbers = range(self.next, self.next + count)
        self.next += count
        self.stream.add(*numbers)

    @rule(reader=st.integers(0, 1), direct=st.booleans(), credit=st.integers(0, 4))
    def subscribe(self, reader: int, direct: bool, credit: int) -> None:
        reader %= self.groups
        if len(self.holders) < 6:
            end = ConsumerEnd(self.stream.delivery, reader, direct=direct)
            if credit:
                end.raise_credit(credit)
            self.holders.append(Holder(end, reader))
            end.recipient.start()

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), change=st.integers(-2, 3))
    def set_credit(self, data: st.DataObject, change: int) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        end = holder.end
        holder.most = max(holder.most, end.total + change)
        end.raise_credit(max(change, -end.total))
        if end.words is not None and end.words.pending:
            self.stream.delivery.serve()  # the doorbell

    @precondition(lambda self: any(each.given for each in self.holders))
    @rule(data=st.data())
    def begin_payload(self, data: st.DataObject) -> None:
        holder, given = self._some(data)
        begun = holder.end.begin(given)
        assert begun or given.number in holder.begun
        holder.begun.add(given.number)

    @precondition(lambda self: any(each.given for each in self.holders))
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        holder, given = self._some(data)
        del holder.given[given.number]
        if given.number not in holder.begun:
            self.deliveries[holder.reader][given.sequence] -= 1
            holder.returned += 1
        else:
            self._give_up(holder.reader, given.sequence)
        holder.end.give_back(given, begun=given.number in holder.begun)

    @precondition(lambda self: any(each.given for each in self.holders))
    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        holder, given = self._some(data)
        holder.end.begin(given)
        del holder.given[given.number]
        self.live[holder.reader].discard(given.sequence)
        self.stream.finish(given.sequence, reader=holder.reader)

    @precondition(lambda self: any(self.live))
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        """The ring drops a payload that waits."""
        reader = data.draw(st.sampled_from([n for n, live in enumerate(self.live) if live]))
        held = {each.sequence for holder in self._of(reader) for each in holder.given.values()}
        waiting = sorted(self.live[reader] - held)
        if waiting:
            dropped = data.draw(st.sampled_from(waiting))
            self.live[reader].discard(dropped)
            self.stream.finish(dropped, reader=reader)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def end_consumer(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        self.holders.remove(holder)
        for given in holder.given.values():
            self._give_up(holder.reader, given.sequence)
        holder.end.recipient.end()

    @rule(seconds=st.sampled_from([0.5, 1.0, BEGIN_SECONDS / 2, BEGIN_SECONDS]))
    def wait(self, seconds: float) -> None:
        self.stream.clock.advance(seconds)
        before = [dict(holder.given) for holder in self.holders]
        self.stream.delivery.serve()
        for holder, had in zip(self.holders, before, strict=True):
            for number, given in had.items():
                if given.sequence not in holder.end.recipient.items:
                    assert number not in holder.begun, "begun payloads are not taken back by time"
                    del holder.given[number]
                    self._give_up(holder.reader, given.sequence)
                    if holder.end.words is not None:
                        assert not holder.end.begin(given)

    # --- what must hold ---------------------------------------------------------------------------------------

    @invariant()
    def every_hand_out_is_right(self) -> None:
        if not hasattr(self, "holders"):
            return
        arrived = [
            (given.number, holder, given)
            for holder in self.holders
            for given in holder.end.announced[holder.read :]
        ]
        for number, holder, given in sorted(arrived, key=lambda each: each[0]):
            reader, sequence = holder.reader, given.sequence
            assert sequence in self.live[reader], "what is done is not handed out"
            held = [h for h in self._of(reader) for each in h.given.values() if each.sequence == sequence]
            assert not held, "one consumer has it at a time"
            count = self.deliveries[reader].get(sequence, 0) + 1
            assert given.deliveries == count
            self.deliveries[reader][sequence] = count
            if sequence not in self.first[reader]:
                self.first[reader].append(sequence)
            holder.given[number] = given
            holder.read += 1
            assert holder.read - holder.returned <= holder.most, "no more is given than the credit allows"
        for first in self.first:
            assert first == sorted(first), "the first hand-outs are in order"

    @invariant()
    def nothing_is_lost_and_none_waits_beside_credit(self) -> None:
        if not hasattr(self, "holders"):
            return
        dead = {(item.reader, item.sequence) for item in self.stream.delivery.dead}
        for reader, group in enumerate(self.stream.delivery.groups):
            waiting = [each.sequence for each in group.waiting]
            assert waiting == sorted(set(waiting))
            held = {each.sequence for holder in self._of(reader) for each in holder.given.values()}
            assert not held & set(waiting)
            for sequence in self.live[reader]:
                assert (sequence in held) + (sequence in waiting) + ((reader, sequence) in dead) == 1
            if any(sequence in self.live[reader] for sequence in waiting):
                assert all(each.end.recipient.allowance <= 0 for each in self._of(reader))
                assert group.marked

    # --- inside -----------------------------------------------------------------------------------------------

    def _of(self, reader: int) -> list[Holder]:
        return [holder for holder in self.holders if holder.reader == reader]

    def _some(self, data: st.DataObject) -> tuple[Holder, Given]:
        holder = data.draw(st.sampled_from([each for each in self.holders if each.given]))
        return holder, holder.given[data.draw(st.sampled_from(sorted(holder.given)))]

    def _give_up(self, reader: int, sequence: int) -> None:
        """A delivery has ended; after the last one the payload is given up."""
        if self.limit is not None and self.deliveries[reader].get(sequence, 0) >= self.limit:
            self.live[reader].discard(sequence)


TestDeliveryModel = DeliveryModel.TestCase
TestDeliveryModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
