"""The error tree. Every error that dray raises on purpose is a `DrayError`.

`retryable` tells a caller whether the same call may succeed if it is made again. Errors about a payload or a
connection carry what they are about (`endpoint`, `slot`, `sequence`, `elapsed`) as attributes and say it in
their message.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from dray.printable import MAX_LINE, printable, printable_value

_MAX_LINE = 1900
"""Characters of the line about one mistake in the configuration."""


class DrayError(Exception):
    """Base of every dray error.

    Args:
        message: what happened, in one sentence; made printable, and one line.
        endpoint: the address it happened at, e.g. ``"tcp:127.0.0.1:40001"``.
        slot: the slot index it is about.
        sequence: the sequence number it is about.
        elapsed: seconds since the failed operation began.
    """

    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        endpoint: str | None = None,
        slot: int | None = None,
        sequence: int | None = None,
        elapsed: float | None = None,
    ) -> None:
        # It may hold text of a peer or of user code, and callers show and log it.
        message = printable(message, MAX_LINE)
        super().__init__(message)
        self.message = message
        self.endpoint = endpoint
        self.slot = slot
        self.sequence = sequence
        self.elapsed = elapsed

    def __str__(self) -> str:
        about = [
            f"{name} {printable(str(value), _MAX_LINE)}"
            for name, value in (
                ("endpoint", self.endpoint),
                ("slot", self.slot),
                ("sequence", self.sequence),
                ("after", None if self.elapsed is None else f"{self.elapsed:.3f} s"),
            )
            if value is not None
        ]
        return f"{self.message} ({', '.join(about)})" if about else self.message


class ConfigError(DrayError, ValueError):
    """A configuration value is not allowed, or something that the configuration needs is not there.

    The message is one line, ``KEY = VALUE is not allowed: ALLOWED``, or ``KEY PROBLEM: ALLOWED`` with a `problem`.
    An error about several mistakes has one such line for each, and is otherwise that of the first.

    Args:
        key: dotted path of the key, e.g. ``"policy.replicas"``.
        value: the value found there.
        allowed: what is allowed, in words.
        problem: what is wrong where no value is to be named, e.g. ``"is missing"``.
        others: further mistakes, each an error of its own.

    Attributes:
        mistakes: every mistake, this one first.
    """

    def __init__(
        self,
        key: str,
        value: Any,
        allowed: str,
        problem: str | None = None,
        others: Sequence[ConfigError] = (),
    ) -> None:
        found = f"= {printable_value(value)} is not allowed" if problem is None else problem
        super().__init__(printable(f"{key} {found}: {allowed}", _MAX_LINE))
        self.key = key
        self.value = value
        self.allowed = allowed
        self.problem = problem
        self.mistakes: tuple[ConfigError, ...] = (self, *others)

    @classmethod
    def of(cls, mistakes: Sequence[ConfigError]) -> ConfigError:
        """One error about all of `mistakes`, of which there is at least one."""
        first, *others = mistakes
        return cls(first.key, first.value, first.allowed, first.problem, others) if others else first

    def __str__(self) -> str:
        return "\n".join(each.message for each in self.mistakes)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.key, self.value, self.allowed, self.problem, self.mistakes[1:])


def error_lines(error: DrayError) -> list[str]:
    """What a terminal is shown of `error`: one line, or one for each mistake of a `ConfigError`."""
    texts = [each.message for each in error.mistakes] if isinstance(error, ConfigError) else [str(error)]
    return [f"error: {printable(text, _MAX_LINE)}" for text in texts]


class MissingDependencyError(DrayError, ImportError, RuntimeError):
    """An optional package is needed and is not installed, or does not load; the message says what to install.

    It is an `ImportError` and a `RuntimeError` because frameworks check for one of them.

    Args:
        package: the package, e.g. ``"ucxx"``.
        needed_by: what needs it, e.g. ``"the ucx lane"``.
        install: what `pip install` has to be given, e.g. ``"'dray[ucxx]'"``.
        reason: why an installed package does not load.
    """

    def __init__(self, package: str, needed_by: str, install: str, reason: str | None = None) -> None:
        state = "is not installed" if reason is None else f"does not load ({reason})"
        super().__init__(f"{needed_by} needs the package {package}, which {state}: pip install {install}")
        self.name = package
        self.package = package
        self.needed_by = needed_by
        self.install = install
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.package, self.needed_by, self.install, self.reason)


# --- payloads -------------------------------------------------------------------------------------------------


class PayloadError(DrayError, ValueError):
    """A payload cannot be packed or unpacked.

    The message is one line of bounded length, whatever the names of fields in it are: they may come from a peer.
    """

    def __init__(self, message: str, **about: Any) -> None:
        super().__init__(printable(message, _MAX_LINE), **about)


class SchemaError(PayloadError):
    """An array does not fit the payload's schema; the message names the field."""


