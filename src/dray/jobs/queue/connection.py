"""The one place that calls redis-py: retries, deadlines and the mapping of its errors.

A command that meets a lost connection, or a server that cannot serve at the moment (`answers.TEMPORARY_CODES`),
is made again, with growing waits, until its deadline; so every operation given to `RedisConnection.call` must be
safe to repeat. An outage is logged once when it begins and once when it ends; one that lasts longer than
`patience` counts as a loss, and every wait ends with it.

A server that refuses may have handed its place to another one: the connections to it are closed, and the next
attempt resolves the server's name again. A server that has become a replica refuses writes and answers reads, so
the success of an operation that only reads does not end an outage that began with a refused write.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, TypeVar

from redis.exceptions import (
    AskError,
    AuthenticationError,
    AuthenticationWrongNumberOfArgsError,
    AuthorizationError,
    BusyLoadingError,
    ClusterDownError,
    MasterDownError,
    MovedError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from dray.clock import MONOTONIC, Clock, Deadline, retry_pauses
from dray.errors import ControlPlaneError
from dray.jobs.queue.keys import JobKeys
from dray.jobs.queue.redis_client import RedisAddress, RedisClient
from dray.resources import Closing

# --- errors ------------------------------------------------------------------------------------------------------


class RedisUnavailableError(ControlPlaneError):
    """Redis has not answered until the deadline, or has refused; the message has for how long.

    Args:
        answer: what the server answered; empty if it did not.
    """

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


# --- answers -----------------------------------------------------------------------------------------------------

# What an error of redis-py means: the server cannot serve at the moment, or it will not.
#
# redis-py has exception classes for some of the error codes with which a server begins such an answer. The others,
# and the code inside the error of a script, are found in the answer itself: the code is a field of the protocol.

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

# A class comes before its own base class.
_CODES: Final[Mapping[type[RedisError], str]] = MappingProxyType(
    {
        ReadOnlyError: "READONLY",
        MasterDownError: "MASTERDOWN",
        BusyLoadingError: "LOADING",
        ClusterDownError: "CLUSTERDOWN",
        TryAgainError: "TRYAGAIN",
        OutOfMemoryError: "OOM",
        MovedError: "MOVED",
        AskError: "ASK",
        NoPermissionError: "NOPERM",
    }
)
# Up to version 6, the error of a script quotes that of its command, with a minus sign before the code.
_IN_SCRIPT = re.compile(r"@user_script: ?\d+: -([A-Z]+)(?: |$)")
_FIRST_WORD = re.compile(r"([A-Z]+)(?: |$)")


def error_code(error: RedisError) -> str:
    """The code of the server's answer, such as ``"READONLY"``; empty if it has none, or if there was no answer."""
    found = next((code for kind, code in _CODES.items() if isinstance(error, kind)), "")
    if found or not isinstance(error, ResponseError):
        return found
    text = str(error)
    match = _IN_SCRIPT.search(text) or _FIRST_WORD.match(text)
    return match[1] if match else ""


def is_temporary(error: RedisError) -> bool:
    """Whether `error` is an answer that means: not now."""
    return error_code(error) in TEMPORARY_CODES


def answer_text(error: RedisError) -> str:
    """The server's answer with its code, which redis-py leaves out of the exceptions that it has classes for."""
    code, text = error_code(error), str(error)
    return text if not code or text.startswith(code) or _IN_SCRIPT.search(text) else f"{code} {text}"


# --- connection --------------------------------------------------------------------------------------------------

logger = logging.getLogger("dray.jobs.queue")

POLL_SLICE = 0.25
"""Longest time, in seconds, that one command blocks in Redis: how late a poll notices shutdown."""

POLL_ANSWER = 1.0
"""Seconds that a command of a poll may take to answer, what it blocks included: how late a poll notices shutdown
while Redis is stopped."""

_REFUSED = (AuthenticationError, AuthenticationWrongNumberOfArgsError, AuthorizationError, NoPermissionError)
_TRANSIENT = (RedisConnectionError, RedisTimeoutError)

T = TypeVar("T")


