"""The protocol, without I/O: references, frames, the handshake, and the sessions of both ends of a connection.

A session turns bytes into events, and answers into bytes. `dray.transport` sends and receives them.
"""

from dray.protocol.handshake import make_secret
from dray.protocol.ref import PayloadRef

__all__ = ["PayloadRef", "make_secret"]
