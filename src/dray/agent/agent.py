"""The agent: holds the descriptors of rings while their owners live, and inherits what these leave when they die.

One thread waits for registrations, for the pidfds of owners, and for consumers that ask too early. Each
inheritance has its own threads, so that one with many consumers delays nothing. The only sign of an owner's death
is its own pidfd, which the owner has sent: no timer and no closed connection.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import select
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dray import admission
from dray.admission import AcceptPause, Unproven
from dray.agent.folder import SOCKET_NAME
from dray.agent.held_ring import HeldRing, Inheritance
from dray.agent.messages import MAX_MESSAGE, WITHDRAWN, Answer, Request
from dray.clock import Deadline
from dray.errors import ConfigError, DrayError, ProtocolError
from dray.forking import here, not_inherited
from dray.identifiers import DEFAULT_AGENT_KEEP, DEFAULT_AGENT_MEMORY
from dray.private_directory import MAX_SOCKET_PATH
from dray.resources import Closing, needing
from dray.ring.consumer_events import Bell, Descriptor
from dray.ring.inherited import FOR_HEIR
from dray.transport.lanes.socket import NO_SIGNAL, received_descriptors

MAX_RINGS: Final = 1024
"""Rings that are registered, or inherited, at a time."""

TURN_AWAY_SECONDS: Final = 1.0
"""How long a consumer waits here for an owner that does not answer it and is not dead."""

_UCRED: Final = struct.Struct("3i")
_INT: Final = struct.Struct("@i")
_LOG = logging.getLogger("dray.agent")


@dataclass(frozen=True, slots=True)
class AgentStatistics:
    """An agent at one moment. Counters start with the agent."""

    registered: int  # rings of living owners
    inheritances: int  # rings of dead owners that are served
    left: int  # payloads of these that are neither consumed nor dropped
    memory: int  # bytes of memory of these
    inherited_rings: int  # rings of dead owners so far that had payloads
    inherited_payloads: int  # their payloads
    inherited_bytes: int  # the size of these
    dropped: int  # inherited payloads that were given up: for a limit of memory or time, or the agent's end
    ignored: int  # slots that contradicted themselves when they were inherited
    refused: int  # registrations that were refused
    turned_away: int  # times that consumers asked here for payloads of a living owner

    @property
    def consumed(self) -> int:
        """Inherited payloads that all readers have consumed."""
        return self.inherited_payloads - self.dropped - self.left


class Agent(Closing):
    """Runs in a thread until it is closed. What it has inherited ends with it, also when its process is killed.

    Args:
        folder: where its sockets are made: one of this user alone, which exists.
        memory: bytes of memory that inherited rings may keep together; above it the oldest are dropped.
        keep: seconds after the death of an owner when what is left of it is dropped.

    Attributes:
        path: the socket at which owners register.

    Raises:
        ConfigError: an argument is not allowed.
        OutOfResources: no descriptor is left.
    """

    def __init__(
        self, folder: Path, *, memory: int = DEFAULT_AGENT_MEMORY, keep: float = DEFAULT_AGENT_KEEP
    ) -> None:
        if memory <= 0:
            raise ConfigError("memory", memory, "more than 0 bytes")
        if not 0 < keep < math.inf:
            raise ConfigError("keep", keep, "more than 0 seconds")
        self.path = folder / SOCKET_NAME
        if len(os.fsencode(self.path)) > MAX_SOCKET_PATH:
            allowed = f"a folder whose sockets have paths of at most {MAX_SOCKET_PATH} bytes"
            raise ConfigError("folder", str(folder), allowed)
        self._folder, self._memory, self._keep = folder, memory, keep
        self._mark = here[0]
        self._actions: dict[int, Callable[[], None]] = {}
        self._silent: Unproven[socket.socket] = Unproven()
        self._pause, self._paused = AcceptPause(_LOG), False
        self._held: dict[HeldRing, socket.socket] = {}
        self._lock = threading.Lock()  # guards what follows
        self._inheritances: dict[Inheritance, None] = {}  # oldest first
        self._ended: deque[Inheritance] = deque()
        self._counts = dict.fromkeys(("rings", "payloads", "bytes", "dropped", "ignored", "refused", "away"), 0)
        self._stopping = False
        with contextlib.ExitStack() as made, needing("the sockets of an agent"):
            self._wake = made.enter_context(Bell(os.eventfd, 0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            self._epoll = made.enter_context(contextlib.closing(select.epoll()))
            listening = not_inherited(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            self._listening = made.enter_context(listening)
            self._listening.bind(os.fsencode(self.path))
            made.callback(self.path.unlink, missing_ok=True)
            self._listening.listen(admission.BACKLOG)
            self._listening.setblocking(False)
            self._watch(self._wake.fileno(), self._collect_ended)
            self._watch(self._listening.fileno(), self._accept)
            self._made = made.pop_all()
        self._thread = threading.Thread(target=self._run, name="dray-agent", daemon=True)
        self._thread.start()

    def statistics(self) -> AgentStatistics:
        """The agent at this moment."""
        with self._lock:
            counts = self._counts
            counted = [each.count() for each in self._inheritances]
            return AgentStatistics(
                registered=len(self._held),
                inheritances=len(self._inheritances),
                left=sum(left for left, _ in counted),
                memory=sum(each.memory for each in self._inheritances),
                inherited_rings=counts["rings"],
                inherited_payloads=counts["payloads"],
                inherited_bytes=counts["bytes"],
                dropped=counts["dropped"] + sum(dropped for _, dropped in counted),
                ignored=counts["ignored"],
                refused=counts["refused"],
                turned_away=counts["away"],
            )

    def close(self) -> None:
        """Hold nothing any more. Twice is fine; in a forked child nothing happens."""
        if here[0] != self._mark:
            return
        self._stopping = True
        self._wake.ring()
        self._thread.join()
        self._made.close()

    def __repr__(self) -> str:
        state = "closed" if self._stopping else f"{len(self._held)} rings"
        return f"<Agent at {self.path}, {state}>"

    # --- the thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                # An event may be that of a descriptor which an action before it has closed: then its number has no
                # action, or another one, which finds nothing to do.
                for number, _ in self._epoll.poll(self._timeout()):
                    if (action := self._actions.get(number)) is not None:
                        self._act(action)
                for late in self._silent.overdue():
                    self._close_connection(late)
                for held in [each for each in self._held if each.turn_away is not None and each.turn_away.expired]:
                    self._turn_away(held)
                if self._paused and not self._pause.remaining:
                    self._paused = False
                    self._watch(self._listening.fileno(), self._accept)
        except BaseException:
            _LOG.exception("the agent has failed: nothing is inherited any more")
            raise
        finally:
            self._close_all()

    def _act(self, action: Callable[[], None]) -> None:
        """One ring or connection that fails does not concern the others."""
        try:
            action()
        except (DrayError, OSError) as error:
            _LOG.error("%s", error)

    def _timeout(self) -> float | None:
        remaining = [each.turn_away.remaining for each in self._held if each.turn_away is not None]
        pause = self._pause.remaining if self._paused else math.inf
        due = min(self._silent.remaining, pause, *remaining)
        return None if due == math.inf else due

    def _watch(self, number: int, action: Callable[[], None]) -> None:
        self._epoll.register(number, select.EPOLLIN)
        self._actions[number] = action

    def _unwatch(self, number: int) -> None:
        if self._actions.pop(number, None) is not None:
            self._epoll.unregister(number)

    def _close_all(self) -> None:
        for held in list(self._held):
            self._release(held)
        for connection in list(self._silent):
            self._close_connection(connection)
        with self._lock:
            inheritances = list(self._inheritances)
        for inheritance in inheritances:
            inheritance.end()
        for inheritance in inheritances:
            inheritance.close()
        self._collect_ended()

    # --- registrations ----------------------------------------------------------------------------------------

    def _accept(self) -> None:
        for _ in range(admission.MAX_ACCEPTED):
            try:
                connection = admission.accept(self._listening)
            except OSError as error:  # no descriptor is left: the connection stays in the backlog for a while
                self._unwatch(self._listening.fileno())
                self._pause.begin(error)
                self._paused = True
                return
            if connection is None:
                return
            connection.setblocking(False)
            pid, uid, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
            if uid != os.getuid():
                _LOG.warning("process %d belongs to user %d, not to this one: its ring is refused", pid, uid)
                connection.close()
                continue
            displaced = self._silent.add(not_inherited(connection))
            if displaced is not None:
                self._close_connection(displaced)
            self._watch(connection.fileno(), functools.partial(self._register, connection, pid))

    def _register(self, connection: socket.socket, pid: int) -> None:
        """Take the first message of a connection, and answer it."""
        descriptors: list[Descriptor] = []
        message = _receive(connection, descriptors)
        if message is None:
            return
        self._silent.discard(connection)
        held: HeldRing | None = None
        try:
            if len(self._held) + len(self._inheritances) >= MAX_RINGS:
                raise ProtocolError(f"the agent holds {MAX_RINGS} rings already")
            held = HeldRing(Request.decode(message), descriptors, pid, self._folder)
            answer = Answer(held.endpoints)
        except DrayError as error:
            for each in descriptors:
                each.close()
            with self._lock:
                self._count(refused=1)
            _LOG.warning("the ring of process %d is refused: %s", pid, error)
            answer = Answer(refused=str(error))
        if held is None:
            self._unwatch(connection.fileno())
        else:
            with self._lock:
                self._held[held] = connection
            self._actions[connection.fileno()] = functools.partial(self._hear, held, connection)
            self._watch(held.owner.fileno(), functools.partial(self._check_owner, held))
            for listener in held.listeners:
                self._watch(listener.fileno(), functools.partial(self._asked, held))
        with contextlib.suppress(OSError):  # the owner waits no longer: its references do not name this agent
            connection.send(answer.encode(), NO_SIGNAL)
        if held is None:
            connection.close()

    def _hear(self, held: HeldRing, connection: socket.socket) -> None:
        """The owner withdraws its ring. If only the connection has ended, nothing has happened to the owner."""
        message = _receive(connection, [])
        if message is None:
            return
        if message == WITHDRAWN or held.owner_has_closed:
            self._release(held)
        elif not message:
            self._close_connection(connection)

    def _close_connection(self, connection: socket.socket) -> None:
        self._silent.discard(connection)
        if connection.fileno() >= 0:
            self._unwatch(connection.fileno())
            connection.close()

    def _stop_waiting(self, held: HeldRing) -> None:
        """Wait for nothing of a ring any more."""
        held.turn_away = None
        self._unwatch(held.owner.fileno())
        for listener in held.listeners:
            self._unwatch(listener.fileno())
        self._close_connection(self._held[held])

    def _release(self, held: HeldRing) -> None:
        """Keep nothing of a ring."""
        self._stop_waiting(held)
        held.close()
        with self._lock:
            del self._held[held]

    # --- deaths -----------------------------------------------------------------------------------------------

    def _check_owner(self, held: HeldRing) -> None:
        """Inherit what an owner has left that is dead."""
        if not held.owner_is_dead:
            return
        if held.owner_has_closed:
            self._release(held)
            return
        self._stop_waiting(held)
        try:
            inheritance = Inheritance(held, self._keep, self._note_ended)
        except DrayError as error:
            self._release(held)
            _LOG.error("the payloads of %s (pid %d) are lost: %s", held.name, held.pid, error)
            return
        payloads, nbytes = inheritance.payloads, inheritance.nbytes
        with self._lock:
            del self._held[held]
            self._inheritances[inheritance] = None
            self._count(rings=payloads > 0, payloads=payloads, bytes=nbytes, ignored=inheritance.ignored)
        _LOG.info("%s (pid %d) has died; %d payloads (%d bytes) are kept", held.name, held.pid, payloads, nbytes)
        self._limit_memory()

    def _limit_memory(self) -> None:
        """Give up the oldest inheritances, but no more than necessary."""
        with self._lock:
            kept = [each for each in self._inheritances if not each.dropping]
        memory = sum(each.memory for each in kept)
        for oldest in kept:
            if memory <= self._memory:
                return
            memory -= oldest.memory
            oldest.drop(f"inherited rings may keep {self._memory} bytes together")

    def _note_ended(self, inheritance: Inheritance) -> None:
        """In the thread of the inheritance."""
        self._ended.append(inheritance)
        self._wake.ring()

    def _collect_ended(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake.fileno())
        while self._ended:
            inheritance = self._ended.popleft()
            with self._lock:
                self._inheritances.pop(inheritance, None)
                self._count(dropped=inheritance.dropped)

    # --- consumers that come too early --------------------------------------------------------------------------

    def _asked(self, held: HeldRing) -> None:
        """Consumers have found no server of the owner: it is about to be dead, or its server has failed."""
        for listener in held.listeners:
            self._unwatch(listener.fileno())
        held.turn_away = Deadline.after(TURN_AWAY_SECONDS)

    def _turn_away(self, held: HeldRing) -> None:
        held.turn_away = None
        with self._lock:
            self._count(away=1)
        held.close_waiting()
        for listener in held.listeners:
            self._watch(listener.fileno(), functools.partial(self._asked, held))

    def _count(self, **more: int) -> None:
        """With the lock."""
        for name, number in more.items():
            self._counts[name] += number


def _receive(connection: socket.socket, descriptors: list[Descriptor]) -> bytes | None:
    """The next message, empty at the end of the connection; None if there is none yet.

    Args:
        connection: where it comes from.
        descriptors: gets those that came with it.
    """
    room = socket.CMSG_LEN(2 * len(FOR_HEIR) * _INT.size)
    try:
        message, ancillary, _, _ = connection.recvmsg(MAX_MESSAGE, room, socket.MSG_CMSG_CLOEXEC)
    except BlockingIOError:
        return None
    except OSError:  # it has failed
        return b""
    numbers = received_descriptors(ancillary)
    descriptors += [Descriptor(numbers.pop, 0) for _ in range(len(numbers))]
    return message
