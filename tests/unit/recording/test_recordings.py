"""Recordings: what is recorded comes back, whatever happens to the recorder and its disk."""

import json
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stream_fixtures import SECONDS, forked

import dray
from dray import Consumer, Producer
from dray.errors import BufferClosedError, ConfigError, OutputError, PayloadFormatError, StreamTimeout
from dray.recording import Recorder, Recording, record, replay
from dray.recording.describe import fields_of, table
from dray.recording.files import is_recording_file, read_payload
from dray.recording.recorder import RecordingFullError


def payload(number: int) -> dict[str, Any]:
    return {
        "obs": np.arange(number, number + 6, dtype=np.float32).reshape(2, 3),
        "turns": [{"text": f"turn {number}", "ids": dray.Ragged.from_rows([np.arange(2), np.arange(number % 3)])}],
        "reward": float(number),
        "nothing": None,
    }


def assert_same(found: Any, number: int) -> None:
    wanted = payload(number)
    assert found["obs"].tobytes() == wanted["obs"].tobytes()
    assert found["turns"][0]["text"] == wanted["turns"][0]["text"]
    assert [each.tolist() for each in found["turns"][0]["ids"]] == [[0, 1], list(range(number % 3))]
    assert (found["reward"], found["nothing"]) == (float(number), None)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_payloads_come_back_in_order_over_several_files(tmp_path: Path) -> None:
    with Recorder(tmp_path / "r", file_bytes=4000) as recorder:
        for number in range(50):
            assert recorder.append(payload(number), about={"step": number}) == number
    recording = Recording(tmp_path / "r")
    assert len(recording) == 50
    assert len(recording.files) > 3
    for number, found in enumerate(recording):
        assert (found.number, found.about) == (number, {"step": number})
        assert_same(found.values, number)
    assert_same(recording[-1].values, 49)
    assert [each.time for each in recording] == sorted(each.time for each in recording)
    with pytest.raises(IndexError, match="payload 50 of a recording of 50"):
        recording[50]


def test_other_libraries_of_the_format_open_each_file(tmp_path: Path) -> None:
    numpy_files = pytest.importorskip("safetensors.numpy")
    with Recorder(tmp_path) as recorder:
        recorder.append(payload(3))
    found = numpy_files.load_file(next(tmp_path.glob("*.safetensors")))
    assert found["payloads.0.obs"].tolist() == payload(3)["obs"].tolist()


def test_the_index_lists_files_and_payloads(tmp_path: Path) -> None:
    with Recorder(tmp_path, about={"stream": "rollouts"}) as recorder:
        for number in range(3):
            recorder.append(payload(number))
            recorder.flush()
    index = json.loads((tmp_path / "index.json").read_text())
    assert (index["version"], index["about"], index["payloads"]) == (1, {"stream": "rollouts"}, 3)
    assert [(each["first"], each["last"]) for each in index["files"]] == [(0, 0), (1, 1), (2, 2)]
    assert index["bytes"] == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))


def test_a_recording_is_continued(tmp_path: Path) -> None:
    for begin in (0, 5):
        with Recorder(tmp_path) as recorder:
            for number in range(begin, begin + 5):
                recorder.append(payload(number))
    for number, found in enumerate(Recording(tmp_path)):
        assert found.number == number
        assert_same(found.values, number)


