"""`PayloadServer`: puts payloads into a ring and serves them on every lane."""

from __future__ import annotations

import contextlib
import logging
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import xxhash

from dray.clock import MONOTONIC, Clock, Deadline
from dray.errors import BufferClosedError, ConfigError, ProtocolError, StaleSlotError, Unreachable
from dray.name_resolution import is_loopback, listening_address
from dray.payload.codec import plan
from dray.payload.schema import PayloadSchema
from dray.private_directory import PrivateDirectory
from dray.protocol import PayloadRef
from dray.protocol.frames import MIN_VERSION, VERSION
from dray.protocol.handshake import ServerIdentity, check_secret
from dray.protocol.ref import has_control
from dray.resources import Closing
from dray.ring import OnFull, Retain, SharedRingBuffer
from dray.ring.direct import direct_problem
from dray.transport.lanes import LANES, LaneChoice, chosen_lanes
from dray.transport.lanes.base import Lane, ListenAt, Listener
from dray.transport.server_loop import ServerLoop
from dray.transport.server_statistics import COUNTED, LeaseInfo, ServerCounters, ServerStatistics
from dray.transport.service import Service, StreamService
from dray.transport.trace import Trace

logger = logging.getLogger("dray.server")

MAX_THREADS = 16
PORTS_TO_TRY = 64
_MAX_LISTED = 200
"""Leases in the statistics: the text after STATUS holds so many."""


