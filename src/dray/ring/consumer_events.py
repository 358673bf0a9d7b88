"""What wakes the owner of a ring: the doorbell of its direct consumers, and the end of their processes."""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Callable

from dray.forking import descriptor_not_inherited
from dray.resources import Closing, needing


class Descriptor(Closing):
    """A descriptor that is closed with this object, and that forked children do not keep.

    An object in C owns the number, whatever it refers to: what a signal handler raises in the middle of the end of
    an object in Python would leave it open.

    Args:
        make: a function in C that returns the number, called with `arguments`. Its result is never lost, whatever
            a signal handler raises.
    """

    def __init__(self, make: Callable[..., int], *arguments: object) -> None:
        self._kept: list[select.epoll] = []
        self._kept.extend(map(select.epoll.fromfd, map(make, *((each,) for each in arguments))))
        descriptor_not_inherited(self, type(self).fileno)

    def fileno(self) -> int:
        """The number; -1 once it is closed."""
        return self._kept[0].fileno() if self._kept and not self._kept[0].closed else -1

    def close(self) -> None:
        if self._kept:
            self._kept[0].close()

    def __repr__(self) -> str:
        return f"<Descriptor {self.fileno()}>"


class Bell(Descriptor):
    """The doorbell of an owner, at a consumer."""

    def ring(self) -> None:
        """Wake the owner, which may have closed. Once this object is closed, nothing happens."""
        number = self.fileno()
        if number >= 0:
            with contextlib.suppress(OSError):
                os.eventfd_write(number, 1)


class ProcessDescriptor(Descriptor):
    """A pidfd."""

    def has_ended(self) -> bool:
        """The process has ended, all its threads included. True once this is closed, by any thread."""
        number = self.fileno()
        if number < 0:
            return True
        poll = select.poll()
        poll.register(number, select.POLLIN)
        return bool(poll.poll(0))


class ConsumerEvents(Closing):
    """An eventfd that consumers write to, and the pidfds of their processes, in one epoll.

    Args:
        bell: an eventfd that consumers have already; a duplicate of it is used. By default it is a new one.

    Raises:
        OutOfResources: no descriptor is left.
    """

    def __init__(self, bell: int | None = None) -> None:
        with needing("the doorbell of a ring"), contextlib.ExitStack() as made:
            if bell is None:
                self._bell = made.enter_context(Descriptor(os.eventfd, 0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            else:
                self._bell = made.enter_context(Descriptor(os.dup, bell))
            self._epoll = made.enter_context(contextlib.closing(select.epoll()))
            descriptor_not_inherited(self, ConsumerEvents.fileno)
            self._epoll.register(self._bell.fileno(), select.EPOLLIN)
            made.pop_all()

    def fileno(self) -> int:
        """The descriptor that is readable while `collect` has something to do."""
        return self._epoll.fileno()

    @property
    def bell(self) -> int:
        """The descriptor that consumers write to."""
        return self._bell.fileno()

    def watch(self, pidfd: int) -> None:
        """Report the end of a process."""
        self._epoll.register(pidfd, select.EPOLLIN)

    def forget(self, pidfd: int) -> None:
        """Report it no longer."""
        with contextlib.suppress(FileNotFoundError):
            self._epoll.unregister(pidfd)

    def collect(self) -> list[int]:
        """The pidfds of processes that have ended; the doorbell is silent afterwards."""
        ended = []
        for descriptor, _ in self._epoll.poll(0):
            if descriptor != self._bell.fileno():
                ended.append(descriptor)
                continue
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(descriptor)
        return ended

    def close(self) -> None:
        self._epoll.close()
        self._bell.close()
