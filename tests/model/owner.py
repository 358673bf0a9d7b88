"""A thread of the owner that puts payloads: claim, write, commit, drop, wait, close."""

from __future__ import annotations

from typing import TYPE_CHECKING

from model.machine import State
from model.observer import COMMITTING, DROPPING, Observer
from model.owner_thread import (
    BARRIER,
    BEGIN_OBSERVATION,
    CLAIM,
    CLOSE_GENERATION,
    CLOSE_WORD,
    COMMIT,
    DONE,
    SLEEP,
    WRITE,
)
from model.scenarios import End, Policy
from model.world import CLOSED, COMMITTED, FREE, UNDECIDED, WRITING, World

if TYPE_CHECKING:
    from model.properties import Properties


class Owner(Observer):
    """A thread of the owner that puts payloads, and observes consumers when it needs a slot."""

    kind = "owner"

    def __init__(self, world: World, properties: Properties, number: int) -> None:
        super().__init__(world, properties, number)
        name = self.name
        self.puts = world.scenario.payloads // world.scenario.putting
        self.put = world.variable(f"payloads that {name} has put")
        world.set_initial(self.step, CLAIM)
        self.steps += [
            self._claim,  # DONE: never done
            self._claim,
            self._write,
            self._commit,
            self._close_word,
            self._close_generation,
        ]

    def _name(self) -> str:
        return f"owner {self.number + 1}" if self.world.scenario.putting > 1 else "owner"

    # --- questions ---------------------------------------------------------------------------------------------

    def is_woken(self, state: bytes) -> bool:
        """This thread was notified. If a barrier has failed, it observes again once all stores are visible."""
        if state[self.observes_again] and not state[self.signal]:
            processors = [self.processor, *(consumer.processor for consumer in self.consumers)]
            return not any(self.world.can_drain(state, processor) for processor in processors)
        return bool(state[self.signal])

    def has_finished(self, state: bytes | State) -> bool:
        """This thread has put all payloads."""
        return state[self.step] == DONE

    def notified(self, state: State) -> None:
        """A slot may be free, or a payload without a lease: not what a thread waits for that has put all."""
        if not self.drains(state) and state[self.step] not in (CLAIM, WRITE, COMMIT, DONE):
            state[self.signal] = 1

    def drains(self, state: bytes | State) -> bool:
        """This thread waits until every payload is consumed."""
        return state[self.put] == self.puts

    def _drops(self, state: State) -> bool:
        return (
            self.policy is Policy.OVERWRITE and state[self.put] < self.puts and self.world.free_slot(state) is None
        )

    def _is_satisfied(self, state: State) -> bool:
        """A slot is free. After the last payload: all payloads are consumed, if the scenario waits for that."""
        world = self.world
        if state[self.put] < self.puts:
            return world.free_slot(state) is not None
        present = [state[place] for place in world.slot_state]
        return world.scenario.end is not End.DRAIN or not (COMMITTED in present or UNDECIDED in present)

    # --- claim -------------------------------------------------------------------------------------------------

    def _claim(self, state: State) -> None:
        if self._is_satisfied(state):
            self._claim_slot(state)
        else:
            self._begin_observation(state)

    def _observation_ended(self, state: State) -> None:
        """Take a slot that is free; else set the doorbell and observe again; then wait."""
        world = self.world
        if self._is_satisfied(state):
            self._claim_slot(state)
        elif self._may_drop_at_once(state):
            self._drop_at_once(state)
        elif not state[self.armed]:
            self._arm(state)
        elif state[self.signal]:
            world.reached.add("another observation before the wait")
            self._begin_observation(state)
        else:
            self._wait(state)

    def _claim_slot(self, state: State) -> None:
        world = self.world
        state[self.signal] = 0
        state[self.observes_again] = 0
        if state[self.armed]:
            state[self.armed] = 0
            self._clear_doorbell(state)
        if state[self.put] == self.puts:
            state[self.step] = CLOSE_WORD if world.scenario.end is End.CLOSE else DONE
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

    def _clear_doorbell(self, state: State) -> None:
        if not any(state[other.armed] for other in self.others):
            self.world.store(state, self.processor, self.world.doorbell, 0)

    def _arm(self, state: State) -> None:
        """Consumers ring from now on; a barrier and another observation follow."""
        self.world.store(state, self.processor, self.world.doorbell, 1)
        state[self.armed] = 1
        self._barrier_then(state, BEGIN_OBSERVATION)

    def _wait(self, state: State) -> None:
        state[self.step] = SLEEP
        if self.world.tracing:
            self.world.note("waits")

    # --- drop --------------------------------------------------------------------------------------------------

    def _may_drop_at_once(self, state: State) -> bool:
        """Without attachments no barrier is needed, whatever another thread has not decided."""
        world = self.world
        return (
            self.policy is Policy.OVERWRITE
            and state[self.put] < self.puts
            and not state[world.attached]
            and bool(self._unleased(state))
        )

    def _unleased(self, state: State) -> list[int]:
        world = self.world
        return [
            slot
            for slot in self.slots
            if state[world.slot_state[slot]] in (COMMITTED, UNDECIDED) and not state[world.server_leases[slot]]
        ]

    def _drop_at_once(self, state: State) -> None:
        world = self.world
        world.reached.add("dropped without attachments")
        state[self.slot] = min(self._unleased(state), key=lambda slot: state[world.slot_payload[slot]])
        state[self.victim] = state[world.slot_payload[state[self.slot]]]
        state[self.phase] = DROPPING
        self._read_board_of_victim(state)

    # --- an exception of a signal handler ----------------------------------------------------------------------

    def can_be_interrupted(self, state: bytes) -> bool:
        """An exception can end this observation before its barrier, so that its end does not run either."""
        return (
            state[self.step] == BARRIER
            and state[self.victim] != 0
            and not state[self.world.interrupted]
            and all(other.has_unlocked(state) for other in self.others)
        )

    def interrupt(self, state: State) -> None:
        """The claim ends with the exception, and the observation is gone. RETIRING stays in the generation."""
        world = self.world
        state[world.interrupted] = 1
        world.reached.add("observation ended by an exception")
        if world.tracing:
            world.note("an exception ends the observation and the claim")
        self._release_victim(state)
        for place in (self.victim, self.slot, self.after, self.signal, *self.due_of):
            state[place] = 0
        if state[self.armed]:
            state[self.armed] = 0
            self._clear_doorbell(state)
        state[self.put] += 1
        state[self.step] = CLAIM

    def _release_victim(self, state: State) -> None:
        world = self.world
        place = world.slot_state[state[self.slot]]
        if state[place] == UNDECIDED and state[world.slot_payload[state[self.slot]]] == state[self.victim]:
            state[place] = COMMITTED

    # --- write, commit, close ----------------------------------------------------------------------------------

    def _write(self, state: State) -> None:
        world = self.world
        slot = state[self.slot]
        world.store(state, self.processor, world.content[slot], state[world.slot_payload[slot]])
        state[self.step] = COMMIT

    def _commit(self, state: State) -> None:
        world = self.world
        slot = state[self.slot]
        own = state[world.slot_payload[slot]]
        world.store(state, self.processor, world.generation[slot], self._generation_of(state, own))
        self._committed(state, slot)

    def _committed(self, state: State, slot: int) -> None:
        state[self.world.slot_state[slot]] = COMMITTED
        state[self.slot] = 0
        state[self.put] += 1
        self._notify_of_commit(state)
        state[self.phase] = COMMITTING
        if self.policy is Policy.NEWEST:
            self._observed(state)
        else:
            state[self.phase] = 0
            state[self.step] = CLAIM

    def _notify_of_commit(self, state: State) -> None:
        """A claim of another thread may drop this payload, or free the one that it replaces."""
        if self.policy is not Policy.WAIT:
            self.notify(state)

    def _close_word(self, state: State) -> None:
        """The closed word first: a consumer that finds no generation must see it."""
        world = self.world
        state[world.ring_closed] = 1
        world.store(state, self.processor, world.closed_word, 1)
        state[self.step] = CLOSE_GENERATION

    def _close_generation(self, state: State) -> None:
        world = self.world
        for slot in self.slots:
            if state[world.slot_state[slot]] not in (FREE, CLOSED):
                if state[world.server_leases[slot]] or any(
                    state[lease.state] and state[world.slot_of[lease.payload]] == slot for lease in world.leases
                ):
                    world.reached.add("closed under a lease")
                world.store(state, self.processor, world.generation[slot], 0)
                state[world.slot_state[slot]] = CLOSED
                return
        state[self.step] = DONE
