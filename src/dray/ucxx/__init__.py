"""The UCXX payload transport for reinforcement learning: trajectories by reference, over UCX or shared memory.

Thin over the core: every slot, connection and retry is `dray.ring`'s, `dray.transport`'s or `dray.prefetch`'s.
What is here knows trajectories, completions, and the names that rollout workers and data packers use.

Architecture::

    rollout worker                                              data packer
    UCXXRolloutMixin.write_to_buffer                            UCXXDataPackerMixin.get_policy_input
          │ trajectory                                                ▲ arrays
    UCXXBuffer                                                  CompletionReader
      SharedRingBuffer ── PayloadServer ◄═ READ/STATUS/bytes ═► PayloadClient ◄── BatchReader
          │                n_server_threads    shm | ucx | tcp        ▲            (prefetch, layers 2 and 3)
          └── completion {"dray_payload": reference} ─ framework ─────┘

`UCXXBuffer` and `CompletionReader` are objects to compose; the mixins hand every call to one of them. A completion
is a JSON-safe ``dict``; `is_completion` alone says what stands for one, for prefetch and for `get_policy_input`.

Life of a slot::

    FREE ─claim─► WRITING ─commit─► READY ─lease─► READING ─last lease ends─► READY ─CONSUME─► FREE

A payload read by prefetch goes back to READY and stays with its producer until it is handed out: collected, or
taken by `get_policy_input`. Then a CONSUME frees it, in the background, tried three times a second apart. A read
that comes too late is thus not lost: it is dropped here and READY there, and `get_policy_input` reads it again.
A payload read at once is consumed by the ACK of its read. One that cannot be read in time stays READY: its
completion may be resolved again or discarded. A ring should hold two batches: the one being collected and the one
being fetched.

Retries, all under one deadline::

    layer  where                           what                                          at most
    1      PayloadClient.read, read_many   another endpoint after a transport failure    2 failures
    2      CompletionReader.read_one,      a fresh read of what failed retryably         ucxx_read_max_attempts
           _read_one
    3      CompletionReader.fetch_all,     the whole batch concurrently; what failed     3 rounds, 0.1 s apart
           _ucxx_dp_fetch_all, prefetch    retryably again in the next round

With the defaults a reference of a batch is read at most 6 times, with 12 transport failures. The answer of a
healthy server is final at every layer, `StaleSlotError` above all. A failure stays with its reference.
`ProducerLostError` means that another producer answers in its place, or that every endpoint refused in every
round; never a timeout alone. One read gets ``ucxx_read_timeout`` at most, a batch ``ucxx_prefetch_timeout``. A
read that times out leaves time for another only if the former is shorter than the latter.

References of one producer are read together, up to 32 pipelined over one connection: one such group at a time
until it answers, then two. 8 threads serve the producer with the fewest groups first. So one that does not answer
holds one thread, and up its own payloads only.

Quarantine: an endpoint that failed is skipped for 30 s by this client, while another is healthy; with all of them
in quarantine all are tried. `ServerBusy` is no failure of the endpoint.

Idle connections heal by themselves: the client replaces one that was idle for 100 s before it is used, the server
closes it at 120 s; so no read finds a connection that the server is about to close.

Prefetch has two buffers: the batch collected last, which `get_policy_input` finds results in, and the one being
fetched. `defer_prefetch` names the one after it. Results are found by (producer, sequence) of their reference,
never by position. A second start is refused while the batch before it is still being read.

Counters of `CompletionReader.statistics`: ``prefetched``, ``read_at_once``, ``skipped`` and its kinds
``skipped_stale``, ``skipped_lost``, ``skipped_transport``, ``skipped_other``. Under ``batches``: ``reads``,
``reads_again`` (layer 2), ``failed`` (what layer 2 gave up, once for each round), ``late``, ``freed``, ``unfreed``
(given up: their slots stay READY until the producer ends), ``refused_starts``; ``reading`` (groups) and
``to_free`` (payloads) are what is so now. Under ``client``: those of `PayloadClient`.

Importing needs no `ucxx`; a server or client that may use the ``ucx`` lane raises `MissingDependencyError`, which
is an `ImportError` and a `RuntimeError`, without it and says what to install.
"""

from dray.errors import SlotError, StaleSlotError
from dray.payload import TensorSpec
from dray.ring import SharedRingBuffer, SlotState
from dray.transport.lanes.ucx_worker import UCXX_AVAILABLE
from dray.ucxx.buffer import UCXXBuffer
from dray.ucxx.client import UCXXClient
from dray.ucxx.completion import completion_for, is_completion, reference_of
from dray.ucxx.completion_reader import CompletionReader
from dray.ucxx.config import UCXXBufferConfig, UCXXConfig
from dray.ucxx.data_packer_mixin import UCXXDataPackerMixin
from dray.ucxx.rollout_mixin import UCXXRolloutMixin

__all__ = [
    "UCXX_AVAILABLE",
    "CompletionReader",
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
