"""What a server serves: a ring, perhaps with a stream, and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from dray.clock import MONOTONIC, Clock
from dray.protocol.frames import VERSION
from dray.protocol.handshake import ServerIdentity
from dray.protocol.streams import Returned
from dray.ring import SharedRingBuffer
from dray.ring.consumer_events import Descriptor
from dray.ring.shared_words import SharedWords
from dray.transport import trace as traced
from dray.transport.lanes.base import Stream


class Subscriber(Protocol):
    """A consumer that has subscribed, as the stream of the ring knows it.

    Attributes:
        words: the memory to share with it; None where frames carry everything.
    """

    @property
    def words(self) -> SharedWords | None: ...
    def start(self) -> None: ...
    def set_credit(self, total: int) -> None: ...
    def begin(self, slot: int, sequence: int, number: int) -> None: ...
    def take_back(self, returned: Returned) -> None: ...
    def end(self) -> None: ...


class ConsumerConnection(Protocol):
    """The connection to a consumer.

    Attributes:
        stream: the connection.
        direct: the consumer may lease directly.
    """

    stream: Stream
    direct: bool

    def push(self, frame: bytes) -> None: ...
    def push_last(self, frame: bytes) -> None: ...


class StreamService(Protocol):
    """The stream of a ring: who gets which payload.

    Attributes:
        bell: an eventfd by which consumers ask for `serve`.
        remaining: seconds until `serve` has something to do that no event announces.
    """

    bell: Descriptor

    @property
    def remaining(self) -> float: ...
    def describe(self) -> str: ...
    def subscribe(self, connection: ConsumerConnection, reader: int) -> Subscriber: ...
    def serve(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What a server serves, and how. All of its connections share it.

    Attributes:
        ring: the payloads.
        identity: the ring, as the handshake describes it.
        secret: the job's secret, if it has one.
        checksum: computes the checksum of a payload on network lanes; ``None`` sends none.
        describe: returns the text that answers STAT.
        idle_timeout: seconds after which a connection without requests and leases is closed.
        lease_timeout: on network lanes, a connection that holds a lease is closed when its reader is silent, and
            no byte travels to it, for this many seconds.
        clock: the source of time.
        trace: receives the events of `dray.transport.trace`.
        newest: the newest protocol version to speak.
        direct: direct leases are offered on lanes with shared memory.
        stream: hands the payloads of the ring out, if it has a stream.
    """

    ring: SharedRingBuffer
    identity: ServerIdentity
    secret: bytes | None = None
    checksum: Callable[[memoryview | bytes], int] | None = None
    describe: Callable[[], str] = lambda: "{}"
    idle_timeout: float = 120.0
    lease_timeout: float = 60.0
    clock: Clock = MONOTONIC
    trace: traced.Trace | None = None
    newest: int = VERSION
    direct: bool = False
    stream: StreamService | None = None
