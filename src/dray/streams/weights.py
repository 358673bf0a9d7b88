"""`Publisher` and `Subscriber`: the newest version of named arrays, such as the weights of a policy."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Final, Literal, Self, get_args

import numpy as np

from dray.clock import MONOTONIC, Clock, Deadline
from dray.errors import BufferClosedError, BufferFullError, ConfigError, StaleSlotError
from dray.exclusive import Exclusive
from dray.forking import here
from dray.payload.codec import plan, plan_blank
from dray.payload.schema import Array, TensorSpec
from dray.payload.selection import Fields, Rows, Selection
from dray.protocol.handshake import check_secret
from dray.resources import Closing
from dray.ring import SharedRingBuffer
from dray.ring.lease import SlotWriter
from dray.streams import sparse
from dray.streams.addresses import ListenOn, find_stream
from dray.streams.newest import Follower, NewestDelivery, Part, Version
from dray.streams.newest_inbox import NewestInbox
from dray.streams.payload import Weights
from dray.streams.registry import Registry, checked_name, command_line
from dray.streams.serving import RingOfStream, ServedConsumer, StreamServer
from dray.streams.wanted import Report, Wanted
from dray.transport import PayloadServer
from dray.transport.service import ConsumerConnection

VERSION_BYTES: Final = 1 << 40
GROUP: Final = "subscribers"

DELTA_SHARE: Final = 2
"""A delta has at most this fraction of the bytes of its version, so that memory for deltas is bounded."""

DELTA_SECONDS: Final = 0.1
"""How long `publish` waits for room for a delta. Without it, subscribers read the whole version."""

DeltaMode = Literal["full", "sparse"]


class Publisher(Closing):
    """Publishes versions of named arrays under a name. Subscribers get the newest one. A context manager.

    There is one publisher of a name in a scope at a time. The memory holds `versions` versions: while a subscriber
    still uses the one that is to be replaced, `publish` waits.

    Args:
        name: 1 to 64 letters, digits, '.', '_' and '-'.
        versions: how many versions there can be at a time, at least 2.
        delta: what travels to subscribers on other hosts: ``"full"`` versions, or ``"sparse"``: only the elements
            whose bits have changed since the version before, to a subscriber that has that one. There can be
            `versions` deltas at a time; one has at most half the bytes of its version.
        slot_bytes: the size limit of a version; it is no reservation.
        listen: an address for subscribers on other hosts, as for `Producer`.
        secret: the secret that subscribers at that address must know, at least 16 random bytes.
        scope: where the name is known; see `dray.streams.registry.default_scope`.
        drain_timeout: seconds that `close` gives to transfers to subscribers on other hosts.
        clock: where time comes from.

    Attributes:
        name, scope: where subscribers find it.
        id: 16 random bytes that name this publisher.
        addresses: those for subscribers on other hosts.

    Raises:
        ConfigError: an argument is not allowed, or another publisher has the name.
        OutOfResources: no descriptor or memory is left.
    """

    def __init__(
        self,
        name: str,
        *,
        versions: int = 2,
        delta: DeltaMode = "full",
        slot_bytes: int = VERSION_BYTES,
        listen: str | Sequence[str] = (),
        secret: bytes | None = None,
        scope: str | None = None,
        drain_timeout: float = 2.0,
        clock: Clock = MONOTONIC,
    ) -> None:
        self.name = checked_name(name)
        if versions.__class__ is not int or not 2 <= versions <= 64:
            raise ConfigError("versions", versions, "an integer from 2 to 64")
        if delta not in get_args(DeltaMode):
            raise ConfigError("delta", delta, " or ".join(map(repr, get_args(DeltaMode))))
        places = ListenOn.parse(listen)
        self._mark = here[0]
        self._closed = False
        self._last = 0
        self._metadata = sparse.METADATA if delta == "sparse" else None
        parts = 1 if delta == "full" else 2
        with contextlib.ExitStack() as opened:
            self._registry = registry = opened.enter_context(Registry(name, scope))
            registry.lock_publisher()
            self.scope = registry.scope
            self._ring = ring = opened.enter_context(
                SharedRingBuffer(versions * parts, slot_bytes, retain="newest", parts=parts, clock=clock)
            )
            self.id = ring.producer_id
            self._newest = NewestDelivery(RingOfStream(ring))
            about = {
                "name": self.name,
                "producer": ring.producer_id.hex(),
                "groups": [GROUP],
                "pid": os.getpid(),
                "command": command_line(),
                "delta": delta,
            }
            self._service = _Service(ring, about, self._newest)
            self._server = opened.enter_context(
                PayloadServer(
                    ring, lane=("shm", *places.lanes), host=places.host, port=places.ports, threads=1,
                    secret=secret, drain_timeout=drain_timeout, clock=clock, stream=self._service,
                )
            )  # fmt: skip
            local, self.addresses = self._service.addresses(self._server.endpoints)
            registry.add("p", {**about, "endpoints": local})
            opened.pop_all()
        registry.nudge_consumers()

    def publish(
        self, arrays: Mapping[str, Any], version: int | None = None, *, timeout: float | None = 30.0
    ) -> int:
        """Make `arrays` the newest version; returns its number.

        Args:
            arrays: arrays by name, as for `Producer.put`.
            version: its number, more than that of the version before; by default one more.
            timeout: seconds to wait until no subscriber uses the version that is replaced; None for no limit.

        Raises:
            PayloadError: the arrays cannot be packed, or are too large.
            BufferFullError: a subscriber did not give up an old version in time; the message names its process.
            BufferClosedError: the publisher is closed.
        """
        number = self._checked_number(version)
        packed = plan(arrays, metadata=self._metadata)
        with self._version(packed.nbytes, number, timeout) as memory:
            packed.write(memory)
        return number

    @contextlib.contextmanager
    def writing(
        self, fields: Mapping[str, TensorSpec], version: int | None = None, *, timeout: float | None = 30.0
    ) -> Iterator[dict[str, Array]]:
        """Write the next version in place: the block fills its arrays, and the end of the block publishes it.

        Nothing is copied. After an exception in the block there is no version. The arrays must not be written to
        after the block.

        Args:
            fields: dtype and shape of each array; every length is fixed.
            version: its number, as for `publish`.
            timeout: as for `publish`, at the begin of the block.

        Raises:
            PayloadError: there can be no such version, or it is too large.
            BufferFullError, BufferClosedError: as for `publish`.
        """
        number = self._checked_number(version)
        blank = plan_blank(fields, self._metadata)
        with self._version(blank.nbytes, number, timeout) as memory:
            arrays = blank.begin(memory)
            yield arrays
            for array in arrays.values():
                array.flags.writeable = False

    def _checked_number(self, version: int | None) -> int:
        if self._closed or here[0] != self._mark:
            raise BufferClosedError("the publisher is closed, or belongs to the process this one was forked from")
        number = self._last + 1 if version is None else version
        if number.__class__ is not int or not self._last < number < 1 << 63:
            raise ConfigError("version", version, f"an integer of more than {self._last}")
        return number

    @contextlib.contextmanager
    def _version(self, nbytes: int, number: int, timeout: float | None) -> Iterator[memoryview]:
        """The block writes the next version into this memory; then it is published."""
        try:
            writer = self._ring.claim(nbytes, timeout)
        except BufferFullError as error:
            newest = None if self._newest.version is None else self._newest.version.full.sequence
            users = sorted({lease.pid for lease in self._ring.direct_leases() if lease.sequence != newest})
            who = f"process {', '.join(map(str, users))}" if users else "a subscriber on another host"
            why = f"{self.name!r}: {who} still uses an older version; copy what is kept, or raise versions"
            raise BufferFullError(why, elapsed=error.elapsed) from None
        delta = None
        try:
            yield writer.buffer
            if number <= self._last:
                raise ConfigError("version", number, f"a number that no other thread has published ({self._last})")
            full, changes = Part(writer.slot, writer.sequence, nbytes), None
            before = self._newest.version
            if self._metadata is not None and before is not None and self._newest.wants_deltas:
                delta = self._delta_writer(nbytes // DELTA_SHARE)
                if delta is not None:
                    changes = self._encode(before, writer, delta)
            writer.commit()
            if delta is not None and changes is not None:
                delta.commit(changes.nbytes)
            self._newest.publish(Version(number, full, changes, 0 if before is None else before.number))
        except BaseException:
            writer.withdraw()
            if delta is not None:
                delta.withdraw()
            raise
        self._last = number

    def _delta_writer(self, nbytes: int) -> SlotWriter | None:
        """Room for a delta; None if subscribers are still reading all earlier ones: this version travels whole."""
        try:
            return self._ring.claim(nbytes, DELTA_SECONDS, part=1)
        except BufferFullError:
            return None

    def _encode(self, before: Version, writer: SlotWriter, delta: SlotWriter) -> Part | None:
        """Write what has changed since the version before; None if that is too much: the slot is free again."""
        nbytes = 0
        with contextlib.suppress(StaleSlotError):  # an exception of a signal handler has withdrawn that version
            with self._ring.read_raw(before.full.slot, before.full.sequence) as lease:
                old, new, target = (np.frombuffer(each.buffer, np.uint8) for each in (lease, writer, delta))
                nbytes = sparse.encode(
                    old, new, target, base=before.number, slot=writer.slot, sequence=writer.sequence
                )
        if not nbytes:
            delta.abort()
            return None
        return Part(delta.slot, delta.sequence, nbytes)

    @property
    def version(self) -> int:
        """The number of the newest version; 0 before the first."""
        return self._last

    @property
    def subscribers(self) -> int:
        """How many are attached."""
        return len(self._newest.followers)

    def close(self) -> None:
        """End the stream. Values that subscribers hold stay valid. Twice is fine."""
        if self._closed or here[0] != self._mark:
            return
        self._closed = True
        self._registry.close()
        self._newest.close()
        self._server.close()
        self._ring.close()
        self._service.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"version {self._last}"
        return f"<Publisher {self.name!r} {state}>"


class Subscriber(Closing):
    """Gets the newest version of a publisher's arrays. A context manager.

    It can be pickled. In each process, also in a forked one, it attaches at its first use there.

    Args:
        stream: the name of a publisher of this user on this host, or its address on another host.
        secret: the secret of the publisher at an address.
        scope: where the name is known; see `dray.streams.registry.default_scope`.
        direct: use versions in the memory of a publisher on this host where that is possible.
        fields: those of each version that are wanted, as for `PayloadClient.read`.
        rows: the rows of them, likewise, such as those of a tensor-parallel rank. In place this part is views;
            from another host only this part travels, unless the publisher has ``delta="sparse"``.

    Raises:
        ConfigError: an argument is not allowed.
        SelectionError: no version can have such a part.
    """

    def __init__(
        self,
        stream: str,
        *,
        secret: bytes | None = None,
        scope: str | None = None,
        direct: bool = True,
        fields: Fields | None = None,
        rows: Rows | None = None,
    ) -> None:
        check_secret(secret)
        name, scope, endpoints = find_stream(stream, scope)
        self._wanted = Wanted(
            name=name,
            scope=scope,
            endpoints=endpoints,
            group=GROUP,
            secret=secret,
            direct=direct,
            selection=Selection.of(fields, rows),
        )
        self._reset()

    def _reset(self) -> None:
        self._exclusive = Exclusive()
        self._inbox: NewestInbox | None = None
        self._closed = False
        self._mark = here[0]

    def newest(self, after: int | Weights | None = None, timeout: float | None = 30.0) -> Weights:
        """The newest version, or one that was the newest during the call.

        Args:
            after: wait for a version with a higher number, or, if `Weights` are given, for one that is newer than
                these: of the same publisher with a higher number, or of another publisher.
            timeout: seconds; None for no limit.

        Raises:
            StreamTimeout: none came in time; the message states what was waited for.
            TransportError: a version could not be read in time.
            SelectionError: the version does not have the part that is wanted.
        """
        deadline = Deadline.after(timeout)
        report = Report(MONOTONIC)
        with self._exclusively():
            inbox = self._opened()
            inbox.begin_call()
            while True:
                inbox.ask()
                found = inbox.read(after, deadline)
                if found is not None:
                    return found
                inbox.wait(deadline, report)

    @property
    def attached(self) -> bool:
        """This process is connected to the publisher, as far as the last call knows."""
        inbox = self._inbox
        return here[0] == self._mark and inbox is not None and bool(inbox.sources)

    def __enter__(self) -> Self:
        with self._exclusively():
            self._opened()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the subscription in this process, also while another thread waits in it. Twice is fine.

        Values that it has returned stay valid.
        """
        if here[0] != self._mark:
            return
        self._closed = True
        inbox = self._inbox
        if inbox is not None:
            inbox.interrupt()
        with self._exclusively():
            inbox, self._inbox = self._inbox, None
            if inbox is not None:
                inbox.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _remake, (self._wanted,)

    def __repr__(self) -> str:
        return f"<Subscriber of {self._wanted}{', closed' if self._closed else ''}>"

    def _exclusively(self) -> AbstractContextManager[Any]:
        if here[0] != self._mark:
            self._reset()
        return self._exclusive.call()

    def _opened(self) -> NewestInbox:
        if self._inbox is None and not self._closed:
            self._inbox = NewestInbox(self._wanted)
        if self._closed:  # tested last: `close` in another thread may not have seen the inbox
            raise BufferClosedError("the subscriber is closed")
        assert self._inbox is not None
        return self._inbox


def _remake(wanted: Wanted) -> Subscriber:
    subscriber = Subscriber.__new__(Subscriber)
    subscriber._wanted = wanted  # noqa: SLF001
    subscriber._reset()  # noqa: SLF001
    return subscriber


class _Service(StreamServer):
    """The stream of versions, for its server."""

    def __init__(self, ring: SharedRingBuffer, about: Mapping[str, Any], newest: NewestDelivery) -> None:
        super().__init__(ring, about)
        self._newest = newest

    def subscribe(self, connection: ConsumerConnection, reader: int) -> Follower:
        self.log_attached(connection, reader)
        pid = connection.stream.peer_pid
        return self._newest.subscribe(
            ServedConsumer(connection, reader), pid=pid, words=self.words(connection),
            deltas=connection.stream.lane.in_band,
        )  # fmt: skip

    def serve(self) -> None:
        self._newest.serve()
