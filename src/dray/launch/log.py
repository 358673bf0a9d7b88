"""The supervisor's own log, beside those of its children."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dray.config import LogLevel
from dray.runtime.process import LEVELS

NAME = "supervisor.log"


@contextmanager
def supervisor_log(folder: Path, level: LogLevel = "info") -> Iterator[None]:
    """What `dray` logs from `level` on goes to the file `NAME` in `folder`; warnings go to the terminal, too."""
    logger = logging.getLogger("dray")
    writer = logging.FileHandler(folder / NAME, encoding="utf-8", errors="backslashreplace")
    writer.setFormatter(logging.Formatter("%(asctime)s supervisor %(levelname)s %(name)s: %(message)s"))
    level_before, shown = logger.level, [(each, each.level) for each in logging.getLogger().handlers]
    for each, _ in shown:
        each.setLevel(logging.WARNING)
    logger.addHandler(writer)
    logger.setLevel(LEVELS[level])
    try:
        yield
    finally:
        logger.setLevel(level_before)
        logger.removeHandler(writer)
        for each, before in shown:
            each.setLevel(before)
        writer.close()
