"""Payloads that a program works on in place, for the length of a ``with`` block.

A slot stays leased until the last array into it is gone, not only until the end of the block. A lease is in one of
these states:

| state | ends with |
|---|---|
| not entered | `close`, the end of the lease object, or the client's `close`: released |
| entered | the end of the block: consumed, or released after an exception |
| lingering: the block has ended, an array exists | the end of the array: as the block has ended |

A direct lease ends in shared memory, where its last array dies. The lease of a connection ends with a message,
which a thread of the client sends if the array dies late (`LeaseReaper`). Closing the client ends only what no
array uses.
"""

from __future__ import annotations

import abc
import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Generic, Protocol, TypeVar

from dray.errors import BufferClosedError, LeaseInUseError
from dray.payload import Selection, Values, unpack
from dray.protocol.client_session import Request
from dray.resources import Closing
from dray.ring.attachment import DirectLease
from dray.transport.connection import ReceivedPayload
from dray.transport.direct_reads import DirectReads, end_with, in_slot
from dray.transport.lease_reaper import LeaseReaper
from dray.transport.receive_buffers import Bytes

T = TypeVar("T")


class Content(Closing, Generic[T]):
    """What a block gets of a payload: `value` until the block ends.

    Args:
        root: the payload's bytes.
    """

    def __init__(self, root: Bytes) -> None:
        self._root: Bytes | None = root

    @property
    def data(self) -> Bytes:
        """The payload's bytes, uint8 of shape (nbytes,), read-only.

        Raises:
            BufferClosedError: the lease has ended.
        """
        if self._root is None:
            raise BufferClosedError("the lease has ended")
        return self._root

    @property
    @abc.abstractmethod
    def value(self) -> T:
        """What `__enter__` of the lease returns."""

    def close(self) -> None:
        self._root = None


class LeasedArrays(Content[Values]):
    """The arrays of a payload, in a mapping that is empty after the block.

    Args:
        root: the payload's bytes.
        selection: the part of them that is wanted; all by default.
    """

    def __init__(self, root: Bytes, selection: Selection | None = None) -> None:
        super().__init__(root)
        self._selection = selection
        self._arrays: Values = {}

    @property
    def value(self) -> Values:
        """The arrays.

        Raises:
            PayloadFormatError: the bytes are not arrays.
            SelectionError: they do not have the part that is wanted.
        """
        if not self._arrays:
            self._arrays = unpack(self.data, selection=self._selection)
        return self._arrays

    def close(self) -> None:
        self._arrays.clear()
        self._root = None


class LeasedBytes(Content["LeasedBytes"]):
    """The bytes of a payload: `data`, until the block ends."""

    @property
    def value(self) -> LeasedBytes:
        return self


MakeContent = Callable[[Bytes, bool], Content[T]]
"""Makes the content of a payload's bytes; the flag is true if they are in the slot, and whole."""


class InPlaceLease(abc.ABC, Generic[T]):
    """A payload in its slot, leased by `PayloadClient.lease`; a context manager. It ends itself."""

    @abc.abstractmethod
    def __enter__(self) -> T:
        """What the block gets.

        Raises:
            BufferClosedError: the lease has ended, or the client was closed meanwhile.
            PayloadFormatError: the bytes are not arrays.
            SelectionError: they do not have the part that is wanted.
        """

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.finish(consumed=kind is None) and kind is None:
            slot, sequence = self.payload
            raise LeaseInUseError(
                "an array of this lease is still referenced; its slot stays leased until that is gone",
                slot=slot,
                sequence=sequence,
            )

    @property
    @abc.abstractmethod
    def payload(self) -> tuple[int, int]:
        """Slot and sequence number."""

    @abc.abstractmethod
    def finish(self, consumed: bool) -> bool:
        """End the lease now, or let it end with the last array into the slot; True in the latter case."""

    def close(self) -> None:
        """Release the payload if the block was never entered. Twice is fine."""
        self.finish(consumed=False)


# --- direct leases ----------------------------------------------------------------------------------------------


class DirectInPlaceLease(InPlaceLease[T]):
    """A direct lease: its end needs neither a connection nor the client."""

    __slots__ = ("_content", "_ended", "_root")

    def __init__(self, lease: DirectLease, make: MakeContent[T], reads: DirectReads) -> None:
        array = in_slot(lease)
        self._root = end_with(array, lease, reads)
        self._content = make(array, True)
        self._ended = False
        lease.attachment.count_read(lease)

    def __enter__(self) -> T:
        try:
            self._root.entered = True  # before the next line: closing the client looks in the opposite order
            if self._root.reads.closed:
                raise BufferClosedError("the client was closed before the block of the lease began")
            return self._content.value
        except BaseException:
            self.finish(consumed=False)
            raise

    @property
    def payload(self) -> tuple[int, int]:
        lease = self._root.lease
        return lease.slot, lease.sequence

    def finish(self, consumed: bool) -> bool:
        if self._ended:
            return False
        root = self._root
        root.consumed = consumed
        self._ended = True
        self._content.close()
        return root() is not None


# --- leases of connections --------------------------------------------------------------------------------------


class Kept(Protocol):
    """A lease whose connection is kept: see `dray.transport.connections.KeptLease`."""

    request: Request
    inside: threading.Lock

    def hand_out(self) -> None: ...
    def end(self, consumed: bool) -> None: ...
    def drop(self) -> None: ...


class KeptInPlaceLease(InPlaceLease[T]):
    """The lease of a connection, which is kept for it: on the shm lane in its slot, else in memory of its own.

    If an exception of a signal handler comes in the middle of an end, the lease ends with its last array as well.

    Args:
        received: the payload.
        kept: its lease.
        reaper: ends the lease if this object does not.
        make: makes what the block gets.
    """

    def __init__(self, received: ReceivedPayload, kept: Kept, reaper: LeaseReaper, make: MakeContent[T]) -> None:
        self._in_place = received.in_place
        self._content: Content[T] | None = make(received.root, received.in_place)
        self._kept = kept
        self._reaper = reaper
        self._watched = self._watch(received.root, consumed=False)

    def __enter__(self) -> T:
        try:
            self._kept.hand_out()
            assert self._content is not None
            return self._content.value
        except BaseException:
            self.finish(consumed=False)
            raise

    @property
    def payload(self) -> tuple[int, int]:
        return self._kept.request.slot, self._kept.request.sequence

    def finish(self, consumed: bool) -> bool:
        content = self._content
        if content is None:
            return False
        alive = weakref.ref(content.data)
        with self._kept.inside:
            # The reaper watches until here, and again while an array exists. After an exception of a signal
            # handler the lease is either dropped with its connection or watched, so that it ends in each case.
            try:
                self._reaper.forget(self._watched)
                self._content = None
                content.close()
                root = alive() if self._in_place else None
                if root is not None:
                    self._watch(root, consumed)
                    return True
                self._kept.end(consumed)
            except BaseException:
                root = alive()
                if root is None:
                    self._kept.drop()
                else:
                    self._watch(root, consumed)
                raise
        return False

    def _watch(self, root: Bytes, consumed: bool) -> int:
        """Let the lease end once `root` is gone."""
        kept = self._kept

        def end() -> None:
            with kept.inside:
                kept.end(consumed)

        return self._reaper.watch(root, end)
