"""A consumer's thread: lease, read, end, and what follows a lease that fails. One shared access a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from model.machine import RETIRING, State
from model.scenarios import End, Kind
from model.world import DIRECT, ENDED, NONE, OVER_SOCKET, Lease, World, consumer_name

if TYPE_CHECKING:
    from model.properties import Properties

# Steps within an operation: places in `Consumer.steps`, to which planted defects append. The first is BEGIN.
BEGIN, GENERATION, BOARD, FAILED, DOORBELL, RING, CLEAR_WORD, CLOSED_FLAG, CLOSED_WORD, END_WORD, LEASE_WORD = (
    range(11)
)

# How a lease word comes to be cleared, and what follows.
ENDING, IS_STALE, IS_RETIRING, IS_ZERO, IS_CLOSED = range(5)
LEASED: Final = 5

# Answers of the server.
GRANTED, STALE, REFUSED, ATTACHED = range(4)

BEGINS: Final = (Kind.LEASE, Kind.ASK, Kind.ACKNOWLEDGE)


class Instruction(NamedTuple):
    """An operation with the lease that it begins, reads or ends.

    Attributes:
        kind: what it does.
        payload: the sequence number of the payload.
        consumed: the lease ends consumed.
        lease: the lease; None if the operation has none.
        after: the lease's thread must have passed this operation; -1 if it is this thread.
    """

    kind: Kind
    payload: int
    consumed: bool
    lease: Lease | None
    after: int


class Consumer:
    """A thread of a consumer.

    Attributes:
        name: its name in traces.
        processor: its processor.
        process: the number of its process.
        reader: its reader id.
        requested: the place of what it waits with: the server has not answered.
        pending: the place of its message that the server has not received: 2 × generation + consumed.
    """

    def __init__(self, world: World, properties: Properties, number: int) -> None:
        self.world = world
        self.properties = properties
        self.number = number
        self.thread = world.scenario.threads[number]
        self.name = consumer_name(number)
        self.process = self.thread.process
        self.reader = self.thread.reader
        self.processor = world.processor(self.name)
        self.operation = world.variable(f"operation of {self.name}")
        self.step = world.variable(f"step of {self.name}")
        self.reason = world.variable(f"why {self.name} clears its word")
        self.requested = world.variable(f"{self.name} waits for the server's answer")
        self.pending = world.variable(f"message of {self.name} to the server")
        self.program: list[Instruction] = []
        self.consumers: list[Consumer] = []
        self.begun = {
            at: world.lease_object(number, each.payload)
            for at, each in enumerate(self.thread.program)
            if each.kind in BEGINS
        }
        world.operation_of.append(self.operation)
        self.steps: list[Callable[[State, Instruction], None]] = [
            self._begin,
            self._read_generation,
            self._read_board,
            self._clear_failed,
            self._read_doorbell,
            self._ring,
            self._clear_word,
            self._read_closed_flag,
            self._read_closed_word,
            self._write_end_word,
            self._write_taken_word,
        ]

    def resolve(self, consumers: list[Consumer]) -> None:
        """Find the lease of each operation, now that all consumers have their lease objects."""
        self.consumers = consumers
        ended: list[Lease] = []
        for at, each in enumerate(self.thread.program):
            other = consumers[each.thread] if each.thread is not None else self
            lease = other.latest_lease(each.payload, at if other is self else len(other.thread.program))
            after = -1 if other is self else other.place_of_read(each.payload)
            self.program.append(Instruction(each.kind, each.payload, each.consumed, lease, after))
            if each.kind is Kind.END and lease is not None:
                ended.append(lease)
        self.world.kept.update(lease for lease in ended if ended.count(lease) > 1 or lease.thread != self.number)

    def latest_lease(self, payload: int, before: int) -> Lease | None:
        """The last lease of a payload that this thread begins up to an operation."""
        leases = [lease for at, lease in self.begun.items() if lease.payload == payload and at <= before]
        return leases[-1] if leases else None

    def place_of_read(self, payload: int) -> int:
        """The operation that reads a payload."""
        return next(
            at for at, each in enumerate(self.thread.program) if each.kind is Kind.READ and each.payload == payload
        )

    # --- steps -------------------------------------------------------------------------------------------------

    def can_step(self, state: bytes) -> bool:
        """A step of this thread is possible."""
        world = self.world
        at = state[self.operation]
        if state[world.dead] >> self.process & 1 or at == len(self.program) or state[self.requested]:
            return False
        if state[self.step]:
            return True
        operation = self.program[at]
        if operation.kind in BEGINS:
            return self._is_closed(state) or (
                bool(state[world.published] >> operation.payload & 1)
                and (not self._shares_page or any(state[spare] for spare in world.spare[self.process]))
            )
        if operation.kind is Kind.END:
            return not state[self.pending] and self._is_due(state, operation)
        return True

    def _is_due(self, state: bytes, operation: Instruction) -> bool:
        """Another thread's lease object has reached this thread, and so have the stores made before that."""
        world, lease = self.world, operation.lease
        if operation.after < 0 or lease is None:
            return True
        return state[world.operation_of[lease.thread]] > operation.after and (
            state[lease.state] != DIRECT or not world.can_drain(state, self.consumers[lease.thread].processor)
        )

    def do_step(self, state: State) -> None:
        """The next step."""
        self.steps[state[self.step]](state, self.program[state[self.operation]])

    def _begin(self, state: State, operation: Instruction) -> None:
        if operation.kind in BEGINS and self._is_closed(state):
            self._next(state)
        elif operation.kind is Kind.LEASE or operation.kind is Kind.ACKNOWLEDGE:
            self._begin_lease(state, operation)
        elif operation.kind is Kind.READ:
            self._read(state, operation)
        elif operation.kind is Kind.END:
            self._end(state, operation)
        elif operation.kind is Kind.REGISTER:
            self._register(state, operation)
        elif operation.kind is Kind.CLOSE:
            self._close(state)
        else:
            self._request(state, operation)

    # --- lease -------------------------------------------------------------------------------------------------

    def _begin_lease(self, state: State, operation: Instruction) -> None:
        if self._may_be_closed_by_others:
            state[self._lease(operation).word_index] = self._take_index(state)
            state[self.step] = LEASE_WORD
        else:
            self._write_word(state, operation)
            state[self.step] = GENERATION

    def _write_word(self, state: State, operation: Instruction) -> None:
        if self._shares_page:
            state[self._lease(operation).word_index] = self._take_index(state)
        self._store_word(state, operation)

    def _write_taken_word(self, state: State, operation: Instruction) -> None:
        self._store_word(state, operation)
        state[self.step] = GENERATION

    def _store_word(self, state: State, operation: Instruction) -> None:
        self._store(state, self._word(state, operation), self._slot(state, operation) + 1)

    def _read_generation(self, state: State, operation: Instruction) -> None:
        world = self.world
        generation = world.load(state, self.processor, world.generation[self._slot(state, operation)])
        verdict = self._judge(generation, operation.payload + 1)
        if verdict != LEASED:
            self._fail(state, verdict)
            return
        self.properties.generation_accepted(state, operation.payload)
        if world.uses_board:
            state[self.step] = BOARD
        else:
            self._checked(state, operation)

    def _judge(self, generation: int, own: int) -> int:
        """What a generation means for a lease of the payload whose generation is `own`."""
        if generation == own:
            return LEASED
        if not generation and self.world.scenario.end is End.CLOSE:
            return IS_ZERO
        return IS_RETIRING if generation == own | RETIRING else IS_STALE

    def _read_board(self, state: State, operation: Instruction) -> None:
        if self._is_consumed(state, operation):
            self._fail(state, IS_STALE)
        else:
            self._checked(state, operation)

    def _checked(self, state: State, operation: Instruction) -> None:
        """Generation and board are right. If another thread may end the attachment, its flag is read last."""
        if self._may_be_closed_by_others:
            state[self.step] = CLOSED_FLAG
        else:
            self._leased(state, operation)

    def _read_closed_flag(self, state: State, operation: Instruction) -> None:
        if self._is_closed(state):
            self._fail(state, IS_CLOSED)
        else:
            self._leased(state, operation)

    def _is_closed(self, state: bytes | State) -> bool:
        return bool(state[self.world.closed_by_consumer] >> self.process & 1)

    def _is_consumed(self, state: State, operation: Instruction) -> bool:
        word = self.world.board[self._slot(state, operation)][self.reader]
        return self.world.load(state, self.processor, word) == operation.payload + 1

    def _leased(self, state: State, operation: Instruction) -> None:
        lease = self._lease(operation)
        self.properties.handed_out(state, operation.payload, self.reader)
        state[lease.state] = DIRECT
        if self.world.tracing:
            self.world.note(f"has a lease of payload {operation.payload}")
        if operation.kind is Kind.ACKNOWLEDGE:
            self._end(state, operation)
        else:
            self._next(state)

    def _read(self, state: State, operation: Instruction) -> None:
        world = self.world
        value = world.load(state, self.processor, world.content[self._slot(state, operation)])
        self.properties.bytes_read(operation.payload, value)
        self._next(state)

    # --- a lease that fails ------------------------------------------------------------------------------------

    def _fail(self, state: State, reason: int) -> None:
        state[self.reason] = reason
        state[self.step] = FAILED

    def _clear_failed(self, state: State, operation: Instruction) -> None:
        self._store_zero(state, operation)
        state[self._lease(operation).word_index] = 0
        state[self.step] = DOORBELL

    def _read_doorbell(self, state: State, operation: Instruction) -> None:
        if self.world.load(state, self.processor, self.world.doorbell):
            state[self.step] = RING
        else:
            self._cleared(state, operation)

    def _ring(self, state: State, operation: Instruction) -> None:
        """A system call, which empties the store buffer."""
        self.world.drain(state, self.processor)
        state[self.world.eventfd] = 1
        self._reach("doorbell rung")
        if self.world.tracing:
            self.world.note("rings the eventfd")
        self._cleared(state, operation)

    def _cleared(self, state: State, operation: Instruction) -> None:
        """What follows after a lease word was cleared and the doorbell tested."""
        reason = state[self.reason]
        state[self.reason] = ENDING
        if reason == IS_RETIRING:
            self._request(state, operation)
        elif reason == IS_STALE:
            self._report_stale(state, operation)
        elif reason == IS_ZERO:
            state[self.step] = CLOSED_WORD
        else:
            self._next(state)

    def _read_closed_word(self, state: State, operation: Instruction) -> None:
        """The generation is 0. If the ring is closed, only the server knows what that means."""
        if self.world.load(state, self.processor, self.world.closed_word):
            self._request(state, operation)
        else:
            self._report_stale(state, operation)

    def _report_stale(self, state: State, operation: Instruction) -> None:
        if self.world.tracing:
            self.world.note(f"STALE for payload {operation.payload}")
        self._reach("STALE reported")
        self.world.record(state, self.processor, self.world.stale[operation.payload], 1 << self.reader)
        self._next(state)

    # --- end ---------------------------------------------------------------------------------------------------

    def _end(self, state: State, operation: Instruction) -> None:
        """The token is taken, at most once."""
        lease = self._lease(operation)
        held = state[lease.state]
        if held == DIRECT:
            state[lease.state] = ENDED
            self._end_direct(state, operation)
        elif held == OVER_SOCKET:
            self._forget(state, lease)
            state[self.pending] = 2 * (operation.payload + 1) + operation.consumed
            if self.world.tracing:
                self.world.note(f"sends the end of its lease of payload {operation.payload}")
            self._next(state)
        else:
            self._reach("second end")
            if self.world.tracing:
                self.world.note("ends a lease that has ended: nothing")
            self._next(state)

    def _end_direct(self, state: State, operation: Instruction) -> None:
        if operation.consumed and self.world.uses_board:
            self._write_board(state, operation)
            state[self.step] = CLEAR_WORD
        else:
            self._clear_word(state, operation)

    def _write_board(self, state: State, operation: Instruction) -> None:
        self._store(state, self.world.board[self._slot(state, operation)][self.reader], operation.payload + 1)

    def _clear_word(self, state: State, operation: Instruction) -> None:
        self._store_zero(state, operation)
        self._forget(state, self._lease(operation))
        state[self.step] = DOORBELL

    # --- the end of the attachment -----------------------------------------------------------------------------

    def _close(self, state: State) -> None:
        """Begin no more leases. The interpreter's lock empties the buffers of the threads that had it before."""
        world = self.world
        for consumer in self.consumers:
            if consumer.process == self.process:
                world.drain(state, consumer.processor)
        state[world.closed_by_consumer] |= 1 << self.process
        if world.tracing:
            world.note("begins no lease any more")
        state[self.step] = END_WORD

    def _write_end_word(self, state: State, operation: Instruction) -> None:
        if any(state[lease.state] == DIRECT for lease in self.world.leases if lease.thread == self.number):
            self._reach("attachment closed under a lease")
        self._store(state, self.world.end_word[self.process], 1)
        state[self.step] = DOORBELL

    # --- messages to the server --------------------------------------------------------------------------------

    def _register(self, state: State, operation: Instruction) -> None:
        """A system call, which empties the store buffer."""
        world = self.world
        world.drain(state, self.processor)
        state[world.registered] |= 1 << self.process
        if world.tracing:
            world.note("registers with membarrier")
        self._next(state)

    def _request(self, state: State, operation: Instruction) -> None:
        state[self.step] = BEGIN
        state[self.requested] = 1
        if self.world.tracing:
            what = "to attach" if operation.kind is Kind.ATTACH else f"for a lease of payload {operation.payload}"
            self.world.note(f"asks the server {what}")

    def request(self, state: bytes | State) -> Instruction:
        """The operation for which this thread waits for the server."""
        return self.program[state[self.operation]]

    def answered(self, state: State, answer: int) -> None:
        """The server's answer arrives."""
        operation = self.request(state)
        state[self.requested] = 0
        if answer == STALE:
            self._report_stale(state, operation)
            return
        if answer == GRANTED:
            state[self._lease(operation).state] = OVER_SOCKET
        if operation.kind is Kind.ACKNOWLEDGE and answer == GRANTED:
            self._end(state, operation)
        else:
            self._next(state)

    def killed(self, state: State) -> None:
        """The process is killed. What this thread was doing makes no difference any more."""
        for place in (self.operation, self.step, self.reason, self.requested):
            state[place] = 0

    # --- questions of the search -------------------------------------------------------------------------------

    def rests(self, state: bytes | State) -> bool:
        """This thread has finished, was killed, or waits for a payload that was never committed."""
        world = self.world
        at = state[self.operation]
        if state[self.pending]:
            return False
        if at == len(self.program) or state[world.dead] >> self.process & 1:
            return True
        operation = self.program[at]
        return (
            state[self.step] == BEGIN
            and not state[self.requested]
            and operation.kind in BEGINS
            and not state[world.published] >> operation.payload & 1
        )

    # --- helpers -----------------------------------------------------------------------------------------------

    @property
    def _shares_page(self) -> bool:
        return self.world.scenario.words > 1

    @property
    def _may_be_closed_by_others(self) -> bool:
        return self.process in self.world.end_word and self._shares_page

    def _take_index(self, state: State) -> int:
        """An index of the page that is not in use. Taking it is atomic, and empties the store buffer."""
        world = self.world
        world.drain(state, self.processor)
        index = next(index for index, spare in enumerate(world.spare[self.process]) if state[spare])
        state[world.spare[self.process][index]] = 0
        if world.tracing:
            world.note(f"takes index {index}")
        return index

    def _store_zero(self, state: State, operation: Instruction) -> None:
        """Clear the lease word; its index is given back after it."""
        self.properties.word_cleared(state, self._lease(operation))
        self._store(state, self._word(state, operation), 0)
        self._give_index_back(state, operation)

    def _give_index_back(self, state: State, operation: Instruction) -> None:
        if self._shares_page:
            self._store(state, self.world.spare[self.process][state[self._lease(operation).word_index]], 1)

    def _forget(self, state: State, lease: Lease) -> None:
        """A lease has ended. States that differ only in leases that no operation refers to are one state."""
        if lease in self.world.kept:
            state[lease.state] = ENDED
        else:
            state[lease.state] = NONE
            state[lease.word_index] = 0

    def _next(self, state: State) -> None:
        """Continue with the next operation, except those of a lease that has failed."""
        at = state[self.operation] + 1
        while at < len(self.program):
            operation = self.program[at]
            ends = operation.kind is Kind.READ or operation.kind is Kind.END
            if not ends or operation.after >= 0 or state[self._lease(operation).state] != NONE:
                break
            at += 1
        state[self.operation] = at
        state[self.step] = BEGIN

    def _lease(self, operation: Instruction) -> Lease:
        assert operation.lease is not None
        return operation.lease

    def _slot(self, state: State, operation: Instruction) -> int:
        return state[self.world.slot_of[operation.payload]]

    def _word(self, state: State, operation: Instruction) -> int:
        return self.world.words[self.process][state[self._lease(operation).word_index]]

    def _store(self, state: State, address: int, value: int) -> None:
        self.world.store(state, self.processor, address, value)

    def _reach(self, event: str) -> None:
        self.world.reached.add(event)
