"""What must hold in every state, and in every state in which nothing more happens."""

from __future__ import annotations

from enum import Enum
from functools import partial
from typing import TYPE_CHECKING

from model.machine import RETIRING, State
from model.scenarios import Policy
from model.world import (
    CLOSED,
    COMMITTED,
    DIRECT,
    DROPPED,
    DUE,
    FREE,
    KEPT,
    OVER_SOCKET,
    REPLACED,
    RETIRED,
    UNDECIDED,
    Lease,
    World,
    consumer_name,
)

if TYPE_CHECKING:
    from model.consumer import Consumer
    from model.owner_thread import OwnerThread


class Property(Enum):
    """The properties, as the violations name them."""

    OTHER_BYTES = "a lease reads the bytes of another payload"
    SLOT_CHANGED = "a slot changes under a lease"
    STALE = "STALE is reported for a payload that is neither consumed nor dropped"
    CONSUMED_TWICE = "a payload is handed out to a reader id that has consumed it"
    UNDONE = "a consumption is undone"
    MISCOUNTED = "a payload that was consumed counts as dropped"
    LOST = "a payload is gone that was neither consumed by every reader id nor dropped"
    UNSERVED = "a direct lease begins although no server is there"
    FOREIGN_END = "the end of a lease clears the word of another lease"
    LOST_WAKE_UP = "the owner waits although it could get a slot"
    WORD_STAYS = "a lease word stays although its lease has ended"
    HANG = "a thread waits for something that does not happen"


class ViolationError(Exception):
    """A property does not hold.

    Attributes:
        violated: the property.
        detail: for which slot, payload and reader id.
    """

    def __init__(self, violated: Enum, detail: str) -> None:
        super().__init__(f"{violated.value}: {detail}")
        self.violated = violated


