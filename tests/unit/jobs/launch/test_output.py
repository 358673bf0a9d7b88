import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest
from writing import umask

from dray.errors import ConfigError
from dray.jobs.config import JobConfig
from dray.jobs.job_file import parse_job
from dray.jobs.launch.output import attempt_folder, open_output
from dray.jobs.replica.checkpoint import CheckpointState, save_checkpoint


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
    root.mkdir()
    checkpoint(root)
    for left in (".run/redis", ".checkpoint.partial/trainer", ".checkpoint.previous/trainer"):
        (root / left).mkdir(parents=True)
    for left in (".summary.json.123", ".metrics.jsonl.12ab34cd"):
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


def test_each_attempt_has_logs_of_its_own_and_a_symbolic_link_leads_to_the_newest(tmp_path: Path) -> None:
    for attempt in ("001.1", "001.2"):
        with open_output(config(str(tmp_path / "out")), resume=None, attempt=attempt) as (folder, _):
            assert folder.logs == tmp_path / "out" / "parts" / attempt / "logs"
            for _ in range(2):
                attempt_folder(folder)
                assert folder.logs.is_dir()
        assert (tmp_path / "out" / "latest").readlink() == Path("parts", attempt)


def test_file_system_without_locks_of_folders_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_descriptor: int, _operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with open_output(config(str(tmp_path / "out")), resume=None):
        assert "make sure that no other job uses it" in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_folder_of_another_user_is_refused_by_name(tmp_path: Path) -> None:
    root = tmp_path / "out"
    root.mkdir()
    os.chown(root, 12345, -1)
    with (
        pytest.raises(ConfigError, match=f"^job.output = '{root}' .* its owner is 12345$"),
        open_output(config(str(root)), resume=False),
    ):
        pass


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o1777])
def test_folder_that_others_may_write_to_is_refused_by_name(tmp_path: Path, mode: int) -> None:
    root = tmp_path / "out"
    root.mkdir()
    root.chmod(mode)
    with (
        pytest.raises(ConfigError, match=f"^job.output = '{root}' .*chmod go-w.* its mode is {mode:o}$"),
        open_output(config(str(root)), resume=None),
    ):
        pass


def test_folders_are_made_without_rights_of_others_to_write_whatever_the_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with umask(0), open_output(config(), resume=False, attempt="001.1") as (folder, _):
        attempt_folder(folder)
        found = [path for path in tmp_path.rglob("*") if not path.is_symlink()]
        assert len(found) == 7
        assert [path for path in found if path.stat().st_mode & 0o022] == []


def test_symbolic_link_in_the_place_of_a_folder_of_logs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    with open_output(config(str(tmp_path / "out")), resume=False) as (folder, _):
        folder.logs.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ConfigError, match=r"out/logs.* not a symbolic link"):
            attempt_folder(folder)


def test_checkpoint_that_others_may_write_is_not_resumed(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    checkpoint(tmp_path / "out")
    (tmp_path / "out" / "checkpoint" / "trainer").chmod(0o777)
    with (
        pytest.raises(ConfigError, match=r"checkpoint/trainer.* its mode is 777"),
        open_output(config(str(tmp_path / "out")), resume=True),
    ):
        pass


def started(count: int, output: JobConfig) -> list[str | ConfigError]:
    """What as many runs at the same time get that all end together: a folder's name or an error."""
    found: list[str | ConfigError] = []
    start, end = threading.Barrier(count), threading.Barrier(count)

    def run() -> None:
        start.wait(30)
        try:
            with open_output(output, resume=False) as (folder, _):
                found.append(folder.root.name)
                end.wait(30)
        except ConfigError as error:
            found.append(error)
            end.wait(30)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_runs_that_start_at_the_same_time_have_different_numbered_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(4):  # at the end of a round the folders, which are empty, are removed
        assert sorted(map(str, started(40, config()))) == [f"{number:03d}" for number in range(1, 41)]


def test_one_of_the_runs_that_start_in_the_same_folder_has_it(tmp_path: Path) -> None:
    for _ in range(5):
        found = started(8, config(str(tmp_path / "out")))
        assert found.count("out") == 1
        assert all("no running job uses" in str(each) for each in found if each != "out")


def test_folder_of_a_run_that_has_ended_can_be_used_at_once(tmp_path: Path) -> None:
    """Each run removes the folder, which is empty, while others are about to lock it."""
    chosen = config(str(tmp_path / "deep" / "out"))
    errors: list[ConfigError] = []

    def run() -> None:
        for _ in range(50):
            try:
                with open_output(chosen, resume=False):
                    pass
            except ConfigError as error:
                errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [str(error) for error in errors if "no running job uses" not in str(error)] == []


def test_run_without_a_checkpoint_is_restarted_by_resuming_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in (1, 2, 3):
        with open_output(config(), resume=False) as (folder, _):
            (folder.root / ("options.json" if number < 3 else "notes")).touch()
    with open_output(config(), resume=True) as (folder, state):
        assert (folder.root.name, state) == ("002", None)
    checkpoint(tmp_path / "outputs" / "small" / "001")
    with open_output(config(), resume=True) as (folder, state):
        assert (folder.root.name, state is None) == ("001", False)
    with open_output(config("outputs/small/002"), resume=True) as (folder, state):
        assert (folder.root.name, state) == ("002", None)
    with pytest.raises(ConfigError, match="earlier run"), open_output(config("outputs/small/003"), resume=True):
        pass
