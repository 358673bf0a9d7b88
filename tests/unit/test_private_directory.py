import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from dray.errors import ConfigError
from dray.private_directory import PrivateDirectory, locked


def test_only_its_owner_can_enter_and_closing_leaves_nothing(tmp_path: Path) -> None:
    root = tmp_path / "r"
    directory = PrivateDirectory(root)
    assert directory.path.parent == root
    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    (directory.path / "0.sock").touch()
    directory.close()
    directory.close()
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("swept_by", ["the next folder", "the end of another"])
def test_folders_of_killed_owners_are_swept_and_those_of_live_ones_are_not(tmp_path: Path, swept_by: str) -> None:
    root = tmp_path / "r"
    program = (
        "import sys, pathlib, dray.private_directory as p\n"
        "d = p.PrivateDirectory(pathlib.Path(sys.argv[1]))\n"
        "(d.path / '0.sock').touch(); print(d.path, flush=True); sys.stdin.read()\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", program, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with owner:
        assert owner.stdout is not None
        theirs = Path(owner.stdout.readline().strip())
        mine, other = PrivateDirectory(root), PrivateDirectory(root)
        other.close()
        assert (theirs / "0.sock").exists()
        owner.kill()
        owner.wait(10)
    if swept_by == "the next folder":
        with PrivateDirectory(root):
            assert not theirs.exists()
            assert mine.path.exists()
    mine.close()
    assert not theirs.exists()


def test_the_end_of_a_folder_does_not_wait_for_another_process_that_makes_one(tmp_path: Path) -> None:
    mine = PrivateDirectory(tmp_path / "r")
    with locked(tmp_path / "r"):
        mine.close()
    assert not mine.path.exists()


def test_foreign_things_in_the_root_stay(tmp_path: Path) -> None:
    root = tmp_path / "r"
    PrivateDirectory(root).close()
    (root / "notes.txt").touch()
    (root / "results").mkdir()
    (root / "symlink").symlink_to(root / "results")
    PrivateDirectory(root).close()
    assert {path.name for path in root.iterdir()} == {"notes.txt", "results", "symlink"}


def test_a_root_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "r"
    root.mkdir(mode=0o755)
    root.chmod(0o755)
    with pytest.raises(ConfigError, match="mode 0700"):
        PrivateDirectory(root)


def test_a_root_that_is_a_symlink_or_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "symlink").symlink_to(tmp_path / "real")
    (tmp_path / "file").touch()
    for root in ("symlink", "file"):
        with pytest.raises(ConfigError, match="runtime directory"):
            PrivateDirectory(tmp_path / root)


def test_a_root_too_long_for_a_socket_path_is_refused() -> None:
    with pytest.raises(ConfigError, match="bytes"):
        PrivateDirectory(Path("/tmp") / ("d" * 100))


def test_a_lock_that_a_child_inherits_keeps_the_folder(tmp_path: Path) -> None:
    root = tmp_path / "r"
    directory = PrivateDirectory(root)
    child = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, pass_fds=[directory.lock]
    )
    with child:
        os.close(directory.lock)  # as the kernel does when the owner dies
        directory.lock = -1
        PrivateDirectory(root).close()
        assert directory.path.exists()
        child.communicate(b"", timeout=10)
    PrivateDirectory(root).close()
    assert not directory.path.exists()
