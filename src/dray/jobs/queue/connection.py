"""The one place that calls redis-py: addresses, commands, retries, deadlines and the mapping of its errors.

A command that meets a lost connection, or a server that cannot serve at the moment (`TEMPORARY_CODES`), is made
again, with growing waits, until its deadline; so every operation given to `RedisConnection.call` must be safe to
repeat. An outage is logged once when it begins and once when it ends; one that lasts longer than `patience` counts
as a loss, and every wait ends with it.

A server that refuses may have handed its place to another one: the connections to it are closed, and the next
attempt resolves the server's name again. A server that has become a replica refuses writes and answers reads, so
the success of an operation that only reads does not end an outage that began with a refused write.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar
from urllib.parse import quote, unquote, unquote_to_bytes, urlsplit

import redis
from redis import exceptions
from redis.backoff import NoBackoff
from redis.connection import Connection, SSLConnection, UnixDomainSocketConnection, parse_url
from redis.retry import Retry

from dray.clock import MONOTONIC, Deadline, retry_pauses
from dray.errors import ConfigError, ControlPlaneError, TransportError
from dray.name_resolution import bracketed, resolve
from dray.resources import Closing

logger = logging.getLogger("dray.jobs.queue")

T = TypeVar("T")

# --- errors ------------------------------------------------------------------------------------------------------


class RedisUnavailableError(ControlPlaneError):
    """Redis has not answered until the deadline, or has refused, with `answer`; the message has for how long."""

    retryable = True

    def __init__(self, message: str, *, answer: str = "", **about: Any) -> None:
        super().__init__(message, **about)
        self.answer = answer


class StreamLostError(ControlPlaneError):
    """The stream is not the one this producer published to: Redis was restarted empty.

    Call `RolloutQueue.attach` and publish every payload again that is READY or being read.
    """

    retryable = True


class BacklogFullError(ControlPlaneError):
    """The stream held `max_backlog` entries until the deadline; nothing was published."""

    retryable = True


class OldEpochError(ControlPlaneError):
    """The policy group has a newer epoch; nothing was committed, and this replica must exit."""


class ControlPlaneStopped(ControlPlaneError):
    """The wait was given up because shutdown began; nothing was published."""


# --- address -----------------------------------------------------------------------------------------------------

_ALLOWED = (
    "must be like redis://[[user]:password@]host:port/db, rediss://… or unix://[:password@]/path/to/socket, with "
    "the special characters of user and password percent-encoded"
)
_DEFAULT_USER = "default"
_OPTIONS = {"host", "port", "db", "username", "password", "path", "connection_class"}


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """The address of a Redis server. `str` and `repr` leave the credentials out, `url` has them.

    Raises:
        ConfigError: the URL is not one of a Redis server.
    """

    url: str = field(repr=False)

    def __post_init__(self) -> None:
        self.options()

    @classmethod
    def of_socket(cls, path: str, password: str, user: str = "") -> RedisAddress:
        """The address of a server on a Unix socket."""
        return cls(f"unix://{quote(user, safe='')}:{quote(password, safe='')}@{quote(os.fsencode(path))}")

    @classmethod
    def of_port(cls, host: str, port: int, password: str, user: str = "") -> RedisAddress:
        """The address of a server on a TCP port."""
        return cls(f"redis://{quote(user, safe='')}:{quote(password, safe='')}@{bracketed(host)}:{port}/0")

    def options(self) -> dict[str, Any]:
        """Keyword arguments of a redis-py connection pool, the password among them."""
        try:
            parts = urlsplit(self.url)
            options: dict[str, Any] = parse_url(self.url)  # type: ignore[no-untyped-call]
        except ValueError:  # quotes parts of the URL
            raise _not_an_address() from None
        place = parts.netloc.rpartition("@")[2]
        if parts.scheme == "unix":
            if "path" in options:
                # redis-py takes the path for UTF-8 and replaces what is not.
                options["path"] = os.fsdecode(unquote_to_bytes(parts.path))
            # A place would be taken for the beginning of a path, and may be that of a password.
            fits = bool(options.get("path")) and not place
        else:
            # A password with a plain "/", "?" or "#" ends the place too early: its rest has the "@".
            database = parts.path.strip("/")
            fits = bool(parts.hostname) and (not database or database.isdecimal())
            fits = fits and "@" not in parts.query and not parts.fragment
        if not fits or any(name not in _OPTIONS and not name.startswith("ssl_") for name in options):
            raise _not_an_address()
        return options

    def redacted(self, text: str) -> str:
        """`text`, such as an answer of the server, without the credentials of this address."""
        options = self.options()
        for name in ("password", "username"):
            secret = options.get(name)
            if secret and secret != _DEFAULT_USER:
                text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", "***", text)
        return text

    def __str__(self) -> str:
        scheme, _, rest = self.url.partition("://")
        return f"{scheme}://{unquote(rest.partition('?')[0].rpartition('@')[2])}"

    def __repr__(self) -> str:
        return f"<RedisAddress {self}>"


def _not_an_address() -> ConfigError:
    # The value is not shown: where it does not parse, any part of it may be a password.
    return ConfigError("redis.url", None, _ALLOWED, "is not the URL of a Redis server")


# --- client ------------------------------------------------------------------------------------------------------


class NoSignalSocket(socket.socket):
    """A socket whose `sendall` never raises SIGPIPE, which a program may have given its default action back."""

    @classmethod
    def of(cls, connected: socket.socket) -> NoSignalSocket:
        """The same socket, with its timeout; `connected` is closed."""
        timeout = connected.gettimeout()
        found = cls(fileno=connected.detach())
        found.settimeout(timeout)
        return found

    def sendall(self, data: Any, flags: int = 0) -> None:
        super().sendall(data, flags | socket.MSG_NOSIGNAL)


class _TcpConnection(Connection):
    """Looks the server's name up within the time for connecting, which redis-py does not bound."""

    def _connect(self) -> socket.socket:
        name, failure = self.host, OSError(f"{self.host} has no address")
        try:
            for _, address in resolve(name, self.port, Deadline.after(self.socket_connect_timeout)):
                self.host = address[0]
                try:
                    return NoSignalSocket.of(super()._connect())  # type: ignore[no-untyped-call]
                except OSError as error:
                    failure = error
            raise failure
        except TransportError as error:
            raise OSError(error.message) from error  # of a TimeoutError redis-py drops the text
        finally:
            self.host = name


