"""Connections between the nodes of a job: how each end proves that it knows the job's secret.

```
head                                         node
  nonce (32 bytes) ─────────────────────────►
  ◄─────────────── nonce, proof of the node, purpose
  proof of the head ────────────────────────►
```

These are messages as of `dray.jobs.messages.channel`. A proof is an HMAC-SHA256 over both nonces and the purpose,
under a key that follows from the secret. The secret itself is never sent, and a proof is good for one connection.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import secrets
import selectors
import socket
from collections.abc import Callable
from contextlib import ExitStack
from typing import Annotated

from pydantic import Field, ValidationError

from dray.admission import BACKLOG, MAX_ACCEPTED, UNPROVEN_SECONDS, AcceptPause, LineLimit, Unproven, accept
from dray.clock import Deadline
from dray.errors import AuthenticationError, ConfigError, DrayError, TransportError, TransportTimeout, Unreachable
from dray.jobs.messages.channel import Frames, FramingError, framed
from dray.jobs.messages.models import Message
from dray.resources import Closing

# --- handshake ---------------------------------------------------------------------------------------------------

NONCE = 32
PROOF = 32
_MAX_PURPOSE = 1024
_STRANGER = "the listener at the head's address does not know the job's secret"


class ConnectionInfo(Message):
    """What a connection is for: the orders to a node of an attempt, or the channel of a policy rank there."""

    node: Annotated[str, Field(min_length=1, max_length=255)]
    attempt: Annotated[str, Field(min_length=1, max_length=64)]
    rank: Annotated[int, Field(ge=1)] | None = None


class ServerAuth:
    """The head's end. No I/O.

    Attributes:
        challenge: what it sends first.
    """

    def __init__(self, secret: bytes) -> None:
        self._key = _key(secret)
        self._frames = Frames(NONCE + PROOF + _MAX_PURPOSE)
        self._nonce = secrets.token_bytes(NONCE)
        self.challenge = framed(self._nonce)

    def feed(self, chunk: bytes) -> tuple[ConnectionInfo, bytes] | None:
        """Take what was received; once the node's message is complete, its purpose and what the head sends then.

        Raises:
            AuthenticationError: the node does not know the secret, or is of another version.
        """
        self._frames.feed(chunk)
        try:
            body = self._frames.next()
        except FramingError as error:
            raise AuthenticationError(f"the other end of a connection sends no proof: {error}") from error
        if body is None:
            return None
        theirs, proof, text = body[:NONCE], body[NONCE : NONCE + PROOF], body[NONCE + PROOF :]
        proven = hmac.compare_digest(_proof(self._key, b"node", self._nonce, theirs, text), proof)
        if not proven or self._frames:
            raise AuthenticationError("the other end of a connection does not know the job's secret")
        try:
            purpose = ConnectionInfo.model_validate_json(text)
        except ValidationError as error:
            raise AuthenticationError("the other end of a connection is of another version") from error
        return purpose, framed(_proof(self._key, b"head", self._nonce, theirs, text))


def answer(secret: bytes, purpose: ConnectionInfo, challenge: bytes) -> tuple[bytes, bytes]:
    """What the node sends when it has received the head's nonce, and the proof that the head must send then."""
    key, text, ours = _key(secret), purpose.model_dump_json().encode(), secrets.token_bytes(NONCE)
    proof, expected = (_proof(key, whose, challenge, ours, text) for whose in (b"node", b"head"))
    return framed(ours + proof + text), expected


def _key(secret: bytes) -> bytes:
    return hmac.digest(secret, b"dray connection between nodes", hashlib.sha256)


def _proof(key: bytes, whose: bytes, nonce_of_head: bytes, nonce_of_node: bytes, text: bytes) -> bytes:
    return hmac.digest(key, whose + nonce_of_head + nonce_of_node + text, hashlib.sha256)


# --- connection --------------------------------------------------------------------------------------------------

_PROBES = 3


