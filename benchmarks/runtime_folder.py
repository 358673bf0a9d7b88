"""A folder for the names and sockets of the streams of one benchmark, removed at its end."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator

_VARIABLE = "DRAY_RUNTIME_DIR"


@contextlib.contextmanager
def own_runtime_folder() -> Iterator[str]:
    """The folder that this process, and the children that it starts, use until the end of the block."""
    before = os.environ.get(_VARIABLE)
    with tempfile.TemporaryDirectory(prefix="dray-bench-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        os.environ[_VARIABLE] = folder
        try:
            yield folder
        finally:
            if before is None:
                del os.environ[_VARIABLE]
            else:
                os.environ[_VARIABLE] = before