def test_small_files_become_one(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        for number in range(40):
            recorder.append(payload(number))
            recorder.flush()
    recording = Recording(tmp_path)
    assert len(recording.files) == 2 + 8
    for number, found in enumerate(recording):
        assert_same(found.values, number)


def test_a_merge_that_was_interrupted_leaves_every_payload_once(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        for number in range(15):
            recorder.append(payload(number))
            recorder.flush()
        small = {name: (tmp_path / name).read_bytes() for name in names(tmp_path) if name.endswith("safetensors")}
        recorder.append(payload(15))
        recorder.flush()
    for name, content in small.items():
        (tmp_path / name).write_bytes(content)
    assert [each.number for each in Recording(tmp_path)] == list(range(16))
    with Recorder(tmp_path):
        assert not set(small) & set(names(tmp_path))


def test_the_oldest_files_go_when_there_are_too_many_bytes(tmp_path: Path) -> None:
    with Recorder(tmp_path, max_bytes=20_000, file_bytes=4000) as recorder:
        for number in range(200):
            recorder.append(payload(number))
        recorder.flush()
        assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) <= 20_000
        recording = Recording(tmp_path)
        assert recording[0].number == recorder.removed > 100
        assert recording[-1].number == 199
        assert_same(recording[0].values, recorder.removed)
    assert json.loads((tmp_path / "index.json").read_text())["removed_payloads"] == recorder.removed


def test_a_recording_that_may_not_remove_ends_when_it_is_full(tmp_path: Path) -> None:
    with Recorder(tmp_path, max_bytes=5000, when_full="stop") as recorder:
        for number in range(100):
            recorder.append(payload(number))
        with pytest.raises(RecordingFullError, match=r"cannot be written: \d+ bytes are more than the 5000"):
            recorder.flush()
        with pytest.raises(RecordingFullError):
            recorder.close()
    with pytest.raises(ConfigError, match="a folder with the files of a recording"):
        Recording(tmp_path)


@contextmanager
def no_more_than(nbytes: int) -> Iterator[None]:
    """Files of this process cannot become larger: a write fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_what_was_written_and_keeps_the_rest_for_another_attempt(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        recorder.append(payload(0))
        recorder.flush()
        recorder.append({"obs": np.zeros(100_000)})
        with no_more_than(10_000), pytest.raises(OutputError, match="cannot be written: File too large"):
            recorder.flush()
        assert [each.number for each in Recording(tmp_path)] == [0]
        assert not [name for name in names(tmp_path) if name.startswith(".0")]
        recorder.flush()
    assert [each.number for each in Recording(tmp_path)] == [0, 1]


def test_a_recorder_that_is_killed_leaves_whole_files(tmp_path: Path) -> None:
    def write(ready: int) -> None:
        with Recorder(tmp_path, file_bytes=3000) as recorder:
            number = 0
            while True:
                recorder.append(payload(number))
                number += 1
                if number == 100:
                    os.write(ready, b"x")

    with forked(write) as (pid, reading):
        assert os.read(reading, 1) == b"x"
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, os.WNOHANG)
    found = list(Recording(tmp_path))
    assert [each.number for each in found] == list(range(len(found)))
    assert len(found) > 50
    for each in found:
        assert_same(each.values, each.number)
    with Recorder(tmp_path) as recorder:  # its lock has ended with it
        assert recorder.append(payload(len(found))) >= len(found)
    assert not [name for name in names(tmp_path) if name.startswith(".0")]


def test_two_recorders_do_not_write_into_one_folder(tmp_path: Path) -> None:
    with Recorder(tmp_path), pytest.raises(ConfigError, match="a folder in which no other recorder writes"):
        Recorder(tmp_path)
    with Recorder(tmp_path):
        pass


@pytest.mark.parametrize("damage", ["cut", "text", "other"])
def test_a_file_that_is_damaged_is_named(tmp_path: Path, damage: str) -> None:
    with Recorder(tmp_path) as recorder:
        recorder.append(payload(0))
    path = next(tmp_path.glob("*.safetensors"))
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-100], "text": b"no image", "other": bytes(dray.pack(payload(0)))}[damage])
    with pytest.raises(PayloadFormatError, match=f"{path.name} cannot be read"):
        Recording(tmp_path)[0]


@pytest.mark.parametrize(
    ("options", "named"),
    [({"max_bytes": 0}, "max_bytes"), ({"file_bytes": True}, "file_bytes"), ({"when_full": "no"}, "when_full")],
)
def test_arguments_that_are_not_allowed_are_named(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Recorder(tmp_path, **options)


def test_a_recorder_that_is_closed_takes_nothing(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.close()
    recorder.close()
    with pytest.raises(BufferClosedError):
        recorder.append(payload(0))


def test_values_may_be_changed_after_they_were_added(tmp_path: Path) -> None:
    values = payload(0)
    with Recorder(tmp_path) as recorder:
        recorder.append(values)
        values["obs"][:] = 9
    assert_same(Recording(tmp_path)[0].values, 0)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing.*No such file or directory"):
        Recording(tmp_path / "missing")


def test_fields_of_payloads_are_described_by_their_paths() -> None:
    payloads = [payload(number) for number in range(5)] + [
        {"obs": np.array([np.nan, 1.0]), "c": np.zeros(2, "c8")}
    ]
    rows = {name: field.row(name) for name, field in fields_of(payloads).items()}
    assert list(rows) == ["obs", "turns.0.text", "turns.0.ids", "reward", "nothing", "c"]
    assert rows["obs"] == ("obs", "float32 float64", "(2, 3) (2,)", "6", "136", "0", "4.3871", "9", "1")
    assert rows["turns.0.text"][1:5] == ("text", "()", "5", "30")
    assert rows["turns.0.ids"][1:3] == ("ragged int64", "(2,) (3,) (4,)")
    assert rows["nothing"][1] == "none"
    assert rows["c"][5:] == ("-", "-", "-", "-")
    lines = table(rows.values())
    assert len(lines) == 7
    assert lines[0].startswith("field")


def test_any_safetensors_file_is_one_payload(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    path.write_bytes(bytes(dray.pack(payload(3))))
    assert not is_recording_file(path)
    assert_same(read_payload(path), 3)
    path.write_bytes(b"something else")
    for read in (read_payload, is_recording_file):
        with pytest.raises(PayloadFormatError, match=r"one\.safetensors cannot be read"):
            read(path)
    with pytest.raises(ConfigError, match="a file that can be read"):
        read_payload(tmp_path / "two.safetensors")


# --- streams ----------------------------------------------------------------------------------------------------


def put(name: str, count: int) -> Callable[[int], None]:
    def run(ready: int) -> None:
        with Producer(name, scope=name, groups=["default", "record"], slots=4, drain_timeout=SECONDS) as producer:
            os.write(ready, b"x")
            for number in range(count):
                producer.put(payload(number), timeout=SECONDS)

    return run


def test_a_stream_is_recorded_by_a_group_of_its_own_and_replayed(tmp_path: Path) -> None:
    name = f"recorded-{os.getpid()}"
    recorder = Recorder(tmp_path)
    with forked(put(name, 30)), recorder, Consumer(name, scope=name) as trainer:
        with Consumer(name, scope=name, group="record", ack="manual") as consumer:
            worker = threading.Thread(target=record, args=(consumer, recorder))
            worker.start()
            for number, each in enumerate(trainer):
                assert_same(each, number)
            worker.join(SECONDS)
            assert not worker.is_alive()
        assert recorder.payloads == 30
    recording = Recording(tmp_path)
    assert [each.about["sequence"] for each in recording] == list(range(30))

    with Producer(name, scope=name, slots=4) as producer, Consumer(name, scope=name) as trainer:
        replayed = threading.Thread(target=replay, args=(recording, producer))
        replayed.start()
        for number in range(30):
            assert_same(trainer.get(timeout=SECONDS), number)
        replayed.join(SECONDS)


def test_a_full_disk_gives_payloads_back_to_their_producer(tmp_path: Path) -> None:
    name = f"full-{os.getpid()}"
    with forked(put(name, 8)):
        consumer = Consumer(name, scope=name, group="record", ack="manual")
        with consumer, Recorder(tmp_path, max_bytes=100, when_full="stop") as recorder:
            with pytest.raises(RecordingFullError):
                record(consumer, recorder)
            with pytest.raises(RecordingFullError):
                recorder.close()
        with Consumer(name, scope=name) as trainer:
            again = Consumer(name, scope=name, group="record", ack="manual")
            with again, Recorder(tmp_path / "b") as other:
                worker = threading.Thread(target=record, args=(again, other))
                worker.start()
                assert sum(1 for _ in trainer) == 8
                worker.join(SECONDS)
        found = list(Recording(tmp_path / "b"))
        assert sorted(each.about["sequence"] for each in found) == list(range(8))
        assert any(each.about["deliveries"] > 1 for each in found)


def test_a_replay_keeps_the_times_between_payloads_if_asked(tmp_path: Path) -> None:
    name = f"paced-{os.getpid()}"
    with Recorder(tmp_path) as recorder:
        recorder.append(payload(0))
    first = Recording(tmp_path)[0]
    recording = [first, first._replace(time=first.time + 100.0)]
    stop = threading.Event()
    with Producer(name, scope=name) as producer, Consumer(name, scope=name) as consumer:
        worker = threading.Thread(target=replay, args=(recording, producer), kwargs={"speed": 1.0, "stop": stop})
        worker.start()
        assert_same(consumer.get(timeout=SECONDS), 0)
        with pytest.raises(StreamTimeout):
            consumer.get(timeout=0.2)
        stop.set()
        worker.join(SECONDS)
        assert not worker.is_alive()
        assert replay(recording, producer, speed=10_000.0) == 2
        assert [consumer.get(timeout=SECONDS)["reward"] for _ in range(2)] == [0.0, 0.0]
        with pytest.raises(ConfigError, match="speed"):
            replay(recording, producer, speed=0.0)