class _TlsConnection(SSLConnection, _TcpConnection):
    """TLS above such a connection. Certificates are compared with the name; TLS writes to the socket itself."""


class _UnixConnection(UnixDomainSocketConnection):
    def _connect(self) -> socket.socket:
        return NoSignalSocket.of(super()._connect())  # type: ignore[no-untyped-call]


_CONNECTIONS: dict[type, type] = {
    Connection: _TcpConnection,
    SSLConnection: _TlsConnection,
    UnixDomainSocketConnection: _UnixConnection,
}
"""What stands for each class of redis-py."""


class RedisClient(Closing):
    """A thread-safe pool of connections to one server. Raises the exceptions of redis-py, and retries nothing.

    Args:
        answer_timeout: seconds that connecting, and each answer, may take.
    """

    def __init__(self, address: RedisAddress, answer_timeout: float) -> None:
        options = address.options()
        chosen = options.pop("connection_class", Connection)
        self._pool = redis.ConnectionPool(
            connection_class=_CONNECTIONS.get(chosen, chosen),
            **options,
            protocol=2,
            socket_timeout=answer_timeout,
            socket_connect_timeout=answer_timeout,
            retry=Retry(NoBackoff(), 0),
            health_check_interval=0,
        )
        self._redis = redis.Redis(connection_pool=self._pool)
        # Replies as the protocol has them: their shape then does not depend on redis-py's version.
        self._redis.response_callbacks.clear()

    def do(self, *command: str | bytes | int) -> Any:
        """The reply to one command."""
        return self._redis.execute_command(*command)  # type: ignore[no-untyped-call]

    def drop_idle(self) -> None:
        """Close the connections that are not in use."""
        self._pool.disconnect(inuse_connections=False)

    def close(self) -> None:
        """Close every connection; a command under way in another thread fails."""
        self._pool.disconnect()


