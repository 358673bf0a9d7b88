"""dray moves reinforcement-learning payloads from the processes that make them to those that learn from them.

A producer puts named arrays into a `SharedRingBuffer` and serves it with a `PayloadServer`; what it hands on is a
small `PayloadRef`. A `PayloadClient` redeems the reference, over shared memory on the same host, over UCX or TCP
elsewhere.
"""

import logging

from dray.errors import (
    AuthenticationError,
    BufferClosedError,
    BufferFullError,
    ConfigError,
    ConnectionClosed,
    ConnectionReset,
    ControlPlaneError,
    DrayError,
    LeaseInUseError,
    MessageTruncated,
    MissingDependencyError,
    OutOfResources,
    PayloadError,
    PayloadFormatError,
    PayloadTooLargeError,
    ProducerLostError,
    ProtocolError,
    ReaderIdError,
    SchemaError,
    ServerBusy,
    SlotError,
    StaleSlotError,
    TransportError,
    TransportTimeout,
    Unreachable,
    VersionMismatch,
)
from dray.payload import PayloadSchema, TensorSpec, pack, unpack
from dray.protocol import PayloadRef, make_secret
from dray.ring import SharedRingBuffer
from dray.transport import PayloadClient, PayloadServer

__version__ = "0.1.0"

__all__ = [
    "AuthenticationError",
    "BufferClosedError",
    "BufferFullError",
    "ConfigError",
    "ConnectionClosed",
    "ConnectionReset",
    "ControlPlaneError",
    "DrayError",
    "LeaseInUseError",
    "MessageTruncated",
    "MissingDependencyError",
    "OutOfResources",
    "PayloadClient",
    "PayloadError",
    "PayloadFormatError",
    "PayloadRef",
    "PayloadSchema",
    "PayloadServer",
    "PayloadTooLargeError",
    "ProducerLostError",
    "ProtocolError",
    "ReaderIdError",
    "SchemaError",
    "ServerBusy",
    "SharedRingBuffer",
    "SlotError",
    "StaleSlotError",
    "TensorSpec",
    "TransportError",
    "TransportTimeout",
    "Unreachable",
    "VersionMismatch",
    "make_secret",
    "pack",
    "unpack",
]

logging.getLogger("dray").addHandler(logging.NullHandler())
