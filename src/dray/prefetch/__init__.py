"""Reading batches of references: at once, or in the background while the batch before is used.

`BatchReader` is the driver. What it decides is decided by state machines without I/O: `ReadTries` (layer 2),
`BatchFetch` (layer 3), `DoubleBuffer` (which batch is whose) and `Freeing` (what producers are told).
"""

from dray.prefetch.batch import BatchFetch, Fetched, Pause, Read, ReadTries
from dray.prefetch.double_buffer import DoubleBuffer
from dray.prefetch.freeing import Free, Freeing
from dray.prefetch.reader import BatchReader
from dray.prefetch.threads import Source

__all__ = [
    "BatchFetch",
    "BatchReader",
    "DoubleBuffer",
    "Fetched",
    "Free",
    "Freeing",
    "Pause",
    "Read",
    "ReadTries",
    "Source",
]
