"""Bytes over connections: the server, the client, and the three kinds of stream between them."""

from dray.transport.client import PayloadClient
from dray.transport.pipeline import ReadResult
from dray.transport.server import PayloadServer

__all__ = ["PayloadClient", "PayloadServer", "ReadResult"]
