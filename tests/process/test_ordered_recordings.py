"""`dray record OUTPUT DIR`: a running job is recorded for as long as the command runs, and continues."""

import codecs
import os
import re
import select
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from job_runner import CLASSES, job_settings, running
from node_runner import nodes_running
from test_recorded_jobs import BATCHES, batches
from waiting import wait_until
from watched_runs import WatchedRun

from dray.clock import Deadline
from dray.errors import ConfigError
from dray.recording import Recorder, Recording

BOUND = 60.0
BATCH = 8
GATED = """
class Gated(Trainer):
    def train_step(self, trajectories):
        if os.path.exists(self.args["gate"]):
            open(self.args["gate"]).read()
        return super().train_step(trajectories)
"""
DRAY = (sys.executable, "-m", "dray.cli.app")


class RecordCommand:
    """A `dray record` of a job."""

    def __init__(self, job: WatchedRun, folder: Path, *options: str) -> None:
        words = ["record", str(job.output), str(folder), *options]
        self.process = subprocess.Popen([*DRAY, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.text = ""
        self.decode = codecs.getincrementaldecoder("utf-8")().decode

    def wait_for(self, words: str) -> None:
        """Read what the command prints until `words` come."""
        deadline = Deadline.after(BOUND)
        assert self.process.stdout is not None
        while words not in self.text:
            assert select.select([self.process.stdout], [], [], deadline.remaining)[0], self.text
            chunk = os.read(self.process.stdout.fileno(), 65536)
            assert chunk, f"the command ended without printing {words!r}\n{self.text}"
            self.text += self.decode(chunk)

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def end(self) -> int:
        """Wait for the end and return the exit code."""
        rest, _ = self.process.communicate(timeout=BOUND)
        self.text += self.decode(rest)
        return self.process.returncode

    def recorded(self) -> int:
        """How many payloads the command reports as recorded."""
        found = re.search(r"recorded (\d+) payloads; see ", self.text)
        assert found, self.text
        return int(found[1])


@contextmanager
def recording(job: WatchedRun, folder: Path, *options: str) -> Iterator[RecordCommand]:
    """A command that has ended afterwards."""
    command = RecordCommand(job, folder, *options)
    try:
        yield command
    finally:
        if command.process.poll() is None:
            command.process.kill()
        command.process.wait()
        assert command.process.stdout is not None
        command.process.stdout.close()


def wait_for_steps(job: WatchedRun, more: int) -> None:
    """The job has done so many steps more."""
    goal = job.step() + more
    wait_until(lambda: job.step() >= goal, f"step {goal}", BOUND, pause=0.02, story=job.story)


def steps_in(folder: Path) -> list[int]:
    """The step of each payload of a recording."""
    return [each.about["step"] for each in Recording(folder)]


def no_recorder_writes(folder: Path) -> bool:
    try:
        Recorder(folder).close()
    except ConfigError:
        return False
    return True


@pytest.mark.timeout(240)  # two jobs and two commands, one after the other
def test_a_running_job_is_recorded_until_ctrl_c_and_the_recording_gives_another_one_the_same_batches(
    tmp_path: Path,
) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    folder = tmp_path / "recording"
    settings = job_settings("policy.trainer=small.py:Batches")
    with running(tmp_path / "first", *settings, stop_table="", classes=CLASSES + BATCHES) as job:
        wait_for_steps(job, 2)
        with recording(job, folder) as command:
            command.wait_for("recording into")
            wait_for_steps(job, 3)
            command.interrupt()
            assert command.end() == 0, command.text
        top = subprocess.run(
            [*DRAY, "top", "--once", str(job.output)], capture_output=True, text=True, timeout=BOUND
        )
        assert f"has ended: {command.recorded()} payloads" in " ".join(top.stdout.split())
        wait_for_steps(job, 2)
        job.process.send_signal(signal.SIGINT)
        assert job.end() == 130, job.story()
        trained = batches(job.output)
    counts = Counter(steps_in(folder))
    first, last = min(counts), max(counts)
    assert first > 2
    assert counts == dict.fromkeys(range(first, last + 1), BATCH)
    assert last - first >= 2
    assert command.recorded() == counts.total()
    inspected = subprocess.run([*DRAY, "inspect", str(folder)], capture_output=True, text=True, timeout=BOUND)
    assert f"{command.recorded()} payloads in " in inspected.stdout
    replayed = job_settings(
        "rollout.replicas=1", f"work.replay={folder}", f"job.max_steps={len(counts)}", "policy.args.repeats=true"
    )
    with running(tmp_path / "second", *settings, *replayed, stop_table="", classes=CLASSES + BATCHES) as job:
        assert job.end() == 0, job.story()
        assert batches(job.output) == trained[first - 1 : last]


def test_r18_the_recording_of_a_killed_command_ends_by_itself_and_can_be_continued(tmp_path: Path) -> None:
    folder = tmp_path / "recording"
    with running(tmp_path, stop_table="") as job:
        wait_for_steps(job, 1)
        with recording(job, folder) as command:
            command.wait_for("recording into")
            wait_for_steps(job, 1)
            command.process.kill()
        wait_until(lambda: no_recorder_writes(folder), "the end of the recording", BOUND, pause=0.1)
        before = steps_in(folder)
        assert before
        wait_for_steps(job, 2)
        assert steps_in(folder) == before
        with recording(job, folder, "--payloads", "20") as command:
            assert command.end() == 0, command.text
        assert command.recorded() == 24
        after = steps_in(folder)
        assert after[: len(before)] == before
        assert Counter(after[len(before) :]).total() == 24
        assert min(after[len(before) :]) > max(before)


def test_a_second_command_is_refused_and_one_that_cannot_write_fails_while_the_job_continues(
    tmp_path: Path,
) -> None:
    folder, file = tmp_path / "recording", tmp_path / "file"
    file.touch()
    with running(tmp_path, stop_table="") as job:
        wait_for_steps(job, 1)
        with recording(job, file / "recording") as command:
            assert command.end() == 1
        assert f"{file}/recording cannot be written: Not a directory" in command.text
        with recording(job, folder, "--max-bytes", "2000", "--stop-when-full") as command:
            assert command.end() == 1
        assert "are more than the 2000 that it may have" in command.text
        with recording(job, folder) as command:
            command.wait_for("recording into")
            with recording(job, tmp_path / "other") as second:
                assert second.end() == 2
            assert f"this one is, into {folder}" in second.text
            assert not (tmp_path / "other").exists()
            wait_for_steps(job, 1)
            job.process.send_signal(signal.SIGINT)
            assert job.end() == 130, job.story()
            assert command.end() == 0
        assert f"the job has ended; recorded {len(Recording(folder))} payloads; see {folder}" in command.text
        with recording(job, folder) as command:
            assert command.end() == 2
        assert "must be the output folder of a running job" in command.text


def test_ctrl_c_waits_for_the_end_of_the_step(tmp_path: Path) -> None:
    folder, gate = tmp_path / "recording", tmp_path / "gate"
    gated = job_settings("policy.trainer=small.py:Gated", f"policy.args.gate={gate}")
    with running(tmp_path, *gated, stop_table="", classes=CLASSES + GATED) as job:
        wait_for_steps(job, 1)
        with recording(job, folder) as command:
            command.wait_for("recording into")
            os.mkfifo(gate)
            with gate.open("w"):  # which waits for the trainer
                command.interrupt()
                command.wait_for("for policy-0 to end its step; it is training step")
                gate.unlink()
            assert command.end() == 0, command.text
        assert command.recorded() == len(Recording(folder))
        assert set(Counter(steps_in(folder)).values()) == {BATCH}


def test_a_recording_continues_after_a_restart_of_the_policy(tmp_path: Path) -> None:
    folder = tmp_path / "recording"
    settings = job_settings("policy.restarts=1", "policy.checkpoint_every=5", "rollout.args.restarts=true")
    again = job_settings("policy.args.restarts=true", "policy.args.repeats=true")
    with running(tmp_path, *settings, *again, stop_table="") as job:
        wait_for_steps(job, 1)
        with recording(job, folder) as command:
            command.wait_for("recording into")
            wait_for_steps(job, 3)
            killed_at = job.step()
            job.only("dray.jobs.replica.policy").kill()
            job.wait_for("restarting the policy group")
            wait_until(lambda: job.step() > killed_at + 8, "more steps", BOUND, pause=0.02, story=job.story)
            command.interrupt()
            assert command.end() == 0, command.text
        recorded = steps_in(folder)
        assert command.recorded() == len(recorded)
        assert max(recorded) > killed_at
        assert set(range(min(recorded), max(recorded) + 1)) == set(recorded)


def test_a_job_on_several_nodes_is_recorded_by_its_output_folder(tmp_path: Path) -> None:
    folder = tmp_path / "recording"
    with nodes_running(tmp_path, "stop.at_least=1e9", rollout_nodes=1) as run:
        run.start()
        run.wait_for_steps(2)
        with recording(run, folder, "--payloads", str(3 * BATCH)) as command:
            assert command.end() == 0, command.text
        assert command.recorded() == len(Recording(folder)) == 3 * BATCH
        wait_for_steps(run, 1)
