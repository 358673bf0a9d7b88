"""Addresses of streams: ``tcp://HOST:PORT`` and ``ucx://HOST:PORT``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        ports: the port of each lane to serve there; 0 for any.
    """

    host: str
    ports: Mapping[str, int]

    @property
    def lanes(self) -> tuple[str, ...]:
        """The lanes to serve."""
        return tuple(self.ports)

    @classmethod
    def parse(cls, listen: str | Sequence[str]) -> ListenOn:
        """One or several addresses of one host, one for each lane.

        Raises:
            ConfigError: one of them is none, or they do not fit together.
        """
        texts = (listen,) if isinstance(listen, str) else tuple(listen)
        hosts, ports = set(), {}
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
            hosts.add(host.removeprefix("[").removesuffix("]"))
            ports[scheme] = int(port)
        chosen = [port for port in ports.values() if port]
        if len(hosts) > 1 or len(ports) < len(texts) or len(set(chosen)) < len(chosen):
            raise ConfigError("listen", listen, "addresses of one host, one for each lane, each with its own port")
        return cls(hosts.pop() if hosts else "127.0.0.1", ports)


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
