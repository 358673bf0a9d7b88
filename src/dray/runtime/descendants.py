"""The processes below this one, found in ``/proc`` and killed through pidfds."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Collection, Iterator
from pathlib import Path

from dray.clock import Deadline

_STOPPED = "Tt"
_ENDED = "ZX"
"""States of a process that has ended, and that its parent has not waited for yet."""


def child_pids() -> set[int]:
    """The pids of this process's children, ended ones included."""
    own = os.getpid()
    return {pid for pid, parent, _ in _processes() if parent == own}


def descendant_pids() -> set[int]:
    """The pids of this process's children, of theirs and so on, without those that have ended."""
    children: dict[int, list[int]] = {}
    ended = set()
    for pid, parent, state in _processes():
        children.setdefault(parent, []).append(pid)
        if state in _ENDED:
            ended.add(pid)
    found: set[int] = set()
    open_ends = [os.getpid()]
    while open_ends:
        for pid in children.get(open_ends.pop(), ()):
            if pid not in found:
                found.add(pid)
                open_ends.append(pid)
    return found - ended


def is_running(pid: int) -> bool:
    """Whether the process, a child of this one, has neither ended nor been stopped by a signal or a debugger."""
    try:
        stat = Path("/proc", str(pid), "stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return _parent_and_state(stat)[1] not in _ENDED + _STOPPED


def kill_descendants(timeout: float) -> None:
    """Kill every process below this one, and what they start meanwhile, within `timeout` seconds.

    Complete if this process adopts orphans: a process whose parent is killed first stays below this one.
    """
    deadline = Deadline.after(timeout)
    while (pids := descendant_pids()) and not deadline.expired:
        _kill_and_wait(pids, deadline)


def kill_orphans(known: Collection[int], timeout: float) -> int:
    """Kill and collect children that this process did not start but was given when their parents ended.

    Args:
        known: children that are not meant.
        timeout: seconds to wait for each round; killing one may orphan others.

    Returns:
        How many were alive and were killed; those that had ended already are collected, too, and not counted.
    """
    own, killed, all_ended = os.getpid(), 0, True
    while all_ended and (
        orphans := {pid: state for pid, parent, state in _processes() if parent == own and pid not in known}
    ):
        all_ended = _kill_and_wait(orphans, Deadline.after(timeout))
        for pid, state in orphans.items():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended and state not in _ENDED:
                killed += os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    return killed


def ends_within(pidfd: int, timeout: float) -> bool:
    """Whether the process of `pidfd` has ended or does so within `timeout` seconds."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout * 1000))


def _kill_and_wait(pids: Collection[int], deadline: Deadline) -> bool:
    """Kill all of them first, so that none has the time to start another, then wait; True if all have ended."""
    descriptors = []
    try:
        for pid in pids:
            try:
                descriptors.append(os.pidfd_open(pid))
                signal.pidfd_send_signal(descriptors[-1], signal.SIGKILL)
            except ProcessLookupError:
                continue
        return all(ends_within(descriptor, deadline.remaining) for descriptor in descriptors)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _processes() -> Iterator[tuple[int, int, str]]:
    """Pid, parent and state of every process."""
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            try:
                stat = Path(entry.path, "stat").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            yield int(entry.name), *_parent_and_state(stat)


def _parent_and_state(stat: bytes) -> tuple[int, str]:
    # The command, in parentheses, may hold anything; state and parent are the first fields after it.
    state, parent = stat.rpartition(b")")[2].split()[:2]
    return int(parent), state.decode()