class Properties:
    """Checks of one world. Those of shared words run when a store becomes visible."""

    def __init__(self, world: World) -> None:
        self.world = world
        for slot, address in enumerate(world.generation):
            world.on_arrival(address, self._generation_arrives)
            world.on_arrival(world.content[slot], partial(self._content_arrives, slot))
            for reader, word in enumerate(world.board[slot]):
                world.on_arrival(word, partial(self._board_arrives, slot, reader))
        for payload, address in enumerate(world.stale):
            world.on_arrival(address, partial(self._stale_arrives, payload))

    # --- stores that become visible ----------------------------------------------------------------------------

    def _generation_arrives(self, state: State, address: int, value: int) -> None:
        state[address] = value
        if value:
            state[self.world.published] |= 1 << (value & ~RETIRING) - 1

    def _content_arrives(self, slot: int, state: State, address: int, value: int) -> None:
        world = self.world
        state[address] = value
        for lease in world.leases:
            held = state[lease.state] in (DIRECT, OVER_SOCKET)
            if held and state[world.slot_of[lease.payload]] == slot and lease.payload + 1 != value:
                name = consumer_name(lease.thread)
                raise ViolationError(
                    Property.SLOT_CHANGED, f"slot {slot} is written while {name} leases payload {lease.payload}"
                )

    def _board_arrives(self, slot: int, reader: int, state: State, address: int, value: int) -> None:
        world = self.world
        state[address] = value
        payload = value - 1
        state[world.consumed[payload]] |= 1 << reader
        if state[world.fate[payload]] != KEPT:
            raise ViolationError(
                Property.MISCOUNTED, f"payload {payload} is consumed by reader id {reader} after it was counted"
            )
        present = state[world.slot_payload[slot]]
        overwritten = present and present != value and state[world.consumed[present - 1]] >> reader & 1
        if overwritten and not state[world.latched[slot]] >> reader & 1:
            raise ViolationError(
                Property.UNDONE, f"the word of payload {present - 1} and reader id {reader} is overwritten"
            )

    def _stale_arrives(self, payload: int, state: State, address: int, value: int) -> None:
        state[address] |= value
        self._check_stale(state, payload)

    def _check_stale(self, state: State, payload: int) -> None:
        """A reader id that received STALE has consumed the payload, or it was dropped or replaced.

        While a drop is undecided the check waits for the decision.
        """
        world = self.world
        readers = state[world.stale[payload]] & ~state[world.consumed[payload]]
        undecided = state[world.slot_state[state[world.slot_of[payload]]]] == UNDECIDED
        if readers and not undecided and state[world.fate[payload]] not in (DROPPED, REPLACED):
            raise ViolationError(Property.STALE, f"payload {payload}, reader ids {self._names(readers)}")

    # --- steps of consumers ------------------------------------------------------------------------------------

    def generation_accepted(self, state: State, payload: int) -> None:
        """A direct lease finds the generation of its payload."""
        if state[self.world.suspended]:
            raise ViolationError(Property.UNSERVED, f"payload {payload}")

    def handed_out(self, state: State, payload: int, reader: int) -> None:
        """A lease begins."""
        world = self.world
        if state[world.consumed[payload]] >> reader & 1:
            raise ViolationError(Property.CONSUMED_TWICE, f"payload {payload}, reader id {reader}")

    def bytes_read(self, payload: int, value: int) -> None:
        """A lease has read the content of its slot."""
        if value != payload + 1:
            found = f"payload {value - 1}" if value else "nothing"
            raise ViolationError(Property.OTHER_BYTES, f"{found} instead of payload {payload}")

    def word_cleared(self, state: State, ended: Lease) -> None:
        """The lease `ended` stores 0 in its word."""
        threads = self.world.scenario.threads
        process, index = threads[ended.thread].process, state[ended.word_index]
        for lease in self.world.leases:
            same_word = threads[lease.thread].process == process and state[lease.word_index] == index
            if lease != ended and same_word and state[lease.state] == DIRECT:
                raise ViolationError(
                    Property.FOREIGN_END,
                    f"word {index} of process {process} names the lease of payload {lease.payload}",
                )

    # --- steps of the owner ------------------------------------------------------------------------------------

    def given_back(self, state: State, payload: int) -> None:
        """An undecided drop ends without a drop."""
        self._check_stale(state, payload)

    def freed(self, state: State, payload: int) -> None:
        """The slot of a retired payload becomes FREE."""
        world = self.world
        if state[world.fate[payload]] == KEPT and state[world.consumed[payload]] != world.all_readers:
            raise ViolationError(Property.LOST, f"payload {payload} was freed")

    def counted(self, state: State, payload: int, latched: int, fate: int) -> None:
        """A payload is counted as dropped or replaced for the reader ids that are not latched."""
        world = self.world
        missed = state[world.consumed[payload]] & ~latched
        if missed:
            raise ViolationError(Property.MISCOUNTED, f"payload {payload}, reader ids {self._names(missed)}")
        state[world.fate[payload]] = fate

    # --- at rest -----------------------------------------------------------------------------------------------

    def at_rest(self, state: State | bytes, observers: list[OwnerThread], consumers: list[Consumer]) -> None:
        """Nothing happens any more unless a process is killed: this is where lost wake-ups show."""
        for consumer in consumers:
            if not consumer.rests(state):
                raise ViolationError(Property.HANG, f"{consumer.name} is in the middle of an operation")
        named = self._named(state)
        for owner in observers:
            if owner.waits(state) and owner.drains(state):
                if not self._has_unconsumed(state):
                    raise ViolationError(Property.LOST_WAKE_UP, "every payload is consumed")
            elif owner.waits(state) and owner.puts:
                for slot in range(self.world.scenario.slots):
                    if self._can_be_freed(state, slot, bool(named >> slot & 1)):
                        raise ViolationError(Property.LOST_WAKE_UP, f"slot {slot} can be freed")
            elif not owner.has_finished(state):
                raise ViolationError(Property.HANG, f"{owner.name} is in the middle of an operation")
        self._check_payloads(state)

    def _named(self, state: State | bytes) -> int:
        """The slots that the words of living processes name: each of these words belongs to a lease."""
        world = self.world
        named = 0
        for process, words in enumerate(world.words):
            if state[world.dead] >> process & 1:
                continue
            for index, word in enumerate(words):
                if state[word]:
                    named |= 1 << state[word] - 1
                    owned = any(
                        state[lease.state] == DIRECT
                        and state[lease.word_index] == index
                        and world.scenario.threads[lease.thread].process == process
                        for lease in world.leases
                    )
                    if not owned:
                        raise ViolationError(Property.WORD_STAYS, f"word {index} of process {process}")
        return named

    def _has_unconsumed(self, state: State | bytes) -> bool:
        world = self.world
        return any(
            state[place] == COMMITTED and state[world.consumed[state[payload] - 1]] != world.all_readers
            for place, payload in zip(world.slot_state, world.slot_payload, strict=True)
        )

    def _can_be_freed(self, state: State | bytes, slot: int, named: bool) -> bool:
        world = self.world
        payload = state[world.slot_payload[slot]] - 1
        slot_state = state[world.slot_state[slot]]
        consumed = payload >= 0 and state[world.consumed[payload]] == world.all_readers
        leased = named or state[world.server_leases[slot]] != 0
        droppable = world.scenario.policy is Policy.OVERWRITE
        return slot_state == FREE or (
            not leased and (slot_state in (DUE, RETIRED) or (slot_state == COMMITTED and (consumed or droppable)))
        )

    def _check_payloads(self, state: State | bytes) -> None:
        """Each payload is consumed by every reader id, counted, or still in its slot with its generation."""
        world = self.world
        for payload in range(world.scenario.payloads):
            slot = state[world.slot_of[payload]]
            generation = state[world.generation[slot]] & ~RETIRING
            committed = state[world.slot_state[slot]] == COMMITTED and generation == payload + 1
            kept = state[world.slot_payload[slot]] == payload + 1 and (
                committed or state[world.slot_state[slot]] == CLOSED
            )
            counted = state[world.fate[payload]] != KEPT
            consumed = state[world.consumed[payload]] == world.all_readers
            if state[world.published] >> payload & 1 and not (kept or counted or consumed):
                raise ViolationError(Property.LOST, f"payload {payload}")

    @staticmethod
    def _names(readers: int) -> str:
        return ", ".join(str(reader) for reader in range(8) if readers >> reader & 1)
