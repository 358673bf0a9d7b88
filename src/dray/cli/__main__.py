"""The program `dray`: runs the command line, or prints one line that names the missing extra.

`import dray` needs three packages; the command line also needs those of the extra `jobs`.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import NoReturn, TextIO

from dray import __version__
from dray.cli.extras import remedy
from dray.jobs.exit_codes import ExitCode
from dray.jobs.standard_streams import flush_streams, open_missing_streams


def main() -> None:
    """The entry point of the program. Without the extra, every command but `dray --version` exits with 2."""
    try:
        from dray.cli.app import main as command_line
    except ModuleNotFoundError as error:
        line = remedy(error)
        if line is None:
            raise
    else:
        command_line()
        return
    open_missing_streams()
    if sys.argv[1:2] == ["--version"]:
        _end(f"dray {__version__}", sys.stdout, ExitCode.OK)
    _end(f"error: {line}", sys.stderr, ExitCode.CONFIGURATION)


def _end(line: str, stream: TextIO, code: ExitCode) -> NoReturn:
    with suppress(OSError):  # a stream that cannot be written: the exit code has to do
        print(line, file=stream)
    flush_streams()
    sys.exit(int(code))


if __name__ == "__main__":
    main()
