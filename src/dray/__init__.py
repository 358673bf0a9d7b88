"""dray moves reinforcement-learning payloads from the processes that generate them to those that learn from them.

A producer puts named arrays into a ring in shared memory and serves it (`PayloadServer.create`). `put` returns a
small `PayloadRef`, which any control plane can carry. A `PayloadClient` reads the payload by that reference: over
shared memory on the same host, over UCX or TCP between hosts. The errors are in `dray.errors`.
"""

import logging

from dray import errors
from dray.errors import DrayError
from dray.payload import PayloadSchema, TensorSpec, pack, unpack
from dray.protocol import PayloadRef, make_secret
from dray.ring import SharedRingBuffer
from dray.transport import PayloadClient, PayloadServer, ReadResult

__version__ = "0.1.0"

__all__ = [
    "DrayError",
    "PayloadClient",
    "PayloadRef",
    "PayloadSchema",
    "PayloadServer",
    "ReadResult",
    "SharedRingBuffer",
    "TensorSpec",
    "errors",
    "make_secret",
    "pack",
    "unpack",
]

logging.getLogger("dray").addHandler(logging.NullHandler())
