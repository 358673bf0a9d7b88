"""Where producers and consumers find each other: the folder, its locks, and what is left of the dead."""

from __future__ import annotations

import errno
import os
import secrets
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from stream_fixtures import forked
from writing import files_of_at_most

from dray.errors import ConfigError
from dray.streams import registry as module
from dray.streams.registry import Registry


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DRAY_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("DRAY_SCOPE", f"registry {secrets.token_hex(4)}")
    return tmp_path


def test_an_entry_exists_as_long_as_its_registry_and_its_folder_goes_with_the_last_one() -> None:
    with Registry("s") as one, Registry("s") as other:
        entry = one.add("p", {"endpoints": []})
        other.add("c", {})
        (peer,) = other.peers("p")
        assert (peer.entry, peer.pid) == (entry, os.getpid())
        assert str(peer).startswith(f"process {os.getpid()} (")
        assert repr(one) == f"<Registry 's' in scope {os.environ['DRAY_SCOPE']!r}>"
        one.close()
        assert other.peers("p") == []
        assert other.folder.exists()
    assert not other.folder.exists()


def test_a_forked_child_does_not_remove_the_entries_of_its_parent() -> None:
    with Registry("s") as registry:
        registry.add("p", {})

        def close(done: int) -> None:
            registry.close()
            os.write(done, b"x")

        with forked(close) as (_, reading):
            assert os.read(reading, 1) == b"x"
        assert len(registry.peers("p")) == 1


def test_what_the_dead_have_left_is_removed() -> None:
    def add(done: int) -> None:
        Registry("s").add("p", {})
        os.write(done, b"x")
        os._exit(0)

    with Registry("s") as registry:
        registry.add("c", {})
        with forked(add) as (pid, reading):
            os.read(reading, 1)
            os.waitpid(pid, 0)
        (registry.folder / "c-1.lock").touch()  # it was killed before it had written its entry
        (registry.folder / "p-1.json.0123.new").touch()  # while it wrote it
        assert registry.peers("p") == []
        assert not (registry.folder / "c-1.lock").exists()
        registry.add("c", {})
        left = {path.name for path in registry.folder.iterdir() if not path.name.startswith("c-")}
        assert left == {"stream.json"}


def test_what_a_process_has_not_closed_is_removed_at_its_end() -> None:
    script = "from dray.streams.registry import Registry; it = Registry('s'); it.add('c', {}); print(it.folder)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert not Path(done.stdout.strip()).exists()


def test_what_is_served_elsewhere_is_listed() -> None:
    with Registry("s") as registry, Registry("s", "another") as other, Registry("t") as third:
        other.add("p", {})
        third.add("p", {})
        third.add("p", {})
        with Registry("t", "another") as unrelated:
            unrelated.add("p", {})
            assert sorted(registry.elsewhere()) == [
                "'s' in scope 'another' (1 producers)",
                f"'t' in scope {registry.scope!r} (2 producers)",
            ]


def test_a_lock_of_a_publisher_that_is_held_names_the_process() -> None:
    def wait(ready: int) -> None:
        with Registry("s") as held:
            held.lock_publisher()
            os.write(ready, b"x")
            threading.Event().wait()

    with forked(wait) as (pid, reading), Registry("s") as registry:
        os.read(reading, 1)
        with pytest.raises(ConfigError, match=rf"served by another publisher .*: process {pid} \("):
            registry.lock_publisher()


def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Registry("s") as registry:

        def refuse(*_: object, **__: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(module.os, "open", refuse)
        with pytest.raises(ConfigError, match="No space left on device") as caught:
            registry.add("p", {})
        assert str(registry.folder) in str(caught.value)
        monkeypatch.undo()
        registry.add("p", {})
        assert len(registry.peers("p")) == 1


def test_an_entry_that_does_not_fit_on_the_disk_leaves_nothing() -> None:
    with Registry("s") as registry:
        registry.add("c", {})
        with files_of_at_most(100), pytest.raises(OSError, match="File too large"):
            registry.add("p", {"text": "x" * 1000})
        assert registry.peers("p") == []
        registry.close()
    assert not registry.folder.exists()


def test_a_network_file_system_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    read = Path.read_text

    def nfs(self: Path, *args: str) -> str:
        if self.name != "mountinfo":
            return read(self, *args)
        device = Path(os.environ["DRAY_RUNTIME_DIR"]).stat().st_dev
        return f"\n36 35 {os.major(device)}:{os.minor(device)} / /mnt rw - nfs4 host:/export rw\n"

    monkeypatch.setattr(Path, "read_text", nfs)
    with pytest.raises(ConfigError, match="is on nfs4"):
        Registry("s")