class PayloadServer(Closing):
    """Serves the payloads of a ring, in several threads: if one hangs, the endpoints of the others still serve.

    Args:
        ring: where the payloads are. It must outlive the server, and the caller closes it; `create` makes a server
            with a ring of its own.
        lane: which lanes to serve: a name, several, or ``"auto"``. That is ``shm`` and, with a secret, ``tcp`` and
            (where ``ucxx`` is installed and works) ``ucx``. Loopback does not separate users: where ``tcp`` or
            ``ucx`` is named and there is no secret, every user of the machine can read and consume, and the
            server logs a warning.
        host: address to listen on for ``tcp`` and ``ucx``, and the one to advertise. A name is looked up once,
            here: references carry the numeric address.
        port: the first of 64 ports to try; 0 takes any. A mapping has the only port of each lane, for one thread.
        threads: how many server threads, 1 … 16.
        secret: the job's secret, at least 16 random bytes (`dray.make_secret` makes one); with it, readers must
            prove that they know it.
        idle_timeout: seconds after which a connection without requests and leases is closed.
        lease_timeout: seconds a reader on a network lane may hold a payload while it is silent and no byte travels
            to it.
        drain_timeout: seconds that `close` gives to transfers in flight.
        join_timeout: seconds that `close` then waits for the threads.
        max_leases: payloads a connection may hold at a time.
        checksum: ``True`` sends an xxh3-64 of each payload on network lanes; ``"commit"`` computes it already when
            the payload is put; ``False`` sends none.
        directory: where the folder for Unix sockets is made; see `PrivateDirectory`.
        clock: the source of time.
        trace: receives what happens on the connections; see `dray.transport.trace`. It runs in the server threads.
        direct: let consumers on this host lease payloads in shared memory without asking this server, where this
            machine can (`dray doctor` shows whether, and why not).
        newest_version: the newest protocol version to speak, for clients that fail with a newer one.
        stream: hands the payloads of the ring out to consumers; see `dray.streams`.
        heirs: the addresses of the ring's heir, see `dray.agent`: references carry them after the endpoints,
            unless they become too long; then the server logs a warning.
        listeners: listen already; with them, `lane`, `host`, `port`, `threads` and `directory` mean nothing. The
            server closes them.

    Attributes:
        ring: as given.
        endpoints: its addresses, which references carry, e.g. ``"tcp:127.0.0.1:40001"``.
        loops: the server threads.

    Raises:
        ConfigError: an argument is not allowed, a lane cannot be served here, or `host` is not loopback and there
            is no secret.
        MissingDependencyError: a lane needs a package that is not installed.
        OutOfResources: no descriptor is left for its sockets and threads.
    """

    def __init__(
        self,
        ring: SharedRingBuffer,
        *,
        lane: LaneChoice = "auto",
        host: str = "127.0.0.1",
        port: int | Mapping[str, int] = 0,
        threads: int = 2,
        secret: bytes | None = None,
        idle_timeout: float = 120.0,
        lease_timeout: float = 60.0,
        drain_timeout: float = 2.0,
        join_timeout: float = 5.0,
        max_leases: int = 8,
        checksum: bool | Literal["commit"] = True,
        directory: Path | None = None,
        clock: Clock = MONOTONIC,
        trace: Trace | None = None,
        direct: bool = True,
        newest_version: int = VERSION,
        stream: StreamService | None = None,
        heirs: Sequence[str] = (),
        listeners: Sequence[Listener] = (),
    ) -> None:
        check_secret(secret)
        self._lanes = () if listeners else _served(lane, secret)
        named = host
        if self._network_lanes:
            host = listening_address(named)
        if ":" in host:
            only_ipv4 = [each for each in self._lanes if each.ipv4_only]
            if only_ipv4 and lane != "auto":
                meant = "" if host == named else f", which {named!r} does not mean here (it means {host})"
                raise ConfigError("host", named, f"an IPv4 address for the {only_ipv4[0].name} lane{meant}")
            self._lanes = tuple(each for each in self._lanes if not each.ipv4_only)
        for key, value, fits, allowed in (
            ("threads", threads, 1 <= threads <= MAX_THREADS, f"1 to {MAX_THREADS}"),
            ("max_leases", max_leases, max_leases >= 1, "1 or more"),
            ("idle_timeout", idle_timeout, idle_timeout > 0, "more than 0 seconds"),
            ("lease_timeout", lease_timeout, lease_timeout > 0, "more than 0 seconds"),
            ("drain_timeout", drain_timeout, drain_timeout >= 0, "0 seconds or more"),
            ("join_timeout", join_timeout, join_timeout >= 0, "0 seconds or more"),
            (
                "newest_version",
                newest_version,
                MIN_VERSION <= newest_version <= VERSION,
                f"{MIN_VERSION} to {VERSION}",
            ),
        ):
            if not fits:
                raise ConfigError(key, value, allowed)
        if secret is None and self._network_lanes:
            if not is_loopback(host):
                raise ConfigError("host", named, "a loopback address, or any with a secret configured")
            open_lanes = "/".join(each.name for each in self._network_lanes)
            logger.warning("%s without a secret: every user of this machine can read and consume", open_lanes)
        if host != named and is_loopback(host) and "localhost" not in named:
            logger.warning(
                "host %r means %s here, a loopback address: other machines cannot reach this server; for them "
                "give the address of one of this machine's interfaces",
                named,
                host,
            )
        self.ring = ring
        self._owned_ring: SharedRingBuffer | None = None
        self._host = host
        self._ports = _ports_of(self._network_lanes, port)
        self._checksum_at_commit = checksum == "commit"
        self._drain_timeout = drain_timeout
        self._join_timeout = join_timeout
        self._service = Service(
            ring=ring,
            identity=ServerIdentity(ring.producer_id, ring.slots, ring.slot_bytes, max_leases, ring.readers),
            secret=secret,
            checksum=xxhash.xxh3_64_intdigest if checksum else None,
            describe=lambda: self.statistics().to_json(),
            idle_timeout=idle_timeout,
            lease_timeout=lease_timeout,
            clock=clock,
            trace=trace,
            newest=newest_version,
            direct=direct and not direct_problem(),
            stream=stream,
        )
        self._pid = os.getpid()
        self._closed = self._counted = False
        self.loops: list[ServerLoop] = []
        self._directory = PrivateDirectory(directory) if any(each.local for each in self._lanes) else None
        try:
            if listeners:
                self.loops.append(ServerLoop("dray-server-0", listeners, self._service))
            else:
                self.loops.append(self._make_first_loop(lane))
                for index in range(1, threads):
                    self.loops.append(self._make_loop(index))
            by_lane = zip(*(loop.endpoints for loop in self.loops), strict=True)
            self.endpoints = tuple(endpoint for endpoints in by_lane for endpoint in endpoints)
            self._addresses = (*self.endpoints, *heirs)
            self._check_reference_fits()
            ring.count_servers(1)
            self._counted = True
            if ring.has_direct_consumers:  # they attached to an earlier server
                self.loops[0].watch_consumers()
            for loop in self.loops:
                loop.start()
        except BaseException:
            self.close()
            raise
        _servers.add(self)

    @classmethod
    def create(
        cls,
        *,
        slots: int,
        slot_bytes: int,
        on_full: OnFull = "block",
        readers: int = 1,
        retain: Retain = "unread",
        prefault: bool = False,
        clock: Clock = MONOTONIC,
        **options: Any,
    ) -> Self:
        """A server with a ring of its own, which is closed with it.

        Args:
            slots: how many payloads the ring holds; this and what follows as for `SharedRingBuffer`.
            slot_bytes: the capacity of a slot.
            on_full: what a `put` does when no slot is free.
            readers: how many readers must consume each payload.
            retain: when a payload gives up its slot.
            prefault: whether all memory is taken from the system at once.
            clock: the source of time of both.
            options: as for `PayloadServer`.
        """
        ring = SharedRingBuffer(
            slots, slot_bytes, on_full=on_full, readers=readers, retain=retain, prefault=prefault, clock=clock
        )
        try:
            server = cls(ring, clock=clock, **options)
        except BaseException:
            ring.close()
            raise
        server._owned_ring = ring
        return server

    # --- payloads ---------------------------------------------------------------------------------------------

    def put(
        self,
        arrays: Mapping[str, Any],
        *,
        schema: PayloadSchema | None = None,
        metadata: Mapping[str, str] | None = None,
        timeout: float | None = 30.0,
    ) -> PayloadRef:
        """Pack named arrays into a free slot and commit it.

        Args:
            arrays: arrays by name, any shape; see `dray.payload.pack` for the dtypes.
            schema: the schema that the arrays must match.
            metadata: text by name, kept in the payload's header.
            timeout: seconds to wait for a free slot; ``None`` for no limit.

        Raises:
            PayloadError: the arrays cannot be packed, do not fit the schema, or not into a slot.
            BufferFullError: no slot became free in time.
            BufferClosedError: the ring or the server is closed.
        """
        self._check_open()
        packed = plan(arrays, schema, metadata)
        return self._put(packed.nbytes, packed.write, timeout)

    def put_bytes(self, data: bytes | bytearray | memoryview, *, timeout: float | None = 30.0) -> PayloadRef:
        """Commit bytes as they are, to be read with `PayloadClient.read_bytes`; otherwise like `put`."""
        self._check_open()
        view = memoryview(data).cast("B")
        return self._put(view.nbytes, lambda memory: memory.__setitem__(slice(None), view), timeout)

    def ref(self, slot: int, sequence: int, nbytes: int) -> PayloadRef:
        """The reference for a payload of this server's ring."""
        return PayloadRef(self.ring.producer_id, slot, sequence, nbytes, self._addresses)

    def wait_consumed(self, ref: PayloadRef, timeout: float | None = 30.0) -> bool:
        """Wait until the payload is retired: consumed by all readers, dropped or replaced by a newer one.

        Returns False if `timeout` seconds pass before that; ``None`` for no limit.

        Raises:
            StaleSlotError: the reference is not of this ring.
        """
        if ref.producer != self.ring.producer_id:
            raise StaleSlotError("the reference names another producer", slot=ref.slot, sequence=ref.sequence)
        return self.ring.wait_consumed(ref.slot, ref.sequence, timeout)

    # --- state ------------------------------------------------------------------------------------------------

    def statistics(self) -> ServerStatistics:
        """The server at this moment: its ring, its counters, and the leases of its readers.

        Raises:
            BufferClosedError: the ring is closed.
        """
        ring = self.ring.statistics()
        leases = [lease for loop in self.loops for lease in loop.connections.leases()]
        leases += [LeaseInfo(*lease) for lease in self.ring.direct_leases()]
        totals = [loop.connections.totals() for loop in self.loops]
        return ServerStatistics(
            self.ring.producer_id,
            self.endpoints,
            sum(len(loop.connections) for loop in self.loops),
            tuple(sorted(leases, key=lambda lease: -lease.age)[:_MAX_LISTED]),
            ServerCounters(**{name: sum(each[name] for each in totals) for name in COUNTED}),
            ring,
        )

    def close(self) -> None:
        """Accept no more connections, finish what is in flight within `drain_timeout`, end the threads.

        Twice is fine.
        """
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        if self._counted:
            self.ring.count_servers(-1)
        drain = Deadline.after(self._drain_timeout)
        for loop in self.loops:
            loop.stop(drain)
        join = Deadline.after(self._drain_timeout + self._join_timeout)
        for loop in self.loops:
            if not loop.join(join):
                logger.error("a server thread is still running %.1f s after it was stopped", join.elapsed)
        if self._directory is not None:
            self._directory.close()
        if self._owned_ring is not None:
            self._owned_ring.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else ", ".join(self.endpoints)
        return f"<PayloadServer {self.ring.producer_id.hex()[:8]} {state}>"

    # --- inside -----------------------------------------------------------------------------------------------

    def _check_reference_fits(self) -> None:
        for endpoint in self.endpoints:
            if has_control(endpoint):
                raise ConfigError("directory", endpoint, "a path without control characters: references carry it")
        longest = self.ring.slots - 1, 2**64 - 1, self.ring.slot_bytes
        if self._addresses != self.endpoints:
            try:
                self.ref(*longest).to_json()
            except ProtocolError as error:
                logger.warning("references carry no address of an heir: they would be too long (%s)", error)
                self._addresses = self.endpoints
        try:
            self.ref(*longest).to_json()
        except ProtocolError as error:
            allowed = f"fewer, or fewer lanes: references carry every endpoint ({error})"
            raise ConfigError("threads", len(self.loops), allowed) from error

    @property
    def _network_lanes(self) -> list[Lane]:
        return [lane for lane in self._lanes if not lane.local]

    def _make_first_loop(self, choice: LaneChoice) -> ServerLoop:
        """Find out which lanes this machine can use."""
        while True:
            try:
                return self._make_loop(0)
            except _LaneUnusable as unusable:
                name, error = unusable.lane.name, unusable.error
                if choice != "auto":
                    allowed = f"lanes that this machine can use ({error.message})"
                    raise ConfigError("lane", choice, allowed) from error
                logger.warning("serving without the %s lane: %s", name, error.message)
                self._lanes = tuple(each for each in self._lanes if each is not unusable.lane)

    def _make_loop(self, index: int) -> ServerLoop:
        path = self._directory.path / f"{index}.sock" if self._directory is not None else None
        with contextlib.ExitStack() as opened:
            listeners: list[Listener] = []
            for lane in self._lanes:
                try:
                    listener = lane.listen(ListenAt(self._host, self._ports.get(lane, range(1)), path))
                except Unreachable as error:
                    if error.lane_unusable:
                        raise _LaneUnusable(lane, error) from error
                    raise
                if listener.worker is not None:
                    opened.callback(listener.worker.close)
                opened.callback(listener.close)
                listeners.append(listener)
            loop = ServerLoop(f"dray-server-{index}", listeners, self._service)
            opened.pop_all()
            return loop

    def _put(self, nbytes: int, write: Callable[[memoryview], None], timeout: float | None) -> PayloadRef:
        """The reference of a payload that `write` has written. After an exception, the slot is free again."""
        slot = self.ring.claim(nbytes, timeout)
        try:
            write(slot.buffer)
            slot.commit()
            ref = self._committed(slot.slot, slot.sequence, nbytes)
        except BaseException:
            slot.withdraw()
            raise
        return ref

    def _committed(self, slot: int, sequence: int, nbytes: int) -> PayloadRef:
        if self._checksum_at_commit and nbytes:
            # A reader may have consumed the payload by now.
            with contextlib.suppress(StaleSlotError):
                self.ring.checksum(slot, sequence, xxhash.xxh3_64_intdigest)
        return self.ref(slot, sequence, nbytes)

    def _check_open(self) -> None:
        if self._closed or os.getpid() != self._pid:
            raise BufferClosedError("the server is closed, or belongs to the process this one was forked from")

    def abandon_after_fork(self) -> None:
        """In a forked child, which does not have the threads: close what only they use."""
        for loop in self.loops:
            loop.abandon_after_fork()
        if self._directory is not None and not self._directory.closed:
            os.close(self._directory.lock)  # the folder can be swept when the parent is dead


