"""What is found out before a job is started, by `dray run` and by `dray check`: every mistake at once.

Each check does what the job would do, and undoes it: the folder is made and locked, the port of the controller is
bound, a ring is made. So both commands print the same lines, and what passes here fails later only if it has
changed.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from dray.clock import Deadline
from dray.errors import ConfigError, MissingDependencyError
from dray.identifiers import PRODUCER_ID_BYTES
from dray.jobs.config import JobConfig
from dray.jobs.controller.listener import bind, check_token_file
from dray.jobs.exit_codes import meaning
from dray.jobs.folder import JobFolder
from dray.jobs.job_file import MAX_MISTAKES, JobDraft
from dray.jobs.launch.output import open_output
from dray.jobs.launch.processes import Child
from dray.jobs.process import SignalInbox, child_pids, kill_orphans
from dray.jobs.queue import JobKeys, RedisAddress
from dray.jobs.queue.redis_server import answering_server, find_redis_binary
from dray.jobs.replica.checkpoint import CheckpointState
from dray.private_directory import PrivateDirectory
from dray.ring.layout import SegmentLayout
from dray.ring.segment import Segment
from dray.text import bytes_of, path_of
from dray.transport.lanes import LANES

# --- entry points ------------------------------------------------------------------------------------------------

NOTICE_AFTER = 2.0
"""Seconds that an import takes before there is a line about it; another one follows whenever that has doubled."""


def check_entry_points(
    draft: JobDraft, job_file: Path, folder: Path, inbox: SignalInbox, *, show_line: Callable[[str], None]
) -> list[signal.Signals]:
    """Import the user's classes in a process of their own, so that nothing of them stays in this one.

    Args:
        draft: classes that it does not know are not checked.
        folder: for this user only; the report and the output of the process go there.
        show_line: shows a line to the user.

    Returns:
        Signals that came meanwhile; with them nothing is known.

    Raises:
        ConfigError: they cannot be imported.
    """
    config, report = draft.config, folder / "entry_points.json"
    entry_points = {
        "rollout.worker": config.worker if draft.knows("rollout.worker") else "",
        "policy.trainer": config.policy.trainer if draft.knows("policy.trainer") else "",
        "work.items": config.work.items or "" if draft.knows("work.items") else "",
    }
    named = {key: text for key, text in entry_points.items() if text}
    if not named:
        return []
    # They may name files: arguments of a process are bytes, as paths are.
    worker, trainer, items = (os.fsdecode(bytes_of(each)) for each in entry_points.values())
    concurrency = config.rollout.concurrency if draft.knows("rollout.concurrency") else 1
    strangers = child_pids()
    child = Child(
        "check",
        "dray.jobs.replica.entry_points",
        [str(job_file.parent), worker, trainer, str(concurrency), items, str(report)],
        folder / "check.log",
    )
    deadline = Deadline.after(config.timeouts.start)
    notice = NOTICE_AFTER
    signals: list[signal.Signals] = []
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(inbox, selectors.EVENT_READ)
            selector.register(child.pidfd, selectors.EVENT_READ)
            while child.collect() is None and not signals and not deadline.expired:
                selector.select(min(deadline.remaining, notice - deadline.elapsed))
                signals += inbox.receive()
                if deadline.elapsed >= notice:
                    notice *= 2
                    show_line(
                        f"importing {' and '.join(named.values())} "
                        f"({deadline.elapsed:.0f} s so far, at most {config.timeouts.start:g} s)"
                    )
    finally:
        child.kill_group()
        child.collect(5.0)
        kill_orphans(strangers, 1.0)
    if signals:
        return signals
    try:
        mistakes = json.loads(report.read_text(encoding="utf-8"))["mistakes"]
    except (OSError, ValueError) as error:
        why = f"importing them took longer than timeouts.start = {config.timeouts.start:g} s"
        if not deadline.expired:
            why = f"importing them ended the process ({meaning(child.exit_code or 0)})"
        raise ConfigError(", ".join(named), ", ".join(named.values()), why, "cannot be used") from error
    if mistakes:
        raise ConfigError.of([ConfigError(**each) for each in mistakes])
    return []


# --- preparation -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Preparation:
    """What was found out about a job.

    Attributes:
        mistakes: every one. With at least one, the job is not started.
        signals: those that came meanwhile; with them not everything is known.
        folder: of the run, locked; None if it is one of the mistakes.
        state: of the checkpoint from which the run is resumed.
    """

    mistakes: list[ConfigError] = field(default_factory=list)
    signals: list[signal.Signals] = field(default_factory=list)
    folder: JobFolder | None = None
    state: CheckpointState | None = None

    @property
    def finished(self) -> bool:
        """Whether the run that is resumed has finished: there is nothing left to start."""
        return self.state is not None and bool(self.state.outcome)


@contextmanager
def preparation(
    draft: JobDraft, job_file: Path, inbox: SignalInbox, *, show_line: Callable[[str], None], resume: bool = False
) -> Iterator[Preparation]:
    """Everything about a job that can be checked before it starts; the run's folder is held until the end.

    A configured Redis server is not asked; `raise_mistakes` does that. To be used in the main thread.

    Args:
        show_line: shows a line to the user.
    """
    found = Preparation(list(draft.mistakes))
    with ExitStack() as opened:
        named = draft.knows("job.output") and (draft.config.job.output is not None or draft.knows("job.name"))
        if named and (not resume or draft.knows("policy.replicas")):
            try:
                found.folder, found.state = opened.enter_context(open_output(draft.config, resume=resume))
            except ConfigError as error:
                found.mistakes += error.mistakes
        if not found.finished:
            for keys, check in _CHECKS:
                if draft.knows(*keys):
                    try:
                        check(draft.config)
                    except ConfigError as error:
                        found.mistakes += error.mistakes
            try:
                place = found.folder.run if found.folder is not None else _temporary_folder(opened)
                found.signals += check_entry_points(draft, job_file, place, inbox, show_line=show_line)
            except ConfigError as error:
                found.mistakes += error.mistakes
        yield found


def _temporary_folder(opened: ExitStack) -> Path:
    try:
        return Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="dray-check-")))
    except OSError as error:
        allowed = f"a folder for temporary files is needed ({error.strerror})"
        raise ConfigError("TMPDIR", os.environ.get("TMPDIR"), allowed, "cannot be used") from error


def raise_mistakes(draft: JobDraft, mistakes: Sequence[ConfigError], show_line: Callable[[str], None]) -> None:
    """Raise one error about all of `mistakes`, and what is wrong with a configured Redis server, if anything is.

    Waits for the server, at most `timeouts.redis` seconds.

    Args:
        show_line: shows a line to the user.
    """
    unique = {each.message: each for each in mistakes}
    if draft.config.redis.url is not None and draft.knows("redis.url"):
        try:
            answering_server(draft.config, JobKeys(f"check-{secrets.token_hex(4)}"), show_line)
        except ConfigError as error:
            unique |= {each.message: each for each in error.mistakes}
    if unique:
        raise ConfigError.of(list(unique.values())[:MAX_MISTAKES])


# --- checks -----------------------------------------------------------------------------------------------------


def _lane(config: JobConfig) -> None:
    lane = LANES.get(config.job.lane)
    if lane is None or config.job.transfer != "reference":
        return
    try:
        lane.check()
    except MissingDependencyError as error:
        raise ConfigError("job.lane", lane.name, error.message, f"= {lane.name!r} cannot be used") from error


def _ring(config: JobConfig) -> None:
    if config.job.transfer != "reference":
        return
    layout = SegmentLayout(config.rollout.slots, config.rollout.slot_bytes)
    try:
        Segment.create(layout, secrets.token_bytes(PRODUCER_ID_BYTES)).close()
    except ConfigError as error:
        if error.key != "slots x slot_bytes":
            raise
        key = "rollout.slots x rollout.slot_bytes"
        raise ConfigError(key, error.value, error.allowed, error.problem) from error


def _redis(config: JobConfig) -> None:
    if config.redis.url is None:
        find_redis_binary()
    else:
        RedisAddress(config.redis.url)


def _controller(config: JobConfig) -> None:
    bind(config.controller.host, config.controller.port).close()


def _token_file(config: JobConfig) -> None:
    if config.controller.token_file is not None:
        check_token_file(path_of(config.controller.token_file))


def _socket_folder(_: JobConfig) -> None:
    PrivateDirectory().close()


_CHECKS: Final[tuple[tuple[tuple[str, ...], Callable[[JobConfig], None]], ...]] = (
    (("job.lane", "job.transfer"), _lane),
    (("job.transfer", "rollout.slots", "rollout.slot_bytes"), _ring),
    (("redis.url",), _redis),
    (("controller.host", "controller.port"), _controller),
    (("controller.token_file",), _token_file),
    ((), _socket_folder),
)
"""Each check, with the keys that it reads."""
