"""`Subscription`: a consumer's connection to the stream of one producer. Its user waits for `fileno`."""

from __future__ import annotations

import contextlib
import json
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from dray.clock import Deadline
from dray.errors import (
    BufferClosedError,
    ProtocolError,
    TransportError,
)
from dray.forking import here
from dray.protocol import streams
from dray.protocol.client_session import Answer, ClientSession, Refusal
from dray.protocol.frames import FRAME_BYTES, Flag, Kind
from dray.protocol.handshake import ANY_PRODUCER, DIRECT_VERSION
from dray.resources import Closing
from dray.ring.attachment import Attachment
from dray.ring.consumer_events import Bell
from dray.ring.stream_words import StreamWords
from dray.transport.connecting import shake_hands
from dray.transport.lanes import parse_endpoint
from dray.transport.lanes.base import Network, Stream, Waiter, Worker

_MAX_FRAMES: Final = 64
"""Frames that are received together."""


class Subscription(Closing):
    """A connection after SUBSCRIBE.

    Attributes:
        endpoint: the address.
        producer: the producer's id.
        reader: the reader id of the group.
        attachment: the means for direct leases, on one host; it outlives the subscription.
        ended: the END that has come; None before it.
        credit: how many payloads the producer may have given so far.
    """

    def __init__(self, stream: Stream, endpoint: str, producer: bytes, reader: int) -> None:
        self.endpoint = endpoint
        self.producer = producer
        self.reader = reader
        self.attachment: Attachment | None = None
        self.ended: streams.Ended | None = None
        self._stream = stream
        self._worker: Worker | None = stream.worker
        self._words: StreamWords | None = None
        self._bell: Bell | None = None
        self.credit = 0
        self._returns = 0  # payloads that were given back before they were begun
        self._returned: deque[tuple[int, int]] = deque()  # which ones the producer may not know: count, sequence
        self._unsent = False
        self._mark = here[0]

    @classmethod
    def open(
        cls,
        endpoint: str,
        deadline: Deadline,
        *,
        network: Network,
        producer: bytes = ANY_PRODUCER,
        reader: int | None = None,
        choose: Callable[[dict[str, Any]], int] | None = None,
        secret: bytes | None = None,
        direct: bool = True,
    ) -> Subscription:
        """Connect and subscribe.

        Args:
            endpoint: the address of a server with a stream.
            deadline: when it must have answered.
            network: where connections come from.
            producer: the producer that is expected there; any by default.
            reader: the reader id of the group; if None, the server is asked what it serves.
            choose: returns the reader id for the server's description of itself, for that.
            secret: the job's secret, if it has one.
            direct: ask for direct leases where the lane has shared memory.

        Raises:
            TransportError, OtherProducerError, AuthenticationError, ProtocolError: as `Connection.open`.
            VersionMismatch: the server is older than streams.
            SlotError: it has no stream.
        """
        address = parse_endpoint(endpoint)
        with contextlib.ExitStack() as opened:
            worker = network.make_worker(address)
            if worker is not None:
                opened.callback(worker.close)
            waiter = network.waiter()
            stream = network.connect(address, deadline, worker)
            opened.callback(stream.close)
            shared = shake_hands(
                stream, waiter, deadline,
                network=network, endpoint=endpoint, producer=producer, secret=secret, version=DIRECT_VERSION,
                attach_as=reader if direct else None,
            )  # fmt: skip
            if shared.attachment is not None:
                opened.callback(shared.attachment.close)
            made = cls(stream, endpoint, shared.identity.producer, -1 if reader is None else reader)
            asking = _Asking(stream, waiter, deadline, endpoint=endpoint, readers=shared.identity.readers)
            if reader is None:
                assert choose is not None
                made.reader = choose(parse_description(asking.ask(Kind.DESCRIBE, 0), endpoint))
            if shared.attachment is None:
                asking.ask(Kind.SUBSCRIBE, made.reader)
            else:
                made._words, made._bell = asking.subscribe(made.reader, shared.identity.slots, network)
            made.attachment = shared.attachment
            opened.pop_all()
        return made

    # --- in ---------------------------------------------------------------------------------------------------

    def fileno(self) -> int:
        """The descriptor that becomes readable when `receive` may have something."""
        return self._stream.fileno() if self._worker is None else self._worker.fileno()

    def receive(self) -> list[streams.ProducerEvent]:
        """What has come since the last call; empty if nothing has. It does not wait.

        Raises:
            TransportError: the connection has failed: the producer has died, or cannot be reached.
            ProtocolError: the producer has broken the protocol.
        """
        stream, worker = self._stream, self._worker
        if worker is not None:
            worker.progress()
        stream.idle()
        events: list[streams.ProducerEvent] = []
        if self._unsent:
            self._unsent = not stream.flush()
        while (messages := stream.receive(FRAME_BYTES, _MAX_FRAMES)) is not None:
            events += streams.producer_events(messages)
        for event in events:
            if isinstance(event, streams.Ended):
                self.ended = event
        return events

    @property
    def unsent(self) -> bool:
        """A frame waits for room in the connection: `receive` must be called soon."""
        return self._unsent

    def arm(self) -> bool:
        """Before a wait for `fileno`; False if `receive` has something to do already."""
        if self._unsent:
            try:
                self._unsent = not self._stream.flush()
            except TransportError:
                return False
        return self._stream.idle() and (self._worker is None or self._worker.arm())

    # --- out --------------------------------------------------------------------------------------------------

    @property
    def direct(self) -> bool:
        """Credit is a word in shared memory, and payloads are leased in place."""
        return self._words is not None

    @property
    def pending(self) -> bool:
        """The producer has payloads that wait for credit, as far as that is known here."""
        return self._words is not None and self._words.pending

    @property
    def may_give(self) -> bool:
        """As `pending`; without shared words, that is not known."""
        return self._words is None or self._words.pending

    def set_credit(self, total: int) -> None:
        """Let the producer give `total` payloads, of all that it has given so far."""
        if total == self.credit:
            return
        if self._words is not None:
            self._words.credit = total
        else:
            self._send(streams.credit(total))
        self.credit = total  # last: after an exception of a signal handler, it is stored or sent again

    def ring(self) -> None:
        """Wake the producer: it has payloads that wait, and there is credit now."""
        if self._bell is not None:
            self._bell.ring()

    def begin(self, given: streams.Given) -> bool:
        """The program is about to get a payload; False if it was taken back meanwhile."""
        if self._words is not None:
            return self._words.begin(given.slot, given.number)
        self._send(streams.begin(given))
        return True

    def give_back(self, given: streams.Given, begun: bool) -> None:
        """Return a payload to its producer, for another consumer."""
        if not begun:
            self._returns += 1
            self._returned.append((self._returns, given.sequence))
        self._send(streams.give_back(given, begun))

    def overtakes(self, given: streams.Given) -> bool:
        """The producer gave this payload before it knew that an earlier one comes back, and that comes first."""
        returned = self._returned
        while returned and returned[0][0] <= given.returns:
            returned.popleft()
        return any(sequence < given.sequence for _, sequence in returned)

    def close(self) -> None:
        """End the connection: what was given and not consumed goes to other consumers. Twice is fine."""
        if here[0] == self._mark:
            self._stream.close()
            if self._worker is not None:
                self._worker.close()
            if self._words is not None:
                self._words.close()
            if self._bell is not None:
                self._bell.close()

    def __repr__(self) -> str:
        return f"<Subscription {self.endpoint} to {self.producer.hex()[:8]}>"

    def _send(self, frame: bytes) -> None:
        """Send, or leave the rest to `receive`: so few frames fit into the connection of a healthy peer."""
        try:
            self._unsent = not self._stream.send([frame])
        except (TransportError, BufferClosedError):
            self._unsent = False  # `receive` reports it


