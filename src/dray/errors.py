"""The errors. Every error that dray raises on purpose is a `DrayError`, and the built-in error that fits as well.

`retryable` is true where the same call may succeed when it is made again. Errors about a payload or a connection
carry `endpoint`, `slot`, `sequence` and `elapsed` as attributes, and show them in their message.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

from dray.text import MAX_LINE, printable, printable_value

_MAX_LINE = 1900
"""Characters of one line of a message."""


class DrayError(Exception):
    """The base of every dray error.

    Args:
        message: what happened, in one sentence; it is made printable and one line.
        endpoint: the address, e.g. ``"tcp:127.0.0.1:40001"``.
        slot: the index of the slot.
        sequence: the sequence number of the payload.
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
        # It may contain text from a peer or from user code, and callers print and log it.
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
    """A configuration value or an argument is not allowed, or something that it needs is missing.

    The message is one line: ``KEY = VALUE is not allowed: ALLOWED``, or ``KEY PROBLEM: ALLOWED`` with a `problem`.
    An error about several mistakes has one such line for each; its attributes are those of the first.

    Args:
        key: the argument, or the dotted path of the key, e.g. ``"policy.replicas"``.
        value: the value that was found.
        allowed: what is allowed, in words.
        problem: what is wrong, where there is no value to show, e.g. ``"is missing"``.
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
        *,
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
        return cls(first.key, first.value, first.allowed, first.problem, others=others) if others else first

    def __str__(self) -> str:
        return "\n".join(each.message for each in self.mistakes)

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = self.key, self.value, self.allowed, self.problem
        return functools.partial(type(self), others=self.mistakes[1:]), arguments


def error_lines(error: DrayError) -> list[str]:
    """The lines that a terminal shows for `error`: one, or one for each mistake of a `ConfigError`."""
    texts = [each.message for each in error.mistakes] if isinstance(error, ConfigError) else [str(error)]
    return [f"error: {printable(text, _MAX_LINE)}" for text in texts]


class MissingDependencyError(DrayError, ImportError, RuntimeError):
    """An optional package is not installed, or does not load; the message names what to install.

    It is an `ImportError` and a `RuntimeError`, because frameworks check for one of these.

    Args:
        package: the package, e.g. ``"ucxx"``.
        needed_by: the part of dray that needs it, e.g. ``"the ucx lane"``.
        install: the argument for `pip install`, e.g. ``"'dray-rl[ucxx]'"``.
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
    """A payload cannot be packed or unpacked. The message is bounded, as field names may come from a peer."""

    def __init__(self, message: str, **about: Any) -> None:
        super().__init__(printable(message, _MAX_LINE), **about)


class SchemaError(PayloadError):
    """An array does not fit the payload's schema; the message names the field."""


class PayloadTooLargeError(PayloadError):
    """A payload does not fit into a slot, or into memory; the message names both sizes."""


class PayloadFormatError(PayloadError):
    """Bytes are not a valid payload, or a dtype cannot be carried."""


class SelectionError(PayloadError):
    """The fields or rows that were asked for cannot be selected; the message names them. Nothing is consumed."""


# --- slots ----------------------------------------------------------------------------------------------------


class SlotError(DrayError, RuntimeError):
    """A slot cannot be used in this way."""


class StaleSlotError(SlotError, LookupError):
    """The payload that the reference names was consumed, overwritten or replaced. Never retried."""


class BufferFullError(SlotError, TimeoutError):
    """No slot became free in time."""

    retryable = True


class StoreFullError(BufferFullError):
    """There was no room in a `dray.integrations.store.PayloadStore` in time.

    Args:
        message: what was put, and how long it has waited.
        capacity_bytes: bytes that the store may hold.
        used_bytes: bytes of the payloads in it.
        payloads: how many payloads are in it.
        elapsed: seconds since the call began.
    """

    def __init__(
        self,
        message: str,
        *,
        capacity_bytes: int = 0,
        used_bytes: int = 0,
        payloads: int = 0,
        elapsed: float | None = None,
    ) -> None:
        super().__init__(message, elapsed=elapsed)
        self.capacity_bytes = capacity_bytes
        self.used_bytes = used_bytes
        self.payloads = payloads


