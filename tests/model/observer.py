"""An observation: how a thread of the owner learns what consumers hold and have consumed, and frees slots.

It begins under the ring's lock: reset the eventfd, read the board and the lease words, choose a payload to drop.
The barrier follows without the lock. The end is under the lock again: read the lease words, and free what they do
not name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from model.machine import RETIRING, State
from model.owner_thread import (
    CLAIM,
    DROP,
    END_OBSERVATION,
    GIVE_BACK,
    MARK,
    OBSERVE,
    OBSERVED,
    RETIRE,
    SCAN,
    SLEEP,
    VICTIM_BOARD,
    VICTIM_RETIRE,
    OwnerThread,
)
from model.scenarios import Policy
from model.world import (
    COMMITTED,
    DROPPED,
    DUE,
    FREE,
    REPLACED,
    RETIRED,
    UNDECIDED,
    World,
)

if TYPE_CHECKING:
    from model.properties import Properties

# What a thread is doing.
BEGINNING, ENDING, DROPPING, COMMITTING = range(4)


class Observer(OwnerThread):
    """A thread of the owner that observes consumers. This class is the server's thread, which puts no payloads."""

    def __init__(self, world: World, properties: Properties, number: int) -> None:
        super().__init__(world, properties, number)
        name = self.name
        self.policy = world.scenario.policy
        self.phase = world.variable(f"phase of {name}")
        self.slot = world.variable(f"slot that {name} writes or drops")
        self.victim = world.variable(f"payload that {name} drops")
        self.cursor = world.variable(f"word that {name} reads next")
        self.page = world.variable(f"what {name} has found in a page")
        self.named = world.variable(f"slots that {name} found named")
        self.due_of = [world.variable(f"payload that {name} frees in slot {slot}") for slot in self.slots]
        self.pairs = [(slot, reader) for slot in self.slots for reader in range(world.scenario.readers)]
        self.places = self._places()
        self.steps = [
            self._begin_observation,
            self._observe,
            self._retire,
            self._scan,
            self._mark,
            self._begin_barrier,
            self._end_observation,
            self._observe_victim,
            self._retire_victim,
            self._drop,
            self._give_back,
            self._observation_ended,
            self._wake,
        ]

    def _places(self) -> list[tuple[int, int, int]]:
        """The words of all pages in the order in which they are read: process, place, 1 for an end word."""
        world = self.world
        places = []
        for process, words in enumerate(world.words):
            if process in world.end_word:
                places.append((process, world.end_word[process], 1))
            places += [(process, word, 0) for word in words]
        return places

    # --- questions ---------------------------------------------------------------------------------------------

    def is_woken(self, state: bytes) -> bool:
        """What this thread waits for has happened: the server's thread waits for the eventfd and the pidfds."""
        world = self.world
        if state[world.suspended] or state[world.ring_closed]:
            return False
        return bool(state[world.eventfd] or self._ended(state))

    # --- the beginning of an observation -------------------------------------------------------------------------

    def _wake(self, state: State) -> None:
        self.world.reached.add(f"{self.kind} woken")
        if not state[self.signal]:
            state[self.observes_again] = 0
        self._begin_observation(state)

    def _begin_observation(self, state: State) -> None:
        """Reset the eventfd, take attachments of ended processes off the list, then read the board."""
        world = self.world
        self._reset_eventfd(state)
        state[self.signal] = 0
        if self._ended(state):
            state[world.attached] &= ~self._ended(state)
            self._lost_attachments(state)
        state[self.phase] = BEGINNING
        if world.tracing:
            world.note("begins an observation")
        if self._find_pair(state, 0):
            state[self.step] = OBSERVE
            self._observe(state)
        else:
            self._observed(state)

    def _reset_eventfd(self, state: State) -> None:
        state[self.world.eventfd] = 0

    def _ended(self, state: bytes | State) -> int:
        """The attachments whose process has ended: its threads do not run, and all their stores are visible."""
        world = self.world
        ended = state[world.attached] & state[world.dead]
        if ended:
            for consumer in self.consumers:
                if world.can_drain(state, consumer.processor):
                    ended &= ~(1 << consumer.process)
        return ended

    def _find_pair(self, state: State, first: int) -> bool:
        """Find the next word of the board whose value is not known."""
        world = self.world
        if not world.uses_board:
            return False
        for cursor in range(first, len(self.pairs)):
            slot, reader = self.pairs[cursor]
            present = state[world.slot_state[slot]] in (COMMITTED, UNDECIDED)
            if present and not state[world.latched[slot]] >> reader & 1:
                state[self.cursor] = cursor
                return True
        state[self.cursor] = 0
        return False

    def _observe(self, state: State) -> None:
        slot, reader = self.pairs[state[self.cursor]]
        self._learn(state, slot, reader)
        if not self._find_pair(state, state[self.cursor] + 1):
            self._observed(state)

    def _learn(self, state: State, slot: int, reader: int) -> None:
        world = self.world
        value = world.load(state, self.processor, world.board[slot][reader])
        if self._means_consumed(value, state[world.slot_payload[slot]]):
            state[world.latched[slot]] |= 1 << reader

    def _means_consumed(self, value: int, own: int) -> bool:
        """What a word of the board means for the payload whose generation is `own`."""
        return value == own

    def _observed(self, state: State) -> None:
        if self._to_retire(state):
            state[self.step] = RETIRE
        elif state[self.phase] == COMMITTING:
            state[self.phase] = BEGINNING
            state[self.step] = CLAIM
        else:
            self._begin_scan(state)

    # --- retire ------------------------------------------------------------------------------------------------

    def _to_retire(self, state: State) -> list[int]:
        """Slots to retire: consumed by all; in a newest ring, older than another one."""
        world = self.world
        present = [slot for slot in self.slots if state[world.slot_state[slot]] in (COMMITTED, UNDECIDED)]
        if self.policy is Policy.NEWEST:
            newest = max((state[world.slot_payload[slot]] for slot in present), default=0)
            return [slot for slot in present if state[world.slot_payload[slot]] < newest]
        return [slot for slot in present if state[world.latched[slot]] == world.all_readers]

    def _retire(self, state: State) -> None:
        slot = self._to_retire(state)[0]
        self._clear_generation(state, slot)
        self._retired(state, slot)
        if self._to_retire(state):
            self.world.reached.add("slots retired together")
        self._observed(state)

    def _clear_generation(self, state: State, slot: int) -> None:
        self.world.store(state, self.processor, self.world.generation[slot], 0)

    def _retired(self, state: State, slot: int) -> None:
        world = self.world
        if world.tracing:
            world.note(f"retires payload {state[world.slot_payload[slot]] - 1}")
        state[world.slot_state[slot]] = self._state_after_retiring(state, slot)
        if self.policy is Policy.NEWEST:
            self.properties.counted(state, state[world.slot_payload[slot]] - 1, 0, REPLACED)
        self.notify_of_retirement(state)

    def _state_after_retiring(self, state: State, slot: int) -> int:
        return RETIRED if state[self.world.server_leases[slot]] else DUE

    # --- lease words -------------------------------------------------------------------------------------------

    def _begin_scan(self, state: State) -> None:
        """Read the lease words from the next step on; the list cannot change meanwhile."""
        state[self.named] = 0
        state[self.step] = SCAN
        if not self._find_place(state, 0):
            self._scanned(state)

    def _attachments(self, state: State) -> int:
        return state[self.world.attached]

    def _find_place(self, state: State, first: int) -> bool:
        for cursor in range(first, len(self.places)):
            if self._attachments(state) >> self.places[cursor][0] & 1:
                state[self.cursor] = cursor
                return True
        state[self.cursor] = 0
        return False

    def _scan(self, state: State) -> None:
        cursor = state[self.cursor]
        process, place, is_end = self.places[cursor]
        value = self.world.load(state, self.processor, place)
        if is_end:
            state[self.page] |= value
        elif value:
            state[self.page] |= 2
            state[self.named] |= 1 << value - 1
        if cursor + 1 == len(self.places) or self.places[cursor + 1][0] != process:
            if self._means_ended(state[self.page]):
                self._end_attachment(state, process)
            state[self.page] = 0
        if not self._find_place(state, cursor + 1):
            self._scanned(state)

    def _means_ended(self, page: int) -> bool:
        """The end word is set (1), and no lease word was found (2)."""
        return page == 1

    def _end_attachment(self, state: State, process: int) -> None:
        state[self.world.attached] &= ~(1 << process)
        self.world.reached.add("attachment ended by its consumer")
        self._lost_attachments(state)
        if self.world.tracing:
            self.world.note(f"takes the attachment of process {process} off the list")

    def _lost_attachments(self, state: State) -> None:
        """Without attachments slots are freed, and payloads dropped, without a barrier."""
        if not state[self.world.attached]:
            self.notify(state)
            self.notified(state)

    def _scanned(self, state: State) -> None:
        if state[self.phase] == ENDING:
            self._free_due(state)
        else:
            self._choose(state)

    def _note_words(self, state: State) -> None:
        """A slot that no word names any more is READY: where payloads are dropped, claims observe again."""
        world = self.world
        before, state[world.worded] = state[world.worded], state[self.named]
        for slot in self.slots:
            present = state[world.slot_state[slot]] in (COMMITTED, UNDECIDED)
            if present and before >> slot & 1 and not self._is_leased(state, slot):
                self._became_ready(state)

    def _became_ready(self, state: State) -> None:
        if self.policy is Policy.OVERWRITE:
            self.notify(state)
            self.notified(state)

    def _is_leased(self, state: State, slot: int) -> bool:
        return bool(state[self.named] >> slot & 1 or state[self.world.server_leases[slot]])

    # --- the choice of a payload to drop, and the barrier ------------------------------------------------------

    def _choose(self, state: State) -> None:
        """Choose the oldest payload that has no lease, if payloads are dropped and no slot is free."""
        world = self.world
        self._note_words(state)
        if not state[world.attached]:
            for slot in self.slots:
                if state[world.slot_state[slot]] == DUE:
                    self._free(state, slot)
            self._leave_observation(state)
            return
        victims = [
            slot
            for slot in self.slots
            if state[world.slot_state[slot]] == COMMITTED and not self._is_leased(state, slot)
        ]
        if self._drops(state) and victims:
            state[self.slot] = min(victims, key=lambda slot: state[world.slot_payload[slot]])
            state[self.step] = MARK
        else:
            self._begin_need(state)

    def _drops(self, state: State) -> bool:
        return False

    def _mark(self, state: State) -> None:
        world = self.world
        slot = state[self.slot]
        state[self.victim] = state[world.slot_payload[slot]]
        world.store(state, self.processor, world.generation[slot], self._mark_of(state[self.victim]))
        state[world.slot_state[slot]] = UNDECIDED
        self._begin_need(state)

    def _mark_of(self, own: int) -> int:
        """The generation while a drop is undecided."""
        return own | RETIRING

    def _begin_need(self, state: State) -> None:
        """Remember what only a barrier can free."""
        world = self.world
        state[self.named] = 0
        for slot in self.slots:
            if state[world.slot_state[slot]] == DUE:
                state[self.due_of[slot]] = state[world.slot_payload[slot]]
        if state[self.victim] or any(state[each] for each in self.due_of):
            self._barrier_then(state, END_OBSERVATION)
        else:
            self._leave_observation(state)

    # --- the end of an observation -------------------------------------------------------------------------------

    def _end_observation(self, state: State) -> None:
        if state[self.world.ring_closed]:
            for place in self.due_of:
                state[place] = 0
            self._leave_observation(state)
            return
        state[self.phase] = ENDING
        self._begin_scan(state)
        if state[self.step] == SCAN:
            self._scan(state)

    def _free_due(self, state: State) -> None:
        """Free the slots of the observation that are due with the same payload and that no lease word names."""
        world = self.world
        for slot in self.slots:
            if state[self.passed] and self._is_same(state, slot):
                if state[self.named] >> slot & 1:
                    world.reached.add("retired slot is named")
                else:
                    self._free(state, slot)
            state[self.due_of[slot]] = 0
        self._decide(state)

    def _is_same(self, state: State, slot: int) -> bool:
        """The slot is due, with the payload that it had when the observation began."""
        world = self.world
        return state[world.slot_state[slot]] == DUE and state[self.due_of[slot]] == state[world.slot_payload[slot]]

    def _free(self, state: State, slot: int) -> None:
        world = self.world
        self.properties.freed(state, state[world.slot_payload[slot]] - 1)
        state[world.slot_state[slot]] = FREE
        state[world.slot_payload[slot]] = 0
        state[world.latched[slot]] = 0
        state[world.worded] &= ~(1 << slot)
        if world.tracing:
            world.note(f"slot {slot} is free")

    def _decide(self, state: State) -> None:
        """After the lease words, read the board: then it is known whether the payload is dropped."""
        world = self.world
        slot = state[self.slot]
        if not state[self.victim]:
            self._finish(state)
        elif state[world.slot_payload[slot]] != state[self.victim] or state[world.slot_state[slot]] != UNDECIDED:
            self._forget_victim(state)
            self._finish(state)
        else:
            self._read_board_of_victim(state)

    def _read_board_of_victim(self, state: State) -> None:
        if self._find_reader(state, 0):
            state[self.step] = VICTIM_BOARD
        else:
            self._victim_observed(state)

    def _find_reader(self, state: State, first: int) -> bool:
        for reader in range(first, self.world.scenario.readers):
            if not state[self.world.latched[state[self.slot]]] >> reader & 1:
                state[self.cursor] = reader
                return True
        state[self.cursor] = 0
        return False

    def _observe_victim(self, state: State) -> None:
        reader = state[self.cursor]
        self._learn(state, state[self.slot], reader)
        if not self._find_reader(state, reader + 1):
            self._victim_observed(state)

    def _victim_observed(self, state: State) -> None:
        world = self.world
        slot = state[self.slot]
        if state[world.latched[slot]] == world.all_readers:
            world.reached.add("consumed during a drop")
            state[self.step] = VICTIM_RETIRE
        elif self._may_drop(state, slot):
            state[self.step] = DROP
        else:
            if state[world.server_leases[slot]]:
                world.reached.add("lease over the socket during a drop")
            state[self.step] = GIVE_BACK

    def _may_drop(self, state: State, slot: int) -> bool:
        """A barrier has passed, a slot is still needed, and the payload is READY."""
        world = self.world
        if state[self.phase] == DROPPING:
            return True
        return bool(
            state[self.passed]
            and world.free_slot(state) is None
            and not self._is_leased(state, slot)
            and not state[world.worded] >> slot & 1
        )

    def _retire_victim(self, state: State) -> None:
        slot = state[self.slot]
        self._clear_generation(state, slot)
        self._retired(state, slot)
        if state[self.phase] == DROPPING:
            self._free(state, slot)
        self._forget_victim(state)
        self._finish(state)

    def _drop(self, state: State) -> None:
        world = self.world
        slot = state[self.slot]
        world.reached.add("dropped")
        self.properties.counted(state, state[world.slot_payload[slot]] - 1, state[world.latched[slot]], DROPPED)
        world.store(state, self.processor, world.generation[slot], 0)
        self._free(state, slot)
        self._forget_victim(state)
        self._finish(state)

    def _give_back(self, state: State) -> None:
        """The payload is READY as before."""
        world = self.world
        world.reached.add("drop given back")
        if state[self.passed]:
            self.notified(state)  # another payload may have no lease
        slot = state[self.slot]
        world.store(state, self.processor, world.generation[slot], self._generation_of(state, state[self.victim]))
        state[world.slot_state[slot]] = COMMITTED
        self.properties.given_back(state, state[self.victim] - 1)
        self._forget_victim(state)
        self._finish(state)

    def _generation_of(self, state: State, own: int) -> int:
        """The generation of a committed payload."""
        return own | RETIRING if state[self.world.suspended] else own

    def _forget_victim(self, state: State) -> None:
        state[self.victim] = 0
        state[self.slot] = 0

    def _finish(self, state: State) -> None:
        if state[self.phase] == ENDING:
            self._note_words(state)
            if self.world.free_slot(state) is not None:
                self.notify(state)
        self._leave_observation(state)

    def _leave_observation(self, state: State) -> None:
        state[self.named] = 0
        state[self.phase] = BEGINNING
        self._clear_passed(state)
        state[self.step] = OBSERVED

    def _clear_passed(self, state: State) -> None:
        state[self.passed] = 0

    def _observation_ended(self, state: State) -> None:
        """The server's thread waits again."""
        state[self.step] = SLEEP

    # --- the server's thread ------------------------------------------------------------------------------------

    def notified(self, state: State) -> None:
        """The server's thread waits for the eventfd, not for slots."""
