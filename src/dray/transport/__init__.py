"""Payloads over connections: the server, the client, and what they report."""

from dray.transport.client import PayloadClient
from dray.transport.client_statistics import ClientStatistics
from dray.transport.pipeline import ReadResult
from dray.transport.server import PayloadServer
from dray.transport.server_statistics import ServerStatistics

__all__ = ["ClientStatistics", "PayloadClient", "PayloadServer", "ReadResult", "ServerStatistics"]
