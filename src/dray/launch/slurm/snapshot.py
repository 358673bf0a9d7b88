"""A copy of the code beside the job file, so that what is edited after a submission does not reach the job.

Copied is the folder of the job file, with what is below it. Left out are hidden files and folders (a repository's
own, virtual environments, caches), `__pycache__`, `outputs/` and the run's folder. A link to a file becomes a copy
of the file, a link to a folder a link to that same folder: data sets are often linked so.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from dray.errors import ConfigError

LARGEST_BYTES = 256 << 20
LARGEST_COUNT = 10_000
_LEFT_OUT = frozenset(("__pycache__", "outputs"))


def take_snapshot(job_file: Path, target: Path, run_folder: Path) -> Path:
    """Copy the folder of `job_file` to `target`, in the place of what is there; returns the job file in it.

    Raises:
        ConfigError: there is more than `LARGEST_BYTES` or `LARGEST_COUNT` files: that is not only code.
    """
    source = job_file.parent.resolve()
    found = _within_bounds(source, _entries(source, run_folder.resolve()))
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for path in found:
        copy = partial / path.relative_to(source)
        if path.is_symlink() and path.is_dir():
            copy.symlink_to(path.resolve())
        elif path.is_dir():
            copy.mkdir()
        else:
            shutil.copy2(path, copy)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    return target / job_file.name


def _entries(folder: Path, run_folder: Path) -> Iterator[Path]:
    """What is copied, a folder before its content."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in _LEFT_OUT or path.resolve() == run_folder:
            continue
        if path.is_dir():
            yield path
            if not path.is_symlink():
                yield from _entries(path, run_folder)
        elif path.is_file():  # no sockets, pipes or links that lead nowhere
            yield path


def _within_bounds(source: Path, entries: Iterable[Path]) -> list[Path]:
    found, files, size = [], 0, 0
    for path in entries:
        found.append(path)
        if not path.is_dir():
            files += 1
            size += path.stat().st_size
        if files > LARGEST_COUNT or size > LARGEST_BYTES:
            allowed = (
                f"{source} has more than {LARGEST_COUNT} files, or than {LARGEST_BYTES >> 20} MiB in them: "
                "keep data elsewhere, link its folder, or set it to false"
            )
            raise ConfigError("slurm.snapshot", True, allowed)
    return found
