"""Which folder a run writes to, and that no two runs write to the same one."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import platform
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from dray.errors import ConfigError
from dray.files import FOLDER_MODE, make_own_folders, open_own_folder, open_to_append, write_json
from dray.jobs.config import JobConfig, LogLevel
from dray.jobs.folder import OPTIONS_NAME, JobFolder, short_path
from dray.jobs.process import printable_handler
from dray.jobs.replica.checkpoint import CheckpointState, check_checkpoint, find_checkpoint, sweep_partial
from dray.system_calls import needed
from dray.text import MAX_LINE, path_of, printable

KEY = "job.output"
RESUME_NEEDS = "must be the output folder of an earlier run"
_LOG = logging.getLogger("dray.jobs.launch.output")
_NO_LOCKS = frozenset((errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP))
_USED = re.compile(r"^([A-Za-z0-9._-]+)(?!.*extra == .(?:dev|docs|fuzz)\b).*$", re.MULTILINE)
"""A line of the requirements of dray, but those of its developers; the name of the package."""

MAX_FOLDER_ATTEMPTS = 1000
"""Folders that are tried one after another because other runs that start at the same time have them."""


@contextmanager
def open_output(
    config: JobConfig, *, resume: bool | None, attempt: str | None = None
) -> Iterator[tuple[JobFolder, CheckpointState | None]]:
    """The run's folder, locked, with an empty `run` folder that is gone afterwards; and the state to resume from.

    A folder that was made here is removed again if it is left empty.

    Args:
        resume: whether to resume from a checkpoint, or from the beginning if an earlier run of the folder ended
            before its first one; None: whether there is one.
        attempt: the name of the attempt of a run that takes several.

    Raises:
        ConfigError: the folder belongs to another run or user, cannot be written, or has nothing to resume.
    """
    new = config.job.output is None and resume is False
    with _locked_folder(lambda: run_folder(config, resume=resume is not False), new=new) as root:
        folder = JobFolder(root, attempt)
        _sweep(folder)
        found = None if resume is False else find_checkpoint(folder.checkpoint)
        if resume and found is None and not is_begun(root):
            raise ConfigError("--resume", str(root), RESUME_NEEDS, f"cannot resume in {root}")
        if found is not None:
            check_checkpoint(found[0])
            if found[1].ranks != config.policy.replicas:
                allowed = f"must be {found[1].ranks}, as in the run whose checkpoint it is"
                raise ConfigError("policy.replicas", config.policy.replicas, allowed)
        shutil.rmtree(folder.run, ignore_errors=True)
        try:
            folder.run.mkdir(mode=0o700)
        except OSError as error:
            raise _not_writable(root, error) from error
        try:
            yield folder, None if found is None else found[1]
        finally:
            shutil.rmtree(folder.run, ignore_errors=True)


def _sweep(folder: JobFolder) -> None:
    """Remove what processes that were killed while they wrote have left. Only while the folder is locked."""
    sweep_partial(folder.checkpoint)
    for written in (folder.summary, folder.metrics, folder.record):
        for path in folder.root.glob(f".{written.name}.*"):
            path.unlink()


def resume_line(folder: JobFolder, state: CheckpointState) -> str:
    """From which checkpoint and step a run is resumed."""
    return f"resuming from checkpoint {short_path(folder.checkpoint)}, step {state.step}"


def attempt_folder(folder: JobFolder) -> None:
    """Make the folder of logs of an attempt and the symbolic link `latest` to it, and remove an earlier trace.

    Raises:
        ConfigError: there is something in its place that another user may have put there.
    """
    make_own_folders(folder.root, folder.logs, KEY)
    shutil.rmtree(folder.trace, ignore_errors=True)
    if folder.attempt is not None:
        newer = folder.latest.with_name(f".{folder.latest.name}.{os.getpid()}")
        newer.unlink(missing_ok=True)
        newer.symlink_to(folder.logs.parent.relative_to(folder.root))
        newer.replace(folder.latest)


def write_run_record(folder: JobFolder, config: JobConfig, job_file: Path) -> None:
    """Write what runs to the folder's `record`, for its owner only: a command line may hold secrets.

    It has the command, the job file, when the run began, the versions of Python and of the packages that dray and
    its extras name, and the configuration with every default. The URL of Redis, which may hold a password, is left
    out.
    """
    document = {
        "command": [printable(each, MAX_LINE) for each in sys.orig_argv],
        "job_file": printable(str(job_file), MAX_LINE),
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": _versions(),
        # The configured folder's name need not be text; this is that folder.
        "config": config.model_dump(mode="json", exclude={"job": {"output"}, "redis": {"url"}}),
    }
    write_json(folder.record, document, mode=0o600)


def _versions() -> dict[str, str]:
    """The versions of dray and of the packages that it and its extras name, where they are installed."""
    found = {}
    with suppress(metadata.PackageNotFoundError):
        found["dray-rl"] = metadata.version("dray-rl")
        for name in sorted({*_USED.findall("\n".join(metadata.requires("dray-rl") or ()))} - {"dray-rl"}):
            with suppress(metadata.PackageNotFoundError):
                found[name] = metadata.version(name)
    return found


def lock_folder(descriptor: int, root: Path, patience: float = 0.0) -> None:
    """Lock the folder until `descriptor`, which is of it, is closed.

    Some file systems that nodes share have no locks of folders: there it cannot be found out.

    Args:
        patience: seconds to wait for another process to give up its lock.

    Raises:
        ConfigError: it is locked, or a sandbox refuses locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        if not _locked_within(descriptor, patience):
            raise ConfigError(KEY, str(root), "must be a folder that no running job uses") from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            with needed("flock"):
                raise
        _LOG.warning("%s cannot be locked (%s): make sure that no other job uses it", root, error.strerror)