def listen(host: str) -> socket.socket:
    """A listening socket at `host`, on any free port; it does not block.

    Raises:
        ConfigError: this machine has no such address.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.bind((host, 0))
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ConfigError("slurm.interface", host, f"an address of this machine ({error.strerror})") from error
    return listener


def end_when_silent(connected: socket.socket, seconds: float) -> None:
    """Let the connection fail when the other machine has not answered for `seconds`, whether or not anything is
    sent. Small messages are sent at once."""
    interval = max(1, math.floor(seconds / (_PROBES + 1)))
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, interval)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, math.ceil(seconds * 1000))


def connect(
    address: tuple[str, int], secret: bytes, purpose: ConnectionInfo, deadline: Deadline, silence: float
) -> socket.socket:
    """A connection to the head that has shown that it knows the secret; it does not block.

    Args:
        silence: seconds, as for `end_when_silent`.

    Raises:
        TransportError: there is no answer in time.
        AuthenticationError: the listener there does not know the secret.
    """
    endpoint = f"tcp:{address[0]}:{address[1]}"
    with ExitStack() as opened:
        try:
            connected = opened.enter_context(
                socket.create_connection(address, timeout=max(0.001, deadline.remaining))
            )
        except OSError as error:
            message = f"the head cannot be reached: {error}"
            raise Unreachable(message, endpoint=endpoint, elapsed=deadline.elapsed) from error
        end_when_silent(connected, silence)
        try:
            nonce = _receive(connected, deadline, endpoint)
            if len(nonce) != NONCE:
                raise FramingError(f"a nonce has {NONCE} bytes, not {len(nonce)}")
            proof, expected = answer(secret, purpose, nonce)
            connected.settimeout(max(0.001, deadline.remaining))
            connected.sendall(proof, socket.MSG_NOSIGNAL)
            if not hmac.compare_digest(_receive(connected, deadline, endpoint), expected):
                raise AuthenticationError(_STRANGER, endpoint=endpoint)
            connected.setblocking(False)
        except FramingError as error:
            raise AuthenticationError(f"{_STRANGER}: {error}", endpoint=endpoint) from error
        except DrayError:
            raise
        except TimeoutError as error:
            raise TransportTimeout(
                "the head does not answer", endpoint=endpoint, elapsed=deadline.elapsed
            ) from error
        except OSError as error:
            raise TransportError(f"the head is gone: {error.strerror}", endpoint=endpoint) from error
        opened.pop_all()
        return connected


def _receive(connected: socket.socket, deadline: Deadline, endpoint: str) -> bytes:
    """The body of the next message. What the head sends after it stays in the connection."""
    frames = Frames(max(NONCE, PROOF))
    while (body := frames.next()) is None:
        connected.settimeout(max(0.001, deadline.remaining))
        chunk = connected.recv(frames.missing)
        if not chunk:
            raise TransportError("the head node rejected the connection", endpoint=endpoint)
        frames.feed(chunk)
    return body


# --- listener ----------------------------------------------------------------------------------------------------

_CHUNK = 4096
_LOG = logging.getLogger("dray.jobs.messages.auth")


class NodeListener(Closing):
    """A listening socket, and the connections that have not proven the secret. No method waits.

    Args:
        host: an address of this machine.
        silence: seconds, as for `end_when_silent`, for connections that were accepted.
        reason_to_reject: why a connection is rejected; empty if it is not.
        on_accepted: is called with those that are not.

    Raises:
        ConfigError: this machine has no such address.
    """

    def __init__(
        self,
        host: str,
        secret: bytes,
        silence: float,
        reason_to_reject: Callable[[ConnectionInfo], str],
        on_accepted: Callable[[ConnectionInfo, socket.socket], None],
    ) -> None:
        self._secret = secret
        self._silence = silence
        self._reason_to_reject = reason_to_reject
        self._on_accepted = on_accepted
        self._unproven: Unproven[socket.socket] = Unproven()
        self._pause = AcceptPause(_LOG)
        self._paused = False
        self._lines = LineLimit()
        self._selector: selectors.BaseSelector | None = None
        self._listener: socket.socket | None = listen(host)

    def open(self, selector: selectors.BaseSelector) -> tuple[str, int]:
        """Register with `selector`, whose keys have a function to call as their data; returns the address."""
        assert self._listener is not None
        self._selector = selector
        self._accept_when_readable()
        host, port = self._listener.getsockname()
        return host, port

    def apply_timeouts(self) -> None:
        """Drop connections that have taken too long, and accept again after a pause."""
        for pending in self._unproven.overdue():
            self._reject(pending, f"it has not proven the secret within {UNPROVEN_SECONDS:g} s")
        if self._paused and not self._pause.remaining and self._listener is not None:
            self._accept_when_readable()

    def close(self) -> None:
        """Accept no connection any more. Twice is fine."""
        if self._listener is not None:
            if self._selector is not None and not self._paused:
                self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None
        for pending in list(self._unproven):
            self._reject(pending, "the job ends")

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
        displaced = self._unproven.add(connected)
        if displaced is not None:
            self._reject(displaced, "newer ones that have not proven the secret displaced it")
        auth = ServerAuth(self._secret)
        self._selector.register(connected, selectors.EVENT_READ, lambda: self._receive_proof(connected, auth))
        try:
            connected.send(auth.challenge, socket.MSG_NOSIGNAL)
        except OSError as error:
            self._reject(connected, str(error))

    def _receive_proof(self, connected: socket.socket, auth: ServerAuth) -> None:
        assert self._selector is not None
        try:
            chunk = connected.recv(_CHUNK)
            if not chunk:
                self._reject(connected, "it was closed")
                return
            found = auth.feed(chunk)
            if found is None:
                return
            purpose, proof = found
            if reason := self._reason_to_reject(purpose):
                self._reject(connected, reason)
                return
            end_when_silent(connected, self._silence)
            connected.send(proof, socket.MSG_NOSIGNAL)
        except (OSError, AuthenticationError) as error:
            self._reject(connected, str(error))
            return
        self._selector.unregister(connected)
        self._unproven.discard(connected)
        self._on_accepted(purpose, connected)

    def _reject(self, connected: socket.socket, why: str) -> None:
        """Close a connection, unless that has been done."""
        assert self._selector is not None
        if connected.fileno() >= 0:
            self._lines.warn(_LOG, "rejected a connection: %s", why)
            self._unproven.discard(connected)
            self._selector.unregister(connected)
            connected.close()
