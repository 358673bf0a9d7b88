"""Owners with a defect. Each class overrides the steps that the defect changes."""

from __future__ import annotations

from model.machine import State
from model.owner import Owner
from model.owner_thread import BEGIN_OBSERVATION, CLOSE_GENERATION, COMMIT, DONE, SLEEP

# --- commit ----------------------------------------------------------------------------------------------------


class CommitsGenerationFirst(Owner):
    """It writes the generation before the content."""

    def _write(self, state: State) -> None:
        world = self.world
        slot = state[self.slot]
        world.store(state, self.processor, world.generation[slot], state[world.slot_payload[slot]])
        state[self.step] = COMMIT

    def _commit(self, state: State) -> None:
        world = self.world
        slot = state[self.slot]
        world.store(state, self.processor, world.content[slot], state[world.slot_payload[slot]])
        self._committed(state, slot)


class CommitsWithoutRetiring(Owner):
    """A payload that is committed while no server is there carries no RETIRING."""

    def _commit(self, state: State) -> None:
        world = self.world
        slot = state[self.slot]
        world.store(state, self.processor, world.generation[slot], state[world.slot_payload[slot]])
        self._committed(state, slot)


class CommitsSilently(Owner):
    """In a ring whose payloads may be dropped, a commit does not notify the claims that wait."""

    def _notify_of_commit(self, state: State) -> None:
        """No other thread is notified."""


# --- wait ------------------------------------------------------------------------------------------------------


class NoBarrierInWait(Owner):
    """It reads board and words right after it has set the doorbell."""

    def _arm(self, state: State) -> None:
        super()._arm(state)
        state[self.after] = 0
        state[self.step] = BEGIN_OBSERVATION


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

    def _begin_scan(self, state: State) -> None:
        if state[self.armed] == 1:
            self._leave_observation(state)
        else:
            super()._begin_scan(state)


class WaitReadsWordsOnly(_ReadsPartAfterDoorbell):
    """After it has set the doorbell it reads the lease words, not the board."""

    def _find_pair(self, state: State, first: int) -> bool:
        return state[self.armed] != 1 and super()._find_pair(state, first)


class ClearsDoorbellOfOthers(Owner):
    """The first thread that has got a slot clears the doorbell although another one still waits."""

    def _clear_doorbell(self, state: State) -> None:
        self.world.store(state, self.processor, self.world.doorbell, 0)


class WaitsAlthoughNotified(Owner):
    """A claim waits although it was notified between the end of its observation and its wait."""

    def notified(self, state: State) -> None:
        if state[self.step] == SLEEP:
            super().notified(state)


# --- drop ------------------------------------------------------------------------------------------------------


class DropsAtOnceWithoutBoard(Owner):
    """Without attachments it drops a payload and does not read what ended consumers have left on the board."""

    def _drop_at_once(self, state: State) -> None:
        super()._drop_at_once(state)
        self._victim_observed(state)


class StaysUndecidedAfterException(Owner):
    """An observation that an exception has ended leaves its drop undecided."""

    def _release_victim(self, state: State) -> None:
        """The drop stays undecided."""


# --- close -----------------------------------------------------------------------------------------------------


class ClosesWordLast(Owner):
    """It clears the generations, then sets the closed word."""

    def _close_word(self, state: State) -> None:
        state[self.world.ring_closed] = 1
        state[self.step] = CLOSE_GENERATION
        self._close_generation(state)

    def _close_generation(self, state: State) -> None:
        super()._close_generation(state)
        if state[self.step] == DONE:
            self.world.store(state, self.processor, self.world.closed_word, 1)


class ClosesWithoutWord(Owner):
    """It does not set the closed word."""

    def _close_word(self, state: State) -> None:
        state[self.world.ring_closed] = 1
        state[self.step] = CLOSE_GENERATION
        self._close_generation(state)
