import socket
import threading

import pytest

from dray.clock import Deadline
from dray.errors import ConfigError, Unreachable
from dray.jobs.controller.listener import bind
from dray.name_resolution import listening_address, resolve


def test_numeric_addresses_are_found_without_a_thread() -> None:
    before = threading.active_count()
    assert resolve("127.0.0.1", 80, Deadline.after(0)) == [(socket.AF_INET, ("127.0.0.1", 80))]
    assert resolve("::1", 80, Deadline.after(0)) == [(socket.AF_INET6, ("::1", 80, 0, 0))]
    assert threading.active_count() == before


def test_names_of_this_machine_are_found_with_the_port() -> None:
    found = resolve("localhost", 80, Deadline.after(10))
    assert {address[:2] for _, address in found} <= {("127.0.0.1", 80), ("::1", 80)}
    assert found


@pytest.mark.parametrize("host", ["a" * 64 + ".example", "a\0b", "a..b"])
def test_what_is_no_name_is_unreachable_and_named(host: str) -> None:
    with pytest.raises(Unreachable, match="unknown") as caught:
        resolve(host, 80, Deadline.after(10), endpoint="tcp:there:80")
    assert repr(host) in str(caught.value)
    assert caught.value.endpoint == "tcp:there:80"


def test_a_server_and_a_controller_name_the_host_that_they_cannot_listen_at() -> None:
    for listen in (listening_address, lambda host: bind(host, 0)):
        with pytest.raises(ConfigError, match=r"host = 'a\.\.b' is not allowed: .*address of this machine"):
            listen("a..b")