def _locked_within(descriptor: int, seconds: float) -> bool:
    if seconds <= 0:
        return False
    # `flock` has no time-out of its own. A thread that is left behind ends with the process.
    waiting = threading.Thread(target=fcntl.flock, args=(descriptor, fcntl.LOCK_EX), daemon=True)
    waiting.start()
    waiting.join(seconds)
    return not waiting.is_alive()


def run_folder(config: JobConfig, *, resume: bool) -> Path:
    """The folder of a run on this machine, absolute; it need not be there.

    Raises:
        ConfigError: the configured folder is an earlier run's, or there is none to resume.
    """

    def has_checkpoint(root: Path) -> bool:
        return find_checkpoint(JobFolder(root).checkpoint) is not None

    return choose_folder(config, resume=resume, used=has_metrics, resumable=(has_checkpoint, is_begun))


def choose_folder(
    config: JobConfig,
    *,
    resume: bool,
    used: Callable[[Path], bool],
    resumable: Sequence[Callable[[Path], bool]],
    needs: str = RESUME_NEEDS,
) -> Path:
    """The folder that a run is to have, absolute; it need not be there.

    Args:
        used: whether a folder is an earlier run's.
        resumable: whether a run can resume in one of the numbered folders: the newest one that meets the first
            condition is chosen, else the newest one that meets the next.
        needs: what a folder must be or have for that, for the error.

    Raises:
        ConfigError: the configured folder is an earlier run's, or there is none to resume in.
    """
    if config.job.output is not None:
        root = path_of(config.job.output).absolute()
        if not resume and used(root):
            allowed = "must be a folder without an earlier run, or go with --resume"
            raise ConfigError(KEY, str(root), allowed)
        return root
    base = Path("outputs", config.job.name).absolute()
    numbers = sorted(int(path.name) for path in base.glob("[0-9]*") if path.name.isdecimal())
    if not resume:
        return base / f"{(numbers[-1] if numbers else 0) + 1:03d}"
    for condition in resumable:
        for number in reversed(numbers):
            if condition(root := base / f"{number:03d}"):
                return root
    raise ConfigError("--resume", str(base), needs, f"cannot resume in {base}")


