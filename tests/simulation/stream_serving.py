"""The stream of a simulated producer: `Delivery` behind the production server loop."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any, cast

from dray.errors import BufferClosedError
from dray.protocol import PayloadRef, streams
from dray.resources import Closing
from dray.ring.consumer_events import Descriptor
from dray.ring.stream_words import StreamWords
from dray.streams.delivery import Delivery, Recipient, State
from dray.streams.registry import Peer
from dray.transport.service import ConsumerConnection
from simulation.scheduler import Process, Signal
from simulation.shared import SimulatedStreamBell

if TYPE_CHECKING:
    from simulation.network import SimulatedKernel
    from simulation.serving import SimulatedServer

_NUDGES = itertools.count(2_000_000)


class Meeting:
    """Where producers and consumers find each other by name.

    Attributes:
        entries: the producers that have registered, by the name of their entry.
        nudges: those of the consumers.
    """

    def __init__(self) -> None:
        self.entries: dict[str, tuple[Process, dict[str, Any]]] = {}
        self.nudges: list[SimulatedNudges] = []
        self._numbers = itertools.count(1)

    def register(self, process: Process, about: dict[str, Any]) -> str:
        """A producer makes its entry, and notifies the consumers."""
        entry = f"p-{next(self._numbers):04}"
        self.entries[entry] = process, about
        for each in self.nudges:
            each.arrive()
        return entry

    def peers(self) -> list[Peer]:
        """The producers that live."""
        return [
            Peer(entry, process.pid, process.name, about)
            for entry, (process, about) in self.entries.items()
            if not process.dead
        ]


class SimulatedNudges(Closing):
    """The socket by which a consumer learns of new producers.

    Attributes:
        process: the consumer.
        path: for its entry.
        signal: notified when something has come.
    """

    path = "simulated"

    def __init__(self, kernel: SimulatedKernel, process: Process, meeting: Meeting) -> None:
        self.process = process
        self.signal = Signal(kernel.scheduler)
        self.number = next(_NUDGES)
        self.waiting = False
        self._meeting = meeting
        meeting.nudges.append(self)

    def fileno(self) -> int:
        return self.number

    def arrive(self) -> None:
        """A producer has registered."""
        self.waiting = True
        self.signal.notify()

    def readable(self) -> bool:
        return self.waiting

    def clear(self) -> bool:
        came, self.waiting = self.waiting, False
        return came

    def close(self) -> None:
        if self in self._meeting.nudges:
            self._meeting.nudges.remove(self)


class _Ring:
    """What `Delivery` asks of the ring."""

    def __init__(self, server: SimulatedServer) -> None:
        self._ring = server.ring
        self.has_finished = server.ring.is_stale

    def barrier(self) -> bool:
        try:
            return self._ring.direct().barriers.pass_one()
        except BufferClosedError:
            return False


class _Connection:
    """The connection to a consumer, whose hand-outs are checked."""

    def __init__(self, stream: SimulatedStream, connection: ConsumerConnection, reader: int) -> None:
        self._stream = stream
        self._connection = connection
        self._reader = reader

    def announce(self, given: streams.Given) -> None:
        self._stream.check(given, self._reader)
        self._connection.push(streams.give(given, self._reader))

    def take_back(self, slot: int, sequence: int, number: int) -> None:
        self._connection.push(streams.take_back(slot, sequence, number))

    def drain(self) -> None:
        self._connection.push(streams.draining())

    def end(self, lost: int) -> None:
        self._connection.push(streams.end(lost))

    def abort(self) -> None:
        self._connection.stream.abort()


class SimulatedStream:
    """The stream of a producer, for its server.

    Attributes:
        bell: by which consumers ask for `serve`.
        delivery: its decisions.
        recipients: the consumers that have subscribed so far.
    """

    def __init__(self, server: SimulatedServer) -> None:
        kernel, settings = server.kernel, server.settings
        self._server = server
        self._scheduler = kernel.scheduler
        bell = SimulatedStreamBell(kernel, server.process)
        self.bell: Descriptor = bell
        self.delivery = Delivery(
            settings.groups,
            _Ring(server),
            max_deliveries=settings.max_deliveries,
            clock=kernel.scheduler.clock,
            lock=server.machine.lock(),
        )
        self.delivery.wake = bell.ring
        self.recipients: list[Recipient] = []
        self._first = [-1] * settings.groups

    # --- what the server calls --------------------------------------------------------------------------------

    @property
    def remaining(self) -> float:
        return 0.0 if self.delivery.dead else self.delivery.remaining

    @property
    def about(self) -> dict[str, Any]:
        """What the producer states about itself."""
        return {"groups": [f"g{n}" for n in range(self._server.settings.groups)], "schema": None}

    def describe(self) -> str:
        return json.dumps(self.about)

    def subscribe(self, connection: ConsumerConnection, reader: int) -> Recipient:
        words = None
        slots = self._server.ring.slots
        if connection.direct:
            words = StreamWords(self._server.machine.stream_words(StreamWords.count(slots)), slots)
        recipient = self.delivery.subscribe(
            reader, _Connection(self, connection, reader), pid=connection.stream.peer_pid, words=words
        )
        self.recipients.append(recipient)
        self._scheduler.note(f"a consumer subscribes to group {reader}")
        return recipient

    def serve(self) -> None:
        self.delivery.serve()
        while self.delivery.dead:
            item = self.delivery.dead.popleft()
            server = self._server
            server.kernel.plan.count("dead letter")
            self._scheduler.note(f"gives up sequence {item.sequence} of group {item.reader}")
            ref = server.make_ref(item.slot, item.sequence, item.nbytes)
            server.kernel.watch.give_up(ref, item.reader)
            try:
                server.ring.consume(item.slot, item.sequence, item.reader)
            except BufferClosedError:
                return

    # --- what the producer does -------------------------------------------------------------------------------

    def register(self, meeting: Meeting) -> None:
        """Let consumers find the producer."""
        server = self._server
        local = [endpoint for endpoint in server.endpoints if endpoint.startswith("unix:")]
        about = {**self.about, "producer": server.ring.producer_id.hex(), "endpoints": local}
        if local:
            self._entry = meeting.register(server.process, about)
            self._meeting: Meeting | None = meeting

    _meeting: Meeting | None = None
    _entry = ""

    def put(self, ref: PayloadRef) -> None:
        """Hand out a payload that was committed."""
        self.delivery.add(ref.slot, ref.sequence, ref.nbytes)

    def end(self) -> None:
        """Notify the consumers of the end of the stream. In a thread of the producer."""
        if self._meeting is not None:
            del self._meeting.entries[self._entry]
        left = len(self._server.ring.ready(leased=True))
        self.delivery.close(left)

    def check(self, given: streams.Given, reader: int) -> None:
        """First hand-outs are in order, and no payload is handed out too often."""
        server = self._server
        self._scheduler.note(f"gives sequence {given.sequence}, hand-out {given.number}, to group {reader}")
        ahead = [each.sequence for each in self.delivery.groups[reader].waiting if each.state is State.WAITING]
        if ahead and min(ahead) < given.sequence:
            self._scheduler.violate(f"{server.name}: sequence {given.sequence} is given, {min(ahead)} waits")
        limit = server.settings.max_deliveries
        if limit is not None and given.deliveries > limit:
            self._scheduler.violate(f"{server.name}: sequence {given.sequence} is delivery {given.deliveries}")
        if given.sequence > self._first[reader]:
            for skipped in range(self._first[reader] + 1, given.sequence):
                payload = server.books.payloads.get(skipped)
                if payload is not None and not self._has_ended(payload.slot, skipped, reader):
                    self._scheduler.violate(f"{server.name}: sequence {given.sequence} comes before {skipped}")
            self._first[reader] = given.sequence

    def _has_ended(self, slot: int, sequence: int, reader: int) -> bool:
        info = cast(Any, self._server.ring).inspect()[slot]
        return info.sequence != sequence or info.retired or bool(info.consumed_by >> reader & 1)
