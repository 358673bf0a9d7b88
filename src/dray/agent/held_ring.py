"""A ring that an agent holds: a `HeldRing` while its owner lives, then an `Inheritance`, which is served."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from dray.agent.messages import Request
from dray.clock import Deadline
from dray.errors import BufferClosedError, ProtocolError, TransportError
from dray.protocol.handshake import check_secret
from dray.protocol.ref import HEIR
from dray.resources import Closing
from dray.ring.consumer_events import Descriptor, ProcessDescriptor
from dray.ring.direct import LeftWords, pid_behind
from dray.ring.inherited import FOR_HEIR, InheritedRing, check_inheritance, closed_by_owner, memory_of
from dray.transport import PayloadServer
from dray.transport.lanes import SHM, TCP
from dray.transport.lanes.base import ListenAt, Listener

MAX_ACCEPTED: Final = 1024
"""Connections that are turned away at a time."""

DRAIN_SECONDS: Final = 0.5
"""How long an inheritance that has ended finishes what is in flight."""

_LOG = logging.getLogger("dray.agent")


class HeldRing(Closing):
    """The descriptors of a registered ring, and the sockets at which consumers will ask for its payloads.

    The sockets listen from the beginning, so that a consumer that comes before the owner's death is known here
    waits instead of finding nothing.

    Args:
        request: what the owner has asked for.
        descriptors: those of `FOR_HEIR`; the ring owns them, also if this raises.
        pid: the owner, as the kernel reports it for its connection.
        folder: where the socket of the ``shm`` lane is made.

    Attributes:
        name, pid: the owner.
        producer: the producer id.
        owner: a pidfd of the owner. Only that it is readable means that the owner is dead.
        endpoints: for references.
        listeners: the sockets.
        turn_away: when consumers that wait although the owner lives are turned away; None if none wait.

    Raises:
        ProtocolError: a descriptor is not what it should be.
        ConfigError: the secret is too short, or the network address is not one of this machine.
        TransportError: no socket could be made.
    """

    def __init__(self, request: Request, descriptors: Sequence[Descriptor], pid: int, folder: Path) -> None:
        self.name, self.pid = request.name, pid
        self.turn_away: Deadline | None = None
        self._request = request
        with contextlib.ExitStack() as made:
            for each in descriptors:
                made.callback(each.close)
            if len(descriptors) != len(FOR_HEIR):
                raise ProtocolError(f"{len(descriptors)} descriptors came instead of {', '.join(FOR_HEIR)}")
            self._segment, self._control, self._board, self._bell = descriptors[:-1]
            self.owner = made.enter_context(ProcessDescriptor(os.dup, descriptors[-1].fileno()))
            behind = pid_behind(self.owner.fileno())
            if behind is None or behind not in (0, pid):
                raise ProtocolError(f"the last descriptor is not a pidfd of process {pid}")
            check_secret(request.secret)
            layout, self.producer = check_inheritance(
                self._segment.fileno(), self._control.fileno(), self._board.fileno(), request.readers
            )
            self._slots = layout.slots
            self.listeners: list[Listener] = []
            if SHM.name in request.lanes:
                path = folder / f"{self.producer.hex()[:16]}.sock"
                self.listeners.append(made.enter_context(SHM.listen(ListenAt("", path=path))))
            if TCP.name in request.lanes and request.secret is not None:
                self.listeners.append(made.enter_context(TCP.listen(ListenAt(request.host))))
            if not self.listeners:
                raise ProtocolError(f"an heir serves shm, and tcp with a secret, not {', '.join(request.lanes)}")
            self.endpoints = tuple(HEIR + each.endpoint for each in self.listeners)
            self._made = made.pop_all()

    @property
    def owner_is_dead(self) -> bool:
        """All threads of the owner's process have ended."""
        return self.owner.has_ended()

    @property
    def owner_has_closed(self) -> bool:
        """The owner has closed its ring in order, and so leaves nothing."""
        return closed_by_owner(self._control.fileno(), self._slots)

    def inherit(self) -> InheritedRing:
        """The payloads that the dead owner has left. Raises as `InheritedRing`."""
        left = LeftWords(self._control.fileno(), self._board.fileno(), self._bell.fileno())
        return InheritedRing(self._segment.fileno(), left, self._request.readers)

    def serve(self, ring: InheritedRing) -> PayloadServer:
        """A server of the ring at the sockets, which are the server's from now on."""
        return PayloadServer(
            ring,
            secret=self._request.secret,
            max_leases=self._request.max_leases,
            drain_timeout=DRAIN_SECONDS,
            listeners=self.listeners,
        )

    def close_waiting(self) -> None:
        """Close the connections of consumers that wait although the owner lives: their payloads are with it."""
        for listener in self.listeners:
            with contextlib.suppress(TransportError, ProtocolError):
                for _ in range(MAX_ACCEPTED):
                    stream = listener.accept()
                    if stream is None:
                        break
                    stream.close()

    def close(self) -> None:
        self._made.close()

    def __repr__(self) -> str:
        return f"<HeldRing {self.producer.hex()[:8]} of {self.name} (pid {self.pid})>"


