"""Reads batches of references: at once, or in the background while the batch before is in use.

`BatchReader` is the driver. State machines without I/O decide for it: `ReadAttempts` (layer 2), `BatchFetch`
(layer 3), `DoubleBuffer` (which batch is fetched) and `Freeing` (which producer frees payloads next).
"""

from dray.prefetch.batch import BatchFetch, DoubleBuffer, Fetched, Pause, Read, ReadAttempts
from dray.prefetch.freeing import Free, Freeing
from dray.prefetch.reader import BatchReader, BatchReaderStatistics
from dray.prefetch.threads import Source

__all__ = [
    "BatchFetch",
    "BatchReader",
    "BatchReaderStatistics",
    "DoubleBuffer",
    "Fetched",
    "Free",
    "Freeing",
    "Pause",
    "Read",
    "ReadAttempts",
    "Source",
]
