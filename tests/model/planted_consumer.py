"""Consumers with a defect. Each class overrides the steps that the defect changes."""

from __future__ import annotations

from abc import ABC, abstractmethod

from model.consumer import (
    BEGIN,
    BOARD,
    CLEAR_WORD,
    DOORBELL,
    END_WORD,
    ENDING,
    GENERATION,
    IS_RETIRING,
    IS_STALE,
    LEASED,
    RING,
    Consumer,
    Instruction,
)
from model.machine import RETIRING, State
from model.properties import Properties
from model.scenarios import Kind
from model.world import DIRECT, ENDED, World


class OneMoreStep(Consumer, ABC):
    """A consumer with a step that the protocol does not have."""

    def __init__(self, world: World, properties: Properties, number: int) -> None:
        super().__init__(world, properties, number)
        self.extra = len(self.steps)
        self.steps.append(self._extra)

    @abstractmethod
    def _extra(self, state: State, operation: Instruction) -> None:
        """The step."""


# --- lease -----------------------------------------------------------------------------------------------------


class ReadsGenerationBeforeWord(OneMoreStep):
    """It writes its lease word after it has read the generation."""

    def _begin_lease(self, state: State, operation: Instruction) -> None:
        generation = self.world.load(state, self.processor, self.world.generation[self._slot(state, operation)])
        verdict = self._judge(generation, operation.payload + 1)
        if verdict == LEASED:
            state[self.step] = self.extra
        else:
            state[self.reason] = verdict
            self._cleared(state, operation)

    def _extra(self, state: State, operation: Instruction) -> None:
        self._write_word(state, operation)
        if self.world.uses_board:
            state[self.step] = BOARD
        else:
            self._leased(state, operation)


class ReadsBoardBeforeGeneration(Consumer):
    """It reads the board first, then the generation."""

    def _begin_lease(self, state: State, operation: Instruction) -> None:
        self._write_word(state, operation)
        state[self.step] = BOARD

    def _read_board(self, state: State, operation: Instruction) -> None:
        if self._is_consumed(state, operation):
            self._fail(state, IS_STALE)
        else:
            state[self.step] = GENERATION

    def _read_generation(self, state: State, operation: Instruction) -> None:
        world = self.world
        generation = world.load(state, self.processor, world.generation[self._slot(state, operation)])
        verdict = self._judge(generation, operation.payload + 1)
        if verdict == LEASED:
            self._leased(state, operation)
        else:
            self._fail(state, verdict)


class IgnoresBoard(Consumer):
    """It does not read the board."""

    def _is_consumed(self, state: State, operation: Instruction) -> bool:
        return False


class IgnoresRetiring(Consumer):
    """It leases a payload whose drop is undecided."""

    def _judge(self, generation: int, own: int) -> int:
        return super()._judge(generation & ~RETIRING, own)


class TakesRetiringForStale(Consumer):
    """It reports STALE for a payload whose drop is undecided."""

    def _judge(self, generation: int, own: int) -> int:
        verdict = super()._judge(generation, own)
        return IS_STALE if verdict == IS_RETIRING else verdict


class ClearsWordBeforeRead(OneMoreStep):
    """It clears its lease word as soon as the lease has begun."""

    def _leased(self, state: State, operation: Instruction) -> None:
        self.properties.handed_out(state, operation.payload, self.reader)
        state[self._lease(operation).state] = DIRECT
        state[self.step] = self.extra

    def _extra(self, state: State, operation: Instruction) -> None:
        self._store(state, self._word(state, operation), 0)
        if operation.kind is Kind.ACKNOWLEDGE:
            state[self.step] = BEGIN
            self._end_direct(state, operation)
        else:
            self._next(state)

    def _clear_word(self, state: State, operation: Instruction) -> None:
        self._forget(state, self._lease(operation))
        self._read_doorbell(state, operation)


class SkipsRegistration(Consumer):
    """It does not register with membarrier, because it was registered before exec, which clears that."""

    def _register(self, state: State, operation: Instruction) -> None:
        self._next(state)


# --- end -------------------------------------------------------------------------------------------------------


class WritesBoardAfterWord(OneMoreStep):
    """It clears its lease word, then writes the board."""

    def _end_direct(self, state: State, operation: Instruction) -> None:
        self._store_zero(state, operation)
        state[self.step] = self.extra

    def _extra(self, state: State, operation: Instruction) -> None:
        if operation.consumed and self.world.uses_board:
            self._write_board(state, operation)
        self._forget(state, self._lease(operation))
        state[self.step] = DOORBELL


