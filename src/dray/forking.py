"""What a forked child gives up: descriptors that only its parent may use, and its parent's signal handlers.

User code forks: a vector environment, a `multiprocessing` pool, `os.fork`. A child has none of dray's threads. If
it kept a connection open, the peer would not notice the death of the parent. If it wrote a signal to its parent's
wake-up descriptor, the parent would stop.
"""

from __future__ import annotations

import mmap
import os
import signal
import socket
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, Protocol, TypeVar


class HasDescriptor(Protocol):
    """An object with a file descriptor, such as a socket."""

    def fileno(self) -> int:
        """The descriptor; after it is closed, a negative number or an error."""
        ...


_MADV_WIPEONFORK = 18


def _wiped_page() -> tuple[memoryview, bool]:
    """A page that a child finds full of zeros, and whether that is also so after a fork that C code makes."""
    if sys.platform.startswith("linux"):
        page = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):
            page.madvise(_MADV_WIPEONFORK)
            return memoryview(page).cast("Q"), True
    return memoryview(bytearray(8)).cast("Q"), False


here, notices_every_fork = _wiped_page()
"""`here[0]` is this process's mark. An object that must not be used in a forked child remembers the mark and
compares it, which costs no system call."""
here[0] = os.getpid()

_Holder = TypeVar("_Holder", bound=HasDescriptor)
_Any = TypeVar("_Any")

_descriptors: weakref.WeakKeyDictionary[Any, Callable[[Any], int]] = weakref.WeakKeyDictionary()
_handlers: list[SignalHandlers] = []
_callbacks: dict[Callable[[], None], None] = {}
_masks = threading.local()


def not_inherited(holder: _Holder) -> _Holder:
    """Replace the descriptor of `holder` in children that are forked from now on, while `holder` exists."""
    return descriptor_not_inherited(holder, type(holder).fileno)


def descriptor_not_inherited(holder: _Any, fileno: Callable[[_Any], int]) -> _Any:
    """As `not_inherited`; `fileno(holder)` returns the descriptor and must hold no reference to `holder`."""
    _descriptors[holder] = fileno
    return holder


def call_in_children(callback: Callable[[], None]) -> None:
    """Call `callback` once in each child that is forked from now on, before the child gets a signal."""
    _callbacks[callback] = None


class SignalHandlers:
    """Makes signals write their number to a socket and do nothing else, until `restore`. Main thread only.

    A forked child gets the previous handlers.

    Args:
        numbers: the signals.
        writer: a non-blocking socket.
    """

    def __init__(self, numbers: Collection[signal.Signals], writer: socket.socket) -> None:
        self._writer = writer
        self._previous: dict[signal.Signals, Any] = {
            number: signal.signal(number, _note) or signal.SIG_DFL for number in numbers
        }
        self._previous_writer = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        _handlers.append(self)

    @property
    def numbers(self) -> Collection[signal.Signals]:
        """The signals."""
        return self._previous.keys()

    def restore(self) -> None:
        """Restore the previous handlers, unless other code has set new ones since."""
        _handlers.remove(self)
        found = signal.set_wakeup_fd(self._previous_writer)
        if found != self._writer.fileno():
            signal.set_wakeup_fd(found)
        for number, handler in self._previous.items():
            if signal.getsignal(number) is _note:
                signal.signal(number, handler)


@contextmanager
def parent_only() -> Iterator[None]:
    """Only this process leaves the block; a child that is forked inside ends there, as an interpreter does."""
    pid = os.getpid()
    try:
        yield
    except BaseException as error:
        if os.getpid() != pid:
            _end_child(error)
        raise
    if os.getpid() != pid:
        _end_child(None)


def _end_child(error: BaseException | None) -> NoReturn:
    code = 0
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    elif error is not None:
        code = 1
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 0xFF)


def _note(_number: int, _frame: FrameType | None) -> None:
    """Python writes the number to the wake-up descriptor before it calls this."""


def _before() -> None:
    # A signal to the child waits until the child has restored the previous handlers.
    handled = _handlers or _callbacks
    _masks.saved = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()) if handled else None


def _unblock() -> None:
    if _masks.saved is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _masks.saved)


def _in_child() -> None:
    here[0] = os.getpid()
    try:
        for handlers in reversed(_handlers[:]):
            handlers.restore()
        for callback in _callbacks:
            callback()
        _give_up(list(_descriptors.items()))
        _descriptors.clear()
    finally:
        _unblock()


def _give_up(holders: list[tuple[Any, Callable[[Any], int]]]) -> None:
    """Replace the descriptors by /dev/null: a holder that closes its number later must not close another file."""
    numbers = []
    for holder, fileno in holders:
        try:
            numbers.append(fileno(holder))
        except (OSError, ValueError):  # closed
            continue
    numbers = [number for number in numbers if number >= 0]
    if not numbers:
        return
    try:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # no descriptor is left
        for number in numbers:
            os.close(number)
        return
    for number in numbers:
        os.dup2(null, number, inheritable=False)
    os.close(null)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_unblock, after_in_child=_in_child)
