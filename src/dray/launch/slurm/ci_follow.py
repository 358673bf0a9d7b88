"""Waiting for a job of `dray slurm ci`: its log is shown as it grows, until Slurm says that the job has ended."""

from __future__ import annotations

import select
import signal
from collections.abc import Callable
from pathlib import Path

from dray.clock import Deadline
from dray.launch.signals import SignalInbox
from dray.launch.slurm.ci_report import JOB, read_ends
from dray.launch.slurm.scheduler import JobView, SlurmError, cancel, look

POLL_SECONDS = 2.0
SILENCE_SECONDS = 300.0
"""slurmctld may be unreachable for as long, as when it restarts, before the wait is given up."""

CANCEL_SECONDS = 120.0
"""A job that is cancelled gets as long to end."""

RECORD_SECONDS = 15.0
"""What a node wrote last is seen here by then, on any file system that both share."""


def follow(
    number: int, output: Path, inbox: SignalInbox, say: Callable[[str], None]
) -> tuple[JobView, signal.Signals | None]:
    """Show the job's `ci.log` until it has ended; returns its last view, and the signal that interrupted.

    The first signal cancels the job, a second one ends the wait.

    Raises:
        SlurmError: Slurm could not be asked for `SILENCE_SECONDS`, or does not cancel the job.
    """
    log = _Tail(output / "ci.log")
    silence, given_up, interrupted, state = Deadline.after(SILENCE_SECONDS), Deadline.after(None), None, ""
    while True:
        try:
            view: JobView | None = look(number)
        except SlurmError:
            view = _recorded(number, output)
            if view is None and (silence.expired or given_up.expired):
                raise
        else:
            silence = Deadline.after(SILENCE_SECONDS)
        if view is not None:
            if view.state != state:
                state = view.state
                say(f"job {number}: {state}{f', {view.reason}' if state == 'PENDING' else ''}\n")
            if view.ended or given_up.expired:
                break
        say(log.take())
        select.select([inbox], [], [], POLL_SECONDS)
        for received in inbox.take():
            if interrupted is not None:
                given_up = Deadline.after(0.0)
                continue
            interrupted, given_up = received, Deadline.after(CANCEL_SECONDS)
            say(f"{received.name}: cancelling job {number}\n")
            cancel(number)
    if interrupted is None and view.state in ("COMPLETED", "FAILED"):
        _wait_for_record(output, inbox)
    say(log.take())
    return view, interrupted


def _recorded(number: int, output: Path) -> JobView | None:
    """The job as its script recorded its end, for a slurmctld that is away or has forgotten it by now."""
    end = read_ends(output).get(JOB)
    if end is None:
        return None
    state = "FAILED" if end.exit_code else "COMPLETED"
    return JobView(number, state, "None", exit_code=end.exit_code, signal=0, restarts=0, nodes="")


def _wait_for_record(output: Path, inbox: SignalInbox) -> None:
    deadline = Deadline.after(RECORD_SECONDS)
    while JOB not in read_ends(output) and not deadline.expired:
        select.select([inbox], [], [], min(0.5, deadline.remaining))
        if inbox.take():
            return


class _Tail:
    """What a growing file has got since the last look; it may not be there yet."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def take(self) -> str:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            return ""
        content = content[: content.rfind(b"\n") + 1]  # whole lines, and so whole characters
        self._offset += len(content)
        return content.decode("utf-8", errors="replace")