def paired(flat: list[Any]) -> dict[Any, Any]:
    """The mapping that Redis sends as a flat list of keys and values."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


# --- answers -----------------------------------------------------------------------------------------------------

TEMPORARY_CODES: Final = frozenset(
    (
        "READONLY",  # a replica, or a server that has become one
        "MASTERDOWN",
        "LOADING",
        "CLUSTERDOWN",
        "TRYAGAIN",
        "UNBLOCKED",  # a command that blocked while the server became a replica
        "NOREPLICAS",
        "MISCONF",  # the server cannot save its data
        "OOM",
        "BUSY",  # a script blocks the server
    )
)
"""Codes of answers that mean: not now."""

_CODES: Final[dict[type[exceptions.RedisError], str]] = {
    exceptions.ReadOnlyError: "READONLY",
    exceptions.MasterDownError: "MASTERDOWN",
    exceptions.BusyLoadingError: "LOADING",
    exceptions.ClusterDownError: "CLUSTERDOWN",
    exceptions.TryAgainError: "TRYAGAIN",
    exceptions.OutOfMemoryError: "OOM",
    exceptions.MovedError: "MOVED",
    exceptions.AskError: "ASK",
    exceptions.NoPermissionError: "NOPERM",
}
"""redis-py leaves the code out of the text of the exceptions that it has classes for."""

# Up to version 6, the error of a script quotes that of its command, with a minus sign before the code.
_IN_SCRIPT = re.compile(r"@user_script: ?\d+: -([A-Z]+)(?: |$)")
_FIRST_WORD = re.compile(r"([A-Z]+)(?: |$)")
_REFUSED = (
    exceptions.AuthenticationError,
    exceptions.AuthenticationWrongNumberOfArgsError,
    exceptions.AuthorizationError,
    exceptions.NoPermissionError,
)
_TRANSIENT = (exceptions.ConnectionError, exceptions.TimeoutError)


def _answer(error: exceptions.RedisError) -> tuple[str, str]:
    """The code of the server's answer, such as ``"READONLY"``, and the answer with it; the code is empty if it has
    none, or if there was no answer."""
    text = str(error)
    if type(error) in _CODES:
        code = _CODES[type(error)]
        return code, text if text.startswith(code) else f"{code} {text}"
    found = _IN_SCRIPT.search(text) or _FIRST_WORD.match(text)
    return (found[1] if found and isinstance(error, exceptions.ResponseError) else ""), text


# --- connection --------------------------------------------------------------------------------------------------

POLL_SLICE = 0.25
"""Longest time, in seconds, that one command blocks in Redis: how late a poll notices shutdown."""

POLL_ANSWER = 1.0
"""Seconds that a command of a poll may take to answer, what it blocks included: how late a poll notices shutdown
while Redis is stopped."""


class RedisConnection(Closing):
    """A thread-safe connection pool to one Redis server.

    Args:
        shutdown: once set, polls return at once and no lost connection is waited for; once Redis has not answered,
            it is not asked again.
        answer_timeout: seconds that one command may take to answer; a call may outlive its deadline by this much
            when the server is stopped.
        patience: seconds of outage, in which Redis does not answer or refuses, after which it counts as
            lost; no wait outlives it, and polls sit out anything shorter.
    """

    def __init__(
        self,
        address: RedisAddress,
        *,
        shutdown: threading.Event | None = None,
        answer_timeout: float = 3.0,
        patience: float = 30.0,
    ) -> None:
        self.address = address
        self.shutdown = threading.Event() if shutdown is None else shutdown
        self.patience = patience
        self._lock = threading.Lock()
        self._away_since: float | None = None
        self._refuses_writes_only = False
        self._closed = False
        self._client = RedisClient(address, answer_timeout)
        self._polls = RedisClient(address, min(POLL_ANSWER, answer_timeout))

    def call(
        self,
        what: str,
        operation: Callable[[RedisClient], T],
        deadline: Deadline,
        *,
        reads_only: bool = False,
        client: RedisClient | None = None,
    ) -> T:
        """Run `operation`, again after each lost connection and each answer that means "not now", until it
        succeeds, `deadline` has passed or the outage has lasted for `patience`.

        Args:
            what: the operation in words, for messages.
            operation: commands that may be repeated.
            reads_only: the commands change nothing.
            client: which connections are used; None: those of calls.

        Raises:
            RedisUnavailableError: no success until then, or shutdown is set.
            ControlPlaneError: Redis refused the command or the credentials, or the connection is closed.
        """
        pauses = retry_pauses()
        while True:
            if self._closed:
                raise ControlPlaneError(f"{what}: the connection to Redis is closed", endpoint=str(self.address))
            if self.shutdown.is_set() and self._away_since is not None:
                # Each of the calls with which a process ends would wait for an answer otherwise.
                raise RedisUnavailableError(
                    f"{what}: not tried, as Redis has not answered for {self.away_for:.1f} s and the process ends",
                    endpoint=str(self.address),
                    elapsed=deadline.elapsed,
                )
            began = MONOTONIC.now()
            try:
                result = operation(client or self._client)
            except exceptions.RedisError as error:
                code, text = _answer(error)
                answer = self.address.redacted(text)
                # An answer that quotes the credentials is in no traceback either.
                cause = error if answer == text else None
                refused = code in TEMPORARY_CODES
                if isinstance(error, _REFUSED) or not (refused or isinstance(error, _TRANSIENT)):
                    state = "refuses the credentials" if isinstance(error, _REFUSED) else "answered with an error"
                    raise ControlPlaneError(
                        f"{what}: Redis {state}: {answer}", endpoint=str(self.address)
                    ) from cause
                away = self._note_away(answer, refused=refused, reads_only=reads_only)
                if away >= self.patience or deadline.expired or self.shutdown.is_set() or self._closed:
                    state = "has refused" if refused else "has not answered"
                    raise RedisUnavailableError(
                        f"{what}: Redis {state} for {away:.1f} s: {answer}",
                        answer=answer if refused else "",
                        endpoint=str(self.address),
                        elapsed=deadline.elapsed,
                    ) from cause
                self.shutdown.wait(min(next(pauses), deadline.remaining, self.patience - away))
            else:
                self._note_back(began, reads_only=reads_only)
                return result

    def poll(
        self,
        what: str,
        operation: Callable[[RedisClient], T],
        deadline: Deadline,
        nothing: T,
        *,
        reads_only: bool = False,
    ) -> T:
        """As `call`, for an operation that waits for news: `nothing` in shutdown and in outages shorter than
        `patience`."""
        if self.shutdown.is_set():
            return nothing
        try:
            return self.call(what, operation, deadline, reads_only=reads_only, client=self._polls)
        except RedisUnavailableError:
            if self.shutdown.is_set() or self.away_for < self.patience:
                return nothing
            raise

    @property
    def away_for(self) -> float:
        """Seconds since Redis stopped answering, or began to refuse; 0 while it serves."""
        with self._lock:
            return 0.0 if self._away_since is None else MONOTONIC.now() - self._away_since

    def close(self) -> None:
        """Close every connection of the pool; a call under way in another thread fails."""
        with self._lock:
            self._closed = True
        self._client.close()
        self._polls.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "away" if self._away_since is not None else "open"
        return f"<RedisConnection {self.address} {state}>"

    def _note_away(self, answer: str, *, refused: bool, reads_only: bool) -> float:
        with self._lock:
            began = self._away_since is None
            if self._away_since is None:
                self._away_since = MONOTONIC.now()
            away = MONOTONIC.now() - self._away_since
            self._refuses_writes_only = refused and not reads_only
        if began or refused:
            # Idle connections of the pool broke together with this one: each would look like an outage of its own.
            # Those to a server that refuses would not follow its name to another one.
            self._client.drop_idle()
            self._polls.drop_idle()
        if began and not self.shutdown.is_set():
            state = "refuses" if refused else "does not answer"
            logger.warning("Redis at %s %s (%s); trying again", self.address, state, answer)
        return away

    def _note_back(self, began: float, *, reads_only: bool) -> None:
        """What began at this time has succeeded: that ends an outage, unless it was sent before the outage."""
        if self._away_since is None or (reads_only and self._refuses_writes_only):
            return
        with self._lock:
            since = self._away_since
            if since is None or began < since:
                return
            self._away_since = None
        logger.info("Redis at %s answers again after %.1f s", self.address, MONOTONIC.now() - since)


def block_ms(deadline: Deadline) -> int:
    """Milliseconds for one BLOCK argument: at most `POLL_SLICE`, never 0, which would block without end."""
    return max(1, int(1000 * min(POLL_SLICE, deadline.remaining)))
