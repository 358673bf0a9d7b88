"""Resolving host names within a deadline.

The system's resolver has no time limit: without an answer from a name server, `getaddrinfo` returns after ten
seconds or more and cannot be ended before. A daemon thread therefore resolves a name, and a caller waits for that
thread until its own deadline. A numeric address needs neither resolver nor thread.
"""

from __future__ import annotations

import functools
import ipaddress
import os
import select
import socket
import threading
from collections.abc import Callable
from typing import Any, TypeAlias

from dray.clock import Deadline
from dray.errors import ConfigError, TransportError, TransportTimeout, Unreachable

MAX_QUERIES = 16
"""Names that are resolved at one time; each has a thread until the system's resolver returns."""

MAX_RESOLVE_SECONDS = 10.0
"""Time limit for resolving a name at which a process listens, at its start."""

Address: TypeAlias = tuple[socket.AddressFamily, tuple[Any, ...]]
"""A family, and an address as sockets of that family use it."""

AWAITED = "the name server"
"""What `resolve` waits for, for messages."""


def resolve(
    host: str,
    port: int,
    deadline: Deadline,
    *,
    wait: Callable[[int], None] | None = None,
    endpoint: str | None = None,
) -> list[Address]:
    """The addresses of `host` with `port`, in order of preference; at least one.

    Args:
        host: a numeric address or a name.
        wait: waits until a descriptor is readable, or raises; by default until `deadline`.
        endpoint: the address in errors.

    Raises:
        Unreachable: the host is unknown, or too many names are being resolved.
        TransportTimeout: the name server did not answer before the deadline.
    """
    try:
        try:
            found = _ask(host, socket.AI_NUMERICHOST)
        except socket.gaierror as error:
            if error.errno != socket.EAI_NONAME:
                raise
            found = _answer(host, wait or _waiter(deadline, endpoint), endpoint)
    except (socket.gaierror, ValueError) as error:  # ValueError: a label is too long, or there is a NUL
        raise Unreachable(f"the host {host!r} is unknown: {error}", endpoint=endpoint) from error
    except TransportError:
        raise
    except OSError as error:
        raise Unreachable(f"the host {host!r} cannot be resolved: {error}", endpoint=endpoint) from error
    return [(family, (address[0], port, *address[2:])) for family, address in found]


def listening_address(host: str) -> str:
    """The numeric address at which to listen for `host`; clients that get it need no name server.

    IPv4 is preferred, because UCX cannot listen at other addresses.

    Raises:
        ConfigError: the host is unknown.
    """
    if ":" in host:
        return host  # with its zone, if it has one
    try:
        found = resolve(host, 0, Deadline.after(MAX_RESOLVE_SECONDS))
    except TransportError as error:
        allowed = f"an address of this machine, or a name of one ({error.message})"
        raise ConfigError("host", host, allowed) from error
    _, address = min(found, key=lambda each: each[0] is not socket.AF_INET)
    return str(address[0])


@functools.lru_cache(maxsize=1024)
def bracketed(host: str) -> str:
    """A host as it stands before a port: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def is_loopback(host: str) -> bool:
    """Whether an address or name is this machine's loopback, which other machines cannot reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _ask(host: str, flags: int = 0) -> list[Address]:
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=flags)
    return [(family, address) for family, _, _, _, address in found]


# --- queries --------------------------------------------------------------------------------------------------


class _Query:
    """One call of the system's resolver, for all threads that wait for the same host."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.answer: list[Address] | OSError | ValueError | None = None
        self.wakes: set[int] = set()

    def run(self) -> None:
        try:
            answer: list[Address] | OSError | ValueError = _ask(self.host)
        except (OSError, ValueError) as error:
            answer = error
        with _lock:
            self.answer = answer
            del _queries[self.host]
            for wake in self.wakes:
                os.eventfd_write(wake, 1)


_lock = threading.RLock()  # reentrant, because a signal handler may fork while it is held
_queries: dict[str, _Query] = {}


def _answer(host: str, wait: Callable[[int], None], endpoint: str | None) -> list[Address]:
    wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        query = _begin(host, wake, endpoint)
        try:
            wait(wake)
        finally:
            with _lock:
                query.wakes.discard(wake)
    finally:
        os.close(wake)
    match query.answer:
        case list() as found:
            return found
        case Exception() as error:
            # Other threads raise it too, each with a traceback of its own.
            raise type(error)(*error.args) from error
        case _:
            raise AssertionError("the wait for a query ended before it had an answer")


def _begin(host: str, wake: int, endpoint: str | None) -> _Query:
    """The running query for `host`, or a new one; it writes to `wake` when it has an answer."""
    with _lock:
        query = _queries.get(host)
        if query is None:
            if len(_queries) >= MAX_QUERIES:
                message = f"{MAX_QUERIES} other names are being resolved, and the name server does not answer"
                raise Unreachable(message, endpoint=endpoint)
            query = _Query(host)
            threading.Thread(target=query.run, name="dray-name-resolution", daemon=True).start()
            _queries[host] = query
        query.wakes.add(wake)
    return query


def _waiter(deadline: Deadline, endpoint: str | None) -> Callable[[int], None]:
    """Waits until `deadline` for a descriptor that becomes readable."""

    def wait(wake: int) -> None:
        poll = select.poll()
        poll.register(wake, select.POLLIN)
        timeout = deadline.timeout
        if not poll.poll(None if timeout is None else timeout * 1000):
            message = f"no answer while waiting for {AWAITED}"
            raise TransportTimeout(message, endpoint=endpoint, elapsed=deadline.elapsed)

    return wait


def _forget_in_child() -> None:
    """A child does not have the parent's threads."""
    _queries.clear()
    _lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_forget_in_child)
