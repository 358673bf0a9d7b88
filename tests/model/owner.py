"""A thread of the owner that puts payloads: claim, commit, observe, retire, drop, wait, close.

Each step has at most one shared access. Steps whose number is in `UNLOCKED` begin without the ring's lock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from model.machine import RETIRING, State
from model.scenarios import End, Policy
from model.world import (
    CLEARED,
    CLOSED,
    CLOSING,
    COMMITTED,
    DROPPED,
    FREE,
    LOST,
    REPLACED,
    RETIRED,
    UNDECIDED,
    WRITING,
    World,
)

if TYPE_CHECKING:
    from model.consumer import Consumer
    from model.properties import Properties

# Steps: places in `Owner.steps`, to which planted defects append.
(
    CLAIM,
    WRITE,
    COMMIT,
    BARRIER,
    LIST_AFTER_BARRIER,
    OBSERVE_AFTER_BARRIER,
    BARRIER_FAILED,
    SLEEP,
    DONE,
    OBSERVE,
    RETIRE,
    LIST,
    SCAN,
    MARK,
    GIVE_BACK,
    DROP,
    ARM,
    CLOSE_MARK,
) = range(18)
BARRIER_RUNS: Final = 100
"""The barrier reaches the consumers' processors, one after the other, in any order."""

UNLOCKED: Final = frozenset(
    {
        CLAIM,
        WRITE,
        COMMIT,
        BARRIER,
        BARRIER_RUNS,
        LIST_AFTER_BARRIER,
        OBSERVE_AFTER_BARRIER,
        BARRIER_FAILED,
        SLEEP,
        DONE,
    }
)
_TAKES_LOCK: Final = frozenset(
    {CLAIM, COMMIT, LIST_AFTER_BARRIER, OBSERVE_AFTER_BARRIER, BARRIER_FAILED, SLEEP}
)

# What the list of attachments and their words are read for.
NOTHING, RETIRING_SLOTS, PUBLISHING, CHOOSING, DECIDING, CLOSING_RING = range(6)


