"""Paths that are not UTF-8, and processes whose locale is not."""

import os
from pathlib import Path
from typing import Any

import pytest
from job_runner import CLASSES, running
from transport_fixtures import Child

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}

SERVER = """
from pathlib import Path
folder = Path(os.fsdecode(bytes.fromhex(arguments["folder"])))
with SharedRingBuffer(2, 64) as ring, PayloadServer(ring, lane="shm", threads=1, directory=folder) as server:
    send([sys.getfilesystemencoding(), server.put_bytes(b"payload").to_json()])
    receive()
"""

READER = """
from dray.errors import ProducerLostError
ref = PayloadRef.from_json(arguments["ref"])
with PayloadClient(lane="shm") as client:
    send([sys.getfilesystemencoding(), bytes(client.read_bytes(ref)).decode()])
    receive()
    try:
        client.read_bytes(ref)
    except ProducerLostError as error:
        send(str(error))
"""


def child(monkeypatch: pytest.MonkeyPatch, script: str, environment: dict[str, str], **arguments: Any) -> Child:
    with monkeypatch.context() as patched:
        for name, value in environment.items():
            patched.setenv(name, value)
        return Child(script, **arguments)


@pytest.mark.parametrize("name", [b"\xff", "é".encode()])
@pytest.mark.parametrize("ascii_first", [True, False])
def test_references_are_read_whatever_the_locales_of_both_processes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: bytes, ascii_first: bool
) -> None:
    folder = os.fsencode(Path(os.environ["DRAY_RUNTIME_DIR"])) + b"/" + name + os.urandom(2).hex().encode()
    first, second = ({}, ASCII)[:: -1 if ascii_first else 1]
    with child(monkeypatch, SERVER, first, folder=folder.hex()) as server:
        encoding, ref = server.receive()
        assert encoding == ("ascii" if ascii_first else "utf-8")
        with child(monkeypatch, READER, second, ref=ref) as reader:
            assert reader.receive() == ["utf-8" if ascii_first else "ascii", "payload"]
            server.kill()
            reader.send()
            text = reader.receive()
            assert text.startswith("the producer is gone: no server answers for it at unix:")
            assert text.isprintable()


def test_job_runs_in_a_folder_that_is_not_utf_8_with_an_ascii_locale(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "job-\udcff"
    runtime = Path(os.environ["DRAY_RUNTIME_DIR"]) / f"\udcff{os.urandom(2).hex()}"
    for each in (folder, runtime):
        each.mkdir(mode=0o700)
    for name, value in {**ASCII, "DRAY_RUNTIME_DIR": str(runtime)}.items():
        monkeypatch.setenv(name, value)
    (folder / "smállé.py").write_text(CLASSES)
    named = ('controller.token_file="toké"', "rollout.worker=smállé.py:Worker", "job.max_steps=2")
    with running(folder, *(option for each in named for option in ("--set", each)), stop_table="") as job:
        assert job.end() == 0, job.story()
        assert (job.summary()["steps"], job.summary()["lane"]) == (2, "shm")
        assert "Logging error" not in job.text
    assert (folder / "toké").exists()
