"""The protocol, without I/O: references, frames, the handshake, and the two ends of a connection.

Nothing in this package opens, reads or waits; it turns messages into answers. `transport` moves the bytes.
"""

from dray.protocol.handshake import make_secret
from dray.protocol.ref import PayloadRef

__all__ = ["PayloadRef", "make_secret"]
