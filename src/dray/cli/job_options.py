"""Options with which every command that takes a job file changes it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dray.config import JobConfig, load_job
from dray.errors import ConfigError

Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Override a key of the job file.")
]


def read_job(job: Path, settings: list[str] | None, output: str | None) -> JobConfig:
    """The configuration of a job file with what was said on the command line; `output` has the last word.

    Raises:
        ConfigError: the file cannot be read, or a key, a value or the name of the folder is not allowed.
    """
    config = load_job(job, settings or [])
    if output is None:
        return config
    if not output or not _is_utf8(output):
        raise ConfigError("--output", output, "the name of a folder, in UTF-8")
    return config.model_copy(update={"job": config.job.model_copy(update={"output": output})})


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
