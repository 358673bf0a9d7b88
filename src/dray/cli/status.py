"""`dray status`: the state of a running job, as its controller reports it."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dray.cli.extras import require_extra
from dray.clock import Deadline
from dray.errors import ConfigError
from dray.files import open_own_folder, read_private_file
from dray.jobs.folder import JobFolder
from dray.text import MAX_LINE, printable

if TYPE_CHECKING:
    from dray.jobs.messages.models import MemberStatus, Status

ANSWER_BOUND = 5.0
"""Seconds within which the controller must answer."""

END_BOUND = 10.0
"""Seconds within which a job whose controller is gone must have ended."""

_CHECK_INTERVAL = 0.1
_RUNNING = "*/*/.run/controller.json"
_ALLOWED = "must be the output folder of a running job"


def status(
    output: Annotated[
        Path | None,
        typer.Argument(
            help="Output folder of a running job. Default: that of the only job running under outputs/."
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print one JSON object: the response to GET /status, and the controller's URL."
        ),
    ] = False,
    page: Annotated[
        bool,
        typer.Option(
            "--page", help="Print a URL that opens the job's page in a browser, once, within 10 minutes."
        ),
    ] = False,
) -> None:
    """Show the state of a running job: phase, step, replicas, and the controller's URL.

    Exit code 0: the controller has answered; 1: it has not answered within 5 seconds; 2: no job of this user is
    running there.
    """
    require_extra("jobs")
    from dray.jobs.messages.controller_client import ControllerClient

    folder = JobFolder(output if output is not None else find_running(Path("outputs")))
    url, token = read_address(folder)
    with ControllerClient(url, token, ANSWER_BOUND) as client:
        if page:
            typer.echo(client.page_url())
            return
        answer = client.status()
    if as_json:
        typer.echo(json.dumps({"controller": url, **answer.model_dump(mode="json")}, indent=2))
        return
    for line in status_lines(answer, url):
        typer.echo(line)


def find_running(place: Path) -> Path:
    """The output folder of the only job running in a folder ``<job name>/<number>`` of `place`.

    Raises:
        ConfigError: no job is running there, or more than one.
    """
    found = sorted(path.parent.parent for path in place.glob(_RUNNING))
    if len(found) != 1:
        names = ", ".join(map(str, found)) or "there is none"
        raise ConfigError("OUTPUT", str(place), f"{_ALLOWED}; under {place}/: {names}")
    return found[0]


def is_running(folder: JobFolder) -> bool:
    """Whether a job runs in the folder: it is locked by that job.

    Where the file system has no locks, the folder of the run, which an ended job removes, decides.
    """
    if not folder.run.is_dir():
        return False
    descriptor = open_own_folder(folder.root, "OUTPUT")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def ends_soon(folder: JobFolder) -> bool:
    """Whether the job has ended, or ends within `END_BOUND` seconds, as its controller is gone."""
    deadline, never = Deadline.after(END_BOUND), threading.Event()
    while is_running(folder):
        if deadline.expired:
            return False
        never.wait(_CHECK_INTERVAL)
    return True


def read_address(folder: JobFolder) -> tuple[str, str]:
    """URL and token of the controller of the job running in `folder`.

    Raises:
        ConfigError: no job of this user is running there.
    """
    path = folder.controller_address
    try:
        text = read_private_file(path, "OUTPUT")
    except FileNotFoundError as error:
        raise ConfigError("OUTPUT", str(folder.root), _ALLOWED) from error
    try:
        document = json.loads(text)
        return str(document["url"]), str(document["token"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            "OUTPUT", str(path), f"must be the address of a controller of this version ({error})"
        ) from error


def status_lines(answer: Status, url: str) -> Iterator[str]:
    """The status as lines of text: one for the job, one for each replica."""
    steps = [member.progress.counters["step"] for member in answer.members if "step" in member.progress.counters]
    step = f", step {max(steps):.0f}" if steps else ""
    yield f"job {answer.job}: {answer.phase.value} for {answer.seconds:.1f} s{step}; controller at {url}"
    if answer.outcome is not None:
        yield f"outcome: {answer.outcome.kind}, {printable(answer.outcome.reason, MAX_LINE)}"
    if answer.stall is not None:
        yield f"stall: {printable(answer.stall.line, MAX_LINE)}"
    width = max((len(member.name) for member in answer.members), default=0)
    for member in sorted(answer.members, key=lambda each: each.name):
        yield f"{member.name:{width}}  {member.state.value}  {printable(_activity(member), MAX_LINE)}"


def _activity(member: MemberStatus) -> str:
    if member.state.value != "active":
        return member.reason
    waiting = f", waits for {member.progress.waits_for}" if member.progress.waits_for else ""
    return f"{member.progress.doing} for {member.progress.seconds + member.silence:.1f} s{waiting}"
