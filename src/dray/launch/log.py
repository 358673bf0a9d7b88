"""The supervisor's own log, beside those of its children."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAME = "supervisor.log"


@contextmanager
def supervisor_log(folder: Path) -> Iterator[None]:
    """What `dray` logs goes to the file `NAME` in `folder`, and warnings to the terminal as well."""
    logger = logging.getLogger("dray")
    writer = logging.FileHandler(folder / NAME, encoding="utf-8")
    writer.setFormatter(logging.Formatter("%(asctime)s supervisor %(levelname)s %(name)s: %(message)s"))
    level, shown = logger.level, [(each, each.level) for each in logging.getLogger().handlers]
    for each, _ in shown:
        each.setLevel(logging.WARNING)
    logger.addHandler(writer)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(writer)
        for each, before in shown:
            each.setLevel(before)
        writer.close()