class WritesBoardWithoutWord(OneMoreStep):
    """It acknowledges a payload without holding a lease word: generation, then board."""

    def _begin_lease(self, state: State, operation: Instruction) -> None:
        if operation.kind is not Kind.ACKNOWLEDGE:
            super()._begin_lease(state, operation)
            return
        world = self.world
        generation = world.load(state, self.processor, world.generation[self._slot(state, operation)])
        verdict = self._judge(generation, operation.payload + 1)
        if verdict == LEASED:
            state[self.step] = self.extra
        else:
            state[self.reason] = verdict
            self._cleared(state, operation)

    def _extra(self, state: State, operation: Instruction) -> None:
        self._write_board(state, operation)
        state[self.step] = DOORBELL


class EndsTwice(Consumer):
    """It ends a lease whose token has been taken."""

    def _end(self, state: State, operation: Instruction) -> None:
        lease = self._lease(operation)
        if state[lease.state] == ENDED:
            self._end_direct(state, operation)
        else:
            super()._end(state, operation)


class TestsTokenOnly(Consumer):
    """It tests the token at the start of an end, and takes it only when the word is cleared."""

    def _end(self, state: State, operation: Instruction) -> None:
        lease = self._lease(operation)
        if state[lease.state] == DIRECT and operation.consumed and self.world.uses_board:
            self._write_board(state, operation)
            state[self.step] = CLEAR_WORD
        else:
            super()._end(state, operation)


class GivesIndexBackFirst(OneMoreStep):
    """It gives the index of its lease word back, then clears the word."""

    def _end_direct(self, state: State, operation: Instruction) -> None:
        if self._shares_page:
            super()._give_index_back(state, operation)
            state[self.step] = self.extra
        else:
            super()._end_direct(state, operation)

    def _extra(self, state: State, operation: Instruction) -> None:
        super()._end_direct(state, operation)

    def _give_index_back(self, state: State, operation: Instruction) -> None:
        """The index has been given back."""


# --- doorbell --------------------------------------------------------------------------------------------------


class NoDoorbellAfterEnd(Consumer):
    """It does not test the doorbell at the end of a lease."""

    def _read_doorbell(self, state: State, operation: Instruction) -> None:
        if state[self.reason] == ENDING:
            self._cleared(state, operation)
        else:
            super()._read_doorbell(state, operation)


class NoDoorbellAfterFailure(Consumer):
    """It does not test the doorbell after a lease that failed."""

    def _read_doorbell(self, state: State, operation: Instruction) -> None:
        if state[self.reason] == ENDING:
            super()._read_doorbell(state, operation)
        else:
            self._cleared(state, operation)


class ReadsDoorbellFirst(OneMoreStep):
    """At the end of a lease it reads the doorbell before it clears the word."""

    def __init__(self, world: World, properties: Properties, number: int) -> None:
        super().__init__(world, properties, number)
        self.rings = world.variable(f"{self.name} will ring")

    def _clear_word(self, state: State, operation: Instruction) -> None:
        state[self.rings] = self.world.load(state, self.processor, self.world.doorbell)
        state[self.step] = self.extra

    def _extra(self, state: State, operation: Instruction) -> None:
        self._store_zero(state, operation)
        self._forget(state, self._lease(operation))
        rings = state[self.rings]
        state[self.rings] = 0
        if rings:
            state[self.step] = RING
        else:
            self._cleared(state, operation)


# --- the end of an attachment ----------------------------------------------------------------------------------


class IgnoresClosedFlag(Consumer):
    """A lease does not test, as its last step, whether another thread has ended the attachment."""

    def _checked(self, state: State, operation: Instruction) -> None:
        self._leased(state, operation)


class EndWordBeforeFlag(OneMoreStep):
    """It ends the attachment, then lets its threads begin no more leases."""

    def _close(self, state: State) -> None:
        state[self.step] = END_WORD

    def _write_end_word(self, state: State, operation: Instruction) -> None:
        super()._write_end_word(state, operation)
        state[self.step] = self.extra

    def _extra(self, state: State, operation: Instruction) -> None:
        super()._close(state)
        state[self.step] = DOORBELL


class IgnoresClosedWord(Consumer):
    """A generation of 0 means STALE, also when the ring is closed."""

    def _read_closed_word(self, state: State, operation: Instruction) -> None:
        self._report_stale(state, operation)