class Owner:
    """A thread of the owner that puts payloads.

    Attributes:
        name: its name in traces.
        processor: its processor.
        step: the place of its step.
        armed: the place of what it waits with: it has set the doorbell.
        signal: the place of what the ring's condition has notified.
    """

    def __init__(self, world: World, properties: Properties, number: int) -> None:
        self.world = world
        self.properties = properties
        self.number = number
        self.name = f"owner {number + 1}" if world.scenario.putting > 1 else "owner"
        self.processor = world.processor(self.name)
        self.puts = world.scenario.payloads // world.scenario.putting
        self.policy = world.scenario.policy
        self.step = world.variable(f"step of {self.name}")
        self.put = world.variable(f"payloads that {self.name} has put")
        self.slot = world.variable(f"slot that {self.name} writes or drops")
        self.cursor = world.variable(f"word that {self.name} reads next")
        self.listed = world.variable(f"attachments that {self.name} reads")
        self.named = world.variable(f"slots that {self.name} found named")
        self.excluded = world.variable(f"slots that {self.name} does not drop")
        self.purpose = world.variable(f"what {self.name} reads words for")
        self.after = world.variable(f"step of {self.name} after the barrier")
        self.awaited = world.variable(f"consumers that the barrier of {self.name} has not reached")
        self.mine = world.variable(f"slots cleared by {self.name} before its barrier")
        self.armed = world.variable(f"{self.name} has set the doorbell")
        self.signal = world.variable(f"{self.name} was notified")
        self.slots = range(world.scenario.slots)
        self.pairs = [(slot, reader) for slot in self.slots for reader in range(world.scenario.readers)]
        self.places = [
            (process, word) for process, words in enumerate(world.words) for word in words
        ]
        self.others: list[Owner] = []
        self.consumers: list[Consumer] = []
        self.steps: list[Callable[[State], None]] = [
            self._claim,
            self._write,
            self._commit,
            self._begin_barrier,
            self._list,
            self._observe_now,
            self._barrier_failed,
            self._wake,
            self._claim,
            self._observe,
            self._retire,
            self._list,
            self._scan,
            self._mark,
            self._give_back,
            self._drop,
            self._arm,
            self._close_mark,
        ]

    def resolve(self, owners: list[Owner], consumers: list[Consumer]) -> None:
        """Know the other threads of the owner, and the consumers that a barrier reaches."""
        self.others = [owner for owner in owners if owner is not self]
        self.consumers = consumers

    # --- questions ------------------------------------------------------------------------------------------------

    def can_step(self, state: bytes) -> bool:
        """A step of this thread is possible."""
        step = state[self.step]
        if step == DONE or step == BARRIER_RUNS:
            return False
        if step == SLEEP and not (state[self.world.eventfd] or state[self.signal]):
            return False
        return step not in _TAKES_LOCK or all(other.has_unlocked(state) for other in self.others)

    def do_step(self, state: State) -> None:
        """The next step."""
        self.steps[state[self.step]](state)

    def has_unlocked(self, state: bytes | State) -> bool:
        """This thread does not hold the ring's lock, and all that it stored under the lock is visible."""
        world = self.world
        return state[self.step] in UNLOCKED and world.holds_only(state, self.processor, world.content_words)

    def waits(self, state: bytes | State) -> bool:
        """This thread waits for the eventfd."""
        return state[self.step] == SLEEP

    def has_finished(self, state: bytes | State) -> bool:
        """This thread has put all payloads."""
        return state[self.step] == DONE

    def drains(self, state: bytes | State) -> bool:
        """This thread waits until every payload is consumed."""
        return state[self.put] == self.puts

    # --- put ------------------------------------------------------------------------------------------------------

    def _claim(self, state: State) -> None:
        world = self.world
        if not self._is_satisfied(state):
            self._observe_now(state)
            return
        state[self.excluded] = 0
        state[self.signal] = 0
        if state[self.armed]:
            state[self.armed] = 0
            self._clear_doorbell(state)
        if state[self.put] == self.puts:
            state[self.step] = CLOSE_MARK if world.scenario.end is End.CLOSE else DONE
            return
        slot = world.free_slot(state)
        assert slot is not None
        payload = state[world.next_sequence]
        state[world.next_sequence] = payload + 1
        state[world.slot_of[payload]] = slot
        state[world.slot_state[slot]] = WRITING
        state[world.slot_payload[slot]] = payload + 1
        state[world.latched[slot]] = 0
        state[self.slot] = slot
        state[self.step] = WRITE
        if world.tracing:
            world.note(f"claims slot {slot} for payload {payload}")

    def _is_satisfied(self, state: State) -> bool:
        """There is a free slot; after the last payload, all payloads are consumed if the scenario waits for that."""
        world = self.world
        if state[self.put] < self.puts:
            return world.free_slot(state) is not None
        present = [state[place] for place in world.slot_state]
        return world.scenario.end is not End.DRAIN or not (COMMITTED in present or UNDECIDED in present)

    def _clear_doorbell(self, state: State) -> None:
        if not any(state[other.armed] for other in self.others):
            self._store(state, self.world.doorbell, 0)

    def _write(self, state: State) -> None:
        world = self.world
        slot = state[self.slot]
        self._store(state, world.content[slot], state[world.slot_payload[slot]])
        state[self.step] = COMMIT

    def _commit(self, state: State) -> None:
        world = self.world
        slot = state[self.slot]
        self._store(state, world.generation[slot], state[world.slot_payload[slot]])
        self._committed(state, slot)

    def _committed(self, state: State, slot: int) -> None:
        state[self.world.slot_state[slot]] = COMMITTED
        state[self.slot] = 0
        state[self.put] += 1
        self._notify_of_commit(state)
        if self.policy is Policy.NEWEST and self._due(state):
            state[self.purpose] = PUBLISHING
            state[self.step] = RETIRE
        else:
            state[self.step] = CLAIM

    def _notify_of_commit(self, state: State) -> None:
        """Where payloads may be dropped, a claim of another thread may wait for this one to be committed."""
        if self.policy is Policy.OVERWRITE:
            self._notify(state)

    # --- observe --------------------------------------------------------------------------------------------------

    def _observe_now(self, state: State) -> None:
        """Read the first word of the board, if there is one to read, in the present step."""
        if self._find_pair(state, 0):
            state[self.step] = OBSERVE
            self._observe(state)
        else:
            self._observed(state)

    def _observe_next(self, state: State) -> None:
        """Read the board from the next step on; the present one has had an access."""
        if self._find_pair(state, 0):
            state[self.step] = OBSERVE
        else:
            self._observed(state)

    def _find_pair(self, state: State, first: int) -> bool:
        """Find the next word of the board whose value is not known."""
        world = self.world
        if not world.uses_board:
            return False
        for cursor in range(first, len(self.pairs)):
            slot, reader = self.pairs[cursor]
            present = state[world.slot_state[slot]]
            if state[self.purpose] == DECIDING:
                relevant = slot == state[self.slot]
            else:
                relevant = present in (COMMITTED, UNDECIDED, CLOSING)
            if relevant and not state[world.latched[slot]] >> reader & 1:
                state[self.cursor] = cursor
                return True
        state[self.cursor] = 0
        return False

    def _observe(self, state: State) -> None:
        world = self.world
        slot, reader = self.pairs[state[self.cursor]]
        value = self._load(state, world.board[slot][reader])
        if self._means_consumed(value, state[world.slot_payload[slot]]):
            state[world.latched[slot]] |= 1 << reader
        if not self._find_pair(state, state[self.cursor] + 1):
            self._observed(state)

    def _means_consumed(self, value: int, own: int) -> bool:
        """What a word of the board means for the payload whose generation is `own`."""
        return value == own

    def _observed(self, state: State) -> None:
        purpose = state[self.purpose]
        if purpose == DECIDING:
            state[self.step] = DROP
        elif purpose == CLOSING_RING:
            self._count_lost(state)
        elif self._is_satisfied(state):
            state[self.step] = CLAIM
        elif self._due(state):
            state[self.purpose] = RETIRING_SLOTS
            state[self.step] = RETIRE
        elif state[self.world.unfenced]:
            state[self.purpose] = RETIRING_SLOTS
            state[self.mine] = state[self.world.unfenced]
            state[self.world.unfenced] = 0
            self._cleared_all(state)
        elif self._has_retired(state):
            state[self.purpose] = RETIRING_SLOTS
            state[self.step] = LIST
        else:
            self._nothing_due(state)

    def _has_retired(self, state: State) -> bool:
        return any(state[place] == RETIRED for place in self.world.slot_state)

    # --- retire ---------------------------------------------------------------------------------------------------

    def _due(self, state: State) -> list[int]:
        """Slots to retire: consumed by all; in a newest ring, older than another one."""
        world = self.world
        committed = [slot for slot in self.slots if state[world.slot_state[slot]] == COMMITTED]
        if self.policy is Policy.NEWEST:
            newest = max((state[world.slot_payload[slot]] for slot in committed), default=0)
            return [slot for slot in committed if state[world.slot_payload[slot]] < newest]
        return [slot for slot in committed if state[world.latched[slot]] == world.all_readers]

    def _retire(self, state: State) -> None:
        slot = self._due(state)[0]
        self._clear_generation(state, slot)
        if self._due(state):
            self.world.reached.add("slots retired together")
        else:
            self._cleared_all(state)

    def _clear_generation(self, state: State, slot: int) -> None:
        self._store(state, self.world.generation[slot], 0)
        self._cleared(state, slot)

    def _cleared(self, state: State, slot: int) -> None:
        world = self.world
        state[world.slot_state[slot]] = CLEARED
        state[self.mine] |= 1 << slot
        if self.policy is Policy.NEWEST:
            self.properties.counted(state, state[world.slot_payload[slot]] - 1, 0, REPLACED)

    def _cleared_all(self, state: State) -> None:
        self._barrier_then(state, LIST_AFTER_BARRIER)

    def _list(self, state: State) -> None:
        world = self.world
        for slot in self.slots:
            if state[self.mine] >> slot & 1:
                state[world.slot_state[slot]] = RETIRED
        state[self.mine] = 0
        state[self.named] = 0
        state[self.listed] = self._attachments(state)
        if world.tracing:
            world.note(f"reads the list of attachments: {[p for p in range(8) if state[self.listed] >> p & 1]}")
        state[self.step] = SCAN
        if not self._find_place(state, 0):
            self._scanned(state)

    def _attachments(self, state: State) -> int:
        """The list of attachments, without those that have ended."""
        return state[self.world.attached] & ~state[self.world.noticed]

    def _find_place(self, state: State, first: int) -> bool:
        """Find the next lease word of the attachments that were listed."""
        for cursor in range(first, len(self.places)):
            if state[self.listed] >> self.places[cursor][0] & 1:
                state[self.cursor] = cursor
                return True
        state[self.cursor] = 0
        state[self.listed] = 0
        return False

    def _scan(self, state: State) -> None:
        named = self._load(state, self.places[state[self.cursor]][1])
        if named:
            state[self.named] |= 1 << named - 1
        if not self._find_place(state, state[self.cursor] + 1):
            self._scanned(state)

    def _scanned(self, state: State) -> None:
        purpose = state[self.purpose]
        if purpose == CHOOSING:
            self._choose(state)
        elif purpose == DECIDING:
            self._decide(state)
        elif purpose == CLOSING_RING:
            self._observe_next(state)
        else:
            self._free_unnamed(state)

    def _free_unnamed(self, state: State) -> None:
        world = self.world
        for slot in self.slots:
            if state[world.slot_state[slot]] == RETIRED:
                if self._is_leased(state, slot):
                    world.reached.add("retired slot is named")
                else:
                    self._free(state, slot)
        publishing = state[self.purpose] == PUBLISHING
        state[self.purpose] = NOTHING
        if publishing or self._is_satisfied(state):
            state[self.named] = 0
            state[self.step] = CLAIM
        else:
            self._nothing_freed(state)

    def _is_leased(self, state: State, slot: int) -> bool:
        return bool(state[self.named] >> slot & 1 or state[self.world.server_leases[slot]])

    def _free(self, state: State, slot: int) -> None:
        world = self.world
        self.properties.freed(state, state[world.slot_payload[slot]] - 1)
        state[world.slot_state[slot]] = FREE
        state[world.slot_payload[slot]] = 0
        state[world.latched[slot]] = 0
        self._notify(state)
        if world.tracing:
            world.note(f"slot {slot} is free")

    def _notify(self, state: State) -> None:
        for other in self.others:
            if state[other.armed]:
                state[other.signal] = 1

    # --- drop -----------------------------------------------------------------------------------------------------

    def _nothing_due(self, state: State) -> None:
        if self._may_drop(state):
            state[self.purpose] = CHOOSING
            state[self.step] = LIST
        else:
            self._wait(state)

    def _nothing_freed(self, state: State) -> None:
        if self._may_drop(state):
            state[self.purpose] = CHOOSING
            self._choose(state)
        else:
            self._wait(state)

    def _may_drop(self, state: State) -> bool:
        return self.policy is Policy.OVERWRITE and state[self.put] < self.puts

    def _choose(self, state: State) -> None:
        """Choose the oldest payload that no consumer has leased."""
        world = self.world
        victims = [
            slot
            for slot in self.slots
            if state[world.slot_state[slot]] == COMMITTED
            and not state[self.excluded] >> slot & 1
            and not self._is_leased(state, slot)
        ]
        state[self.named] = 0
        if victims:
            state[self.slot] = min(victims, key=lambda slot: state[world.slot_payload[slot]])
            state[self.purpose] = DECIDING
            state[self.step] = MARK
        else:
            state[self.purpose] = NOTHING
            self._wait(state)

    def _mark(self, state: State) -> None:
        world = self.world
        slot = state[self.slot]
        self._store(state, world.generation[slot], self._mark_of(state[world.slot_payload[slot]]))
        state[world.slot_state[slot]] = UNDECIDED
        self._barrier_then(state, LIST_AFTER_BARRIER)

    def _mark_of(self, own: int) -> int:
        """The generation while a drop is undecided."""
        return own | RETIRING

    def _decide(self, state: State) -> None:
        slot = state[self.slot]
        if self._is_leased(state, slot):
            if state[self.world.server_leases[slot]]:
                self.world.reached.add("lease over the socket during a drop")
            state[self.step] = GIVE_BACK
        else:
            state[self.named] = 0
            self._observe_next(state)

    def _give_back(self, state: State) -> None:
        self.world.reached.add("drop given back")
        state[self.excluded] |= 1 << state[self.slot]
        self._take_back(state)
        state[self.purpose] = CHOOSING
        self._choose(state)

    def _take_back(self, state: State) -> None:
        """The payload is READY as before."""
        world = self.world
        slot = state[self.slot]
        own = state[world.slot_payload[slot]]
        self._store(state, world.generation[slot], own)
        state[world.slot_state[slot]] = COMMITTED
        state[self.slot] = 0
        self.properties.given_back(state, own - 1)

    def _drop(self, state: State) -> None:
        world = self.world
        slot = state[self.slot]
        latched = state[world.latched[slot]]
        if latched == world.all_readers:
            world.reached.add("consumed during a drop")
        else:
            world.reached.add("dropped")
            self.properties.counted(state, state[world.slot_payload[slot]] - 1, latched, DROPPED)
        self._store(state, world.generation[slot], 0)
        self._free(state, slot)
        state[self.slot] = 0
        state[self.excluded] = 0
        state[self.purpose] = NOTHING
        state[self.step] = CLAIM

    # --- wait -----------------------------------------------------------------------------------------------------

    def _wait(self, state: State) -> None:
        state[self.named] = 0
        state[self.step] = SLEEP if state[self.armed] else ARM
        if state[self.armed] and self.world.tracing:
            self.world.note("waits for the eventfd")

    def _arm(self, state: State) -> None:
        self._store(state, self.world.doorbell, 1)
        state[self.armed] = 1
        state[self.excluded] = 0
        self._barrier_then(state, OBSERVE_AFTER_BARRIER)

    def _wake(self, state: State) -> None:
        """The eventfd is reset first, then words are read. The thread that waits for it notifies the others."""
        world = self.world
        world.reached.add("owner woken")
        if state[world.eventfd]:
            state[world.eventfd] = 0
            self._notify(state)
        state[self.signal] = 0
        state[self.excluded] = 0
        if world.tracing:
            world.note("wakes up")
        self._observe_next(state)

    # --- barrier --------------------------------------------------------------------------------------------------

    def _barrier_then(self, state: State, step: int) -> None:
        state[self.after] = step
        state[self.step] = BARRIER

    def _begin_barrier(self, state: State) -> None:
        """The barrier empties the buffer of this processor, then reaches those of registered processes."""
        world = self.world
        world.drain(state, self.processor)
        awaited = 0
        for consumer in self.consumers:
            if state[world.registered] >> consumer.process & 1:
                awaited |= 1 << consumer.number
        state[self.awaited] = awaited
        state[self.step] = BARRIER_RUNS if awaited else state[self.after]
        if not awaited:
            state[self.after] = 0
        if world.tracing:
            world.note("membarrier begins")

    def barrier_can_reach(self, state: bytes, consumer: Consumer) -> bool:
        """The barrier has not reached a consumer's processor."""
        return bool(state[self.awaited] >> consumer.number & 1)

    def barrier_reaches(self, state: State, consumer: Consumer) -> None:
        """The barrier empties the buffer of a consumer's processor."""
        world = self.world
        world.drain(state, consumer.processor)
        if world.tracing:
            world.note(f"membarrier reaches the processor of {consumer.name}")
        state[self.awaited] &= ~(1 << consumer.number)
        if not state[self.awaited]:
            state[self.step] = state[self.after]
            state[self.after] = 0

    def barrier_can_fail(self, state: bytes) -> bool:
        """A barrier begins, and none has failed yet."""
        return state[self.step] == BARRIER and not state[self.world.barrier_failed]

    def barrier_fails(self, state: State) -> None:
        """The system call reports an error and has reached no processor."""
        world = self.world
        state[world.barrier_failed] = 1
        world.reached.add("barrier failed")
        if world.tracing:
            world.note("membarrier fails")
        self._continue_after_failure(state)

    def _continue_after_failure(self, state: State) -> None:
        state[self.step] = BARRIER_FAILED

    def _barrier_failed(self, state: State) -> None:
        """Nothing is freed, and the claim ends with an error; cleared slots wait for the next barrier.

        Other threads are notified, since they may get a slot that this one could not.
        """
        purpose, after = state[self.purpose], state[self.after]
        state[self.purpose] = NOTHING
        state[self.after] = 0
        state[self.excluded] = 0
        state[self.world.unfenced] |= state[self.mine]
        state[self.mine] = 0
        if purpose == DECIDING:
            self._take_back(state)
        elif after == OBSERVE_AFTER_BARRIER:
            state[self.armed] = 0
            self._clear_doorbell(state)
        if purpose != PUBLISHING:
            state[self.put] += 1
        self._notify(state)
        state[self.step] = CLAIM

    # --- close ----------------------------------------------------------------------------------------------------

    def _close_mark(self, state: State) -> None:
        """RETIRING in every generation; from the first on the server refuses."""
        world = self.world
        state[world.ring_closed] = 1
        committed = [slot for slot in self.slots if state[world.slot_state[slot]] == COMMITTED]
        if committed:
            slot = committed[0]
            self._store(state, world.generation[slot], state[world.slot_payload[slot]] | RETIRING)
            state[world.slot_state[slot]] = CLOSING
        if len(committed) <= 1:
            state[self.purpose] = CLOSING_RING
            self._marked_for_close(state)

    def _marked_for_close(self, state: State) -> None:
        self._barrier_then(state, LIST_AFTER_BARRIER)

    def _count_lost(self, state: State) -> None:
        """Count the payloads that end with the ring. The generations keep RETIRING: who asks is refused, not STALE."""
        world = self.world
        for slot in self.slots:
            if state[world.slot_state[slot]] == CLOSING:
                latched = state[world.latched[slot]]
                if self._is_leased(state, slot):
                    world.reached.add("closed under a lease")
                elif latched != world.all_readers:
                    world.reached.add("lost by close")
                    self.properties.counted(state, state[world.slot_payload[slot]] - 1, latched, LOST)
                state[world.slot_state[slot]] = CLOSED
        state[self.purpose] = NOTHING
        state[self.named] = 0
        state[self.step] = DONE

    # --- helpers --------------------------------------------------------------------------------------------------

    def _load(self, state: State, address: int) -> int:
        return self.world.load(state, self.processor, address)

    def _store(self, state: State, address: int, value: int) -> None:
        self.world.store(state, self.processor, address, value)