def make_run_folder(choose: Callable[[], Path], *, new: bool) -> tuple[Path, list[Path]]:
    """Make the folder that `choose` gives; returns it, and the folders that were made, innermost first.

    Args:
        choose: called again when another run has made the folder, or removed its parent, meanwhile.
        new: whether a folder that is there already is another run's.

    Raises:
        ConfigError: it cannot be made.
    """
    made: list[Path] = []
    for _ in range(MAX_FOLDER_ATTEMPTS):
        root = choose()
        try:
            for path in reversed([each for each in root.parents if not each.exists()]):
                with suppress(FileExistsError):
                    path.mkdir(FOLDER_MODE)
                    made.insert(0, path)
            root.mkdir(FOLDER_MODE)
            return root, [root, *made]
        except FileExistsError:
            if not new:
                return root, made
        except FileNotFoundError:
            continue  # a run that has ended has removed a folder that it had made
        except OSError as error:
            raise _not_writable(root, error) from error
    raise ConfigError(KEY, str(root), "must be a folder that stays, in folders that stay")


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove those of `folders` that are empty; the innermost come first."""
    for path in folders:
        with suppress(OSError):  # it is not, or another run has removed it
            path.rmdir()


def is_begun(root: Path) -> bool:
    """Whether a run has started its processes in the folder."""
    return os.path.lexists(root / OPTIONS_NAME) or has_metrics(root)


def has_metrics(root: Path) -> bool:
    """Whether a run has written to the folder."""
    return os.path.lexists(JobFolder(root).metrics)


@contextmanager
def _locked_folder(choose: Callable[[], Path], *, new: bool) -> Iterator[Path]:
    """As `make_run_folder`, with a folder of this user that no other run uses meanwhile."""
    for _ in range(MAX_FOLDER_ATTEMPTS):
        root, made = make_run_folder(choose, new=new)
        try:
            descriptor = open_own_folder(root, KEY)
        except FileNotFoundError:
            continue  # a run that has ended has removed it
        try:
            lock_folder(descriptor, root)
            if _is_at(descriptor, root):
                try:
                    yield root
                finally:
                    # While it is locked: another run that has opened it notices afterwards.
                    remove_empty(made)
                return
        finally:
            os.close(descriptor)
    raise ConfigError(KEY, str(root), "must be a folder that stays")


def _is_at(descriptor: int, root: Path) -> bool:
    """Whether the folder is still at `root`: the run that had locked it may have removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), root.stat())
    except FileNotFoundError:
        return False


def _not_writable(root: Path, error: OSError) -> ConfigError:
    return ConfigError(KEY, str(root), f"must be a folder that can be written ({error.strerror})")


# --- log ---------------------------------------------------------------------------------------------------------

LOG_NAME = "supervisor.log"


@contextmanager
def supervisor_log(folder: Path, level: LogLevel = "info") -> Iterator[None]:
    """What `dray` logs from `level` on goes to `LOG_NAME` in `folder`; warnings go to the terminal, too."""
    logger = logging.getLogger("dray")
    descriptor = open_to_append(folder / LOG_NAME, KEY)
    file = os.fdopen(descriptor, "a", encoding="utf-8", errors="backslashreplace")
    writer = printable_handler("%(asctime)s supervisor ", file)
    level_before, shown = logger.level, [(each, each.level) for each in logging.getLogger().handlers]
    for each, _ in shown:
        each.setLevel(logging.WARNING)
    logger.addHandler(writer)
    logger.setLevel(level.upper())
    try:
        yield
    finally:
        logger.setLevel(level_before)
        logger.removeHandler(writer)
        for each, before in shown:
            each.setLevel(before)
        writer.close()
        with suppress(OSError):  # the disk is full
            file.close()
