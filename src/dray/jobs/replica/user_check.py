"""A process that imports what is the user's and reports whether that works.

``FOLDER WORKER TRAINER CONCURRENCY ITEMS REPORT``. The classes and the items may be empty text: they are not
checked. The process ends before the job starts, so that nothing of the user's code stays in the supervisor.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dray.errors import ConfigError
from dray.jobs.files import write_json
from dray.jobs.process import begin_process
from dray.jobs.replica.entry_points import check_entry_points
from dray.jobs.replica.work import check_rows
from dray.text import text_of


def main() -> int:
    """Write to REPORT what is wrong: the parts of each mistake of a `ConfigError`."""
    begin_process("check")
    folder, worker, trainer, concurrency, items, report = sys.argv[1:]
    mistakes: list[ConfigError] = []
    try:
        check_entry_points(
            text_of(worker) or None, text_of(trainer) or None, Path(folder), concurrency=int(concurrency)
        )
    except ConfigError as error:
        mistakes += error.mistakes
    if items:
        try:
            check_rows(text_of(items), Path(folder))
        except ConfigError as error:
            mistakes += error.mistakes
    parts = [{name: getattr(each, name) for name in ("key", "value", "allowed", "problem")} for each in mistakes]
    write_json(Path(report), {"mistakes": parts})
    return 0


if __name__ == "__main__":
    sys.exit(main())
