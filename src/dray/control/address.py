"""Where a Redis server is, without showing its password."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote, unquote_to_bytes, urlsplit

from redis.connection import parse_url

from dray.errors import ConfigError

ALLOWED = (
    "must be like redis://[[user]:password@]host:port/db, rediss://… or unix://[:password@]/path/to/socket, with "
    "the special characters of user and password percent-encoded"
)
_DEFAULT_USER = "default"
_OPTIONS = {"host", "port", "db", "username", "password", "path", "connection_class"}


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """The address of a Redis server. `str` and `repr` leave the credentials out, `url` has them.

    Raises:
        ConfigError: the URL is not one of a Redis server.
    """

    url: str = field(repr=False)

    def __post_init__(self) -> None:
        self.options()

    @classmethod
    def of_socket(cls, path: str, password: str, user: str = "") -> RedisAddress:
        """The address of a server on a Unix socket."""
        return cls(f"unix://{quote(user, safe='')}:{quote(password, safe='')}@{quote(os.fsencode(path))}")

    @classmethod
    def of_port(cls, host: str, port: int, password: str, user: str = "") -> RedisAddress:
        """The address of a server on a TCP port."""
        bracketed = f"[{host}]" if ":" in host else host
        return cls(f"redis://{quote(user, safe='')}:{quote(password, safe='')}@{bracketed}:{port}/0")

    def options(self) -> dict[str, Any]:
        """Keyword arguments of a redis-py connection pool, the password among them."""
        try:
            parts = urlsplit(self.url)
            options: dict[str, Any] = parse_url(self.url)  # type: ignore[no-untyped-call]
        except ValueError:  # quotes parts of the URL
            raise _not_an_address() from None
        if parts.scheme == "unix" and "path" in options:
            # redis-py takes the path for UTF-8 and replaces what is not.
            options["path"] = os.fsdecode(unquote_to_bytes(parts.path))
        unknown = [name for name in options if name not in _OPTIONS and not name.startswith("ssl_")]
        place = parts.netloc.rpartition("@")[2]
        if parts.scheme == "unix":
            # What stands there would be taken for the beginning of a path, and may be that of a password.
            fits = bool(options.get("path")) and not place
        else:
            # A password with a plain "/", "?" or "#" ends the place too early: its rest has the "@".
            database = parts.path.strip("/")
            fits = bool(parts.hostname) and (not database or database.isdecimal())
            fits = fits and "@" not in parts.query and not parts.fragment
        if unknown or not fits:
            raise _not_an_address()
        return options

    def redacted(self, text: str) -> str:
        """`text`, such as an answer of the server, without the credentials of this address."""
        options = self.options()
        for name in ("password", "username"):
            secret = options.get(name)
            if secret and secret != _DEFAULT_USER:
                text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", "***", text)
        return text

    def __str__(self) -> str:
        return _without_credentials(self.url)

    def __repr__(self) -> str:
        return f"<RedisAddress {self}>"


def _without_credentials(url: str) -> str:
    scheme, _, rest = url.partition("://")
    place = rest.partition("?")[0].rpartition("@")[2]
    return f"{scheme}://{unquote(place)}"


def _not_an_address() -> ConfigError:
    # The value is not shown: where it does not parse, any part of it may be a password.
    return ConfigError("redis.url", None, ALLOWED, "is not the URL of a Redis server")
