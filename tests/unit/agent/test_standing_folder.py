"""Where the one agent of a user is found."""

import os
from pathlib import Path

import pytest

from dray.agent import AGENT_VARIABLE, find_agent, standing_folder
from dray.errors import ConfigError


@pytest.fixture(autouse=True)
def runtime_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.delenv(AGENT_VARIABLE, raising=False)
    monkeypatch.setenv("DRAY_RUNTIME_DIR", str(tmp_path))
    return tmp_path


def test_the_agent_is_the_one_that_the_environment_names_or_the_users_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert find_agent() is None
    with standing_folder() as folder:
        assert find_agent() is None
        (folder / "agent.sock").touch()
        assert find_agent() == folder / "agent.sock"
        monkeypatch.setenv(AGENT_VARIABLE, "/elsewhere/agent.sock")
        assert find_agent() == Path("/elsewhere/agent.sock")


def test_the_folder_is_the_users_alone_and_free_of_what_a_killed_agent_has_left(runtime_directory: Path) -> None:
    with standing_folder() as folder:
        assert folder == runtime_directory / "agent"
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "0123456789abcdef.sock").touch()
        (folder / "agent.sock").touch()
    with standing_folder() as again:
        assert [each.name for each in again.iterdir()] == ["agent.lock"]
        assert (again / "agent.lock").read_text() == str(os.getpid())


def test_a_second_agent_of_a_user_is_refused_with_the_pid_of_the_first() -> None:
    with standing_folder(), pytest.raises(ConfigError, match=f"process {os.getpid()} runs"), standing_folder():
        pass
    with standing_folder():
        pass  # the lock of the first has ended with it


def test_a_folder_that_others_may_enter_is_refused(runtime_directory: Path) -> None:
    runtime_directory.chmod(0o755)
    with pytest.raises(ConfigError, match="mode 0700"), standing_folder():
        pass
