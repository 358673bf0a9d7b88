"""Simulated sockets of the kernel under the production streams of the `shm` and `tcp` lanes.

A `Pipe` is one direction of a connection: bytes leave in pieces, arrive after a delay, and wait in a buffer of
limited size. The faults of connections happen here: resets, ends within a message, silence.
"""

from __future__ import annotations

import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dray.transport.lanes.base import Lane
from simulation.faults import Fault, FaultPlan
from simulation.scheduler import Process, Scheduler, Signal

_UCRED = struct.Struct("3i")
# The counters of acknowledged and received bytes in `struct tcp_info`.
_TCP_INFO_BYTES, _CARRIED_AT, _CARRIED = 232, 120, struct.Struct("=QQ")


class Pipe:
    """One direction of a connection.

    Attributes:
        arrived: what the receiver can read.
        carried: bytes that have arrived so far.
        ended: the sender has closed the pipe; after `arrived` comes the end.
        broken: the pipe was reset.
        lost: what is written disappears.
    """

    __slots__ = ("_capacity", "_delay", "_flying", "_last", "_plan", "_scheduler", "arrived", "broken", "carried",
                 "changed", "descriptors", "ended", "lost", "low_water", "unread")  # fmt: skip

    def __init__(self, scheduler: Scheduler, plan: FaultPlan) -> None:
        self._scheduler = scheduler
        self._plan = plan
        self._capacity = plan.capacity()
        self._delay = plan.delay()
        self._flying = 0
        self._last = 0.0
        self.low_water = 1
        self.arrived = bytearray()
        self.carried = 0
        self.descriptors: deque[int] = deque()
        self.ended = self.broken = self.lost = self.unread = False
        self.changed: list[Signal] = []

    @property
    def readable(self) -> bool:
        """A read does not wait; like the kernel, a pipe keeps room for twice the low-water mark."""
        enough = max(1, min(self.low_water, self._capacity // 2))
        return len(self.arrived) >= enough or self.ended or self.broken

    @property
    def room(self) -> int:
        """Bytes that can be written."""
        return self._capacity - self._flying - len(self.arrived)

    @property
    def writable(self) -> bool:
        """A write does not wait."""
        return self.broken or self.unread or self.room > 0

    def write(self, parts: Sequence[memoryview], whole: bool) -> int:
        """Send bytes of `parts`; returns their number. `whole`: as many as there is room for."""
        room = self.room
        if room <= 0:
            raise BlockingIOError
        data = b"".join(_first(parts, room))
        if not whole and len(data) > 1 and self._plan.splits():
            data = data[: self._scheduler.rng.randint(1, len(data))]
        if self.lost:
            return len(data)
        now = self._scheduler.now()
        due = max(now + self._delay, self._last)
        if due <= now:
            self.arrived += data
            self.carried += len(data)
            self.notify()
        else:
            self._flying += len(data)
            self._last = due
            self._scheduler.at(due, lambda: self._arrive(data))
        return len(data)

    def end(self) -> None:
        """End the pipe, after everything that was sent has arrived."""
        if self._last > self._scheduler.now():
            self._scheduler.at(self._last, self._end)
        else:
            self._end()

    def reset(self) -> None:
        """Drop everything on its way, and notify both sides."""
        self.broken = True
        if self._scheduler.rng.random() < 0.5:
            self.arrived.clear()
        self.notify()

    def truncate(self) -> None:
        """Drop the last bytes and everything after them."""
        if self.arrived:
            del self.arrived[self._scheduler.rng.randrange(len(self.arrived)) :]
        self.lost = True
        self._end()

    def slow(self, seconds: float) -> None:
        """Add to the delay of everything from now on."""
        self._delay += seconds

    def notify(self) -> None:
        """Wake the waiters of both sides."""
        for signal in self.changed:
            signal.notify()

    def _arrive(self, data: bytes) -> None:
        self._flying -= len(data)
        if not self.ended and not self.broken:
            self.arrived += data
            self.carried += len(data)
        self.notify()

    def _end(self) -> None:
        self.ended = True
        self.notify()


def _first(parts: Sequence[memoryview], room: int) -> Iterator[memoryview]:
    """The first `room` bytes of `parts`."""
    for part in parts:
        yield part[:room]
        room -= len(part)
        if room <= 0:
            return


class SimulatedSocket:
    """One end of a connection, with the methods that `dray.transport.lanes.socket` uses.

    Args:
        number: its descriptor.
        incoming, outgoing: the two directions.
        process: the owner.
        peer: the process at the other end.

    Attributes:
        signal: notified when the socket becomes readable or writable.
        failed: the owner has received an error or the end of the connection.
        called: called before each system call that others notice.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        plan: FaultPlan,
        number: int,
        lane: Lane,
        *,
        incoming: Pipe,
        outgoing: Pipe,
        process: Process,
        peer: Process,
    ) -> None:
        self._scheduler = scheduler
        self._plan = plan
        self._number = number
        self.lane = lane
        self._incoming = incoming
        self._outgoing = outgoing
        self._peer = peer
        self.process = process
        self.signal = Signal(scheduler)
        self.closed = self.failed = False
        self.called: Callable[[], None] = lambda: None
        incoming.changed.append(self.signal)
        outgoing.changed.append(self.signal)

    def watched_by(self, signal: Signal) -> None:
        """Notify another signal instead."""
        for pipe in (self._incoming, self._outgoing):
            pipe.changed[pipe.changed.index(self.signal)] = signal
        self.signal = signal

    def readable(self) -> bool:
        """A read does not wait."""
        return self._incoming.readable

    def writable(self) -> bool:
        """A write does not wait."""
        return self._outgoing.writable

    @property
    def alive(self) -> bool:
        """Nothing has ended the connection so far."""
        incoming, outgoing = self._incoming, self._outgoing
        over = (incoming.ended, incoming.broken, outgoing.ended, outgoing.broken, outgoing.unread)
        return not self.closed and not any(over)

    # --- what streams use -------------------------------------------------------------------------------------

    def shutdown(self, how: int) -> None:
        assert how == socket.SHUT_RDWR
        self.reset()

    def setblocking(self, blocking: bool) -> None:
        assert not blocking

    def setsockopt(self, _level: int, option: int, value: int) -> None:
        if option == socket.SO_RCVLOWAT:
            self._incoming.low_water = value

    def fileno(self) -> int:
        return -1 if self.closed else self._number

    def recv_into(self, room: memoryview) -> int:
        self._check()
        incoming = self._incoming
        have = min(len(incoming.arrived), len(room))
        if not have:
            if incoming.broken:
                self.failed = True
                raise ConnectionResetError(104, "simulated reset")
            if incoming.ended:
                self.failed = True
                return 0
            raise BlockingIOError
        if have > 1 and self.lane.in_band and self._plan.splits():
            have = self._scheduler.rng.randint(1, have)
        full = incoming.room <= 0
        room[:have] = incoming.arrived[:have]
        del incoming.arrived[:have]
        if full:
            incoming.notify()
        return have

    def send(self, data: memoryview, flags: int = 0) -> int:
        return self.sendmsg([data], (), flags)

    def sendmsg(
        self, parts: Sequence[memoryview], ancillary: Sequence[tuple[int, int, Any]] = (), flags: int = 0
    ) -> int:
        assert flags == socket.MSG_NOSIGNAL
        self._check()
        self.called()
        fault = self._plan.strike(self.lane)
        if fault is not None:
            self._suffer(fault)
        if self._outgoing.broken or self._incoming.broken:
            self.failed = True
            raise ConnectionResetError(104, "simulated reset")
        if self._outgoing.unread:
            # On TCP, the first write after the peer has closed is lost without an error.
            if not self.lane.in_band or self._outgoing.lost:
                self.failed = True
                raise BrokenPipeError(32, "simulated broken pipe")
            self._outgoing.lost = True
            self._plan.count("write lost")
            return sum(len(part) for part in parts)
        sent = self._outgoing.write(parts, whole=not self.lane.in_band)
        for _level, _kind, rights in ancillary:
            self._outgoing.descriptors.extend(os.dup(descriptor) for descriptor in rights)
        return sent

    def recvmsg(self, size: int, _ancillary: int) -> tuple[bytes, list[Any], int, None]:
        message = bytearray(size)
        got = self.recv_into(memoryview(message))
        passed = self._incoming.descriptors
        rights = (
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(passed)}i", *passed))] if passed else []
        )
        passed.clear()
        return bytes(message[:got]), rights, 0, None

    def getsockopt(self, level: int, _option: int, _size: int) -> bytes:
        if level == socket.IPPROTO_TCP:
            info = bytearray(_TCP_INFO_BYTES)
            _CARRIED.pack_into(info, _CARRIED_AT, self._outgoing.carried, self._incoming.carried)
            return bytes(info)
        return _UCRED.pack(self._peer.pid, os.getuid(), 0)

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self.called()
        self._outgoing.end()
        # Closing with unread data resets the connection; what the peer writes from now on is lost.
        if self._incoming.arrived and self.lane.in_band:
            self._outgoing.reset()
        self._incoming.unread = True
        self._incoming.arrived.clear()
        while self._incoming.descriptors:
            os.close(self._incoming.descriptors.popleft())
        self._incoming.notify()

    # --- faults -----------------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Send as much as there is room for."""
        self._outgoing.write([memoryview(data)], whole=True)

    def reset(self) -> None:
        """The network ends the connection."""
        self._incoming.reset()
        self._outgoing.reset()

    def _suffer(self, fault: Fault) -> None:
        self._scheduler.note(f"{fault.value} strikes {self._number}")
        match fault:
            case Fault.RESET:
                self.reset()
            case Fault.HALF_CLOSE:
                self._outgoing.end()
            case Fault.TRUNCATION:
                self._outgoing.truncate()
            case Fault.SILENCE:
                self._outgoing.lost = True
            case Fault.DELAY:
                self._outgoing.slow(self._plan.long_delay())
            case _:
                raise AssertionError(fault)

    def _check(self) -> None:
        if self.closed:
            raise OSError(9, "simulated: closed")
