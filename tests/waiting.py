"""Waiting in tests, which always has a bound."""

import os
import select
import time
from collections.abc import Callable

from dray.clock import Deadline


def wait_until(
    condition: Callable[[], object],
    awaited: str,
    seconds: float = 10.0,
    *,
    pause: float = 0.002,
    story: Callable[[], object] | None = None,
) -> None:
    """Check `condition` repeatedly until it holds: for what no event reports.

    Args:
        awaited: what is waited for, in words.
        pause: seconds between two checks.
        story: returns text to add to the error when `seconds` have passed.

    Raises:
        AssertionError: `seconds` have passed.
    """
    if not holds_within(seconds, condition, pause=pause):
        more = "" if story is None else f"\n{story()}"
        raise AssertionError(f"{seconds:g} s passed while waiting for {awaited}{more}")


def holds_within(seconds: float, condition: Callable[[], object], *, pause: float = 0.002) -> bool:
    """Whether `condition` holds now, or begins to within `seconds`."""
    deadline = Deadline.after(seconds)
    while not condition():
        if deadline.expired:
            return False
        time.sleep(pause)
    return True


def ends_within(seconds: float, pid: int) -> bool:
    """Whether the process, which need not be a child of this one, ends within `seconds`."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))
    finally:
        os.close(pidfd)
