import pytest

from dray.errors import ConfigError
from dray.transport.lanes import SHM, TCP, UCX, parse_endpoint
from dray.transport.lanes.base import Endpoint


@pytest.mark.parametrize(
    ("address", "endpoint"),
    [
        ("unix:/run/dray/a b/0.sock", Endpoint(SHM, "/run/dray/a b/0.sock")),
        ("unix:/with:colon", Endpoint(SHM, "/with:colon")),
        ("tcp:127.0.0.1:40001", Endpoint(TCP, "127.0.0.1", 40001)),
        ("ucx:node-7.cluster:1", Endpoint(UCX, "node-7.cluster", 1)),
        ("unix:/not-\udcff-utf-8/0.sock", Endpoint(SHM, "/not-\udcff-utf-8/0.sock")),
        ("tcp:[fd00::2]:65535", Endpoint(TCP, "fd00::2", 65535)),
    ],
)
def test_an_address_is_taken_apart_and_put_together(address: str, endpoint: Endpoint) -> None:
    assert parse_endpoint(address) == endpoint
    assert str(endpoint) == address


@pytest.mark.parametrize(
    "address",
    [
        "", "unix", "unix:", "tcp", "tcp:", "tcp:h", "tcp::1", "tcp:h:", "tcp:h:0", "tcp:h:65536", "tcp:h:-1",
        "tcp:h:1x", "rdma:h:1", "h:1", "TCP:h:1", "tcp:h:٣", "tcp:[]:1", "tcp:h:" + "9" * 5000, "tcp:h:²",
        "tcp:a..b:1", "ucx:a..b:1", f"tcp:{'a' * 64}:1", "tcp:\ud800:1", "ucx:\ud800:1", "tcp:a\0b:1",
        "unix:\ud800", "unix:\0abstract", "unix:/a\0b", "unix:/a\nb", "tcp:a\r\nb:1", "ucx:\x1b[2J:1",
        "unix:/\x9b", "tcp:h:1\n", f"unix:{'a' * 108}", f"unix:{'é' * 54}",
    ],
)  # fmt: skip
def test_anything_else_is_a_config_error_that_names_it(address: str) -> None:
    with pytest.raises(ConfigError, match="endpoint"):
        parse_endpoint(address)
