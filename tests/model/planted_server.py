"""Servers with a defect. Each class overrides the steps that the defect changes."""

from __future__ import annotations

from functools import partial

from model.consumer import ATTACHED, Consumer
from model.machine import State
from model.properties import Properties
from model.server import FurtherTransition, Server
from model.world import COMMITTED, UNDECIDED, World


class IgnoresBoardOverSocket(Server):
    """A lease over the socket does not read the board."""

    def _is_on_board(self, state: State, slot: int, reader: int, own: int) -> bool:
        return False


class KeepsEndsToItself(Server):
    """A consumption over the socket is not put on the board."""

    def _put_on_board(self, state: State, slot: int, reader: int, own: int) -> None:
        state[self.world.consumed[own - 1]] |= 1 << reader


class AnswersStaleWhileUndecided(Server):
    """It answers STALE for a payload whose drop is undecided."""

    def _is_ready(self, slot_state: int) -> bool:
        return slot_state == COMMITTED


class NoNotificationOfEnds(Server):
    """The end of a lease over the socket does not wake the owner."""

    def _notify_of_end(self, state: State) -> None:
        """The owner is not notified."""


class EndsAttachmentWithSocket(Server):
    """A closed socket ends an attachment."""

    def lose_socket(self, state: State, process: int) -> None:
        super().lose_socket(state, process)
        state[self.world.attached] &= ~(1 << process)


class EndsAttachmentWithEmptyPage(Server):
    """An attachment whose socket is closed ends once its page is zero."""

    def further_transitions(self) -> list[FurtherTransition]:
        return [
            (partial(self._is_orphan, process=process), partial(self._end, process=process))
            for process in self.world.scenario.sockets
        ]

    def _is_orphan(self, state: bytes, process: int) -> bool:
        world = self.world
        closed = state[world.closed_sockets] & state[world.attached]
        return bool(closed >> process & 1) and not any(state[word] for word in world.words[process])

    def _end(self, state: State, process: int) -> None:
        state[self.world.attached] &= ~(1 << process)


class WelcomesBeforeListing(Server):
    """WELCOME leaves before the attachment is in the list."""

    def __init__(self, world: World, properties: Properties) -> None:
        super().__init__(world, properties)
        self.welcomed = world.variable("attachments that are not in the list yet")

    def attach(self, state: State, consumer: Consumer) -> None:
        state[self.welcomed] |= 1 << consumer.process
        consumer.answered(state, ATTACHED)

    def further_transitions(self) -> list[FurtherTransition]:
        return [(lambda state: state[self.welcomed] != 0, self._list_welcomed)]

    def _list_welcomed(self, state: State) -> None:
        state[self.world.attached] |= state[self.welcomed]
        state[self.welcomed] = 0


class PublishesUndecided(Server):
    """A server that starts clears RETIRING of drops that are undecided as well."""

    def _publish_all(self, state: State) -> None:
        super()._publish_all(state)
        world = self.world
        for slot, place in enumerate(world.slot_state):
            if state[place] == UNDECIDED and not state[world.suspended]:
                world.write(state, world.generation[slot], state[world.slot_payload[slot]])


class StopsSilently(Server):
    """When the server stops, the generations stay as they are."""

    def _publish_all(self, state: State) -> None:
        """Nothing is written."""
