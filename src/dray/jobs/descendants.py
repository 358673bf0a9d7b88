"""The processes below this one: which there are, which of them run, and their end.

A pid may be reused as soon as its process was waited for. So a process is killed through a pidfd, and only if the
pid still was that of the process that was found after the pidfd was opened.
"""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Collection
from contextlib import ExitStack, suppress

import psutil

from dray.clock import Deadline

_STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
_ENDED = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
"""States of a process that has ended, and that its parent has not waited for yet."""


def child_pids() -> set[int]:
    """The pids of this process's children, ended ones included."""
    return {child.pid for child in psutil.Process().children()}


def is_running(pid: int) -> bool:
    """Whether the process, a child of this one, has neither ended nor been stopped by a signal or a debugger."""
    try:
        return psutil.Process(pid).status() not in _ENDED + _STOPPED
    except psutil.NoSuchProcess:
        return False


def kill_descendants(timeout: float) -> None:
    """Kill every process below this one, and what they start meanwhile, within `timeout` seconds.

    Complete if this process adopts orphans: a process whose parent is killed first stays below this one.
    """
    deadline = Deadline.after(timeout)
    while (found := _descendants()) and not deadline.expired:
        _kill_and_wait(found, deadline)


def kill_orphans(known: Collection[int], timeout: float) -> int:
    """Kill and collect children that this process did not start but was given when their parents ended.

    Args:
        known: children that are not meant.
        timeout: seconds to wait for each round; killing one may orphan others.

    Returns:
        How many were alive and were killed; those that had ended already are collected, too, and not counted.
    """
    killed, all_ended = 0, True
    while all_ended and (orphans := [each for each in psutil.Process().children() if each.pid not in known]):
        alive = {each.pid for each in orphans if not _has_ended(each)}
        all_ended = _kill_and_wait(orphans, Deadline.after(timeout))
        for orphan in orphans:
            ended, status = os.waitpid(orphan.pid, os.WNOHANG)
            if ended in alive:
                killed += os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    return killed


def ends_within(pidfd: int, timeout: float) -> bool:
    """Whether the process of `pidfd` has ended or does so within `timeout` seconds."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout * 1000))


def _descendants() -> list[psutil.Process]:
    return [each for each in psutil.Process().children(recursive=True) if not _has_ended(each)]


def _has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() in _ENDED
    except psutil.NoSuchProcess:
        return True


def _kill_and_wait(processes: Collection[psutil.Process], deadline: Deadline) -> bool:
    """Kill all of them first, so that none has the time to start another, then wait; True if all have ended."""
    killed = []
    with ExitStack() as opened:
        for process in processes:
            with suppress(ProcessLookupError):
                descriptor = os.pidfd_open(process.pid)
                opened.callback(os.close, descriptor)
                if process.is_running():
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                    killed.append(descriptor)
        return all(ends_within(descriptor, deadline.remaining) for descriptor in killed)
