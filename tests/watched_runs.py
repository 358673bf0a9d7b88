"""What runs of jobs show to a test, however they were started: the files in their folder, and their processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from waiting import holds_within, wait_until

from dray.jobs.folder import JobSpec
from dray.jobs.launch.output import LOG_NAME as SUPERVISOR_LOG
from dray.jobs.messages.controller_client import ControllerClient
from dray.jobs.process import DUMP_SIGNAL

BOUND = 60.0


class WatchedRun:
    """A run that writes to `output`; which processes and logs are its own depends on how it was started."""

    def __init__(self, output: Path) -> None:
        self.output = output

    def processes(self, name: str = "") -> list[psutil.Process]:
        """What runs of it; `name` is part of the command line."""
        raise NotImplementedError

    def logs(self) -> list[Path]:
        """What its processes write to, as far as it is there."""
        raise NotImplementedError

    def only(self, name: str) -> psutil.Process:
        """The one process that has `name` in its command line."""
        (found,) = self.processes(name)
        return found

    def story(self) -> str:
        """What it has printed and logged."""
        return ends_of(self.logs(), self.output)

    # --- files --------------------------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        return dict(json.loads((self.output / "summary.json").read_text()))

    def checkpoint(self) -> dict[str, Any]:
        return dict(json.loads((self.output / "checkpoint" / "state.json").read_text()))

    def metrics(self) -> list[dict[str, Any]]:
        """The whole lines of `metrics.jsonl`."""
        path = self.output / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.split("\n")[:-1]]

    def step(self) -> int:
        """That of the newest line of the metrics; 0 before there is one."""
        lines = self.metrics()
        return int(lines[-1]["step"]) if lines else 0

    def spec(self) -> JobSpec:
        """The specification that its processes have, while it runs."""
        return JobSpec.read(self.output / ".run" / "job.json")

    @contextmanager
    def controller(self) -> Iterator[ControllerClient]:
        """A client of its controller, while it runs."""
        spec = self.spec()
        with ControllerClient.of_address_file(spec.folder.controller_address, spec.token, 30.0) as client:
            yield client

    # --- waiting ------------------------------------------------------------------------------------------------

    def wait_until(self, condition: Callable[[], object], awaited: str, bound: float = BOUND) -> None:
        """Wait for what files and processes of the run show."""
        wait_until(condition, awaited, bound, pause=0.02, story=self._story_with_stacks)

    def rollout_with_payloads(self, count: int) -> psutil.Process:
        """A rollout replica that has at least `count` payloads in its ring, once there is one.

        It still has some when the caller kills it, if the policy takes longer for so many than a heartbeat.
        """
        found: list[int] = []

        def one_has() -> bool:
            members = client.status().members
            found[:] = [each.pid for each in members if each.progress.count("ring_used_slots") >= count]
            return bool(found)

        with self.controller() as client:
            self.wait_until(one_has, f"a rollout replica with {count} payloads in its ring")
        return psutil.Process(found[0])

    def kill_all(self, bound: float = 10.0) -> None:
        """Kill what runs of it, also what was just being started; it has ended when this returns."""

        def none_is_left() -> bool:
            left = self.processes()
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            return not left

        wait_until(none_is_left, "the end of killed processes", bound, pause=0.02, story=self.processes)

    def wait_for_checkpoint(self) -> None:
        """Wait until there is one."""
        self.wait_until((self.output / "checkpoint" / "state.json").exists, "a checkpoint")

    def dump_stacks(self) -> None:
        """Have every process of dray's write the stacks of its threads into its log."""
        before = {log: _dumps(log) for log in self.logs() if log.name != SUPERVISOR_LOG}
        for process in self.processes("-m dray."):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(DUMP_SIGNAL)
        # One that is stopped, or has ended, writes nothing.
        holds_within(2.0, lambda: all(_dumps(log) > count for log, count in before.items()), pause=0.05)

    def _story_with_stacks(self) -> str:
        self.dump_stacks()
        return self.story()


def _dumps(log: Path) -> int:
    return log.read_text().count("most recent call first")


def processes_where(ours: Callable[[psutil.Process], bool], name: str = "") -> list[psutil.Process]:
    """What runs on this machine, is one of `ours`, and has `name` in its command line."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it has ended meanwhile, or is another user's
            named = name in " ".join(process.cmdline())
            if named and ours(process) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def ends_of(files: Iterable[Path], folder: Path) -> str:
    """The last words of each of the files, which lie in `folder`."""
    return "\n".join(
        f"--- {file.relative_to(folder)}\n{file.read_text(errors='replace')[-4000:]}" for file in sorted(files)
    )
