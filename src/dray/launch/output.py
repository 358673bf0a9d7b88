"""Which folder a run writes to, and that no two runs write to the same one."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dray.config import JobConfig
from dray.errors import ConfigError
from dray.path_text import path_of
from dray.runtime.checkpoint import CheckpointState, find_checkpoint
from dray.runtime.job import JobFolder, short_path
from dray.system_calls import needed

_LOG = logging.getLogger("dray.launch.output")
_NO_LOCKS = frozenset((errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP))
RESUME_NEEDS = "must be the output folder of an earlier run that wrote a checkpoint"


@contextmanager
def open_output(
    config: JobConfig, *, resume: bool | None, attempt: str | None = None
) -> Iterator[tuple[JobFolder, CheckpointState | None]]:
    """The run's folder, locked, with an empty `run` folder that is gone afterwards; and the state to resume from.

    A folder that was made here, and in which nothing was left, is removed again.

    Args:
        resume: whether to go on from a checkpoint; None: if there is one.
        attempt: the name of the attempt of a run that takes several.

    Raises:
        ConfigError: the folder belongs to another run, or there is nothing to resume.
    """
    root = run_folder(config, resume=resume is not False)
    made = _make(root)
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    folder = JobFolder(root, attempt)
    try:
        lock_folder(descriptor, root)
        found = None if resume is False else find_checkpoint(folder.checkpoint)
        if resume and found is None:
            raise ConfigError("--resume", str(root), RESUME_NEEDS, f"cannot go on in {root}")
        if found is not None and found[1].ranks != config.policy.replicas:
            allowed = f"must be {found[1].ranks}, as in the run whose checkpoint it is"
            raise ConfigError("policy.replicas", config.policy.replicas, allowed)
        shutil.rmtree(folder.run, ignore_errors=True)
        folder.run.mkdir(mode=0o700)
        try:
            yield folder, None if found is None else found[1]
        finally:
            shutil.rmtree(folder.run, ignore_errors=True)
    finally:
        os.close(descriptor)
        for path in made:
            if not any(path.iterdir()):
                path.rmdir()


def resume_line(folder: JobFolder, state: CheckpointState) -> str:
    """From which checkpoint, and from which step, a run is resumed, in one line."""
    return f"resuming from checkpoint {short_path(folder.checkpoint)}, step {state.step}"


def attempt_folder(folder: JobFolder) -> Path:
    """Make the folder of logs of an attempt, and let the link `latest` lead to its attempt; returns it."""
    folder.logs.mkdir(parents=True, exist_ok=True)
    if folder.attempt is not None:
        link = folder.latest.with_name(f".{folder.latest.name}.{os.getpid()}")
        link.unlink(missing_ok=True)
        link.symlink_to(folder.logs.parent.relative_to(folder.root))
        link.replace(folder.latest)
    return folder.logs


def lock_folder(descriptor: int, root: Path, patience: float = 0.0) -> None:
    """Lock the folder until `descriptor`, which is of it, is closed.

    Some file systems that nodes share know no locks of folders: there nothing tells.

    Args:
        patience: seconds to wait for another process to give up its lock.

    Raises:
        ConfigError: it is locked, or a sandbox refuses locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        if not _locked_within(descriptor, patience):
            raise ConfigError("job.output", str(root), "must be a folder that no running job uses") from error
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
        ConfigError: the configured folder is an earlier run's, or there is none with a checkpoint to go on from.
    """
    return choose_folder(config, resume=resume, used=has_metrics, resumable=_has_checkpoint)


def choose_folder(
    config: JobConfig,
    *,
    resume: bool,
    used: Callable[[Path], bool],
    resumable: Callable[[Path], bool],
    needs: str = RESUME_NEEDS,
) -> Path:
    """The folder that a run is to have, absolute; it need not be there.

    Args:
        used: whether a folder is an earlier run's.
        resumable: whether a run can go on in one of the numbered folders.
        needs: what one must be or have for that, for the error.

    Raises:
        ConfigError: the configured folder is an earlier run's, or there is none to go on in.
    """
    if config.job.output is not None:
        root = path_of(config.job.output).absolute()
        if not resume and used(root):
            allowed = "must be a folder without an earlier run, or go with --resume"
            raise ConfigError("job.output", str(root), allowed)
        return root
    base = Path("outputs", config.job.name).absolute()
    numbers = sorted(int(path.name) for path in base.glob("[0-9]*") if path.name.isdecimal())
    if not resume:
        return base / f"{(numbers[-1] if numbers else 0) + 1:03d}"
    for number in reversed(numbers):
        if resumable(root := base / f"{number:03d}"):
            return root
    raise ConfigError("--resume", str(base), needs, f"cannot go on in {base}")


def has_metrics(root: Path) -> bool:
    """Whether a run has written to the folder."""
    return (root / "metrics.jsonl").exists()


def _has_checkpoint(root: Path) -> bool:
    return find_checkpoint(root / "checkpoint") is not None


def _make(root: Path) -> list[Path]:
    """Make `root` and its parents; returns those that were not there, innermost first."""
    made = []
    for path in (root, *root.parents):
        if path.exists():
            break
        made.append(path)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            "job.output", str(root), f"must be a folder that can be written ({error.strerror})"
        ) from error
    return made
