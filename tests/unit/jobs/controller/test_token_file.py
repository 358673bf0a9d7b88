from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dray.errors import ConfigError
from dray.jobs.controller.listener import token_from_file


def write(path: Path, content: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_token_is_made_once_and_stays_the_same(tmp_path: Path) -> None:
    path = tmp_path / "token"
    token = token_from_file(path)
    assert len(token) == 64
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text() == f"{token}\n"
    assert token_from_file(path) == token
    assert token_from_file(tmp_path / "another") != token
    assert sorted(each.name for each in tmp_path.iterdir()) == ["another", "token"]


def test_token_of_the_user_is_taken_as_it_stands(tmp_path: Path) -> None:
    assert token_from_file(write(tmp_path / "token", b"0123456789abcdef\r\n")) == "0123456789abcdef"


def test_jobs_that_start_at_once_share_one_token(tmp_path: Path) -> None:
    for round_number in range(20):
        path = tmp_path / str(round_number)
        with ThreadPoolExecutor(4) as pool:
            tokens = set(pool.map(token_from_file, [path] * 4))
        assert len(tokens) == 1


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"fifteen bytes..", b"two words are not one token", b"sixteen bytes, \xc3\xa9", b"x" * 513],
)
def test_content_that_is_no_token_is_refused_and_not_shown(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path / "token", content)
    with pytest.raises(ConfigError) as caught:
        token_from_file(path)
    assert str(caught.value) == (
        f"controller.token_file = {str(path)!r} is not allowed: "
        "a file with one token of 16 to 512 printable ASCII characters"
    )


def test_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="for its owner only"):
        token_from_file(write(tmp_path / "token", b"0123456789abcdef", 0o640))


def test_file_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"controller.token_file = .*No such file or directory"):
        token_from_file(tmp_path / "missing" / "token")
