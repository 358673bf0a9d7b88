"""Arrays of 8-byte words that several processes read and write without a lock.

Each word is aligned, in the machine's byte order, and is read and written as a whole: an item of a `memoryview` of
format "Q" is one move of 8 bytes. `struct.pack_into` writes single bytes and must not be used for these words.
"""

from __future__ import annotations

import os
from typing import Any, Final

import numpy as np

from dray.errors import BufferClosedError, ProtocolError, SlotError
from dray.resources import close_all, keep_result, needing, out_of_resources
from dray.ring.mapping import FIXED_SIZE, SharedMemory, fork_lock, map_shared, new_memfd, seal, seals_of

WORD_BYTES: Final = 8
_CLOSED: Final = memoryview(b"").cast("Q")


class SharedWords(SharedMemory):
    """A memfd of words, all zero at first. Use `create` or `attach` to make one.

    Attributes:
        words: the words, a `memoryview` of format "Q"; empty once closed, and in a forked child.
    """

    def __init__(self, words: memoryview, numbers: list[int]) -> None:
        self.words = words
        self.numbers = numbers

    @classmethod
    def create(cls, count: int) -> SharedWords:
        """`count` new words, of a size that no process can change.

        Raises:
            ConfigError: this system has no memfd with seals, or a sandbox refuses a system call.
            OutOfResources: the process has no descriptor, or the system no memory left.
        """
        nbytes = count * WORD_BYTES
        with fork_lock, new_memfd("shared words") as made:
            os.ftruncate(made[0], nbytes)
            view = _mapped(made[0], nbytes, writable=True)
            seal(made[0], FIXED_SIZE)
            created = cls(view.cast("Q"), made)
            created.keep_from_children()
        return created

    @classmethod
    def attach(cls, fd: int, count: int, *, writable: bool) -> SharedWords:
        """Map the `count` words behind `fd`, which the caller may close at once.

        Raises:
            ProtocolError: `fd` has not so many words, or its size can change.
            ConfigError: a sandbox refuses a system call.
            OutOfResources, SlotError: the memory cannot be mapped.
        """
        check_words(fd, count)
        with fork_lock:
            attached = cls(_mapped(fd, count * WORD_BYTES, writable=writable).cast("Q"), [])
            attached.keep_from_children()
        return attached

    @classmethod
    def inherit(cls, fd: int, count: int) -> SharedWords:
        """As `attach`, writable, with a descriptor to pass on: the words of a process that has died."""
        numbers: list[int] = []
        try:
            with needing("a descriptor of shared words"):
                keep_result(numbers, os.dup, fd)
            inherited = cls.attach(fd, count, writable=True)
        except BaseException:
            close_all(numbers)
            raise
        inherited.numbers = numbers
        return inherited

    def array(self) -> Any:
        """The words as an array of uint64, which must not outlive `close`."""
        return np.frombuffer(self.words, np.uint64)

    def fileno(self) -> int:
        """The creator's descriptor, through which others can write.

        Raises:
            BufferClosedError: the words are closed.
        """
        if not self.numbers:
            raise BufferClosedError("the shared words are closed, or were made by another process")
        return self.numbers[0]

    @property
    def path(self) -> str:
        """What can be opened for reading only, so that others cannot write through it; needs /proc."""
        return f"/proc/self/fd/{self.fileno()}"

    def close_descriptor(self) -> None:
        """Close the descriptor and keep the memory: no other process will need it."""
        close_all(self.numbers)

    def forget(self) -> None:
        self.words = _CLOSED
        self.close_descriptor()

    def __repr__(self) -> str:
        return f"<SharedWords {len(self.words)}>"


def check_words(fd: int, count: int) -> None:
    """Raise `ProtocolError` unless `fd` is shared memory of `count` words whose size cannot change."""
    try:
        nbytes, seals = os.fstat(fd).st_size, seals_of(fd)
    except OSError as error:
        raise ProtocolError(f"descriptor {fd} is not shared memory: {error.strerror}") from error
    if nbytes != count * WORD_BYTES or seals & FIXED_SIZE != FIXED_SIZE:
        raise ProtocolError(f"{count} words were announced, {nbytes} bytes came with the seals {seals:#x}")


def _mapped(fd: int, nbytes: int, *, writable: bool) -> memoryview:
    try:
        return map_shared(fd, nbytes, writable=writable)
    except OSError as error:
        why = f"{nbytes} bytes of shared words cannot be mapped: {error.strerror}"
        raise out_of_resources(error, f"a mapping of {nbytes} bytes") or SlotError(why) from error
