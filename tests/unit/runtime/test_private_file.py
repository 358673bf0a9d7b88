import os
from pathlib import Path

import pytest

from dray.errors import ConfigError
from dray.runtime.private_file import read_private_file


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


def test_link_to_a_private_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(private(tmp_path / "file"))
    with pytest.raises(ConfigError, match="it is a link"):
        read_private_file(tmp_path / "link", "key")


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
