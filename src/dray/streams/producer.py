"""`Producer`: puts named arrays into a stream, from which consumers take them."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, NamedTuple

from dray.clock import MONOTONIC, Clock, Deadline
from dray.errors import (
    BufferClosedError,
    BufferFullError,
    ConfigError,
    SlotError,
    UndeliveredError,
)
from dray.forking import here
from dray.identifiers import PayloadId
from dray.payload import PayloadSchema, Values, unpack
from dray.payload.codec import PackPlan, plan
from dray.resources import Closing
from dray.ring import OnFull, RingStatistics, SharedRingBuffer
from dray.streams.addresses import ListenOn
from dray.streams.delivery import ConsumerGroup, Delivery, Recipient
from dray.streams.registry import Registry, checked_name, command_line
from dray.streams.serving import RingOfStream, ServedConsumer, StreamServer
from dray.transport import PayloadServer
from dray.transport.service import ConsumerConnection

logger = logging.getLogger("dray.streams")

SLOT_BYTES: Final = 1 << 30
LEASES: Final = 8
"""Payloads of one producer that one consumer may lease in place."""


class DeadLetter(NamedTuple):
    """A payload that was handed out `max_deliveries` times and never acknowledged.

    Attributes:
        id: the payload.
        group: the group whose consumers have failed with it.
        deliveries: how often it was handed out.
        arrays: its arrays, in memory of their own.
    """

    id: PayloadId
    group: str
    deliveries: int
    arrays: Values


@dataclass(frozen=True, slots=True)
class GroupStatistics:
    """One group of a stream, at one producer. Counters start with the producer."""

    group: str
    consumers: int  # that are attached now
    attached: int  # that have ever attached
    waiting: int  # payloads that no consumer has been given
    given: int  # hand-outs
    redelivered: int  # hand-outs of payloads that were handed out before
    returned: int  # hand-outs that consumers have returned
    taken_back: int  # hand-outs that a consumer has not begun within 30 s
    dropped: int  # payloads that were dropped or consumed by reference before they were handed out
    dead_letters: int  # payloads that were given up


class Producer(Closing):
    """Puts payloads into the stream `name`. Thread-safe; a context manager.

    At the end of its block it waits until every payload is consumed. After an exception in the block it does not
    wait: what is not consumed by then is lost, and is logged.

    Args:
        name: 1 to 64 letters, digits, '.', '_' and '-'. Consumers of the same user, host and scope find it by this
            name.
        slots: how many payloads there can be at a time.
        slot_bytes: the size limit of a payload. Memory is taken when a slot is first written, so that this is no
            reservation: the ring uses `slots` times the size of the largest payloads.
        on_full: what `put` does when all slots hold payloads: wait (``"block"``), raise at once (``"error"``), or
            drop the oldest payload that no consumer uses (``"overwrite"``).
        groups: the names of the groups: each group gets every payload.
        schema: what the arrays must match. Consumers with another schema are refused.
        max_deliveries: a payload that was handed out so often, and comes back, is given up; None for no limit.
        on_dead_letter: called for each payload that is given up, in a thread of the producer.
        listen: an address for consumers on other hosts, ``"tcp://HOST:PORT"`` or ``"ucx://HOST:PORT"``, or
            several; port 0 takes any. Without it, only processes of this user on this host can attach.
        secret: the secret that consumers at that address must know, at least 16 random bytes.
        scope: where the name is known; see `dray.streams.registry.default_scope`.
        drain_timeout: seconds that `close` waits for consumers; None for no limit.
        clock: where time comes from.

    Attributes:
        name, scope: where consumers find it.
        id: 16 random bytes that name this producer.
        addresses: those for consumers on other hosts.

    Raises:
        ConfigError: an argument is not allowed, or the machine cannot be used.
        OutOfResources: no descriptor or memory is left.
    """

    def __init__(
        self,
        name: str,
        *,
        slots: int = 16,
        slot_bytes: int = SLOT_BYTES,
        on_full: OnFull = "block",
        groups: Sequence[str] = ("default",),
        schema: PayloadSchema | None = None,
        max_deliveries: int | None = None,
        on_dead_letter: Callable[[DeadLetter], None] | None = None,
        listen: str | Sequence[str] = (),
        secret: bytes | None = None,
        scope: str | None = None,
        drain_timeout: float | None = 30.0,
        clock: Clock = MONOTONIC,
    ) -> None:
        self.name = checked_name(name)
        self._groups = _checked_groups(groups)
        if max_deliveries is not None and (max_deliveries.__class__ is not int or max_deliveries < 1):
            raise ConfigError("max_deliveries", max_deliveries, "an integer of 1 or more, or None")
        places = ListenOn.parse(listen)
        self._schema = schema
        self._on_dead_letter = on_dead_letter
        self._drain_timeout = drain_timeout
        self._clock = clock
        self._mark = here[0]
        self._closed = self._draining = False
        with contextlib.ExitStack() as opened:
            registry = opened.enter_context(Registry(name, scope))
            self.scope = registry.scope
            ring = opened.enter_context(
                SharedRingBuffer(slots, slot_bytes, on_full=on_full, readers=len(self._groups), clock=clock)
            )
            self._ring = ring
            self._delivery = Delivery(
                len(self._groups), RingOfStream(ring), max_deliveries=max_deliveries, clock=clock
            )
            self.id = ring.producer_id
            self._about = {
                "name": self.name,
                "producer": ring.producer_id.hex(),
                "groups": list(self._groups),
                "schema": schema_text(schema),
                "pid": os.getpid(),
                "command": command_line(),
            }
            self._service = service = _Service(ring, self._about, self._delivery, self._give_up)
            self._server = opened.enter_context(
                PayloadServer(
                    ring,
                    lane=("shm", *places.lanes),
                    host=places.host,
                    port=places.ports,
                    threads=1,
                    secret=secret,
                    max_leases=LEASES,
                    clock=clock,
                    stream=service,
                )
            )
            local, self.addresses = service.addresses(self._server.endpoints)
            registry.add("p", {**self._about, "endpoints": local})
            self._registry = registry
            opened.pop_all()
        registry.nudge_consumers()

    # --- payloads ---------------------------------------------------------------------------------------------

    def put(
        self, arrays: Mapping[str, Any] | None = None, /, *, timeout: float | None = 30.0, **fields: Any
    ) -> PayloadId:
        """Pack named arrays into a slot and hand them to a consumer of each group.

        Args:
            arrays: arrays by name, any shape: NumPy arrays, torch tensors, lists, numbers. Either this or
                `fields`.
            timeout: seconds to wait for a free slot; None for no limit.
            fields: the same as keywords.

        Raises:
            PayloadError: the arrays cannot be packed, do not match the schema, or are too large for a slot.
            BufferFullError: no slot became free in time; the message names the group and the consumer that hold
                the oldest payload.
            BufferClosedError: the producer is closed.
        """
        if arrays is None:
            arrays = fields
        elif fields:
            raise ConfigError("arrays", sorted(fields), "a mapping, or keywords, not both", "came with keywords")
        self._check_open()
        return self._put(plan(arrays, self._schema), timeout)

    def _put(self, packed: PackPlan, timeout: float | None) -> PayloadId:
        nbytes = packed.nbytes
        try:
            writer = self._ring.claim(nbytes, timeout)
        except BufferFullError as error:
            raise BufferFullError(self._explain_full(error), elapsed=error.elapsed) from None
        try:
            packed.write(writer.buffer)
            writer.commit()
            self._delivery.add(writer.slot, writer.sequence, nbytes)
        except BaseException:
            writer.withdraw()
            raise
        return PayloadId(self.id, writer.sequence, writer.slot, nbytes)

    # --- state ------------------------------------------------------------------------------------------------

    def statistics(self) -> tuple[GroupStatistics, ...]:
        """Each group."""
        with self._delivery.lock:
            return tuple(
                GroupStatistics(
                    name, len(group.recipients), group.subscribed, len(group.waiting), group.given,
                    group.redelivered, group.returned, group.taken_back, group.dropped, group.dead,
                )
                for name, group in zip(self._groups, self._delivery.groups, strict=True)
            )  # fmt: skip

    def ring_statistics(self) -> RingStatistics:
        """The ring that holds the payloads.

        Raises:
            BufferClosedError: the producer is closed.
        """
        return self._ring.statistics()

    def drain(self, timeout: float | None = 30.0) -> int:
        """Wait until every payload is consumed; returns how many are left after `timeout` seconds."""
        deadline = Deadline.after(timeout, self._clock)
        ring = self._ring
        while True:
            left = ring.ready(leased=True)
            if not left:
                return 0
            if not ring.wait_consumed(left[0].slot, left[0].sequence, deadline.timeout):
                return len(ring.ready(leased=True))

    def close(self, drain: bool = True) -> None:
        """End the stream of this producer. Twice is fine.

        Args:
            drain: wait until every payload is consumed, at most `drain_timeout` seconds.

        Raises:
            UndeliveredError: payloads were not consumed in time, and are lost.
        """
        if self._closed or here[0] != self._mark:
            return
        left = 0
        try:
            if drain:
                self._delivery.drain()
            left = self.drain(self._drain_timeout if drain else 0.0)
        finally:
            holder = self._oldest() if left else ""
            self._closed = True
            self._registry.close()
            self._delivery.close(left)
            self._server.close()
            self._ring.close()
            self._service.close()
        if left:
            lost = (
                f"the producer of stream {self.name!r} has ended; {left} payloads were not consumed and are lost"
            )
            if drain:
                raise UndeliveredError(f"{lost}: {holder}", left)
            logger.warning("%s: %s", lost, holder)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(drain=kind is None)

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"in scope {self.scope!r}"
        return f"<Producer {self.name!r} {state}>"

    # --- inside -----------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed or here[0] != self._mark:
            raise BufferClosedError("the producer is closed, or belongs to the process this one was forked from")

    def _give_up(self) -> None:
        """Consume the payloads that were handed out too often, and report them."""
        dead = self._delivery.dead
        while dead:
            item = dead.popleft()
            group = self._groups[item.reader]
            letter = None
            with contextlib.suppress(SlotError):
                with self._ring.read_raw(item.slot, item.sequence, item.reader) as lease:
                    if self._on_dead_letter is not None:
                        payload = PayloadId(self.id, item.sequence, item.slot, item.nbytes)
                        arrays = unpack(bytearray(lease.buffer))
                        letter = DeadLetter(payload, group, item.deliveries, arrays)
            logger.warning(
                "payload %d of stream %r is given up: group %r has been handed it %d times",
                item.sequence, self.name, group, item.deliveries,
            )  # fmt: skip
            if letter is not None and self._on_dead_letter is not None:
                try:
                    self._on_dead_letter(letter)
                except Exception:
                    # The thread serves all consumers: a callback of the program must not end it.
                    logger.exception("on_dead_letter of stream %r failed", self.name)

    def _explain_full(self, error: BufferFullError) -> str:
        return f"stream {self.name!r} in scope {self.scope!r}: {error.message}: {self._oldest()}"

    def _oldest(self) -> str:
        """Who holds the oldest payload, in words."""
        left = self._ring.ready(leased=True)
        leased = sorted({lease.pid for lease in self._ring.direct_leases()})
        if not left:
            pinned = ", ".join(map(str, leased)) or "none"
            return f"all payloads are consumed, and arrays of them are kept by process {pinned}; raise slots"
        oldest = left[0]
        age = self._clock.now() - oldest.committed_at
        found = [
            (group, name)
            for reader, (group, name) in enumerate(zip(self._delivery.groups, self._groups, strict=True))
            if not oldest.consumed_by >> reader & 1
        ]
        with self._delivery.lock:
            reasons = [_reason(group, name, oldest.sequence) for group, name in found]
        return f"the oldest payload has waited {age:.1f} s for {' and '.join(reasons)}"


def _reason(group: ConsumerGroup, name: str, sequence: int) -> str:
    for recipient in group.recipients:
        item = recipient.items.get(sequence)
        if item is not None:
            begun = "uses it" if recipient.has_begun(item) else "has not begun with it"
            return f"group {name!r}, whose consumer, process {recipient.pid}, {begun}"
    if not group.subscribed:
        return f"group {name!r}, to which no consumer has ever attached"
    if not group.recipients:
        return f"group {name!r}, which has no consumer now"
    pids = ", ".join(str(recipient.pid) for recipient in group.recipients)
    return f"group {name!r}, whose consumers (process {pids}) have not asked for more"


class _Service(StreamServer):
    """The stream of a producer, for its server."""

    def __init__(
        self, ring: SharedRingBuffer, about: Mapping[str, Any], delivery: Delivery, give_up: Callable[[], None]
    ) -> None:
        super().__init__(ring, about)
        self._delivery = delivery
        self._give_up = give_up
        delivery.wake = lambda: os.eventfd_write(self.bell.fileno(), 1)

    @property
    def remaining(self) -> float:
        return 0.0 if self._delivery.dead else self._delivery.remaining

    def subscribe(self, connection: ConsumerConnection, reader: int) -> Recipient:
        self.log_attached(connection, reader)
        consumer, pid = ServedConsumer(connection, reader), connection.stream.peer_pid
        return self._delivery.subscribe(reader, consumer, pid=pid, words=self.words(connection))

    def serve(self) -> None:
        self._delivery.serve()
        if self._delivery.dead:
            self._give_up()


def schema_text(schema: PayloadSchema | None) -> str | None:
    """A text that is the same for equal schemas."""
    return None if schema is None else repr(schema)


def _checked_groups(groups: Sequence[str]) -> tuple[str, ...]:
    if isinstance(groups, str) or not groups or len(set(groups)) != len(groups):
        raise ConfigError("groups", groups, "a sequence of one or more different names")
    return tuple(checked_name(each, "group") for each in groups)