class PayloadTooLargeError(PayloadError):
    """A payload does not fit into a slot; the message gives both sizes."""


class PayloadFormatError(PayloadError):
    """Bytes are not a valid payload, or a dtype cannot be carried."""


# --- slots ----------------------------------------------------------------------------------------------------


class SlotError(DrayError, RuntimeError):
    """A slot cannot be used as asked."""


class StaleSlotError(SlotError, LookupError):
    """The slot has moved on: the payload that the reference names was consumed or overwritten."""


class BufferFullError(SlotError, TimeoutError):
    """No slot became free in time."""

    retryable = True


class BufferClosedError(SlotError):
    """The ring, server or client is closed, or belongs to the parent of a forked process."""


class LeaseInUseError(SlotError, BufferError):
    """An array of an in-place lease is still referenced; the slot stays leased until it is gone."""


# --- transport ------------------------------------------------------------------------------------------------


class TransportError(DrayError, ConnectionError):
    """A connection failed; another attempt, perhaps over another endpoint, may succeed."""

    retryable = True


class ConnectionReset(TransportError, ConnectionResetError):
    """The peer reset the connection, or an operation on it was cancelled."""


class ConnectionClosed(TransportError):
    """The peer closed the connection."""


class TransportTimeout(TransportError, TimeoutError):
    """The deadline passed; the message says what was awaited."""


class MessageTruncated(TransportError):
    """A message was shorter or longer than announced, or its checksum does not match."""


class Unreachable(TransportError):
    """No connection could be made to the endpoint.

    Args:
        refused: the endpoint's host answered that nobody listens there.
        elsewhere: the address does not exist on this host: it is another host's Unix socket, or that of a server
            which has ended. Such an address has `refused` as well.
        lane_unusable: this machine cannot use the endpoint's lane at all.
    """

    def __init__(
        self,
        message: str,
        *,
        refused: bool = False,
        elsewhere: bool = False,
        lane_unusable: bool = False,
        **about: Any,
    ) -> None:
        super().__init__(message, **about)
        self.refused = refused or elsewhere
        self.elsewhere = elsewhere
        self.lane_unusable = lane_unusable


class OutOfResources(TransportError):
    """The process or the machine has no descriptor, or the kernel no memory, left; the message names the limit.

    It is also raised where a ring, server or client is made. It says nothing about the peer.

    Args:
        number: the system's error number, such as ``errno.EMFILE``.
        strerror: what the system calls it.
    """

    def __init__(self, message: str, number: int, strerror: str, **about: Any) -> None:
        super().__init__(message, **about)
        self.errno = number
        self.strerror = strerror

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.errno, self.strerror), self.__dict__


class ServerBusy(TransportError):
    """The server's lease limit for this connection is reached; the endpoint itself is healthy."""


class ProtocolError(DrayError, ValueError):
    """The peer does not speak the protocol."""


class AuthenticationError(ProtocolError, PermissionError):
    """The peer could not prove that it knows the job's secret, or refused our proof."""


class ReaderIdError(ProtocolError):
    """A reader id is not one of the ring's; the message says which ids it has."""


class VersionMismatch(ProtocolError):
    """The peer speaks another version of the protocol.

    Attributes:
        version: the peer's version; None if it is unknown.
    """

    def __init__(self, message: str, *, version: int | None = None, **context: Any) -> None:
        super().__init__(message, **context)
        self.version = version


class ProducerLostError(DrayError, ConnectionError):
    """The producer of a payload is gone, and the payload with it."""


class OutputError(DrayError, OSError):
    """A file or folder of a job cannot be written; the message names it and says why.

    Args:
        path: the file or folder.
        reason: the operating system's, e.g. ``"No space left on device"``.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path} cannot be written: {reason}")
        self.filename = path
        self.strerror = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.filename, self.strerror)


class ControlPlaneError(DrayError, ConnectionError):
    """Redis or the controller did not answer as it must."""
