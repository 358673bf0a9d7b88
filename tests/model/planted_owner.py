"""Owners with a defect. Each class overrides the steps that the defect changes."""

from __future__ import annotations

from model.machine import State
from model.owner import (
    COMMIT,
    DECIDING,
    DONE,
    DROP,
    GIVE_BACK,
    LIST,
    LIST_AFTER_BARRIER,
    OBSERVE_AFTER_BARRIER,
    PUBLISHING,
    RETIRING_SLOTS,
    SLEEP,
    Owner,
)
from model.properties import Properties
from model.world import RETIRED, World

# --- retire -----------------------------------------------------------------------------------------------------------


class FencesItselfOnly(Owner):
    """Its barrier empties the buffer of its own processor, as a fence does, and reaches no other one."""

    def _begin_barrier(self, state: State) -> None:
        super()._begin_barrier(state)
        if state[self.awaited]:
            state[self.awaited] = 0
            state[self.step] = state[self.after]
            state[self.after] = 0


class CountsDeadAttachments(Owner):
    """It reads the lease words of processes that were killed."""

    def _attachments(self, state: State) -> int:
        return state[self.world.attached]


class NoBarrierInRetire(Owner):
    """It reads the lease words right after it has cleared the generations."""

    def _cleared_all(self, state: State) -> None:
        state[self.step] = LIST


class ListsBeforeBarrier(Owner):
    """It reads the list of attachments before the barrier, the words after it."""

    def _cleared_all(self, state: State) -> None:
        state[self.listed] = super()._attachments(state)
        super()._cleared_all(state)

    def _attachments(self, state: State) -> int:
        if state[self.step] == LIST_AFTER_BARRIER and state[self.purpose] in (RETIRING_SLOTS, PUBLISHING):
            return state[self.listed]
        return super()._attachments(state)


class ClearsGenerationAfterScan(Owner):
    """It clears a generation when no lease word names the slot, after barrier and scan."""

    def __init__(self, world: World, properties: Properties, number: int) -> None:
        super().__init__(world, properties, number)
        self.extra = len(self.steps)
        self.steps.append(self._clear_late)

    def _clear_generation(self, state: State, slot: int) -> None:
        self._cleared(state, slot)

    def _scanned(self, state: State) -> None:
        if state[self.purpose] == RETIRING_SLOTS and self._uncleared(state):
            state[self.step] = self.extra
        else:
            super()._scanned(state)

    def _uncleared(self, state: State) -> list[int]:
        world = self.world
        return [
            slot
            for slot in self.slots
            if state[world.slot_state[slot]] == RETIRED
            and not self._is_leased(state, slot)
            and world.load(state, self.processor, world.generation[slot])
        ]

    def _clear_late(self, state: State) -> None:
        self._store(state, self.world.generation[self._uncleared(state)[0]], 0)
        self._scanned(state)


class IgnoresLeasesOverSocket(Owner):
    """It frees a retired slot that a consumer has leased over the socket."""

    def _is_leased(self, state: State, slot: int) -> bool:
        return bool(state[self.named] >> slot & 1)


class NeverScansAgain(Owner):
    """It does not read the lease words again for a retired slot that was named."""

    def _has_retired(self, state: State) -> bool:
        return False


class TakesAnyBoardValue(Owner):
    """Any value of a board word counts as consumed."""

    def _means_consumed(self, value: int, own: int) -> bool:
        return value != 0


class ScansBeforeItsBarrier(Owner):
    """A slot counts as retired, and any thread may scan and free it, before the barrier is complete."""

    def _cleared(self, state: State, slot: int) -> None:
        super()._cleared(state, slot)
        state[self.world.slot_state[slot]] = RETIRED
        state[self.mine] = 0


class IgnoresFailedBarrier(Owner):
    """It does not check whether the barrier has failed."""

    def _continue_after_failure(self, state: State) -> None:
        state[self.step] = state[self.after]
        state[self.after] = 0


class ForgetsClearedSlots(Owner):
    """After a barrier has failed it does not repeat it for the slots that were cleared."""

    def _barrier_failed(self, state: State) -> None:
        super()._barrier_failed(state)
        state[self.world.unfenced] = 0


class CommitsGenerationFirst(Owner):
    """It writes the generation before the content."""

    def _write(self, state: State) -> None:
        slot = state[self.slot]
        self._store(state, self.world.generation[slot], state[self.world.slot_payload[slot]])
        state[self.step] = COMMIT

    def _commit(self, state: State) -> None:
        slot = state[self.slot]
        self._store(state, self.world.content[slot], state[self.world.slot_payload[slot]])
        self._committed(state, slot)


# --- drop -------------------------------------------------------------------------------------------------------------


