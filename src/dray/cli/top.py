"""`dray top`: a running job, live in the terminal."""

from __future__ import annotations

import errno
import json
import os
import queue
import select
import signal
import sys
import termios
import threading
import tty
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from dray.cli.extras import require_extra
from dray.cli.status import ANSWER_BOUND, ends_soon, find_running, read_address
from dray.errors import ConfigError, ControlPlaneError
from dray.jobs.folder import JobFolder
from dray.jobs.standard_streams import discard
from dray.text import MAX_LINE, printable

if TYPE_CHECKING:
    from rich.console import Console

    from dray.jobs.messages.controller_client import ControllerClient
    from dray.jobs.messages.view import JobView

_QUIT = b"qQ\x03"


def top(
    output: Annotated[
        Path | None,
        typer.Argument(
            help="Output folder of a running job. Default: that of the only job running under outputs/."
        ),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print one frame, and end.")] = False,
) -> None:
    """Show a running job in the terminal until it ends: figures over time, replicas, waits, stalls, warnings.

    q or Ctrl-C ends dray top, and not the job.

    Exit code 0: the job has ended, or q or Ctrl-C; 1: the controller does not answer, or the terminal is gone;
    2: no job of this user is running there, or there is no terminal.
    """
    require_extra("jobs")
    from rich.console import Console

    from dray.jobs.messages.controller_client import ControllerClient

    folder = JobFolder(output if output is not None else find_running(Path("outputs")))
    console = Console(highlight=False)
    if not once and (not sys.stdout.isatty() or console.is_dumb_terminal):
        raise ConfigError(
            "standard output", None, "use a terminal, or `dray top --once` for one frame", "is no terminal"
        )
    with ControllerClient(*read_address(folder), ANSWER_BOUND) as client:
        if once:
            from dray.cli.frame import frame

            console.print(frame(client.view(), console))
            return
        try:
            last = _show(client, console)
        except ControlPlaneError:  # before OSError, which it is
            last = None
            if not ends_soon(folder):
                raise
        except OSError as error:
            _end_without_terminal(error)
    if last is None or last.phase.is_final:
        typer.echo(_ending(folder, last))


def _show(client: ControllerClient, console: Console) -> JobView | None:
    """Show the job until it ends, or the user ends it; returns the last view.

    Raises:
        ControlPlaneError: the controller does not answer.
        OSError: the terminal is gone.
    """
    from rich.live import Live

    from dray.cli.frame import frame

    last: JobView | None = None
    with ExitStack() as resources:
        keys = resources.enter_context(_keys())
        woken = resources.enter_context(_woken_by_signals())
        live = resources.enter_context(Live(console=console, screen=True, auto_refresh=False))
        views = resources.enter_context(_Views(client, woken[1]))
        while True:
            ready = select.select([woken[0], *keys], [], [])[0]
            if woken[0] in ready and b"s" in os.read(woken[0], 4096):
                return last
            if keys and keys[0] in ready:
                typed = os.read(keys[0], 4096)
                if not typed:  # no key gives this
                    raise OSError(errno.EIO, "the terminal is gone")
                if any(each in _QUIT for each in typed):
                    return last
            for last in views.new():
                live.update(frame(last, console, keys=True), refresh=True)
                if last.phase.is_final:
                    return last


class _Views:
    """Asks for views in a thread of its own, which ends with the client's close or the job.

    Args:
        woken: a descriptor to which a byte is written when there is something new.
    """

    def __init__(self, client: ControllerClient, woken: int) -> None:
        self._client = client
        self._woken = woken
        self._found: queue.SimpleQueue[JobView | ControlPlaneError] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="views", daemon=True)

    def __enter__(self) -> _Views:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._client.close()
        self._thread.join()

    def new(self) -> Iterator[JobView]:
        """The views that have come.

        Raises:
            ControlPlaneError: there will be no more.
        """
        with suppress(queue.Empty):
            while True:
                found = self._found.get_nowait()
                if isinstance(found, ControlPlaneError):
                    raise found
                yield found

    def _run(self) -> None:
        seen = -1
        while not self._closed.is_set():
            try:
                view = self._client.view(seen)
            except ControlPlaneError as error:
                self._put(error)
                return
            seen = view.number
            self._put(view)
            if view.phase.is_final:
                return

    def _put(self, found: JobView | ControlPlaneError) -> None:
        self._found.put(found)
        os.write(self._woken, b"v")


@contextmanager
def _keys() -> Iterator[list[int]]:
    """The descriptor from which keys come as they are pressed; none without a terminal."""
    if not sys.stdin.isatty():
        yield []
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)
    try:
        yield [descriptor]
    finally:
        with suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


@contextmanager
def _woken_by_signals() -> Iterator[tuple[int, int]]:
    """Both ends of a pipe; Ctrl-C and SIGTERM write an ``s`` to it."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def handle(_number: int, _frame: object) -> None:
        with suppress(BlockingIOError):
            os.write(writing, b"s")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield reading, writing
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reading)
        os.close(writing)


def _ending(folder: JobFolder, last: JobView | None) -> str:
    """How the job has ended: as the last view or its summary has it."""
    if last is not None and last.outcome is not None:
        return f"job {last.job} has ended ({last.outcome.kind}): {last.outcome.reason}"
    try:
        summary = json.loads(folder.summary.read_text(encoding="utf-8"))
        return printable(f"job {summary['job']} has ended: {summary['exit_reason']}", MAX_LINE)
    except (OSError, ValueError, KeyError, TypeError):
        return printable(f"the job in {folder.root} has ended, and has left no summary", MAX_LINE)


def _end_without_terminal(error: OSError) -> NoReturn:
    """End with exit code 1: nothing more can be shown. Other errors are raised again."""
    if error.errno not in (errno.EIO, errno.EPIPE, errno.ENXIO, errno.EBADF):
        raise error
    discard(sys.stdout)
    raise typer.Exit(1)
