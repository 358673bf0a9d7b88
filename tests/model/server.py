"""The owner's server thread under the ring's lock, and what happens to processes: attach, kill, closed sockets.

Each step of the server holds the ring's lock throughout and has at most one shared access, so it is one step here:
no other thread of the owner runs between its parts, and consumers cannot distinguish its parts apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from model.consumer import ATTACHED, GRANTED, REFUSED, STALE, Consumer
from model.machine import RETIRING, State
from model.scenarios import Kind
from model.world import COMMITTED, DUE, RETIRED, UNDECIDED, World

if TYPE_CHECKING:
    from model.owner_thread import OwnerThread
    from model.properties import Properties

FurtherTransition = tuple[Callable[[bytes], bool], Callable[[State], None]]


class Server:
    """The server thread of the owner, and the end of processes."""

    def __init__(self, world: World, properties: Properties) -> None:
        self.world = world
        self.properties = properties
        self.observers: list[OwnerThread] = []
        self.consumers: list[Consumer] = []

    def resolve(self, observers: list[OwnerThread], consumers: list[Consumer]) -> None:
        """Know the threads that the server works with."""
        self.observers = observers
        self.consumers = consumers

    def further_transitions(self) -> list[FurtherTransition]:
        """Steps that only planted defects have."""
        return []

    def _has_lock(self, state: bytes) -> bool:
        return all(observer.has_unlocked(state) for observer in self.observers)

    # --- leases over the socket --------------------------------------------------------------------------------

    def can_answer(self, state: bytes, consumer: Consumer) -> bool:
        """The consumer has asked for a lease, and what it has sent before has been received."""
        return (
            not state[consumer.pending]
            and not state[self.world.dead] >> consumer.process & 1
            and consumer.request(state).kind is not Kind.ATTACH
            and self._has_lock(state)
        )

    def answer(self, state: State, consumer: Consumer) -> None:
        """Lease the payload over the socket, or answer STALE."""
        world = self.world
        request = consumer.request(state)
        payload = request.payload
        slot = state[world.slot_of[payload]]
        if state[world.ring_closed] or state[world.suspended]:
            world.reached.add("refused by a closed ring" if state[world.ring_closed] else "no server answers")
            consumer.answered(state, REFUSED)
            return
        ready = state[world.slot_payload[slot]] == payload + 1 and self._is_ready(state[world.slot_state[slot]])
        if ready and world.uses_board and self._is_on_board(state, slot, consumer.reader, payload + 1):
            self._consumed(state, slot, consumer.reader)
        if not ready or state[world.latched[slot]] >> consumer.reader & 1:
            consumer.answered(state, STALE)
            return
        self.properties.handed_out(state, payload, consumer.reader)
        world.reached.add("lease over the socket")
        self._grant(state, slot, consumer)
        if world.tracing:
            world.note(f"leases payload {payload} over the socket")
        consumer.answered(state, GRANTED)

    def _is_ready(self, slot_state: int) -> bool:
        return slot_state in (COMMITTED, UNDECIDED)

    def _grant(self, state: State, slot: int, consumer: Consumer) -> None:
        state[self.world.server_leases[slot]] |= 1 << consumer.number

    def _is_on_board(self, state: State, slot: int, reader: int, own: int) -> bool:
        value = state[self.world.board[slot][reader]]
        if self.world.tracing:
            self.world.note(f"loads board of slot {slot} and reader id {reader}: {value}")
        return value == own

    def can_receive_end(self, state: bytes, consumer: Consumer) -> bool:
        """The end of a lease over the socket is on its way."""
        return bool(state[consumer.pending]) and self._has_lock(state)

    def receive_end(self, state: State, consumer: Consumer) -> None:
        """End a lease over the socket."""
        world = self.world
        own, consumed = divmod(state[consumer.pending], 2)
        state[consumer.pending] = 0
        slot = state[world.slot_of[own - 1]]
        state[world.server_leases[slot]] &= ~(1 << consumer.number)
        if consumed and world.uses_board:
            if state[world.slot_state[slot]] in (COMMITTED, UNDECIDED):
                self._consumed(state, slot, consumer.reader)
            self._put_on_board(state, slot, consumer.reader, own)
        self._vacate(state, slot)
        if world.tracing:
            world.note(f"ends the lease of payload {own - 1} of {consumer.name}")
        self._notify_of_end(state)

    def _consumed(self, state: State, slot: int, reader: int) -> None:
        """A reader id has consumed a payload; with the last one it retires."""
        world = self.world
        state[world.latched[slot]] |= 1 << reader
        if state[world.latched[slot]] == world.all_readers:
            world.write(state, world.generation[slot], 0)
            state[world.slot_state[slot]] = RETIRED
            self._vacate(state, slot)
            for observer in self.observers:
                observer.notify_of_retirement(state)

    def _vacate(self, state: State, slot: int) -> None:
        """A retired slot without leases over the socket is due."""
        world = self.world
        if state[world.slot_state[slot]] == RETIRED and not state[world.server_leases[slot]]:
            state[world.slot_state[slot]] = DUE

    def _put_on_board(self, state: State, slot: int, reader: int, own: int) -> None:
        self.world.write(state, self.world.board[slot][reader], own)

    def _notify_of_end(self, state: State) -> None:
        self._notify(state)

    def _notify(self, state: State) -> None:
        self.observers[-1].notify(state)

    # --- attachments -------------------------------------------------------------------------------------------

    def can_attach(self, state: bytes, consumer: Consumer) -> bool:
        """The consumer has asked to attach."""
        dead = state[self.world.dead] >> consumer.process & 1
        return not dead and consumer.request(state).kind is Kind.ATTACH and self._has_lock(state)

    def attach(self, state: State, consumer: Consumer) -> None:
        """List the attachment, then let the consumer write."""
        state[self.world.attached] |= 1 << consumer.process
        if self.world.tracing:
            self.world.note(f"lists the attachment of process {consumer.process}, then sends WELCOME")
        for observer in self.observers:
            if observer.puts and not observer.waits(state):
                self.world.reached.add("attached while the owner is at work")
        consumer.answered(state, ATTACHED)

    def can_notice(self, state: bytes, process: int) -> bool:
        """A process with leases over the socket was killed, and what it has sent has been received."""
        world = self.world
        if not state[world.dead] >> process & 1 or not self._has_lock(state):
            return False
        threads = [consumer for consumer in self.consumers if consumer.process == process]
        leases = sum(1 << thread.number for thread in threads)
        return any(state[place] & leases for place in world.server_leases) and not any(
            state[thread.pending] for thread in threads
        )

    def notice(self, state: State, process: int) -> None:
        """The connections of a process end, and their leases with them."""
        for slot, leases in enumerate(self.world.server_leases):
            for consumer in self.consumers:
                if consumer.process == process:
                    state[leases] &= ~(1 << consumer.number)
            self._vacate(state, slot)
        if self.world.tracing:
            self.world.note(f"the connections of process {process} end")
        self._notify_of_end(state)

    # --- faults ------------------------------------------------------------------------------------------------

    def can_be_killed(self, state: bytes, process: int) -> bool:
        """The process is alive, and at least one of its threads has something left to do."""
        if state[self.world.dead] >> process & 1:
            return False
        return any(
            state[consumer.operation] < len(consumer.program)
            for consumer in self.consumers
            if consumer.process == process
        )

    def kill(self, state: State, process: int) -> None:
        """SIGKILL: no instruction is executed any more; executed stores still leave the buffers."""
        world = self.world
        state[world.dead] |= 1 << process
        for lease in world.leases:
            if self.consumers[lease.thread].process == process:
                if state[lease.state]:
                    world.reached.add("killed under a lease")
                state[lease.state] = 0
                state[lease.word_index] = 0
        for consumer in self.consumers:
            if consumer.process == process:
                consumer.killed(state)
        if world.tracing:
            world.note(f"process {process} is killed")

    def can_lose_socket(self, state: bytes, process: int) -> bool:
        """The socket of an attachment is open."""
        return not state[self.world.closed_sockets] >> process & 1 and bool(
            state[self.world.attached] >> process & 1
        )

    def lose_socket(self, state: State, process: int) -> None:
        """The socket of a living process is closed, by either side; its lease words stay valid."""
        state[self.world.closed_sockets] |= 1 << process
        self.world.reached.add("socket closed")
        if self.world.tracing:
            self.world.note(f"the socket of process {process} is closed")

    def can_stop(self, state: bytes) -> bool:
        """The server can be stopped, once."""
        return not state[self.world.stopped] and self._has_lock(state)

    def stop(self, state: State) -> None:
        """Without a server, all generations carry RETIRING. Drops that are undecided carry it already."""
        world = self.world
        state[world.stopped] = state[world.suspended] = 1
        self._publish_all(state)
        world.reached.add("server stopped")
        if world.tracing:
            world.note("the server stops")

    def can_start(self, state: bytes) -> bool:
        """No server is there."""
        return bool(state[self.world.suspended]) and self._has_lock(state)

    def start(self, state: State) -> None:
        """A new server is there, and waits for the eventfd."""
        state[self.world.suspended] = 0
        self._publish_all(state)
        if self.world.tracing:
            self.world.note("a server starts")

    def _publish_all(self, state: State) -> None:
        world = self.world
        for slot in range(world.scenario.slots):
            if state[world.slot_state[slot]] == COMMITTED:
                own = state[world.slot_payload[slot]]
                world.write(state, world.generation[slot], own | RETIRING if state[world.suspended] else own)
