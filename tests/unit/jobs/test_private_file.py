import os
from pathlib import Path

import pytest
from writing import files_of_at_most, umask

from dray.errors import ConfigError, OutputError
from dray.files import (
    check_own_tree,
    make_own_folder,
    make_own_folders,
    open_own_folder,
    open_to_append,
    read_own_file,
    read_private_file,
    write_whole,
)


def private(path: Path, content: bytes = b"content", mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_file_for_its_owner_only_is_read(tmp_path: Path) -> None:
    assert read_private_file(private(tmp_path / "file"), "key") == b"content"
    assert read_private_file(private(tmp_path / "read-only", mode=0o400), "key") == b"content"


def test_missing_file_is_an_error_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_private_file(tmp_path / "file", "key")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o644])
def test_file_that_others_may_read_or_write_is_refused_with_its_mode(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ConfigError, match=f"for its owner only, mode 600; its mode is {mode:o}") as caught:
        read_private_file(private(tmp_path / "file", mode=mode), "controller.token_file")
    assert (caught.value.key, caught.value.value) == ("controller.token_file", str(tmp_path / "file"))


def test_symbolic_link_to_a_private_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "symlink").symlink_to(private(tmp_path / "file"))
    with pytest.raises(ConfigError, match="it is a symbolic link"):
        read_private_file(tmp_path / "symlink", "key")


def test_folder_and_named_pipe_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ConfigError, match="regular file"):
            read_private_file(path, "key")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_file_of_another_user_is_refused(tmp_path: Path) -> None:
    os.chown(private(tmp_path / "file"), 12345, -1)
    with pytest.raises(ConfigError, match="its owner is 12345"):
        read_private_file(tmp_path / "file", "key")


def test_file_that_others_may_read_is_trusted_and_one_that_they_may_write_is_not(tmp_path: Path) -> None:
    assert read_own_file(private(tmp_path / "file", mode=0o644), "key") == b"content"
    for mode in (0o664, 0o646):
        with pytest.raises(ConfigError, match=rf"no other user may write to \(chmod go-w\); its mode is {mode:o}"):
            read_own_file(private(tmp_path / "file", mode=mode), "key")
    (tmp_path / "symlink").symlink_to(private(tmp_path / "file"))
    with pytest.raises(ConfigError, match="it is a symbolic link"):
        read_own_file(tmp_path / "symlink", "key")


def test_file_is_written_in_the_place_of_a_symbolic_link_and_not_through_it(tmp_path: Path) -> None:
    victim = private(tmp_path / "victim")
    (tmp_path / "file").symlink_to(victim)
    write_whole(tmp_path / "file", b"new")
    assert not (tmp_path / "file").is_symlink()
    assert ((tmp_path / "file").read_bytes(), victim.read_bytes()) == (b"new", b"content")


def test_files_and_folders_are_made_without_rights_of_others_to_write_whatever_the_umask(tmp_path: Path) -> None:
    with umask(0):
        write_whole(tmp_path / "file", b"")
        write_whole(tmp_path / "private", b"", mode=0o600)
        os.close(open_to_append(tmp_path / "log", "key"))
        make_own_folders(tmp_path, tmp_path / "parts" / "1" / "logs", "key")
    found = {str(path.relative_to(tmp_path)): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert found == {
        "file": 0o644, "private": 0o600, "log": 0o644, "parts": 0o755, "parts/1": 0o755, "parts/1/logs": 0o755,
    }  # fmt: skip


def test_write_that_fails_leaves_the_file_as_it_was_and_nothing_beside_it(tmp_path: Path) -> None:
    path = private(tmp_path / "file")
    with (
        files_of_at_most(10),
        pytest.raises(OutputError, match=f"{path} cannot be written: File too large") as caught,
    ):
        write_whole(path, b"x" * 100)
    assert isinstance(caught.value, OSError)
    assert path.read_bytes() == b"content"
    assert list(tmp_path.iterdir()) == [path]


def test_log_is_appended_to(tmp_path: Path) -> None:
    for text in (b"one", b"two"):
        with os.fdopen(open_to_append(tmp_path / "log", "key"), "ab") as file:
            file.write(text)
    assert (tmp_path / "log").read_bytes() == b"onetwo"


def test_log_is_neither_a_symbolic_link_nor_a_folder_nor_a_pipe(tmp_path: Path) -> None:
    victim = private(tmp_path / "victim")
    (tmp_path / "symlink").symlink_to(victim)
    (tmp_path / "dangling").symlink_to(tmp_path / "missing")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "symlink", tmp_path / "dangling", tmp_path, tmp_path / "pipe"):
        with pytest.raises(ConfigError, match="a regular file"):
            open_to_append(path, "key")
    assert not (tmp_path / "missing").exists()
    with pytest.raises(OutputError, match="cannot be written: No such file"):
        open_to_append(tmp_path / "missing" / "log", "key")


def test_folder_in_the_place_of_one_to_make_must_be_closed_to_the_writes_of_others(tmp_path: Path) -> None:
    make_own_folder(tmp_path / "logs", "key")
    make_own_folder(tmp_path / "logs", "key")
    (tmp_path / "symlink").symlink_to(tmp_path / "logs")
    with pytest.raises(ConfigError, match="a folder, not a symbolic link"):
        make_own_folders(tmp_path, tmp_path / "symlink" / "deeper", "key")
    (tmp_path / "logs").chmod(0o775)
    for refused in (
        lambda: make_own_folder(tmp_path / "logs", "key"),
        lambda: open_own_folder(tmp_path / "logs", "key"),
    ):
        with pytest.raises(ConfigError, match="its mode is 775"):
            refused()


def test_tree_is_refused_for_anything_in_it_that_others_may_write(tmp_path: Path) -> None:
    deep = tmp_path / "trainer" / "shards"
    deep.mkdir(parents=True)
    (deep / "latest").symlink_to("1")
    weights = private(deep / "1")
    check_own_tree(tmp_path, "key")
    weights.chmod(0o620)
    with pytest.raises(ConfigError, match=f"{weights}.* its mode is 620"):
        check_own_tree(tmp_path, "key")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_what_belongs_to_another_user_is_refused_wherever_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    path = private(folder / "file", mode=0o644)
    os.chown(path, 12345, -1)
    for refused in (
        lambda: read_own_file(path, "key"),
        lambda: os.close(open_to_append(path, "key")),
        lambda: check_own_tree(folder, "key"),
    ):
        with pytest.raises(ConfigError, match=f"{path}.* its owner is 12345"):
            refused()
    os.chown(folder, 12345, -1)
    for refused in (
        lambda: make_own_folder(folder, "key"),
        lambda: os.close(open_own_folder(folder, "key")),
        lambda: check_own_tree(folder, "key"),
    ):
        with pytest.raises(ConfigError, match=f"{folder}' .* its owner is 12345"):
            refused()
