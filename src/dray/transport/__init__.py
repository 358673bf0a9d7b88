"""Bytes over connections: the server, the client, and the three kinds of stream between them."""

from dray.transport.client import PayloadClient
from dray.transport.client_statistics import ClientStatistics
from dray.transport.server import PayloadServer

__all__ = ["ClientStatistics", "PayloadClient", "PayloadServer"]
