import errno
import fcntl
import os
from pathlib import Path

import pytest

from dray.config import JobConfig, parse_job
from dray.errors import ConfigError
from dray.launch.output import attempt_folder, open_output
from dray.runtime.checkpoint import CheckpointState, save_checkpoint


def config(output: str | None = None) -> JobConfig:
    return parse_job(
        {
            "job": {"name": "small", "max_steps": 3, **({"output": output} if output is not None else {})},
            "rollout": {"worker": "a.py:A"},
            "policy": {"trainer": "a.py:B", "batch_size": 2},
        }
    )


def checkpoint(root: Path) -> None:
    save_checkpoint(root / "checkpoint", CheckpointState(7, 7, 70), lambda _: None)


def test_runs_are_numbered_and_the_newest_checkpoint_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in ("001", "002", "003"):
        with open_output(config(), resume=False) as (folder, state):
            assert (folder.root, state) == (tmp_path / "outputs" / "small" / number, None)
            assert folder.run.stat().st_mode & 0o777 == 0o700
            if number == "001":
                folder.metrics.write_text("")
            elif number == "002":
                checkpoint(folder.root)
        assert not folder.run.exists()
    assert not folder.root.exists()  # nothing was left in it
    with open_output(config(), resume=True) as (folder, state):
        assert folder.root.name == "002"
        assert state is not None
        assert state.step == 7


def test_nothing_to_resume_is_a_config_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="--resume"), open_output(config(), resume=True):
        pass
    with pytest.raises(ConfigError, match="--resume"), open_output(config("deep/folder"), resume=True):
        pass
    assert list(tmp_path.iterdir()) == []


def test_folder_in_use_and_folder_of_an_earlier_run_are_refused(tmp_path: Path) -> None:
    chosen = config(str(tmp_path / "out"))
    with open_output(chosen, resume=False) as (folder, _):
        with pytest.raises(ConfigError, match="no running job"), open_output(chosen, resume=False):
            pass
        folder.metrics.write_text("")
    with pytest.raises(ConfigError, match="earlier run"), open_output(chosen, resume=False):
        pass


def test_folder_that_cannot_be_made_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match="can be written"),
        open_output(config(str(tmp_path / "file" / "x")), resume=False),
    ):
        pass


def test_what_a_killed_run_left_is_swept(tmp_path: Path) -> None:
    root = tmp_path / "out"
    checkpoint(root)
    for left in (".run/redis", ".checkpoint.partial/trainer", ".checkpoint.previous/trainer"):
        (root / left).mkdir(parents=True)
    for left in (".summary.json.123", ".metrics.jsonl.partial"):
        (root / left).write_text("{")
    with open_output(config(str(root)), resume=True) as (folder, _):
        assert list(folder.run.iterdir()) == []
        assert sorted(path.name for path in root.iterdir()) == [".run", "checkpoint"]


def test_attempt_begins_from_the_start_or_from_the_checkpoint_whatever_an_earlier_one_left(tmp_path: Path) -> None:
    chosen = config(str(tmp_path / "out"))
    with open_output(chosen, resume=None, attempt="001.1") as (folder, state):
        assert state is None
        folder.metrics.write_text("")
    with open_output(chosen, resume=None, attempt="001.2") as (folder, state):
        assert state is None
        checkpoint(folder.root)
    with open_output(chosen, resume=None, attempt="002.1") as (folder, state):
        assert state is not None
        assert state.step == 7


def test_each_attempt_has_logs_of_its_own_and_a_link_leads_to_the_newest(tmp_path: Path) -> None:
    for attempt in ("001.1", "001.2"):
        with open_output(config(str(tmp_path / "out")), resume=None, attempt=attempt) as (folder, _):
            assert attempt_folder(folder) == tmp_path / "out" / "parts" / attempt / "logs"
            assert attempt_folder(folder).is_dir()
        assert (tmp_path / "out" / "latest").readlink() == Path("parts", attempt)


def test_file_system_without_locks_of_folders_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_descriptor: int, _operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with open_output(config(str(tmp_path / "out")), resume=None):
        assert "make sure that no other job uses it" in caplog.text
