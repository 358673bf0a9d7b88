import os
import traceback

import pytest

from dray.errors import ConfigError
from dray.jobs.queue import RedisAddress


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:sesame@host:7000/2", "redis://host:7000/2"),
        ("rediss://user:sesame@host/0", "rediss://host/0"),
        ("unix://:sesame@/run/a%20b/s", "unix:///run/a b/s"),
        ("unix:///run/s?password=sesame", "unix:///run/s"),
        ("redis://:se@same@host:1/0", "redis://host:1/0"),
    ],
)
def test_address_shows_the_place_and_never_the_password(url: str, shown: str) -> None:
    address = RedisAddress(url)
    assert str(address) == shown
    assert "same" not in repr(address)
    assert "same" in address.options()["password"]


@pytest.mark.parametrize("folder", [b"/run/\xff", "/run/é".encode(), b"/run/a%20b c"])
def test_socket_is_found_whatever_bytes_its_path_has(folder: bytes) -> None:
    path = os.fsdecode(folder + b"/s")
    address = RedisAddress.of_socket(path, "sesame")
    assert address.url.isascii()
    assert address.options()["path"] == path


@pytest.mark.parametrize(
    "url",
    [
        "http://:sesame@host",
        "redis://:sesame@host:port",
        "redis://:sesame@host:1/zero",
        "redis://:sesame@",
        "unix://:sesame@",
        "redis://:sesame@host/0?decode_responses=true",
        "redis://:sesame@host/0?db=x",
        "user:sesame@host",
        "redis://user:sesame#1@host",
        "redis://user:12#sesame@host",
        "redis://user:12?sesame@host",
        "redis://:12/sesame@host",
        "redis://[sesame@host",
        "redis://:sesame",
        "unix://:12/sesame@/run/s",
        "unix://sesame/run/s",
        "",
    ],
)
def test_malformed_url_is_a_config_error_that_hides_the_password(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RedisAddress(url)
    assert caught.value.key == "redis.url"
    assert "redis://" in caught.value.allowed
    assert "sesame" not in "".join(traceback.format_exception(caught.value))


def test_what_a_server_answers_is_shown_without_the_credentials() -> None:
    answer = "ERR unknown command 'AUTH', with args beginning with: 'keeper' 'open sesame!', open-sesames"
    shown = RedisAddress("redis://keeper:open%20sesame%21@h").redacted(answer)
    assert shown == "ERR unknown command 'AUTH', with args beginning with: '***' '***', open-sesames"
    assert RedisAddress("redis://default:x@h").redacted("the default user") == "the default user"
    assert RedisAddress("redis://h").redacted(answer) == answer


def test_password_of_any_characters_survives_the_url() -> None:
    password = "a/b:c@d?e#f%20 ü"
    assert RedisAddress.of_socket("/run/x y/s", password).options()["password"] == password
    assert RedisAddress.of_socket("/run/x y/s", password).options()["path"] == "/run/x y/s"
    options = RedisAddress.of_port("::1", 7000, password).options()
    assert (options["host"], options["port"], options["password"]) == ("::1", 7000, password)