class _Asking:
    """Requests and answers before the first frame of the stream."""

    def __init__(self, stream: Stream, waiter: Waiter, deadline: Deadline, *, endpoint: str, readers: int) -> None:
        self._stream = stream
        self._waiter = waiter
        self._deadline = deadline
        self._endpoint = endpoint
        self._session = ClientSession(endpoint, readers)

    def ask(self, kind: Kind, reader: int) -> bytes:
        """The text that answers a request."""
        self._send(self._session.request(kind, reader=reader))
        answer = None
        while answer is None:
            while (message := self._stream.receive(self._session.expects)) is None:
                self._wait("an answer")
            answer = self._session.receive(message)
        return bytes(_accepted(answer).body)

    def subscribe(self, reader: int, slots: int, network: Network) -> tuple[StreamWords | None, Bell | None]:
        """Subscribe; the words and the bell that came with the answer."""
        self._send(self._session.request(Kind.SUBSCRIBE, reader=reader))
        numbers: list[int] = []
        received: list[Bell] = []
        with contextlib.ExitStack() as closing:
            while (message := self._stream.receive_with_descriptors(FRAME_BYTES, numbers)) is None:
                self._wait("an answer to SUBSCRIBE")
            received += [closing.enter_context(Bell(numbers.pop, 0)) for _ in range(len(numbers))]
            answer = self._session.receive(message)
            if answer is None:  # an error with a text
                while (text := self._stream.receive(self._session.expects)) is None:
                    self._wait("an answer to SUBSCRIBE")
                answer = self._session.receive(text)
                assert answer is not None
            if not _accepted(answer).frame.flags & Flag.WORDS:
                return None, None
            if len(received) != 2:
                raise ProtocolError(f"{len(received)} descriptors came with the answer to SUBSCRIBE, not two")
            words, bell = received
            made = network.open_stream_words(words, bell, slots)
            closing.pop_all()
            words.close()
            return made

    def _send(self, frame: bytes) -> None:
        sent = self._stream.send([frame])
        while not sent:
            self._wait("a request to be sent")
            sent = self._stream.flush()

    def _wait(self, awaited: str) -> None:
        self._waiter.wait(self._stream, self._deadline, awaited, self._endpoint)


def _accepted(event: Answer | Refusal) -> Answer:
    if isinstance(event, Refusal):
        raise event.error
    return event


def parse_description(text: bytes, endpoint: str) -> dict[str, Any]:
    """The description of a `Producer`; it is untrusted.

    Raises:
        ProtocolError: it is not that.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"a description of a stream must be JSON: {error}", endpoint=endpoint) from error
    groups = found.get("groups") if isinstance(found, dict) else None
    if not isinstance(groups, list) or not all(isinstance(each, str) for each in groups):
        raise ProtocolError("a description of a stream must have a list of groups", endpoint=endpoint)
    return dict(found)
