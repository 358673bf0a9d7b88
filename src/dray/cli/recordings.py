"""`dray record`, `dray replay` and `dray inspect`: payloads of a stream or a job in files, and back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from dray.cli.job_recording import is_job, record_job
from dray.errors import ConfigError
from dray.files import read_private_file
from dray.jobs.folder import JobFolder
from dray.text import MAX_LINE, printable

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the recording.")]
Scope = Annotated[str | None, typer.Option(help="Scope of the stream. Default: that of this session or job.")]
RECORD_GROUP = "record"
SecretFile = Annotated[Path | None, typer.Option(help="File with the secret, as hexadecimal digits.")]


def record(
    source: Annotated[
        str,
        typer.Argument(
            metavar="STREAM|OUTPUT",
            help="Name of a stream, tcp://HOST:PORT, or the output folder of a running job.",
        ),
    ],
    folder: Folder,
    group: Annotated[
        str, typer.Option(help="A group of the producers that is for the recording: it gets every payload.")
    ] = RECORD_GROUP,
    scope: Scope = None,
    secret_file: SecretFile = None,
    payloads: Annotated[
        int | None, typer.Option(min=1, help="End after so many payloads; of a job, after the step that has them.")
    ] = None,
    max_bytes: Annotated[int, typer.Option(min=1, help="Bytes that the files may have together.")] = 10 << 30,
    file_bytes: Annotated[int, typer.Option(min=1, help="Bytes that one file has at most.")] = 64 << 20,
    stop_when_full: Annotated[
        bool,
        typer.Option("--stop-when-full", help="End when max-bytes are there. Default: remove the oldest files."),
    ] = False,
) -> None:
    """Write the payloads of a stream, or those that a running job trains on, to files, until that ends, or Ctrl-C.

    Producers must have the group: Producer(name, groups=["default", "record"]). A payload is acknowledged when it
    is on the disk. A recording that exists is continued.

    The policy replica of a job writes the files, whole training steps at a time; Ctrl-C waits for the end of the
    step. If this command is killed, the recording ends within seconds.

    Exit code 0: the stream or the job has ended, all payloads are there, or Ctrl-C; 1: the disk or the recording
    is full, or the job does not answer; 2: mistakes, or the job cannot be recorded.
    """
    if is_job(source):
        of_streams = (
            ("--group", group, RECORD_GROUP),
            ("--scope", scope, None),
            ("--secret-file", secret_file, None),
        )
        for option, value, default in of_streams:
            if value != default:
                raise ConfigError(option, str(value), f"an option for streams, and {source} is a job")
        with stopped_by_signals() as stop:
            record_job(
                JobFolder(Path(source)),
                folder,
                stop,
                payloads=payloads,
                max_bytes=max_bytes,
                file_bytes=file_bytes,
                stop_when_full=stop_when_full,
            )
        return
    from dray.recording import Recorder
    from dray.recording import record as record_stream
    from dray.streams import Consumer

    with (
        stopped_by_signals() as stop,
        Recorder(
            folder,
            max_bytes=max_bytes,
            file_bytes=file_bytes,
            when_full="stop" if stop_when_full else "remove",
            about={"stream": source, "group": group},
        ) as recorder,
        Consumer(
            source if "://" not in source else [source],
            group=group,
            ack="manual",
            scope=scope,
            secret=_secret(secret_file),
        ) as consumer,
    ):
        recorded = record_stream(consumer, recorder, payloads=payloads, stopped=stop.is_set)
        removed = f", {recorder.removed} of them removed again" if recorder.removed else ""
    typer.echo(f"recorded {recorded} payloads{removed}; see {printable(str(folder), MAX_LINE)}")


def replay(
    folder: Folder,
    stream: Annotated[str, typer.Argument(metavar="STREAM", help="Name of the stream.")],
    pace: Annotated[
        str, typer.Option(help='"max", "original", or a number: 2 is twice as fast as it was recorded.')
    ] = "max",
    first: Annotated[int, typer.Option(min=0, help="Begin with this payload.")] = 0,
    payloads: Annotated[int | None, typer.Option(min=1, help="End after so many payloads.")] = None,
    slots: Annotated[int, typer.Option(min=1, help="Payloads that may wait for consumers.")] = 16,
    group: Annotated[list[str] | None, typer.Option(help="Groups of the stream. Default: default.")] = None,
    listen: Annotated[
        list[str] | None, typer.Option(help="Address for consumers on other hosts, tcp://HOST:PORT.")
    ] = None,
    scope: Scope = None,
    secret_file: SecretFile = None,
) -> None:
    """Put the payloads of a recording into a stream, in their order, and wait until they are consumed.

    Exit code 0: all are consumed, or Ctrl-C; 1: a file cannot be read; 2: mistakes.
    """
    from dray.recording import Recording
    from dray.recording import replay as replay_into
    from dray.streams import Producer

    speed = _speed(pace)
    recording = Recording(folder)
    last = len(recording) if payloads is None else min(len(recording), first + payloads)
    if first >= len(recording):
        raise ConfigError("--first", first, f"less than {len(recording)}, the payloads of the recording")
    with (
        stopped_by_signals() as stop,
        Producer(
            stream,
            slots=slots,
            groups=group or ["default"],
            listen=listen or (),
            scope=scope,
            secret=_secret(secret_file),
            drain_timeout=None,
        ) as producer,
    ):
        chosen = (recording[index] for index in range(first, last))
        put = replay_into(chosen, producer, speed=speed, stop=stop)
        while not stop.is_set() and producer.drain(timeout=0.5):
            pass
        left = producer.drain(timeout=0.0)
        producer.close(drain=False)
    typer.echo(f"replayed {put} payloads" + (f", {left} of them not consumed" if left else ""))


def inspect(
    path: Annotated[Path, typer.Argument(metavar="FILE|DIR", help="A recording, or one safetensors file.")],
    payloads: Annotated[int, typer.Option(min=1, help="Read so many payloads, the first ones.")] = 1000,
) -> None:
    """Show what is in a recording, or in a safetensors file: fields, dtypes, shapes and statistics.

    Exit code 0: it was read; 1: a file cannot be read; 2: there is none.
    """
    from datetime import UTC, datetime
    from itertools import islice

    from dray.recording import Recording
    from dray.recording.describe import fields_of, table
    from dray.recording.files import is_recording_file, read_file, read_payload

    shown = printable(str(path), MAX_LINE)
    if path.is_dir():
        recording = Recording(path)
        found = list(islice(recording, payloads))
        nbytes = sum(file.nbytes for file in recording.files)
        files = f"{len(recording.files)} file{'s' if len(recording.files) > 1 else ''}"
        typer.echo(f"{shown}: {len(recording)} payloads in {files}, {nbytes:,} bytes")
        times = [datetime.fromtimestamp(each.time, UTC) for each in (recording[0], recording[-1])]
        typer.echo(f"recorded from {times[0]:%Y-%m-%d %H:%M:%S} to {times[1]:%Y-%m-%d %H:%M:%S} UTC")
        values = [each.values for each in found]
        if len(found) < len(recording):
            typer.echo(f"the first {len(found)} payloads:")
    elif is_recording_file(path):
        values = [each.values for each in read_file(path)]
        typer.echo(f"{shown}: a file of a recording with {len(values)} payloads")
    else:
        values = [read_payload(path)]
        typer.echo(f"{shown}: one payload")
    rows = [field.row(printable(name, MAX_LINE)) for name, field in fields_of(values).items()]
    for line in table(rows):
        typer.echo(line)


@contextmanager
def stopped_by_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set; a second one ends the command at once."""
    stop = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, _: object) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _secret(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return bytes.fromhex(read_private_file(path, "--secret-file").decode().strip())
    except FileNotFoundError as error:
        raise ConfigError("--secret-file", str(path), "a file that exists") from error
    except ValueError:
        allowed = "a file with hexadecimal digits"
        raise ConfigError("--secret-file", str(path), allowed) from None  # the secret is not shown


def _speed(pace: str) -> float | None:
    if pace == "max":
        return None
    try:
        speed = 1.0 if pace == "original" else float(pace)
    except ValueError:
        speed = 0.0
    if not 0 < speed < float("inf"):
        raise ConfigError("--pace", pace, '"max", "original", or a number of more than 0')
    return speed