class RedisConnection(Closing):
    """A thread-safe connection pool to one Redis server.

    Args:
        address: where the server is.
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
        clock: Clock = MONOTONIC,
    ) -> None:
        self.address = address
        self.shutdown = threading.Event() if shutdown is None else shutdown
        self.patience = patience
        self.clock = clock
        self._lock = threading.Lock()
        self._away_since: float | None = None
        self._refuses_writes_only = False
        self._closed = False
        self._client = RedisClient(address, answer_timeout)
        self._polls = RedisClient(address, min(POLL_ANSWER, answer_timeout))

    def call(
        self, what: str, operation: Callable[[RedisClient], T], deadline: Deadline, *, reads_only: bool = False
    ) -> T:
        """Run `operation`, again after each lost connection and each answer that means "not now", until it
        succeeds, `deadline` has passed or the outage has lasted for `patience`.

        Args:
            what: the operation in words, for messages.
            operation: commands that may be repeated.
            reads_only: the commands change nothing.

        Raises:
            RedisUnavailableError: no success until then, or shutdown is set.
            ControlPlaneError: Redis refused the command or the credentials, or the connection is closed.
        """
        return self._attempt(self._client, what, operation, deadline, reads_only)

    def _attempt(
        self,
        through: RedisClient,
        what: str,
        operation: Callable[[RedisClient], T],
        deadline: Deadline,
        reads_only: bool,
    ) -> T:
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
            try:
                result = operation(through)
            except RedisError as error:
                answer = self.address.redacted(answer_text(error))
                # An answer that quotes the credentials is in no traceback either.
                cause = error if answer == answer_text(error) else None
                refused = is_temporary(error)
                if isinstance(error, _REFUSED) or not (refused or isinstance(error, _TRANSIENT)):
                    state = "refuses the credentials" if isinstance(error, _REFUSED) else "answered with an error"
                    raise ControlPlaneError(
                        f"{what}: Redis {state}: {answer}", endpoint=str(self.address)
                    ) from cause
                away = self._note_away(answer, refused=refused, reads_only=reads_only)
                is_lost = away >= self.patience
                if is_lost or deadline.expired or self.shutdown.is_set() or self._closed:
                    state = "has refused" if refused else "has not answered"
                    raise RedisUnavailableError(
                        f"{what}: Redis {state} for {away:.1f} s: {answer}",
                        answer=answer if refused else "",
                        endpoint=str(self.address),
                        elapsed=deadline.elapsed,
                    ) from cause
                self.shutdown.wait(min(next(pauses), deadline.remaining, self.patience - away))
            else:
                self._note_back(reads_only=reads_only)
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
        `patience`.

        Raises:
            RedisUnavailableError: the outage has lasted longer than `patience`.
            ControlPlaneError: as in `call`.
        """
        if self.shutdown.is_set():
            return nothing
        try:
            return self._attempt(self._polls, what, operation, deadline, reads_only)
        except RedisUnavailableError:
            if self.shutdown.is_set() or self.away_for < self.patience:
                return nothing
            raise

    @property
    def away_for(self) -> float:
        """Seconds since Redis stopped answering, or began to refuse; 0 while it serves."""
        with self._lock:
            return 0.0 if self._away_since is None else self.clock.now() - self._away_since

    def stop(self) -> None:
        """Begin shutdown: polls return at once from now on, calls are tried once."""
        self.shutdown.set()

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
                self._away_since = self.clock.now()
            away = self.clock.now() - self._away_since
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

    def _note_back(self, *, reads_only: bool) -> None:
        if self._away_since is None or (reads_only and self._refuses_writes_only):
            return
        with self._lock:
            since, self._away_since = self._away_since, None
        if since is not None:
            logger.info("Redis at %s answers again after %.1f s", self.address, self.clock.now() - since)


def block_ms(deadline: Deadline) -> int:
    """Milliseconds for one BLOCK argument: at most `POLL_SLICE`, never 0, which would block without end."""
    return max(1, int(1000 * min(POLL_SLICE, deadline.remaining)))


def delete_job(connection: RedisConnection, keys: JobKeys, timeout: float = 10.0) -> int:
    """Delete every key of a job, for a server that outlives it; returns how many there were.

    Raises:
        ControlPlaneError: as `RedisConnection.call`.
    """
    pattern = keys.prefix + "*"

    def delete(client: RedisClient) -> int:
        cursor, deleted = b"0", 0
        while True:
            cursor, found = client.do("SCAN", cursor, "MATCH", pattern, "COUNT", 1000)
            if found:
                deleted += int(client.do("UNLINK", *found))
            if cursor == b"0":
                return deleted

    return connection.call(f"delete the keys of job {keys.job}", delete, Deadline.after(timeout, connection.clock))
