"""`PayloadStore`: named values behind tokens, for frameworks whose storage is looked up by key.

    with PayloadStore(capacity_bytes=8 << 30) as store:
        token = store.put({"observations": observations, "rewards": rewards})

and in that process, or in any other that has the token::

        (sample,) = store.get([token], fields=("rewards",))
        store.clear([token])

A token is text, small enough to travel with a sample's metadata. It names the payload and where it is served. What
a process puts stays in shared memory of that process until it is cleared, or the process ends.
"""

from __future__ import annotations

import atexit
import base64
import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np

from dray.clock import Deadline
from dray.counters import Counters
from dray.errors import (
    BufferClosedError,
    BufferFullError,
    PayloadTooLargeError,
    ProducerLostError,
    ProtocolError,
    StoreFullError,
    TransportError,
)
from dray.forking import call_in_children, here
from dray.identifiers import MAX_READERS, PRODUCER_ID_BYTES
from dray.payload import Array, Ragged, Selection, Values, plan, unpack
from dray.payload.codec import plan_rows
from dray.payload.ragged import map_arrays
from dray.payload.selection import Fields, Rows
from dray.protocol import PayloadRef
from dray.resources import Closing
from dray.ring import SharedRingBuffer, SlotWriter
from dray.ring.layout import checked_int
from dray.streams.addresses import ListenOn
from dray.text import printable_value
from dray.transport import PayloadClient, PayloadServer, ReadResult

MAX_SLOTS: Final = 32_768
"""Payloads of a store by default. Divided by more than two readers: direct leases are for 65,536 words."""

_BOARD_WORDS: Final = 65_536
_ADDRESS_SPACE: Final = 1 << 41
"""Bytes of address space for the slots, which a reader maps for each store that it reads from."""

_VERSION: Final = b"\x01"

_MAX_COPY_THREADS: Final = 4
_COPY_BYTES: Final = 8 << 20
"""Bytes that a thread copies at least: it takes far longer than to start one."""


@dataclass(frozen=True, slots=True)
class Token:
    """What the text of a token contains.

    Attributes:
        ref: the payload.
        fields: how many fields it has.
    """

    ref: PayloadRef
    fields: int

    def encode(self) -> str:
        """The text: letters, digits and ``-_.``"""
        ref = self.ref
        return _text(_prefix(ref.producer, ref.endpoints), (ref.slot, ref.sequence, ref.nbytes, self.fields))

    @classmethod
    def decode(cls, text: str) -> Token:
        """What `encode` wrote; the text is not trusted.

        Raises:
            ProtocolError: it is no token.
        """
        try:
            prefix, *numbers = text.split(".")
            slot, sequence, nbytes, fields = [int(each, 16) for each in numbers]
            producer, endpoints = _named(prefix)
            return cls(PayloadRef(producer, slot, sequence, nbytes, endpoints), fields)
        except (AttributeError, ValueError) as error:
            raise ProtocolError(f"{printable_value(text)} is no token of a PayloadStore") from error


@dataclass(frozen=True, slots=True)
class StoreStatistics:
    """A store at one moment, and what it has done. All counts are those of this process.

    Attributes:
        capacity_bytes: bytes that the payloads may have together.
        used_bytes: bytes of the payloads that were put and are not cleared.
        payloads: how many there are.
        memory_bytes: bytes of memory that the store has taken; it keeps them until it is closed.
        put, put_bytes: what was put, ever.
        got: payloads that were returned, from any process.
        cleared: payloads that this process has freed, in any process.
        waits, wait_seconds: calls of `put` that had to wait for room, and for how long.
        full_errors: calls that have raised `StoreFullError`.
    """

    capacity_bytes: int
    used_bytes: int
    payloads: int
    memory_bytes: int
    put: int
    put_bytes: int
    got: int
    cleared: int
    waits: int
    wait_seconds: float
    full_errors: int


