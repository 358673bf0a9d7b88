"""`dray new`: the files of a job in a new folder, all of them or nothing."""

import errno
import os
import sys
import tomllib
from pathlib import Path

import pytest

from dray.cli import app, new
from dray.cli.new import FILES, create_job
from dray.errors import ConfigError
from dray.jobs.config import is_job_name
from dray.jobs.job_file import load_job
from dray.jobs.replica.entry_points import check_entry_points


def content(folder: Path) -> list[str]:
    """Everything in `folder`, hidden files included."""
    return sorted(path.name for path in folder.iterdir())


def test_new_folder_gets_every_file_and_the_job_its_name(tmp_path: Path) -> None:
    create_job(tmp_path / "pole-7")
    assert content(tmp_path) == ["pole-7"]
    assert content(tmp_path / "pole-7") == sorted(FILES)
    assert load_job(tmp_path / "pole-7" / "job.toml").job.name == "pole-7"
    readme = (tmp_path / "pole-7" / "README.md").read_text()
    assert readme.startswith("# pole-7\n")
    assert "outputs/pole-7/" in readme


def test_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    create_job(tmp_path / "job")
    assert content(tmp_path / "job") == sorted(FILES)


def test_classes_of_a_new_job_are_short_and_fit_the_runtime(tmp_path: Path) -> None:
    create_job(tmp_path / "job")
    config = load_job(tmp_path / "job" / "job.toml")
    check_entry_points(config.rollout.worker, config.policy.trainer, tmp_path / "job")
    for name in ("worker.py", "trainer.py"):
        assert len((tmp_path / "job" / name).read_text().splitlines()) <= 60
    assert config.stop is not None


@pytest.mark.parametrize(
    "name", [".", "..", "/", ".hidden", "-job", "my job", "jobs/a b", "é", "a" * 64, "job\n", "name:1"]
)
def test_name_that_no_job_can_have_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="1 to 63 letters, digits") as caught:
        create_job(Path(name))
    assert caught.value.key == "NAME"
    assert content(tmp_path) == []


def test_name_of_a_new_job_is_one_that_the_job_file_allows() -> None:
    for name in ("a", "A.b_c-d", "0", "a" * 63):
        assert is_job_name(name)
    for name in ("", ".a", "a/b", "a" * 64, "a\n"):
        assert not is_job_name(name)


def test_folder_that_is_not_empty_is_refused_and_stays(tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"job' is not allowed: .* it contains notes\.txt$"):
        create_job(tmp_path / "job")
    assert content(tmp_path / "job") == ["notes.txt"]
    assert content(tmp_path) == ["job"]


def test_folder_that_is_filled_meanwhile_is_refused_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rename(source: Path, target: Path) -> None:
        target.mkdir()
        (target / "notes.txt").write_text("mine")
        actual(source, target)

    actual = os.rename
    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(ConfigError, match=r"it contains notes\.txt$"):
        create_job(tmp_path / "job")
    assert content(tmp_path) == ["job"]
    assert content(tmp_path / "job") == ["notes.txt"]


def test_command_names_what_it_has_created_and_refuses_to_do_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dray", "new", "my-job"])
    with pytest.raises(SystemExit) as ended:
        app.main()
    lines = [f"created my-job/{name}" for name in FILES]
    assert ended.value.code == 0
    assert capsys.readouterr() == ("\n".join([*lines, "run it with: dray run my-job/job.toml\n"]), "")
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code == 2
    line = "error: NAME = 'my-job' is not allowed: must be a new folder or an empty one; it contains "
    assert capsys.readouterr() == ("", f"{line}README.md, job.toml, trainer.py, worker.py\n")


def test_file_or_symlink_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "symlink").symlink_to("other")
    for name in ("file", "symlink"):
        with pytest.raises(ConfigError, match="a file or a symbolic link is there"):
            create_job(tmp_path / name)
    assert content(tmp_path) == ["file", "other", "symlink"]


def test_folder_that_cannot_be_created_is_named_with_the_reason(tmp_path: Path) -> None:
    for place in (tmp_path / "missing" / "job", tmp_path / "file" / "job"):
        (tmp_path / "file").touch()
        with pytest.raises(ConfigError, match=r"must be a folder that can be created \((No such|Not a)") as caught:
            create_job(place)
        assert caught.value.value == str(place)
    assert content(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_nothing_is_left_of_a_creation_that_fails_in_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    written: list[Path] = []

    def write_text(path: Path, *arguments: object, **options: object) -> int:
        written.append(path)
        if len(written) == 3:
            raise error
        return actual(path, *arguments, **options)  # type: ignore[arg-type]

    actual = Path.write_text
    monkeypatch.setattr(Path, "write_text", write_text)
    with pytest.raises((ConfigError, KeyboardInterrupt)):
        create_job(tmp_path / "job")
    assert len(written) == 3
    assert content(tmp_path) == []


def test_files_of_a_new_job_are_those_beside_the_command() -> None:
    folder = Path(new.__file__).with_name("new_job")
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == sorted(FILES)
    assert tomllib.loads((folder / "job.toml").read_text())["job"]["plot"] == ""
