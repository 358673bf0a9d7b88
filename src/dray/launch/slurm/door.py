"""Where the head lets other nodes in: who connects has a bounded time to show that it knows the job's secret."""

from __future__ import annotations

import logging
import selectors
import socket
from collections.abc import Callable

from dray.admission import MAX_ACCEPTED, UNPROVEN_SECONDS, AcceptPause, LineLimit, Unproven, accept
from dray.errors import AuthenticationError
from dray.launch.slurm.connection import end_when_silent, listen
from dray.launch.slurm.greeting import Host, Purpose

_CHUNK = 4096
_LOG = logging.getLogger("dray.launch.door")


class _Greeted:
    """A connection that has not shown yet that it knows the secret."""

    def __init__(self, connected: socket.socket, secret: bytes) -> None:
        self.connected = connected
        self.host = Host(secret)


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
        self._unproven: Unproven[_Greeted] = Unproven()
        self._pause = AcceptPause(_LOG)
        self._paused = False
        self._lines = LineLimit()
        self._selector: selectors.BaseSelector | None = None
        self._listener: socket.socket | None = listen(host)

    def open(self, selector: selectors.BaseSelector) -> tuple[str, int]:
        """Let `selector` call what is here when somebody comes; returns where the door is."""
        assert self._listener is not None
        self._selector = selector
        self._accept_when_readable()
        host, port = self._listener.getsockname()
        return host, port

    def look(self) -> None:
        """Drop connections that have taken too long, and accept again after a pause."""
        for greeted in self._unproven.overdue():
            self._close(greeted, f"it has not proven the secret within {UNPROVEN_SECONDS:g} s")
        if self._paused and not self._pause.remaining and self._listener is not None:
            self._accept_when_readable()

    def close(self) -> None:
        """Let nobody in any more. Twice is fine."""
        if self._listener is not None:
            if self._selector is not None and not self._paused:
                self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None
        for greeted in list(self._unproven):
            self._drop(greeted, "the job ends")

    def _accept_when_readable(self) -> None:
        assert self._selector is not None
        assert self._listener is not None
        self._paused = False
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def _accept(self) -> None:
        assert self._listener is not None
        assert self._selector is not None
        for _ in range(MAX_ACCEPTED):
            try:
                connected = accept(self._listener)
            except OSError as error:
                self._pause.begin(error)
                self._paused = True
                self._selector.unregister(self._listener)
                return
            if connected is None:
                return
            self._add(connected)

    def _add(self, connected: socket.socket) -> None:
        assert self._selector is not None
        connected.setblocking(False)
        greeted = _Greeted(connected, self._secret)
        displaced = self._unproven.add(greeted)
        if displaced is not None:
            self._close(displaced, "newer ones that have not proven the secret displaced it")
        self._selector.register(connected, selectors.EVENT_READ, lambda: self._greet(greeted))
        try:
            connected.send(greeted.host.nonce, socket.MSG_NOSIGNAL)
        except OSError as error:
            self._drop(greeted, str(error))

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
        self._unproven.discard(greeted)
        self._welcome(purpose, greeted.connected)

    def _drop(self, greeted: _Greeted, why: str) -> None:
        if greeted in self._unproven:
            self._unproven.discard(greeted)
            self._close(greeted, why)

    def _close(self, greeted: _Greeted, why: str) -> None:
        assert self._selector is not None
        self._lines.warn(_LOG, "a connection is not taken: %s", why)
        self._selector.unregister(greeted.connected)
        greeted.connected.close()