class PayloadStore(Closing):
    """Puts mappings of named values into shared memory, and gets them by token, from any process. Thread-safe.

    A mapping may hold NumPy arrays and torch tensors of any dtype that a payload can carry, text, numbers, None,
    and nested mappings and lists of these. Arrays, tensors and numbers come back as NumPy arrays;
    `dray.payload.torch_interop.to_torch` makes tensors of them without a copy.

    A forked child has a store of its own: it gets and clears what others have put, and its first `put` makes a
    ring. What its parent has put stays with the parent.

    Args:
        capacity_bytes: bytes that the payloads of this process may have together. A slot that had a payload keeps
            its memory for payloads of a similar size, until the store is closed.
        slots: how many payloads there may be, up to 1,048,576. By default 32,768, and fewer with more than two
            readers, so that processes on this host lease payloads directly.
        payload_bytes: the largest payload; by default as much as the address space for the slots allows, 64 MiB
            with 32,768 slots, and no more than the capacity. Fewer slots allow larger payloads.
        readers: how many readers must clear a payload before it is freed.
        reader: which of them this process is, from 0.
        listen: where to serve other hosts: ``tcp://HOST:PORT`` or ``ucx://HOST:PORT``, or both.
        secret: the secret of all stores that exchange tokens; see `dray.make_secret`.
        put_timeout: seconds that `put` waits for room; None for no limit.

    Raises:
        ConfigError: an argument is not allowed.
    """

    def __init__(
        self,
        *,
        capacity_bytes: int,
        slots: int | None = None,
        payload_bytes: int | None = None,
        readers: int = 1,
        reader: int = 0,
        listen: str | Sequence[str] = (),
        secret: bytes | None = None,
        put_timeout: float | None = 30.0,
    ) -> None:
        self.readers = checked_int("readers", readers, 1, MAX_READERS)
        self.reader = checked_int("reader", reader, 0, readers - 1)
        self.slots = checked_int("slots", slots or min(MAX_SLOTS, _BOARD_WORDS // readers), 1, 1 << 20)
        self.capacity_bytes = checked_int("capacity_bytes", capacity_bytes, 1, 1 << 46)
        largest = min(capacity_bytes, max(_ADDRESS_SPACE // self.slots, -(-capacity_bytes // self.slots)))
        self.payload_bytes = checked_int("payload_bytes", payload_bytes or largest, 1, capacity_bytes)
        self.put_timeout = put_timeout
        self._listen = ListenOn.parse(listen)
        self._secret = secret
        self._closed = False
        self.begin()
        _stores.add(self)

    def begin(self) -> None:
        """Nothing is open yet in this process: at first, and in a forked child."""
        self.made_in = here[0]
        self._lock = threading.Lock()
        self._ring: SharedRingBuffer | None = None
        self._server: PayloadServer | None = None
        self._client: PayloadClient | None = None
        self._partly: dict[tuple[bytes, int], set[str]] = {}
        self._counters = Counters()

    # --- put --------------------------------------------------------------------------------------------------

    def put(self, values: Mapping[str, Any], *, timeout: float | None = None) -> str:
        """Copy values into the store; returns their token.

        Args:
            values: the values by name.
            timeout: seconds to wait for room; by default `put_timeout`.

        Raises:
            PayloadError: a value cannot be carried, or all together are too large for one payload.
            StoreFullError: there was no room in time.
            BufferClosedError: the store is closed.
        """
        return self.put_many((values,), timeout=timeout)[0]

    def put_many(self, mappings: Iterable[Mapping[str, Any]], *, timeout: float | None = None) -> list[str]:
        """`put` each of several mappings. If one cannot be put, none stays in the store.

        Args:
            mappings: the values by name, for each payload.
            timeout: seconds for all of them together; see `put`.

        Raises:
            PayloadError, StoreFullError, BufferClosedError: as for `put`.
        """
        planned = [(plan(values), len(values)) for values in mappings]

        def write(_ring: SharedRingBuffer, writers: Sequence[SlotWriter]) -> None:
            for (each, _), writer in zip(planned, writers, strict=True):
                each.write(writer.buffer)

        return self._put([each.nbytes for each, _ in planned], [fields for _, fields in planned], write, timeout)

    def put_rows(self, columns: Mapping[str, Array], *, timeout: float | None = None) -> list[str]:
        """`put_many` of the rows of arrays: a payload for each index of their first dimension.

        Whole columns are copied, by several threads if they are large.

        Args:
            columns: arrays of one length, by name.
            timeout: seconds for all rows together; see `put`.

        Raises:
            PayloadError, StoreFullError, BufferClosedError: as for `put`.
        """
        rows = plan_rows(columns)

        def write(ring: SharedRingBuffer, writers: Sequence[SlotWriter]) -> None:
            def write_part(part: range) -> None:
                first = part.start
                for memory in ring.memory_of(writers[part.start : part.stop]):
                    rows.write(memory, first)
                    first += len(memory)

            parts = _parts(rows.count, rows.count * rows.nbytes)
            if len(parts) == 1:
                write_part(parts[0])
                return
            threads = ThreadPoolExecutor(len(parts), "dray-copy")
            try:
                list(threads.map(write_part, parts))
            finally:
                _join(threads)

        return self._put([rows.nbytes] * rows.count, [len(columns)] * rows.count, write, timeout)

    def _put(
        self,
        sizes: Sequence[int],
        fields: Sequence[int],
        write: Callable[[SharedRingBuffer, Sequence[SlotWriter]], None],
        timeout: float | None,
    ) -> list[str]:
        """Have `write` fill slots for payloads of these sizes and numbers of fields; returns their tokens."""
        deadline = Deadline.after(self.put_timeout if timeout is None else timeout)
        wanted = sum(sizes)
        ring, server = self._opened()
        if wanted > self.capacity_bytes:
            self._check_sizes(sizes)
            raise self._full(
                ring, f"{wanted} bytes in {len(sizes)} payloads can never be in the store together", 0.0
            )
        writers: list[SlotWriter] = []
        try:
            for nbytes in sizes:
                writers.append(ring.claim(nbytes, max(0.0, deadline.remaining)))
            if len(set(sizes)) == 1:  # any payload fits into any of the slots, and neighbors are copied together
                writers.sort(key=lambda each: each.slot)
            write(ring, writers)
            for each in writers:
                each.commit()
        except BaseException as error:
            for each in writers:
                each.withdraw()
            if isinstance(error, PayloadTooLargeError):
                self._check_sizes(sizes)
            if isinstance(error, BufferFullError):
                what = f"no room for {wanted} bytes in {len(sizes)} payloads"
                raise self._full(ring, what, deadline.elapsed) from error
            raise
        self._counters.add("put", len(sizes))
        self._counters.add("put_bytes", wanted)
        prefix = _prefix(ring.producer_id, server.ref(0, 0, 0).endpoints)
        placed = zip(writers, fields, strict=True)
        return [_text(prefix, (each.slot, each.sequence, each.nbytes, count)) for each, count in placed]

    def _check_sizes(self, sizes: Iterable[int]) -> None:
        largest = max(sizes)
        if largest > self.payload_bytes:
            raise PayloadTooLargeError(
                f"a payload of {largest} bytes; payload_bytes = {self.payload_bytes} allows no larger one "
                f"(capacity_bytes = {self.capacity_bytes}, slots = {self.slots})"
            )

    def _full(self, ring: SharedRingBuffer, what: str, elapsed: float) -> StoreFullError:
        self._counters.add("full_errors")
        state = ring.statistics()
        payloads, used = state.slots - state.free, ring.used_bytes
        return StoreFullError(
            f"{what}: {payloads} payloads (of {self.slots}) use {used} of capacity_bytes = {self.capacity_bytes}",
            capacity_bytes=self.capacity_bytes, used_bytes=used, payloads=payloads, elapsed=elapsed,
        )  # fmt: skip

    # --- get --------------------------------------------------------------------------------------------------

    def get(
        self,
        tokens: Sequence[str],
        *,
        fields: Fields | None = None,
        rows: Rows | None = None,
        timeout: float | None = 30.0,
    ) -> list[dict[str, Any]]:
        """The values behind tokens, in their order, in memory of their own: they stay valid and may be written.

        Args:
            tokens: what to get, of any processes.
            fields: the fields of each payload that are wanted; None for all. Over a network only these travel.
            rows: the rows of them, see `dray.PayloadClient.read`.
            timeout: seconds for all of them; None for no limit.

        Raises:
            StaleSlotError: a payload is cleared.
            ProducerLostError: the process that has put it is gone.
            SelectionError: a payload does not have that part.
            TransportError: a process could not be reached in time.
            ProtocolError: a token is none.
        """
        found = list(self._read(tokens, Selection.of(fields, rows), timeout, in_place=False))
        self._counters.add("got", len(found))
        return found

    def views(
        self,
        tokens: Sequence[str],
        *,
        fields: Fields | None = None,
        rows: Rows | None = None,
        timeout: float | None = 30.0,
    ) -> Iterator[Mapping[str, Any]]:
        """As `get`, one after the other, and without a copy where the payload is on this host.

        The arrays may be read-only, and are valid until the next one is asked for. A program that copies them
        somewhere saves a copy. The arguments and errors are those of `get`.

        Args:
            tokens: what to get.
            fields: the fields that are wanted.
            rows: the rows of them.
            timeout: seconds for all of them, without the time in the caller's loop.
        """
        for each in self._read(tokens, Selection.of(fields, rows), timeout, in_place=True):
            self._counters.add("got")
            yield each

    def _read(
        self, tokens: Iterable[str], selection: Selection | None, timeout: float | None, *, in_place: bool
    ) -> Iterator[Values]:
        self._check_open()
        ring = self._ring
        own = b"" if ring is None else ring.producer_id
        refs = [Token.decode(token).ref for token in tokens]
        others = [ref for ref in refs if ref.producer != own]
        reads: Iterator[ReadResult[Values]] = iter(())
        if others:
            reads = self._reading().read_many(
                others, timeout=timeout, consume=False, in_place=in_place,
                **({} if selection is None else selection.arguments),
            )  # fmt: skip
        for ref in refs:
            if ring is None or ref.producer != own:
                yield next(reads).payload
                continue
            lease = ring.read_raw(ref.slot, ref.sequence, self.reader)
            try:
                payload = np.frombuffer(lease.buffer, np.uint8)
                if in_place:
                    yield unpack(payload, selection=selection)
                elif selection is None:
                    yield unpack(payload.copy())
                else:
                    yield _own_copy(unpack(payload, selection=selection))
            finally:
                if not ring.closed:
                    lease.release()

    # --- clear ------------------------------------------------------------------------------------------------

    def clear(
        self, tokens: Iterable[str], *, fields: Iterable[str] | None = None, timeout: float | None = 30.0
    ) -> int:
        """Free payloads of any process, once each of the `readers` has cleared them.

        Returns how many were there to be cleared. What is gone is not an error, nor is a process that has ended.

        Args:
            tokens: what to free.
            fields: clear only these fields of each. The payload is freed when this process has cleared all of its
                fields; until then they can all be read.
            timeout: seconds for all of them; None for no limit.

        Raises:
            TransportError: a process could not be reached in time. What it has is not freed; call again.
            ProtocolError: a token is none.
        """
        decoded = {token: Token.decode(token) for token in tokens}.values()
        names = None if fields is None else frozenset(fields)
        grouped: dict[bytes, list[PayloadRef]] = {}
        for each in decoded:
            if self._is_last(each, names):
                grouped.setdefault(each.ref.producer, []).append(each.ref)
        deadline = Deadline.after(timeout)
        self._check_open()
        ring = self._ring
        cleared = 0
        failed: TransportError | None = None
        for producer, refs in grouped.items():
            if ring is not None and producer == ring.producer_id:
                cleared += ring.consume_many([(ref.slot, ref.sequence, self.reader) for ref in refs])
                continue
            try:
                with suppress(ProducerLostError):
                    cleared += self._reading().consume(refs, timeout=max(0.0, deadline.remaining))
            except TransportError as error:
                failed = failed or error
        self._counters.add("cleared", cleared)
        if failed is not None:
            raise failed
        return cleared

    def _is_last(self, token: Token, names: frozenset[str] | None) -> bool:
        """Nothing of the payload is wanted any more."""
        key = token.ref.identity
        with self._lock:
            if names is not None:
                kept = self._partly.setdefault(key, set())
                kept |= names
                if len(kept) < token.fields:
                    return False
            self._partly.pop(key, None)
        return True

    # --- state ------------------------------------------------------------------------------------------------

    def statistics(self) -> StoreStatistics:
        """The store at this moment.

        Raises:
            BufferClosedError: the store is closed.
        """
        self._check_open()
        ring, counts = self._ring, self._counters
        state = None if ring is None else ring.statistics()
        return StoreStatistics(
            capacity_bytes=self.capacity_bytes,
            used_bytes=0 if ring is None else ring.used_bytes,
            payloads=0 if state is None else state.slots - state.free,
            memory_bytes=0 if ring is None else ring.memory_bytes,
            put=int(counts["put"]),
            put_bytes=int(counts["put_bytes"]),
            got=int(counts["got"]),
            cleared=int(counts["cleared"]),
            waits=0 if state is None else state.claim_waits,
            wait_seconds=0.0 if state is None else state.claim_wait_seconds,
            full_errors=int(counts["full_errors"]),
        )

    def close(self) -> None:
        """End what this process serves and reads. What it has put is gone; waits in other threads end.

        Twice is fine.
        """
        with self._lock:
            self._closed = True
            client, server, ring = self._client, self._server, self._ring
            self._client = self._server = self._ring = None
        for each in (client, ring, server):
            if each is not None:
                each.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "not used yet" if self._ring is None else repr(self._ring)
        return f"<PayloadStore of {self.capacity_bytes} bytes, {state}>"

    # --- inside -----------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise BufferClosedError("the store is closed")

    def _opened(self) -> tuple[SharedRingBuffer, PayloadServer]:
        """The ring and the server of this process."""
        with self._lock:
            self._check_open()
            if self._ring is None or self._server is None:
                listen = self._listen
                ring = SharedRingBuffer(
                    self.slots, self.payload_bytes, readers=self.readers, capacity_bytes=self.capacity_bytes
                )
                try:
                    self._server = PayloadServer(
                        ring, lane=("shm", *listen.lanes), host=listen.host, port=dict(listen.ports), threads=1,
                        secret=self._secret, max_leases=_MAX_LEASES,
                    )  # fmt: skip
                except BaseException:
                    ring.close()
                    raise
                self._ring = ring
            return self._ring, self._server

    def _reading(self) -> PayloadClient:
        with self._lock:
            self._check_open()
            if self._client is None:
                self._client = PayloadClient(secret=self._secret, reader=self.reader)
            return self._client


def _own_copy(values: Values) -> dict[str, Any]:
    """The values with arrays in memory of their own."""
    return dict(map_arrays(values, np.array, lambda rows: Ragged(rows.values.copy(), rows.offsets.copy())))


_MAX_LEASES: Final = 64
"""Payloads that a reader may have in place at a time."""

_stores: weakref.WeakSet[PayloadStore] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for store in list(_stores):
        if store.made_in == here[0]:
            store.close()


def _begin_in_child() -> None:
    for store in _stores:
        store.begin()


call_in_children(_begin_in_child)


def _join(threads: ThreadPoolExecutor) -> None:
    """Wait for the end of threads that copy, whatever a signal handler raises: their slots are given back then."""
    try:
        threads.shutdown()
    except BaseException:
        _join(threads)
        raise


def _parts(rows: int, nbytes: int) -> list[range]:
    """The rows that each thread copies, so that it has enough to do; one range if the caller does."""
    processors = len(os.sched_getaffinity(0))
    count = max(1, min(_MAX_COPY_THREADS, processors, rows, nbytes // _COPY_BYTES))
    bounds = [rows * part // count for part in range(count + 1)]
    return [range(*each) for each in pairwise(bounds)]


# --- tokens -----------------------------------------------------------------------------------------------------


def _text(prefix: str, numbers: tuple[int, int, int, int]) -> str:
    """The text of a token: its numbers are the slot, the sequence number, the bytes and the number of fields."""
    return "{}.{:x}.{:x}.{:x}.{:x}".format(prefix, *numbers)


@functools.lru_cache(1024)
def _prefix(producer: bytes, endpoints: tuple[str, ...]) -> str:
    content = _VERSION + producer + "\n".join(endpoints).encode()
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


@functools.lru_cache(1024)
def _named(prefix: str) -> tuple[bytes, tuple[str, ...]]:
    """The producer and the endpoints in the prefix of a token. Raises `ValueError`."""
    content = base64.b64decode(prefix + "=" * (-len(prefix) % 4), b"-_", validate=True)
    begin, end = len(_VERSION), len(_VERSION) + PRODUCER_ID_BYTES
    if len(content) < end or content[:begin] != _VERSION:
        raise ValueError("another version")
    endpoints = content[end:].decode()
    return content[begin:end], tuple(endpoints.split("\n")) if endpoints else ()
