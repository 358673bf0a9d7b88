import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from writing import umask

import dray
from dray.errors import ConfigError
from dray.private_directory import PrivateDirectory, default_root
from dray.ring import SharedRingBuffer
from dray.transport import PayloadServer

OWNER = """
import socket, sys
from pathlib import Path
from dray.private_directory import PrivateDirectory
directory = PrivateDirectory(Path(sys.argv[1]))
sock = socket.socket(socket.AF_UNIX)
sock.bind(str(directory.path / "0.sock"))
print(directory.path, flush=True)
sys.stdin.read()
"""


ROOT = """
import os
from dray.private_directory import default_root
os.environ.pop("DRAY_RUNTIME_DIR")
os.mkdir("/tmp/login", 0o700)
os.environ["XDG_RUNTIME_DIR"] = "/tmp/login"
print(default_root(), default_root())
"""

TWO_OWNERS = """
import os, subprocess, sys
os.environ.pop("DRAY_RUNTIME_DIR")
program = '''
import logging, os
from dray.private_directory import PrivateDirectory
logging.basicConfig()
print(PrivateDirectory().path, flush=True)
os._exit(0)
'''
for _ in range(2):
    print(subprocess.check_output([sys.executable, "-c", program], text=True), end="", flush=True)
print(*sorted(os.listdir("/tmp")))
"""


