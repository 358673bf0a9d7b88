"""`dray record`, `dray replay` and `dray inspect` as a user runs them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dray import Consumer, Producer
from dray.recording import Recorder, Recording

SECONDS = 60.0


def dray(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "dray.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )


def ended(command: subprocess.Popen[str], code: int = 0) -> str:
    out, err = command.communicate(timeout=SECONDS)
    assert command.returncode == code, out + err
    return out + err


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    with Recorder(tmp_path / "recording") as recorder:
        for number in range(10):
            recorder.append(
                {"obs": np.full((number + 1, 3), number, np.float32), "about": {"text": "ok", "reward": 0.5}}
            )
    return tmp_path / "recording"


def test_a_stream_is_recorded_until_ctrl_c_and_replayed(tmp_path: Path) -> None:
    name, folder = f"cli-{os.getpid()}", str(tmp_path / "recording")
    with Producer(name, scope=name, groups=["record"], drain_timeout=SECONDS) as producer:
        recorder = dray("record", name, folder, "--scope", name)
        for number in range(100):
            producer.put({"number": np.array(number)}, timeout=SECONDS)
        assert producer.drain(SECONDS) == 0
        recorder.send_signal(signal.SIGINT)
        assert f"recorded 100 payloads; see {folder}" in ended(recorder)
    assert [int(each.values["number"]) for each in Recording(folder)] == list(range(100))

    replay = dray("replay", folder, name, "--scope", name, "--first", "90")
    with Consumer(name, scope=name) as consumer:
        assert [int(each["number"]) for each in consumer] == list(range(90, 100))
    assert "replayed 10 payloads" in ended(replay)


def test_a_stream_without_the_group_is_an_error_that_names_its_groups(tmp_path: Path) -> None:
    name = f"cli-{os.getpid()}"
    with Producer(name, scope=name):
        text = ended(dray("record", name, str(tmp_path / "r"), "--scope", name), 1)
    assert "'record'" in text
    assert "default" in text
    assert "Traceback" not in text


def test_fields_are_shown_with_their_shapes_and_statistics(recording: Path) -> None:
    text = ended(dray("inspect", str(recording)))
    assert "10 payloads in 1 file" in text
    lines = {line.split()[0]: line for line in text.splitlines() if line}
    assert lines["field"].split()[:5] == ["field", "dtype", "shape", "payloads", "bytes"]
    assert "float32" in lines["obs"]
    assert "(1, 3) (2, 3) (3, 3) …" in lines["obs"]
    assert lines["obs"].split()[-4:] == ["0", "6", "9", "-"]
    assert "text" in lines["about.text"]
    assert "0.5" in lines["about.reward"]
    one = ended(dray("inspect", str(next(recording.glob("*.safetensors")))))
    assert "a file of a recording with 10 payloads" in one


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "missing"], "missing"),
        (["replay", "missing", "s"], "missing"),
        (["replay", "{recording}", "s", "--pace", "fast"], "--pace = 'fast'"),
        (["replay", "{recording}", "s", "--first", "10"], "less than 10"),
        (["record", "a b", "{recording}2"], "name = 'a b'"),
        (["record", "s", "{recording}", "--secret-file", "none"], "--secret-file"),
        (["record", "outputs/1", "{recording}"], "must be the output folder of a running job"),
        (["record", "{recording}", "{recording}"], "must be the output folder of a running job"),
        (["record", "outputs/1", "{recording}", "--scope", "s"], "--scope = 's'"),
        (["record", "outputs/1", "{recording}", "--scope", "record"], "--scope = 'record'"),
        (["record", "outputs/1", "{recording}", "--group", "g"], "--group = 'g'"),
    ],
)
def test_mistakes_are_one_line_each(recording: Path, arguments: list[str], words: str) -> None:
    text = ended(dray(*(each.format(recording=recording) for each in arguments)), 2)
    assert words in text
    assert len(text.strip().splitlines()) == 1


def test_two_recorders_of_one_folder_are_refused(recording: Path) -> None:
    with Recorder(recording):
        text = ended(dray("record", "s", str(recording)), 2)
    assert "no other recorder writes" in text


def test_a_replay_without_a_reader_ends_with_ctrl_c(recording: Path) -> None:
    name = f"cli-{os.getpid()}"
    replay = dray("replay", str(recording), name, "--scope", name, "--slots", "2")
    with Consumer(name, scope=name, ack="manual") as consumer:
        consumer.get(timeout=SECONDS).release()
    replay.send_signal(signal.SIGINT)
    assert "replayed 2 payloads, 2 of them not consumed" in ended(replay)
