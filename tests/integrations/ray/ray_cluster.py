"""A Ray cluster for tests, in a network namespace that has loopback alone, with a home of its own.

Ray runs in processes below this one: it starts threads and opens descriptors that it keeps, and warns of itself.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import loopback

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
START_SECONDS = 120.0
"""A start takes 5 s on a machine that has nothing else to do."""


_PROCESSES = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


class ScenarioError(AssertionError):
    """A scenario has raised in its driver; the text is its traceback."""


class RayHome:
    """A short folder that is the home of Ray programs."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="dray-home-", dir="/tmp"))  # Ray's sockets need a short path

    def start(
        self, command: Sequence[str], environment: Mapping[str, str], **options: Any
    ) -> subprocess.Popen[bytes]:
        """Start a program there: it reaches loopback alone, and what it has started ends with it."""
        paths = os.pathsep.join(map(str, (ROOT / "src", ROOT / "tests", HERE)))
        variables = loopback.environment(self.path, PYTHONPATH=paths, RAY_TMPDIR=str(self.path), **environment)
        started = [*_PROCESSES, *command] if os.geteuid() == 0 else command
        return subprocess.Popen(
            loopback.command(started), cwd=self.path, env=variables, start_new_session=True, **options
        )

    def end(self, process: subprocess.Popen[bytes], seconds: float) -> int:
        """The exit code of a program, which is killed after that time, with all that it has started."""
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return process.wait()

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


class Cluster:
    """A cluster and its driver, which runs the functions of `ray_scenarios`.

    Args:
        environment: variables of the driver, and of all processes of the cluster.
    """

    def __init__(self, **environment: str) -> None:
        self._home = RayHome()
        try:
            self._start(environment)
        except ScenarioError:  # on a busy machine, Ray gives up a start after 30 s, and nothing can change that
            self._end()
            self._start(environment)

    def _start(self, environment: Mapping[str, str]) -> None:
        requests, self._requests = os.pipe()
        results, answers = os.pipe()
        self._process = self._home.start(
            [sys.executable, str(HERE / "ray_driver.py"), str(requests), str(answers)],
            environment,
            pass_fds=(requests, answers),
        )
        os.close(requests)
        os.close(answers)
        self._results = os.fdopen(results)
        self._answer(START_SECONDS)

    def run(self, name: str, *, seconds: float = 120.0, **arguments: Any) -> Any:
        """What a function of `ray_scenarios` returns, as JSON has it.

        Raises:
            ScenarioError: it has raised.
            TimeoutError: it has not returned in time; the cluster is killed.
        """
        try:
            os.write(self._requests, json.dumps([name, arguments]).encode() + b"\n")
        except BrokenPipeError as error:
            raise ScenarioError("the driver has ended") from error
        return self._answer(seconds)

    def _answer(self, seconds: float) -> Any:
        if not select.select([self._results], [], [], seconds)[0]:
            os.killpg(self._process.pid, signal.SIGKILL)  # its answer would be taken for that of the next call
            raise TimeoutError(f"the driver has not answered within {seconds} s")
        answer = json.loads(self._results.readline() or '{"error": "the driver has ended"}')
        if "error" in answer:
            raise ScenarioError(answer["error"])
        return answer["value"]

    def _end(self) -> None:
        os.close(self._requests)
        self._home.end(self._process, 30)
        self._results.close()

    def close(self) -> None:
        """End the driver, and the cluster with it."""
        self._end()
        self._home.close()
