"""`dray record` of a running job: it has the controller's order stand until the recording ends."""

from __future__ import annotations

import os
import secrets
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from dray.cli.extras import require_extra
from dray.cli.status import ends_soon, read_address
from dray.clock import Deadline
from dray.errors import ConfigError, ControlPlaneError
from dray.jobs.folder import JobFolder
from dray.text import MAX_LINE, printable

if TYPE_CHECKING:
    from dray.jobs.messages.controller_client import ControllerClient
    from dray.jobs.messages.models import RecordingOrder, RecordingState

END_SECONDS = 600.0
"""For which the command waits for the end of the training step that is under way when it is to end."""


class RecordingEndedError(ControlPlaneError):
    """The policy replica has ended the recording of its job by itself."""


def is_job(source: str) -> bool:
    """Whether `source` is the output folder of a job, or a path, and not a stream's name or address."""
    if "://" in source:
        return False
    folder = JobFolder(Path(source))
    return os.sep in source or folder.run.is_dir() or folder.newest_logs.is_dir()


def record_job(
    job: JobFolder,
    folder: Path,
    stop: threading.Event,
    *,
    payloads: int | None,
    max_bytes: int,
    file_bytes: int,
    stop_when_full: bool,
) -> None:
    """Record what the job trains on into `folder`, until it has ended, `stop` is set, or `payloads` are there.

    Raises:
        ConfigError: no job of this user is running in `job`, or it cannot be recorded.
        RecordingEndedError: the policy replica cannot write the recording.
        ControlPlaneError: the controller does not answer.
    """
    require_extra("jobs")
    from dray.jobs.controller.recording import ORDER_SECONDS
    from dray.jobs.messages.controller_client import ControllerClient
    from dray.jobs.messages.models import MAX_PATH, RecordingOrder, RecordingRefusedError

    url, token = read_address(job)
    path = str(folder.absolute())
    if len(path) > MAX_PATH or not path.isprintable():
        raise ConfigError("DIR", path, f"a path of at most {MAX_PATH} printable characters")
    order = RecordingOrder(
        id=secrets.token_hex(8),
        folder=path,
        payloads=payloads,
        max_bytes=max_bytes,
        file_bytes=file_bytes,
        stop_when_full=stop_when_full,
    )
    # After this process was stopped, too, there is time for an answer that is held back.
    with ControllerClient(url, token, ORDER_SECONDS, hurried=ORDER_SECONDS) as client:
        try:
            state = _follow(job, client, order, stop)
        except RecordingRefusedError as error:
            raise ConfigError("OUTPUT", str(job.root), f"must be {error.message}") from error
    if state.problem:
        raise RecordingEndedError(f"the recording in {path} has ended: {state.problem}")
    count = f"{'' if state.confirmed else 'at least '}{state.payloads} payloads"
    removed = f", {state.removed} of them removed again" if state.removed else ""
    ended = "" if state.phase.gives_work else "the job has ended; "
    typer.echo(f"{ended}recorded {count}{removed}; see {printable(str(folder), MAX_LINE)}")


def _follow(
    job: JobFolder, client: ControllerClient, order: RecordingOrder, stop: threading.Event
) -> RecordingState:
    """Send the order until its recording has ended. The controller holds each answer back for a second."""
    from dray.jobs.messages.controller_client import ControllerLostError
    from dray.jobs.messages.models import Phase, RecordingState

    last: RecordingState | None = None
    shown, deadline = "", Deadline.after(None)
    while True:
        if stop.is_set() and not order.end:
            order, deadline = order.model_copy(update={"end": True}), Deadline.after(END_SECONDS)
        try:
            state = client.post("/recording", order, RecordingState)
        except ControllerLostError:
            if last is None or not ends_soon(job):
                raise
            return last.model_copy(update={"phase": Phase.DRAINING})  # its last phase was not seen
        if state.ended:
            return state
        if deadline.expired:
            raise ControlPlaneError(
                f"policy-0 has not ended the recording: it is {state.doing}, and ends it afterwards",
                elapsed=deadline.elapsed,
            )
        line = f"recording into {order.folder}; Ctrl-C ends it"
        if order.end:
            line = f"waiting up to {END_SECONDS:g} s for policy-0 to end its step"
        elif not state.began:
            line = "waiting for policy-0 to begin its next step"
        if line != shown:
            shown = line
            typer.echo(line if state.began and not order.end else f"{line}; it is {state.doing}", err=True)
        last = state
