import json
import socket
from pathlib import Path

import pytest

from dray.errors import ConfigError
from dray.jobs.controller.listener import advertise, bind
from dray.jobs.folder import JobFolder


def test_advertised_address_is_the_bound_one(tmp_path: Path) -> None:
    (tmp_path / ".run").mkdir()
    folder = JobFolder(tmp_path)
    with bind("127.0.0.1", 0) as listener:
        advertise(folder, listener, "token of the job")
        port = listener.getsockname()[1]
        assert json.loads(folder.controller_address.read_text()) == {
            "url": f"http://127.0.0.1:{port}",
            "token": "token of the job",
        }
        assert folder.controller_address.stat().st_mode & 0o777 == 0o600
        socket.create_connection(("127.0.0.1", port)).close()
        with pytest.raises(ConfigError, match=r"controller.host, controller.port = '127.0.0.1:\d+'"):
            bind("127.0.0.1", port)


def test_controller_listens_at_an_ipv6_address_and_advertises_it_in_brackets(tmp_path: Path) -> None:
    (tmp_path / ".run").mkdir()
    folder = JobFolder(tmp_path)
    with bind("::1", 0) as listener:
        advertise(folder, listener, "token of the job")
        port = listener.getsockname()[1]
        assert json.loads(folder.controller_address.read_text())["url"] == f"http://[::1]:{port}"
        socket.create_connection(("::1", port)).close()


def test_host_of_another_machine_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="address of this machine"):
        bind("192.0.2.1", 0)
    with pytest.raises(ConfigError, match=r"controller.host = 'no host'"):
        bind("no host", 0)
