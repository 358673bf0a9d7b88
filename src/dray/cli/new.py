"""`dray new`: creates the files of a small complete job, whose parts the user replaces."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Annotated, Final

import typer

from dray.errors import ConfigError
from dray.jobs.config import JOB_NAME_FORM, is_job_name
from dray.jobs.folder import short_path
from dray.text import as_argument, printable

FILES: Final = ("worker.py", "trainer.py", "job.toml", "README.md")
_KEY = "NAME"
_TEMPLATES = files("dray.cli") / "new_job"
_IN_USE = frozenset({errno.ENOTEMPTY, errno.EEXIST})


def new(
    name: Annotated[
        Path,
        typer.Argument(
            help="The folder to create; it may exist if it is empty. Its last part becomes the name of the job.",
            show_default=False,
        ),
    ],
) -> None:
    """Create a folder with a small complete job: worker.py, trainer.py, job.toml and README.md.

    The job learns to balance a pole on a cart within seconds, with NumPy alone.

    Exit code 0: the folder was created; 2: it exists and is not empty, or its name is not allowed.
    """
    create_job(name)
    for each in FILES:
        typer.echo(f"created {printable(str(name / each))}")
    typer.echo(f"run it with: dray run {as_argument(short_path(name.absolute() / 'job.toml'))}")


def create_job(folder: Path) -> None:
    """Create `folder` with all files of a job of the same name, or nothing.

    Raises:
        ConfigError: the folder is not empty, its name is no job name, or it cannot be created.
    """
    if not is_job_name(folder.name):
        raise ConfigError(
            _KEY, folder.name or str(folder), f"must be {JOB_NAME_FORM}, the first a letter or digit"
        )
    # Renamed in one step when it is complete. No job name begins with a dot.
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        _check_free(folder)
        partial.mkdir()
        for each in FILES:
            text = (_TEMPLATES / each).read_text(encoding="utf-8")
            content = text if each.endswith(".py") else Template(text).substitute(name=folder.name)
            (partial / each).write_text(content, encoding="utf-8")
        os.rename(partial, folder)  # noqa: PTH104 - replaces only an empty folder
    except OSError as error:
        if error.errno in _IN_USE:
            raise _in_use(folder) from error
        allowed = f"must be a folder that can be created ({error.strerror})"
        raise ConfigError(_KEY, str(folder), allowed) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_free(folder: Path) -> None:
    """Raise `ConfigError` unless `folder` does not exist or is empty."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ConfigError(
            _KEY, str(folder), "must be a new folder or an empty one; a file or a symbolic link is there"
        )
    if folder.is_dir() and any(folder.iterdir()):
        raise _in_use(folder)


def _in_use(folder: Path) -> ConfigError:
    content = sorted(path.name for path in folder.iterdir())
    shown = ", ".join(content[:4]) + (", …" if len(content) > 4 else "")
    return ConfigError(_KEY, str(folder), f"must be a new folder or an empty one; it contains {shown}")
