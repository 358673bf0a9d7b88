"""Observations with a defect, of every thread of the owner. Each class overrides the steps that it changes."""

from __future__ import annotations

from model.machine import State
from model.observer import ENDING, Observer
from model.owner_thread import END_OBSERVATION
from model.properties import Properties
from model.world import DUE, RETIRED, UNDECIDED, World

# --- retire ----------------------------------------------------------------------------------------------------


class FencesItselfOnly(Observer):
    """Its barrier empties the buffer of its own processor, as a fence does, and reaches no other one."""

    def _begin_barrier(self, state: State) -> None:
        super()._begin_barrier(state)
        if state[self.awaited]:
            state[self.awaited] = 0
            self._barrier_passed(state)


class NoBarrierInRetire(Observer):
    """It reads the lease words right after it has cleared the generations."""

    def _barrier_then(self, state: State, step: int) -> None:
        super()._barrier_then(state, step)
        if step == END_OBSERVATION and not state[self.victim]:
            self._barrier_passed(state)


class NoBarrierInDrop(Observer):
    """It reads the lease words again right after it has set RETIRING."""

    def _barrier_then(self, state: State, step: int) -> None:
        super()._barrier_then(state, step)
        if step == END_OBSERVATION and state[self.victim]:
            self._barrier_passed(state)


class CountsDeadAttachments(Observer):
    """It reads the lease words of processes that were killed."""

    def _ended(self, state: bytes | State) -> int:
        return 0


class ClearsGenerationAfterScan(Observer):
    """It clears a generation when no lease word names the slot, after barrier and scan."""

    def __init__(self, world: World, properties: Properties, number: int) -> None:
        super().__init__(world, properties, number)
        self.late = world.variable(f"slots that {self.name} clears late")

    def _clear_generation(self, state: State, slot: int) -> None:
        """The generation stays."""

    def _free(self, state: State, slot: int) -> None:
        super()._free(state, slot)
        self.world.store(state, self.processor, self.world.generation[slot], 0)


class FreesWithBarrierOfAnother(Observer):
    """It frees every slot that is due, also one that was retired after its barrier began."""

    def _is_same(self, state: State, slot: int) -> bool:
        return state[self.world.slot_state[slot]] == DUE


class KnowsDueSlotsByIndex(Observer):
    """A slot that is due again, with another payload, is freed by a barrier that began before."""

    def _is_same(self, state: State, slot: int) -> bool:
        return super()._is_same(state, slot) or (
            state[self.world.slot_state[slot]] == DUE and state[self.due_of[slot]] != 0
        )


class IgnoresFailedBarrier(Observer):
    """It does not check whether the barrier has failed."""

    def _failed(self, state: State) -> None:
        self._barrier_passed(state)


class KeepsVictimAfterFailure(Observer):
    """After a barrier has failed, the drop stays undecided."""

    def _decide(self, state: State) -> None:
        if state[self.victim] and not state[self.passed]:
            self._forget_victim(state)
            self._finish(state)
        else:
            super()._decide(state)


class IgnoresLeasesOverSocket(Observer):
    """It frees a retired slot that a consumer has leased over the socket."""

    def _state_after_retiring(self, state: State, slot: int) -> int:
        return DUE


class TakesAnyBoardValue(Observer):
    """Any value of a board word counts as consumed."""

    def _means_consumed(self, value: int, own: int) -> bool:
        return value != 0


class NeverScansAgain(Observer):
    """It does not observe again at a retired slot that was named."""

    def _free_due(self, state: State) -> None:
        for slot in self.slots:
            if self._is_same(state, slot) and state[self.named] >> slot & 1:
                state[self.world.slot_state[slot]] = RETIRED
        super()._free_due(state)


# --- attachments that their consumers end ----------------------------------------------------------------------


class ReadsEndWordLast(Observer):
    """It reads the lease words of a page, then the word that ends the attachment."""

    def _places(self) -> list[tuple[int, int, int]]:
        return sorted(super()._places(), key=lambda place: (place[0], place[2]))


class EndsAttachmentUnderLease(Observer):
    """The end word alone ends an attachment, although a lease word is left."""

    def _means_ended(self, page: int) -> bool:
        return page & 1 == 1


# --- drop ------------------------------------------------------------------------------------------------------


class ClearsUndecided(Observer):
    """The generation is 0 while a drop is undecided."""

    def _mark_of(self, own: int) -> int:
        return 0


class DropsWithoutSecondScan(Observer):
    """It does not read the lease words again after the barrier."""

    def _decide(self, state: State) -> None:
        state[self.named] = 0
        super()._decide(state)


class DropsUnderLeaseOverSocket(Observer):
    """It does not see a lease over the socket that began during the barrier."""

    def _may_drop(self, state: State, slot: int) -> bool:
        leases = self.world.server_leases[slot]
        held, state[leases] = state[leases], 0
        result = super()._may_drop(state, slot)
        state[leases] = held
        return result


class DropsWithoutBoard(Observer):
    """It does not read the board again before it counts a payload as dropped."""

    def _read_board_of_victim(self, state: State) -> None:
        self._victim_observed(state)


class DropReadsBoardFirst(Observer):
    """After the barrier of a drop it reads the board, then the lease words."""

    def __init__(self, world: World, properties: Properties, number: int) -> None:
        super().__init__(world, properties, number)
        self.board_known = world.variable(f"{self.name} has read the board of its victim")

    def _end_observation(self, state: State) -> None:
        slot = state[self.slot]
        undecided = state[self.world.slot_state[slot]] == UNDECIDED
        if state[self.victim] and undecided and state[self.world.slot_payload[slot]] == state[self.victim]:
            state[self.phase] = ENDING
            state[self.board_known] = 1
            super()._read_board_of_victim(state)
        else:
            super()._end_observation(state)

    def _victim_observed(self, state: State) -> None:
        if state[self.board_known] == 1:
            state[self.board_known] = 2
            self._begin_scan(state)
        else:
            super()._victim_observed(state)

    def _read_board_of_victim(self, state: State) -> None:
        if state[self.board_known]:
            state[self.board_known] = 0
            super()._victim_observed(state)
        else:
            super()._read_board_of_victim(state)


class GivesBackWithoutRetiring(Observer):
    """A payload that is given back carries no RETIRING although no server is there."""

    def _generation_of(self, state: State, own: int) -> int:
        return own


# --- notifications ---------------------------------------------------------------------------------------------


class ResetsEventfdLate(Observer):
    """It resets the eventfd after it has read board and words."""

    def _reset_eventfd(self, state: State) -> None:
        """Not yet."""

    def _begin_need(self, state: State) -> None:
        state[self.world.eventfd] = 0
        super()._begin_need(state)


class WakesAlone(Observer):
    """A thread that frees slots does not notify the claims that wait."""

    def notify(self, state: State) -> None:
        """No other thread is notified."""


class KeepsEndsOfLeasesToItself(Observer):
    """Where payloads are dropped, it does not notify the claims that wait when a lease ends without consuming."""

    def _became_ready(self, state: State) -> None:
        """No thread is notified."""


class LosesLastAttachmentSilently(Observer):
    """It does not notify the claims that wait when the last attachment ends."""

    def _lost_attachments(self, state: State) -> None:
        """No thread is notified."""


class RetiresSilently(Observer):
    """It does not notify the threads that wait until payloads are consumed."""

    def notify_of_retirement(self, state: State) -> None:
        """No thread is notified."""


class WaitsForFirstServerOnly(Observer):
    """A server that starts after another one does not wait for the eventfd."""

    def is_woken(self, state: bytes) -> bool:
        return not state[self.world.stopped] and super().is_woken(state)
