"""dray moves reinforcement-learning payloads from the processes that generate them to those that learn from them.

`Producer` and `Consumer` are the two ends of a stream: named arrays go in at one end and come out at the other,
without a broker.

Below that, a `PayloadServer` keeps payloads in a ring in shared memory and serves them. Its `put` returns a small
`PayloadRef`, which any control plane can carry. A `PayloadClient` reads the payload by that reference: over shared
memory on the same host, over UCX or TCP between hosts. The errors are in `dray.errors`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

from dray import errors

if TYPE_CHECKING:
    from dray.errors import DrayError
    from dray.identifiers import PayloadId
    from dray.payload import PayloadSchema, Ragged, RaggedSpec, TensorSpec, TextSpec, pack, unpack
    from dray.protocol import PayloadRef, make_secret
    from dray.ring import SharedRingBuffer
    from dray.streams import Consumer, Payload, Producer, Publisher, Subscriber
    from dray.transport import PayloadClient, PayloadServer, ReadResult

__version__ = "0.1.0"

__all__ = [
    "Consumer",
    "DrayError",
    "Payload",
    "PayloadClient",
    "PayloadId",
    "PayloadRef",
    "PayloadSchema",
    "PayloadServer",
    "Producer",
    "Publisher",
    "Ragged",
    "RaggedSpec",
    "ReadResult",
    "SharedRingBuffer",
    "Subscriber",
    "TensorSpec",
    "TextSpec",
    "errors",
    "make_secret",
    "pack",
    "unpack",
]

# Imported at their first use: a command and a controller need no NumPy.
_MODULES: Final = {
    "dray.errors": ("DrayError",),
    "dray.identifiers": ("PayloadId",),
    "dray.payload": ("PayloadSchema", "Ragged", "RaggedSpec", "TensorSpec", "TextSpec", "pack", "unpack"),
    "dray.protocol": ("PayloadRef", "make_secret"),
    "dray.ring": ("SharedRingBuffer",),
    "dray.streams": ("Consumer", "Payload", "Producer", "Publisher", "Subscriber"),
    "dray.transport": ("PayloadClient", "PayloadServer", "ReadResult"),
}
_MODULE_OF: Final = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(module), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