class BufferClosedError(SlotError):
    """The ring, server or client is closed, or belongs to the parent of this forked process."""


class LeaseInUseError(SlotError, BufferError):
    """An array of an in-place lease is still referenced. The slot stays leased until the array is deleted."""


# --- transport ------------------------------------------------------------------------------------------------


class TransportError(DrayError, ConnectionError):
    """A connection failed. Another attempt may succeed, perhaps at another endpoint."""

    retryable = True


class ConnectionReset(TransportError, ConnectionResetError):
    """The peer reset the connection, or an operation on it was cancelled."""


class ConnectionClosed(TransportError):
    """The peer closed the connection."""


class TransportTimeout(TransportError, TimeoutError):
    """The deadline passed; the message names what was awaited."""


class MessageTruncated(TransportError):
    """A message has another length than announced, or another checksum."""


class Unreachable(TransportError):
    """No connection could be made to the endpoint.

    Args:
        refused: the host answered that no process listens there.
        elsewhere: the address does not exist on this host: it is the Unix socket of another host, or of a server
            that has ended. Implies `refused`.
        lane_unusable: this machine cannot use the lane of the endpoint at all.
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
    """No descriptor or kernel memory is left in this process or machine; the message names the limit.

    Making a ring, server or client can raise it, too. The peer may be healthy.

    Args:
        number: the error number of the system, such as ``errno.EMFILE``.
        strerror: the system's text for it.
    """

    def __init__(self, message: str, number: int, strerror: str, **about: Any) -> None:
        super().__init__(message, **about)
        self.errno = number
        self.strerror = strerror

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.errno, self.strerror), self.__dict__


class ServerBusy(TransportError):
    """The connection holds as many leases as the server allows. The endpoint is healthy."""


class ProtocolError(DrayError, ValueError):
    """A peer sent something that the protocol does not allow, or a text is not what it must be."""


class AuthenticationError(ProtocolError, PermissionError):
    """The peer did not prove that it knows the job's secret, or rejected the proof of this side."""


class ReaderIdError(ProtocolError):
    """A reader id does not exist in the ring; the message names the ids that exist."""


class VersionMismatch(ProtocolError):
    """The peer speaks another version of the protocol.

    Attributes:
        version: the peer's version; None if it is unknown.
    """

    def __init__(self, message: str, *, version: int | None = None, **context: Any) -> None:
        super().__init__(message, **context)
        self.version = version


class ProducerLostError(DrayError, ConnectionError):
    """The producer of a payload has ended. Its payloads are lost."""


class StreamError(DrayError):
    """A call of a stream was not possible."""


class StreamTimeout(StreamError, TimeoutError):
    """No payload came in time, or no producer; the message names the stream, the scope and what exists."""

    retryable = True


class StreamEnded(StreamError, EOFError):
    """Every producer that was attached has closed, and nothing is left."""


class UndeliveredError(StreamError, TimeoutError):
    """A producer has ended before its payloads were consumed.

    Args:
        lost: how many payloads are lost.
    """

    def __init__(self, message: str, lost: int = 0) -> None:
        super().__init__(message)
        self.lost = lost

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.lost)


class OutputError(DrayError, OSError):
    """A file or folder of a job cannot be written; the message names it and the reason.

    Args:
        path: the file or folder.
        reason: the operating system's reason, e.g. ``"No space left on device"``.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path} cannot be written: {reason}")
        self.filename = path
        self.strerror = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.filename, self.strerror)


class ControlPlaneError(DrayError, ConnectionError):
    """Redis or the controller did not answer, or not as required."""
