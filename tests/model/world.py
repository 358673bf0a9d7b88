"""The variables of a scenario: shared words, what owner and kernel know, and the history that is checked."""

from __future__ import annotations

from typing import NamedTuple

from model.machine import Machine, State
from model.scenarios import Kind, Policy, Scenario

# States of a slot in the owner's table. UNDECIDED: it may be dropped. RETIRED: it is leased over the socket. DUE:
# it is retired, direct leases on it are not ruled out.
FREE, WRITING, COMMITTED, UNDECIDED, RETIRED, DUE, CLOSED = range(7)

# States of a lease.
NONE, DIRECT, OVER_SOCKET, ENDED = range(4)

# What happened to a payload that was not consumed by every reader id.
KEPT, DROPPED, REPLACED = range(3)


def consumer_name(thread: int) -> str:
    """The name of a consumer's thread in traces."""
    return f"consumer {chr(ord('A') + thread)}"


class Lease(NamedTuple):
    """A lease object of a consumer.

    Attributes:
        state: the place of its state; DIRECT and OVER_SOCKET mean that its token has not been taken.
        word_index: the place of the index of its lease word.
        thread: the thread that leases.
        payload: the sequence number of the payload.
    """

    state: int
    word_index: int
    thread: int
    payload: int


class World(Machine):
    """A machine with the variables of one scenario.

    Sequence numbers are stored plus one, as in the generations; 0 is no payload.

    Attributes:
        reached: events that have occurred in any state of the search.
        kept: leases that several operations end.
        always: the place of a byte that is 1 in every state.
        operation_of: the place of the number of each consumer's operation.
    """

    def __init__(self, scenario: Scenario) -> None:
        super().__init__()
        self.scenario = scenario
        self.reached: set[str] = set()
        self.uses_board = scenario.policy is not Policy.NEWEST
        slots, readers = range(scenario.slots), range(scenario.readers)
        payloads, processes = range(scenario.payloads), range(scenario.processes)
        words = range(scenario.words)

        # Shared memory.
        self.generation = [self.variable(f"generation of slot {slot}") for slot in slots]
        self.content = [self.variable(f"content of slot {slot}") for slot in slots]
        self.board = [
            [self.variable(f"board of slot {slot} and reader id {reader}") for reader in readers] for slot in slots
        ]
        self.words = [
            [self.variable(f"lease word {index} of process {process}") for index in words] for process in processes
        ]
        self.doorbell = self.variable("doorbell")
        self.closed_word = self.variable("closed word")
        self.end_word = {
            process: self.variable(f"end word of process {process}") for process in scenario.closing_processes
        }
        self.always = self.variable("1", 1)
        # Known to the threads of one process: the indices of its page that are not in use; it begins no leases.
        self.spare = [
            [self.variable(f"index {index} of process {process} is not in use", 1) for index in words]
            for process in processes
        ]
        self.closed_by_consumer = self.variable("processes that begin no lease any more")

        # History, for the properties. A bit for each reader id, or for each payload.
        self.published = self.variable("payloads whose generation has been visible")
        self.consumed = [self.variable(f"reader ids that consumed payload {payload}") for payload in payloads]
        self.stale = [
            self.variable(f"reader ids that received STALE for payload {payload}") for payload in payloads
        ]
        self.fate = [self.variable(f"fate of payload {payload}") for payload in payloads]
        self.slot_of = [self.variable(f"slot of payload {payload}") for payload in payloads]

        # The kernel.
        self.eventfd = self.variable("eventfd")
        self.dead = self.variable("processes that were killed")
        self.registered = self.variable("processes registered with membarrier", self._attached_at_start())
        self.barrier_failed = self.variable("a barrier has failed")
        self.closed_sockets = self.variable("processes whose socket is closed")

        # The owner's table, under the ring's lock, and its list of attachments.
        self.slot_state = [self.variable(f"state of slot {slot}") for slot in slots]
        self.slot_payload = [self.variable(f"payload of slot {slot}") for slot in slots]
        self.latched = [self.variable(f"reader ids latched as consumed in slot {slot}") for slot in slots]
        self.server_leases = [self.variable(f"leases over the socket of slot {slot}") for slot in slots]
        self.worded = self.variable("slots that lease words named at the last observation")
        self.next_sequence = self.variable("next sequence number")
        self.ring_closed = self.variable("the ring is closed")
        self.attached = self.variable("list of attachments", self._attached_at_start())
        self.suspended = self.variable("no server is there")
        self.stopped = self.variable("the server was stopped")
        self.interrupted = self.variable("an exception has ended an observation")

        self.leases: list[Lease] = []
        self.kept: set[Lease] = set()
        self.operation_of: list[int] = []
        self.all_readers = (1 << scenario.readers) - 1
        self.content_words = frozenset(self.content)

    def _attached_at_start(self) -> int:
        late = {
            thread.process
            for thread in self.scenario.threads
            if any(each.kind is Kind.ATTACH for each in thread.program)
        }
        return sum(1 << process for process in range(self.scenario.processes) if process not in late)

    def lease_object(self, thread: int, payload: int) -> Lease:
        """One more lease object."""
        name = f"{consumer_name(thread)}'s lease of payload {payload}"
        lease = Lease(self.variable(f"state of {name}"), self.variable(f"index of {name}"), thread, payload)
        self.leases.append(lease)
        return lease

    def free_slot(self, state: State) -> int | None:
        """The first slot without a payload."""
        for slot, place in enumerate(self.slot_state):
            if state[place] == FREE:
                return slot
        return None
