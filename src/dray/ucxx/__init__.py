"""A UCXX payload transport for RL frameworks: trajectories travel by reference, over UCX, shared memory or TCP.

This package has the names that rollout workers and data packers of such frameworks use. It is thin: `dray.ring`,
`dray.transport` and `dray.prefetch` do the work. The documentation is docs/reference/UCXX.md. Importing the
package needs no `ucxx`; what needs it raises `MissingDependencyError` when it starts.
"""

from dray.errors import SlotError, StaleSlotError
from dray.payload import TensorSpec
from dray.ring import SharedRingBuffer, SlotState
from dray.transport.lanes.ucx_worker import UCXX_AVAILABLE
from dray.ucxx.buffer import UCXXBuffer, UCXXRolloutMixin, completion_for, is_completion, reference_of
from dray.ucxx.config import UCXXBufferConfig, UCXXConfig
from dray.ucxx.data_packer import CompletionReader, CompletionReaderStatistics, UCXXClient, UCXXDataPackerMixin

__all__ = [
    "UCXX_AVAILABLE",
    "CompletionReader",
    "CompletionReaderStatistics",
    "SharedRingBuffer",
    "SlotError",
    "SlotState",
    "StaleSlotError",
    "TensorSpec",
    "UCXXBuffer",
    "UCXXBufferConfig",
    "UCXXClient",
    "UCXXConfig",
    "UCXXDataPackerMixin",
    "UCXXRolloutMixin",
    "completion_for",
    "is_completion",
    "reference_of",
]
