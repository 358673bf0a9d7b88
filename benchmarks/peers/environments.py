"""Virtual environments for the peers whose packages would disturb those of dray."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.peers.catalog import OWN, PEERS, REQUIREMENTS, Peer

_CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
_SECONDS = 1800.0


class NotInstalled(Exception):
    """A peer cannot run here; the text states why."""


def place(environment: str) -> Path:
    """Where an environment lies: in the user's cache, one for each version of Python."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return cache / "dray" / "bench-peers" / f"{environment}-{version}"


def interpreter(peer: Peer) -> Path:
    """The Python that runs a peer: this one where it has what is needed, or that of the peer's environment.

    Raises:
        NotInstalled: neither has.
    """
    if importlib.util.find_spec(peer.needed) is not None:
        return Path(sys.executable)
    if peer.environment == OWN:
        raise NotInstalled(f"the package {peer.needed} is not installed")
    python = place(peer.environment) / "bin" / "python"
    if not (place(peer.environment) / "installed").exists():
        raise NotInstalled("not installed: make bench-peers")
    return python


def install(report: Callable[[str], None]) -> dict[str, str]:
    """Make the environments that are missing; needs an index of packages.

    Args:
        report: called with a line about each environment.

    Returns:
        Why an environment could not be made, for those that could not.
    """
    failed: dict[str, str] = {}
    for environment, requirements in REQUIREMENTS.items():
        peer = next(each for each in PEERS if each.environment == environment)
        try:
            found = interpreter(peer)
        except NotInstalled:
            report(f"{environment}: installing {', '.join(requirements)} into {place(environment)}")
            try:
                _make(environment, requirements)
            except subprocess.CalledProcessError as error:
                failed[environment] = (error.stderr or str(error)).strip().splitlines()[-1]
            except subprocess.TimeoutExpired:
                failed[environment] = f"pip did not end within {_SECONDS:.0f} s"
        else:
            report(f"{environment}: {found}")
    return failed


def _make(environment: str, requirements: tuple[str, ...]) -> None:
    folder = place(environment)
    _run(sys.executable, "-m", "venv", "--clear", str(folder))
    python = str(folder / "bin" / "python")
    _run(python, "-m", "pip", "install", "--quiet", "--constraint", str(_CONSTRAINTS), *requirements)
    (folder / "installed").touch()


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)