class _LaneUnusable(Exception):
    """This machine cannot use a lane."""

    def __init__(self, lane: Lane, error: Unreachable) -> None:
        super().__init__(str(error))
        self.lane = lane
        self.error = error


def _ports_of(lanes: Sequence[Lane], port: int | Mapping[str, int]) -> dict[Lane, range]:
    """The ports to try for each lane."""
    for each in (port,) if isinstance(port, int) else port.values():
        if not 0 <= each < 65536:
            raise ConfigError("port", each, "0 to 65535")
    found = {}
    for lane in lanes:
        first = port if isinstance(port, int) else port.get(lane.name, 0)
        tried = PORTS_TO_TRY if first and isinstance(port, int) else 1
        found[lane] = range(first, min(first + tried, 65536))
    return found


def _served(choice: LaneChoice, secret: bytes | None) -> tuple[Lane, ...]:
    """The lanes that a choice means."""
    lanes = chosen_lanes("lane", choice)
    if lanes is not None:
        return lanes
    return tuple(lane for lane in LANES.values() if lane.available and (lane.local or secret is not None))


_servers: weakref.WeakSet[PayloadServer] = weakref.WeakSet()


def _abandon_in_child() -> None:
    for server in _servers:
        server.abandon_after_fork()
    _servers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_in_child)
