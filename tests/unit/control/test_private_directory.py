import os
import stat
from pathlib import Path

from dray.control.private_directory import PrivateDirectory


def test_only_its_owner_can_enter_and_closing_leaves_nothing(tmp_path: Path) -> None:
    directory = PrivateDirectory.below(tmp_path)
    assert directory.path.parent == tmp_path
    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700
    directory.socket_path.touch()
    directory.close()
    directory.close()
    assert list(tmp_path.iterdir()) == []


def test_directories_of_dead_owners_are_swept_and_those_of_live_ones_are_not(tmp_path: Path) -> None:
    dead = PrivateDirectory.below(tmp_path)
    dead.socket_path.touch()
    os.close(dead.lock)  # as the kernel does when the owner dies
    live = PrivateDirectory.below(tmp_path)
    other = PrivateDirectory.below(tmp_path)
    assert not dead.path.exists()
    assert live.path.exists()
    live.close()
    other.close()


def test_foreign_things_with_such_a_name_stay(tmp_path: Path) -> None:
    (tmp_path / "redis-notes.txt").touch()
    full = tmp_path / "redis-results"
    full.mkdir()
    (full / "table").touch()
    (tmp_path / "redis-link").symlink_to(full)
    PrivateDirectory.below(tmp_path).close()
    assert {path.name for path in tmp_path.iterdir()} == {"redis-notes.txt", "redis-results", "redis-link"}


def test_a_short_path_is_chosen_where_the_given_one_is_too_long(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    directory = PrivateDirectory.below(deep)
    assert len(os.fsencode(directory.socket_path)) < 107
    directory.close()
    assert not directory.path.exists()
