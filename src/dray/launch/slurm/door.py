"""Where the head lets other nodes in: who connects has a bounded time to show that it knows the job's secret."""

from __future__ import annotations

import logging
import selectors
import socket
from collections.abc import Callable

from dray.clock import Deadline
from dray.errors import AuthenticationError
from dray.launch.slurm.connection import end_when_silent, listen
from dray.launch.slurm.greeting import Host, Purpose

GREETING_BOUND = 5.0
"""Seconds that a new connection has to show that it knows the secret."""

MOST_GREETED = 64
"""Connections that have not shown it yet; the oldest gives way to another one."""

_CHUNK = 4096
_LOG = logging.getLogger("dray.launch.door")


class _Greeted:
    """A connection that has not shown yet that it knows the secret."""

    def __init__(self, connected: socket.socket, secret: bytes) -> None:
        self.connected = connected
        self.host = Host(secret)
        self.deadline = Deadline.after(GREETING_BOUND)


class Door:
    """A listening socket, and the connections that have not been let in. Nothing here waits.

    Args:
        host: an address of this machine.
        silence: seconds, as for `end_when_silent`, for connections that were let in.
        refusal: says why a connection is not wanted, or nothing.
        welcome: is given those that are.

    Raises:
        ConfigError: this machine has no such address.
    """

    def __init__(
        self,
        host: str,
        secret: bytes,
        silence: float,
        refusal: Callable[[Purpose], str],
        welcome: Callable[[Purpose, socket.socket], None],
    ) -> None:
        self._secret = secret
        self._silence = silence
        self._refusal = refusal
        self._welcome = welcome
        self._greeted: set[_Greeted] = set()
        self._selector: selectors.BaseSelector | None = None
        self._listener: socket.socket | None = listen(host)

    def open(self, selector: selectors.BaseSelector) -> tuple[str, int]:
        """Let `selector` call what is here when somebody comes; returns where the door is."""
        assert self._listener is not None
        self._selector = selector
        selector.register(self._listener, selectors.EVENT_READ, self._accept)
        host, port = self._listener.getsockname()
        return host, port

    def look(self) -> None:
        """Drop connections that have taken too long."""
        for greeted in [each for each in self._greeted if each.deadline.expired]:
            self._drop(greeted, f"it said nothing within {GREETING_BOUND:g} s")

    def close(self) -> None:
        """Let nobody in any more. Twice is fine."""
        if self._listener is not None:
            if self._selector is not None:
                self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None
        for greeted in list(self._greeted):
            self._drop(greeted, "the job ends")

    def _accept(self) -> None:
        assert self._listener is not None
        assert self._selector is not None
        try:
            connected, _ = self._listener.accept()
        except OSError:  # whoever it was has gone
            return
        connected.setblocking(False)
        greeted = _Greeted(connected, self._secret)
        self._greeted.add(greeted)
        self._selector.register(connected, selectors.EVENT_READ, lambda: self._greet(greeted))
        try:
            connected.send(greeted.host.nonce, socket.MSG_NOSIGNAL)
        except OSError as error:
            self._drop(greeted, str(error))
        if len(self._greeted) > MOST_GREETED:
            self._drop(min(self._greeted, key=lambda each: each.deadline.at), "too many say nothing")

    def _greet(self, greeted: _Greeted) -> None:
        try:
            chunk = greeted.connected.recv(_CHUNK)
            if not chunk:
                self._drop(greeted, "it was closed")
                return
            answer = greeted.host.feed(chunk)
            if answer is None:
                return
            purpose, proof = answer
            if refusal := self._refusal(purpose):
                self._drop(greeted, refusal)
                return
            end_when_silent(greeted.connected, self._silence)
            greeted.connected.send(proof, socket.MSG_NOSIGNAL)
        except (OSError, AuthenticationError) as error:
            self._drop(greeted, str(error))
            return
        assert self._selector is not None
        self._selector.unregister(greeted.connected)
        self._greeted.discard(greeted)
        self._welcome(purpose, greeted.connected)

    def _drop(self, greeted: _Greeted, why: str) -> None:
        if greeted in self._greeted:
            assert self._selector is not None
            _LOG.warning("a connection is not taken: %s", why)
            self._greeted.discard(greeted)
            self._selector.unregister(greeted.connected)
            greeted.connected.close()
