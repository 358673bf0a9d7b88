"""Addresses of streams: ``tcp://HOST:PORT`` and ``ucx://HOST:PORT``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dray.errors import ConfigError
from dray.streams.registry import checked_name, default_scope
from dray.transport.lanes import LANES, parse_endpoint

_FORM = "tcp://HOST:PORT or ucx://HOST:PORT"


@dataclass(frozen=True, slots=True)
class ListenOn:
    """Where a producer listens for other hosts.

    Attributes:
        host: the address; loopback without any.
        port: the port; 0 for any.
        lanes: the lanes to serve there.
    """

    host: str = "127.0.0.1"
    port: int = 0
    lanes: tuple[str, ...] = ()

    @classmethod
    def parse(cls, listen: str | Sequence[str]) -> ListenOn:
        """One or several addresses, which differ in their lanes alone.

        Raises:
            ConfigError: one of them is none, or they differ in host or port.
        """
        texts = (listen,) if isinstance(listen, str) else tuple(listen)
        places = []
        for text in texts:
            scheme, separator, rest = text.partition("://") if isinstance(text, str) else ("", "", "")
            host, _, port = rest.rpartition(":")
            if (
                not separator
                or scheme not in ("tcp", "ucx")
                or not host
                or not port.isdecimal()
                or int(port) > 65535
            ):
                raise ConfigError("listen", text, f"an address {_FORM}; port 0 takes any")
            places.append((host.removeprefix("[").removesuffix("]"), int(port), scheme))
        if len({place[:2] for place in places}) > 1:
            raise ConfigError("listen", listen, "addresses with the same host and port, one for each lane")
        if not places:
            return cls()
        return cls(places[0][0], places[0][1], tuple(dict.fromkeys(lane for _, _, lane in places)))


def find_stream(stream: str | Sequence[str], scope: str | None) -> tuple[str, str, tuple[str, ...]]:
    """The name and the scope of a stream, or the endpoints that its addresses name; the others are empty.

    Raises:
        ConfigError: it is neither a name nor an address.
    """
    if isinstance(stream, str) and "://" not in stream:
        return checked_name(stream), default_scope() if scope is None else scope, ()
    endpoints = tuple(map(endpoint_of, (stream,) if isinstance(stream, str) else stream))
    if not endpoints:
        raise ConfigError("stream", stream, "a name, or one or more addresses")
    return "", "", endpoints


def endpoint_of(address: object) -> str:
    """The endpoint that an address names.

    Raises:
        ConfigError: it is no address.
    """
    scheme, separator, rest = address.partition("://") if isinstance(address, str) else ("", "", "")
    if separator and scheme in LANES and not LANES[scheme].local:
        try:
            return str(parse_endpoint(f"{scheme}:{rest}"))
        except ConfigError as error:
            raise ConfigError("address", address, f"an address {_FORM}") from error
    raise ConfigError("address", address, f"an address {_FORM}")