class NoBarrierInDrop(Owner):
    """It reads the lease words again right after it has set RETIRING."""

    def _mark(self, state: State) -> None:
        super()._mark(state)
        state[self.after] = 0
        state[self.step] = LIST


class ClearsUndecided(Owner):
    """The generation is 0 while a drop is undecided."""

    def _mark_of(self, own: int) -> int:
        return 0


class DropsWithoutSecondScan(Owner):
    """It does not read the lease words again after the barrier."""

    def _decide(self, state: State) -> None:
        state[self.named] = 0
        super()._decide(state)


class DropsUnderLeaseOverSocket(Owner):
    """It does not see a lease over the socket that began during the barrier."""

    def _decide(self, state: State) -> None:
        if state[self.named] >> state[self.slot] & 1:
            state[self.step] = GIVE_BACK
        else:
            state[self.named] = 0
            self._observe_next(state)


class DropsWithoutBoard(Owner):
    """It does not read the board again before it counts a payload as dropped."""

    def _observe_next(self, state: State) -> None:
        if state[self.purpose] == DECIDING:
            state[self.step] = DROP
        else:
            super()._observe_next(state)


class DropReadsBoardFirst(Owner):
    """After the barrier of a drop it reads the board, then the lease words."""

    def _mark(self, state: State) -> None:
        super()._mark(state)
        state[self.after] = OBSERVE_AFTER_BARRIER

    def _observed(self, state: State) -> None:
        if state[self.purpose] == DECIDING:
            state[self.step] = LIST
        else:
            super()._observed(state)

    def _decide(self, state: State) -> None:
        if self._is_leased(state, state[self.slot]):
            state[self.step] = GIVE_BACK
        else:
            state[self.named] = 0
            state[self.step] = DROP


# --- wait -------------------------------------------------------------------------------------------------------------


class NoBarrierInWait(Owner):
    """It reads board and words right after it has set the doorbell."""

    def _arm(self, state: State) -> None:
        super()._arm(state)
        state[self.after] = 0
        state[self.step] = OBSERVE_AFTER_BARRIER


class SleepsAtOnce(Owner):
    """It sets the doorbell and waits; it does not read board and words again."""

    def _arm(self, state: State) -> None:
        super()._arm(state)
        state[self.after] = SLEEP


class _ReadsPartAfterDoorbell(Owner):
    """After it has set the doorbell it reads only a part of board and words; after each wake-up all of them."""

    def _wake(self, state: State) -> None:
        state[self.armed] = 2
        super()._wake(state)


class WaitReadsBoardOnly(_ReadsPartAfterDoorbell):
    """After it has set the doorbell it reads the board, not the lease words."""

    def _has_retired(self, state: State) -> bool:
        return state[self.armed] != 1 and super()._has_retired(state)


class WaitReadsWordsOnly(_ReadsPartAfterDoorbell):
    """After it has set the doorbell it reads the lease words, not the board."""

    def _find_pair(self, state: State, first: int) -> bool:
        return state[self.armed] != 1 and super()._find_pair(state, first)


class ResetsEventfdLate(Owner):
    """It resets the eventfd after it has read board and words."""

    def _wake(self, state: State) -> None:
        rung = state[self.world.eventfd]
        super()._wake(state)
        state[self.world.eventfd] = rung

    def _wait(self, state: State) -> None:
        if state[self.armed]:
            state[self.world.eventfd] = 0
        super()._wait(state)


class ClearsDoorbellOfOthers(Owner):
    """The first thread that has got a slot clears the doorbell although another one still waits."""

    def _clear_doorbell(self, state: State) -> None:
        self._store(state, self.world.doorbell, 0)


class CommitsSilently(Owner):
    """In a ring whose payloads may be dropped, a commit does not notify the claims that wait."""

    def _notify_of_commit(self, state: State) -> None:
        """No other thread is notified."""


class WakesAlone(Owner):
    """The thread that has read the eventfd does not notify the others."""

    def _notify(self, state: State) -> None:
        """No other thread is notified."""


# --- close ------------------------------------------------------------------------------------------------------------


class NoBarrierInClose(Owner):
    """It counts what is lost right after it has set RETIRING."""

    def _marked_for_close(self, state: State) -> None:
        state[self.step] = LIST


class ClearsGenerationsAtClose(Owner):
    """Once what is lost is counted, the generations are 0."""

    def __init__(self, world: World, properties: Properties, number: int) -> None:
        super().__init__(world, properties, number)
        self.extra = len(self.steps)
        self.steps.append(self._clear_closed)

    def _count_lost(self, state: State) -> None:
        super()._count_lost(state)
        state[self.step] = self.extra

    def _clear_closed(self, state: State) -> None:
        for address in self.world.generation:
            self._store(state, address, 0)
        state[self.step] = DONE