def with_own_tmp(folder: Path, program: str) -> subprocess.CompletedProcess[str]:
    """Run a program for which `folder` is ``/tmp``."""
    if any(Path(place).is_relative_to("/tmp") for place in (sys.executable, dray.__file__)):
        pytest.skip("Python or dray lies in /tmp, where the program would not find it")
    script = 'mount --bind "$0" /tmp && exec "$1" -c "$2"'
    command = ["unshare", "--mount", "sh", "-c", script, str(folder), sys.executable, program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.stderr.startswith(("unshare:", "mount:")):
        pytest.skip(f"a mount of its own cannot be had: {done.stderr.strip()}")
    return done


def printed(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "dray"


@pytest.fixture
def owner(root: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process with a folder of its own."""
    command = [sys.executable, "-c", OWNER, str(root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def folder_of(owner: subprocess.Popen[str]) -> Path:
    assert owner.stdout is not None
    return Path(owner.stdout.readline().strip())


def test_the_folder_of_a_killed_process_is_swept(root: Path, owner: subprocess.Popen[str]) -> None:
    folder = folder_of(owner)
    assert (folder / "0.sock").is_socket()
    owner.send_signal(signal.SIGKILL)
    owner.wait(30)
    assert folder.is_dir()
    directory = PrivateDirectory(root)
    assert not folder.exists()
    directory.close()


def test_the_folder_of_a_living_process_stays(root: Path, owner: subprocess.Popen[str]) -> None:
    folder = folder_of(owner)
    directory = PrivateDirectory(root)
    assert (folder / "0.sock").is_socket()
    directory.close()
    assert folder.is_dir()


def test_the_folder_of_a_stopped_process_stays(root: Path, owner: subprocess.Popen[str]) -> None:
    folder = folder_of(owner)
    owner.send_signal(signal.SIGSTOP)
    PrivateDirectory(root).close()
    assert (folder / "0.sock").is_socket()


def test_the_folder_of_a_killed_process_is_swept_while_its_forked_child_is_alive(root: Path) -> None:
    script = """
import os, sys
from pathlib import Path
from dray.ring import SharedRingBuffer
from dray.transport import PayloadServer
ring = SharedRingBuffer(1, 64)
server = PayloadServer(ring, lane="shm", directory=Path(sys.argv[1]))
if os.fork() == 0:
    # The child speaks for both: it runs this only after it has closed what it inherited of the server.
    print(Path(server.endpoints[0].removeprefix("unix:")).parent, flush=True)
    sys.stdin.read()
    os._exit(0)
sys.stdin.read()
"""
    command = [sys.executable, "-c", script, str(root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        folder = folder_of(process)
        process.kill()
        process.wait(30)
        PrivateDirectory(root).close()
        assert not folder.exists()


def test_many_processes_at_once_sweep_none_of_each_other(root: Path) -> None:
    command = [sys.executable, "-c", OWNER, str(root)]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    try:
        folders = [folder_of(process) for process in processes]
        assert len(set(folders)) == 3
        assert all((folder / "0.sock").is_socket() for folder in folders)
    finally:
        for process in processes:
            process.kill()
            process.communicate(timeout=30)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_root_of_another_user_is_refused(root: Path) -> None:
    root.mkdir(mode=0o700)
    os.chown(root, 12345, 12345)
    with pytest.raises(ConfigError, match="of this user"):
        PrivateDirectory(root)


def test_the_root_comes_from_the_environment_or_is_one_that_survives_a_logout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DRAY_RUNTIME_DIR", "/somewhere")
    assert default_root() == Path("/somewhere")
    assert printed(with_own_tmp(tmp_path, ROOT)) == [f"/tmp/dray-{os.getuid()}"] * 2


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_random_folder_takes_the_place_of_one_that_another_user_has_taken(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    taken = tmp_path / "dray-0"
    for name in ("dray-0", "dray-0-another"):
        (tmp_path / name).mkdir(mode=0o700)
        os.chown(tmp_path / name, 12345, -1)
    done = with_own_tmp(tmp_path, TWO_OWNERS)
    first, second, *left = printed(done)
    (name,) = set(left) - {"dray-0", "dray-0-another"}
    # The second process uses the folder that the first one has made, and sweeps what is left of it.
    assert {Path(first).parent, Path(second).parent} == {Path("/tmp", name)}
    assert [path.name for path in (tmp_path / name).iterdir()] == [Path(second).name]
    assert (tmp_path / name).stat().st_mode & 0o777 == 0o700
    assert list(taken.iterdir()) == []
    assert done.stderr.count("is used instead") == 1


def test_a_root_in_a_folder_in_which_others_can_replace_it_is_refused() -> None:
    short = Path(tempfile.mkdtemp(dir=os.environ["DRAY_RUNTIME_DIR"]))
    shared = short / "shared"
    (shared / "deep").mkdir(parents=True)
    (short / "alias").symlink_to(shared / "deep")
    shared.chmod(0o777)
    if os.getuid() == 0:
        os.chown(shared, 12345, -1)
    for root in (shared / "dray", shared / "deep" / "dray", short / "alias" / "dray"):
        with pytest.raises(ConfigError, match=rf"other users can replace what is in {shared}: .*chmod \+t"):
            PrivateDirectory(root)
    shared.chmod(0o1777)
    PrivateDirectory(shared / "deep" / "dray").close()


def test_folders_on_the_way_to_a_root_are_made_for_this_user_only(tmp_path: Path) -> None:
    with umask(0):
        PrivateDirectory(tmp_path / "a" / "b").close()
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("a", "a/b")] == [0o700, 0o700]


def test_a_configured_directory_too_deep_is_an_error_that_leaves_nothing(tmp_path: Path) -> None:
    root = tmp_path / ("d" * 90)
    with SharedRingBuffer(1, 64) as ring, pytest.raises(ConfigError, match="a path of"):
        PayloadServer(ring, lane="shm", directory=root)
    assert not root.exists()


def test_directory_that_no_reference_can_carry_is_an_error_that_leaves_nothing(root: Path) -> None:
    with SharedRingBuffer(1, 64) as ring, pytest.raises(ConfigError, match="control characters") as caught:
        PayloadServer(ring, lane="shm", directory=root / "a\nb")
    assert caught.value.key == "directory"
    assert list((root / "a\nb").iterdir()) == []


def test_sockets_lie_in_the_private_folder_and_go_with_the_server(root: Path) -> None:
    with SharedRingBuffer(1, 64) as ring:
        with PayloadServer(ring, lane="shm", threads=2, directory=root) as server:
            paths = [Path(endpoint.removeprefix("unix:")) for endpoint in server.endpoints]
            assert all(path.is_socket() and path.parent.parent == root for path in paths)
            for path in paths:
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.connect(str(path))
        assert list(root.iterdir()) == []
