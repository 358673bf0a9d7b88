"""A process that imports the user's classes and tells whether that works: ``FOLDER WORKER TRAINER REPORT``.

One of the classes may be empty text: it is not checked. The process ends before the job starts, so that nothing of
the user's code stays in the supervisor.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dray.errors import ConfigError
from dray.runtime.entry_point import check_entry_points
from dray.runtime.job import write_json
from dray.runtime.process import begin_process
from dray.text import text_of


def main() -> int:
    """Write to REPORT what is wrong: the parts of each mistake of a `ConfigError`."""
    begin_process("check")
    folder, worker, trainer, report = sys.argv[1:]
    mistakes: tuple[ConfigError, ...] = ()
    try:
        check_entry_points(text_of(worker) or None, text_of(trainer) or None, Path(folder))
    except ConfigError as error:
        mistakes = error.mistakes
    parts = [{name: getattr(each, name) for name in ("key", "value", "allowed", "problem")} for each in mistakes]
    write_json(Path(report), {"mistakes": parts})
    return 0


if __name__ == "__main__":
    sys.exit(main())
