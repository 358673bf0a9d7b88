"""What a forked child gives up: descriptors that only its parent may use, and its parent's handling of signals.

User code forks: a vector environment, a `multiprocessing` pool, `os.fork`. Such a child has none of the threads
that serve what dray has opened. A connection that it kept open would hide the death of its parent from the peer,
and a signal that it passed on to its parent's wake-up descriptor would end the parent.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, Protocol, TypeVar


class HasDescriptor(Protocol):
    """Anything with a file descriptor, such as a socket."""

    def fileno(self) -> int:
        """The descriptor; negative, or an error, once it is closed."""
        ...


_Holder = TypeVar("_Holder", bound=HasDescriptor)
_Any = TypeVar("_Any")

_descriptors: weakref.WeakKeyDictionary[Any, Callable[[Any], int]] = weakref.WeakKeyDictionary()
_handlers: list[SignalHandlers] = []
_callbacks: dict[Callable[[], None], None] = {}
_masks = threading.local()


def not_inherited(holder: _Holder) -> _Holder:
    """Take the descriptor of `holder`, as long as that is there, from children that are forked from now on."""
    return descriptor_not_inherited(holder, _fileno)


def descriptor_not_inherited(holder: _Any, fileno: Callable[[_Any], int]) -> _Any:
    """As `not_inherited`; `fileno` returns the descriptor of `holder`, to which it must not refer."""
    _descriptors[holder] = fileno
    return holder


def call_in_children(callback: Callable[[], None]) -> None:
    """Call `callback` in children that are forked from now on, before they get a signal; once, if given twice."""
    _callbacks[callback] = None


class SignalHandlers:
    """Signals that write their number to a socket and do nothing else, until `restore`. Main thread only.

    A forked child handles them as this process did before.

    Args:
        numbers: of the signals.
        writer: a socket that does not block.
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
        """Handle the signals as before. Handlers that others have set since then stay."""
        _handlers.remove(self)
        found = signal.set_wakeup_fd(self._previous_writer)
        if found != self._writer.fileno():
            signal.set_wakeup_fd(found)
        for number, handler in self._previous.items():
            if signal.getsignal(number) is _note:
                signal.signal(number, handler)


@contextmanager
def parent_only() -> Iterator[None]:
    """Only this process leaves the block: a child that was forked inside ends there, as an interpreter does."""
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


def _fileno(holder: HasDescriptor) -> int:
    return holder.fileno()


def _before() -> None:
    # A signal that the child gets before it has given the handlers up waits until then.
    handled = _handlers or _callbacks
    _masks.saved = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()) if handled else None


def _unblock() -> None:
    if _masks.saved is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _masks.saved)


def _in_child() -> None:
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
    """Put /dev/null in the place of their descriptors: holders may close these, and not those of others."""
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
