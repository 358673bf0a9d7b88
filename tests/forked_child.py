"""Checks in a forked child of the test's process."""

import os
import traceback
from collections.abc import Callable


def run_in_child(check: Callable[[], object]) -> str:
    """Run `check` in a forked child; the traceback if it raised, the signal if it crashed, or nothing."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            check()
        except BaseException:
            os.write(writing, traceback.format_exc().encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        problem = pipe.read().decode()
    _, status = os.waitpid(pid, 0)
    return problem or ("" if status == 0 else f"status {status}")