class Inheritance(Closing):
    """The payloads of a dead owner: a thread serves them until all are consumed, or the time is over.

    Args:
        held: the ring, which the inheritance closes.
        keep: seconds until what is left is dropped.
        ended: called in the thread, at its end.

    Attributes:
        name, pid: the owner.
        payloads, nbytes: what there was at its death.
        ignored: slots that contradicted themselves.
        dropped: payloads that were given up.
        dropping: what was left was given up.
        memory: bytes of memory that it keeps.
    """

    def __init__(self, held: HeldRing, keep: float, ended: Callable[[Inheritance], None]) -> None:
        self.name, self.pid = held.name, held.pid
        self.dropped, self.dropping = 0, False
        self._keep = keep
        self._dropping = threading.Lock()
        self._ended = ended
        with contextlib.ExitStack() as made:
            made.enter_context(held)
            self._ring = made.enter_context(held.inherit())
            self.payloads, self.nbytes = self._ring.inherited, self._ring.inherited_bytes
            self.ignored = self._ring.ignored
            self.memory = memory_of(self._ring.segment.fileno())
            made.enter_context(held.serve(self._ring))
            self._made = made.pop_all()
        self._thread = threading.Thread(target=self._run, name="dray-inheritance", daemon=True)
        self._thread.start()

    def drop(self, why: str, level: int = logging.WARNING) -> None:
        """Give up what is left, and log how many payloads that are. Does not wait for the end of the thread."""
        with self._dropping, contextlib.suppress(BufferClosedError):
            self.dropping = True
            dropped = self._ring.drop_all()
            self.dropped += dropped
            if dropped:
                text = "dropped %d of %d payloads of %s (pid %d): %s"
                _LOG.log(level, text, dropped, self.payloads, self.name, self.pid, why)

    def count(self) -> tuple[int, int]:
        """How many payloads are neither consumed nor dropped, and how many were dropped, at one moment."""
        with self._dropping:
            try:
                return len(self._ring.ready(leased=True)), self.dropped
            except BufferClosedError:
                return 0, self.dropped

    def end(self) -> None:
        """Serve nothing any more; what is left is gone. Does not wait for the end of the thread. Twice is fine."""
        self.drop("the agent has ended", logging.INFO)
        self._ring.close()

    def _run(self) -> None:
        try:
            if not self._ring.wait_all_consumed(self._keep):
                self.drop(f"they were not consumed within {self._keep:g} s")
        except BufferClosedError:
            pass  # the agent closes
        finally:
            self._made.close()
            self._ended(self)

    def close(self) -> None:
        """`end`, and wait for the end of the thread."""
        self.end()
        self._thread.join()

    def __repr__(self) -> str:
        return f"<Inheritance of {self.name} (pid {self.pid}), {self.payloads} payloads>"
