"""A Python process in network and mount namespaces of its own: loopback alone, and files that only it sees."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

BOUND = 60.0
_NAMESPACES = (
    ("unshare", "--net", "--mount") if os.getuid() == 0 else ("unshare", "--map-root-user", "--net", "--mount")
)


def run_isolated(script: str, folder: Path, files: Mapping[str, str] | None = None, setup: str = "") -> list[str]:
    """The lines that `script` prints there.

    Args:
        folder: where the files are made.
        files: path → text: what the process finds there instead of the machine's own file.
        setup: commands of the shell that are run before.

    Raises:
        AssertionError: the script failed.
    """
    missing = [tool for tool in ("unshare", "ip", "mount") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed")
    commands = ["set -e", "ip link set lo up"]
    for number, (path, text) in enumerate((files or {}).items()):
        mounted = folder / f"mounted-{number}"
        mounted.write_text(text)
        commands.append(f"mount --bind {shlex.quote(str(mounted))} {shlex.quote(path)}")
    if subprocess.run([*_NAMESPACES, "true"], capture_output=True, timeout=BOUND, check=False).returncode:
        pytest.skip("this machine allows no namespaces")
    commands += [setup, f"exec {shlex.join([sys.executable, '-c', script])}"]
    done = subprocess.run(
        [*_NAMESPACES, "sh", "-c", "\n".join(commands)],
        capture_output=True,
        text=True,
        timeout=BOUND,
        check=False,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
