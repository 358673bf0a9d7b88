"""Where a Redis server is, without showing its password."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote, unquote_to_bytes, urlsplit

from redis.connection import parse_url

from dray.errors import ConfigError

ALLOWED = "a URL like redis://[[user]:password@]host:port/db, rediss://… or unix://[:password@]/path/to/socket"
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
    def of_socket(cls, path: str, password: str) -> RedisAddress:
        """The address of a server on a Unix socket."""
        return cls(f"unix://:{quote(password, safe='')}@{quote(os.fsencode(path))}")

    @classmethod
    def of_port(cls, host: str, port: int, password: str) -> RedisAddress:
        """The address of a server on a TCP port."""
        bracketed = f"[{host}]" if ":" in host else host
        return cls(f"redis://:{quote(password, safe='')}@{bracketed}:{port}/0")

    def options(self) -> dict[str, Any]:
        """Keyword arguments of a redis-py connection pool, the password among them."""
        try:
            parts = urlsplit(self.url)
            options: dict[str, Any] = parse_url(self.url)  # type: ignore[no-untyped-call]
        except ValueError as error:
            raise ConfigError("redis.url", _without_credentials(self.url), ALLOWED) from error
        if parts.scheme == "unix" and "path" in options:
            # redis-py takes the path for UTF-8 and replaces what is not.
            options["path"] = os.fsdecode(unquote_to_bytes(parts.path))
        unknown = [name for name in options if name not in _OPTIONS and not name.startswith("ssl_")]
        database = parts.path.strip("/")
        bad_database = parts.scheme != "unix" and database != "" and not database.isdecimal()
        has_place = bool(options.get("path")) if parts.scheme == "unix" else bool(parts.hostname)
        if unknown or bad_database or not has_place:
            raise ConfigError("redis.url", _without_credentials(self.url), ALLOWED)
        return options

    def __str__(self) -> str:
        return _without_credentials(self.url)

    def __repr__(self) -> str:
        return f"<RedisAddress {self}>"


def _without_credentials(url: str) -> str:
    # Works on text that does not parse, too: what stands before the last @, and any query, may hold a password.
    scheme, separator, rest = url.partition("://")
    if not separator:
        return "***" if "@" in url or "?" in url else url
    place = rest.rpartition("@")[2].partition("?")[0]
    return f"{scheme}://{unquote(place)}"
