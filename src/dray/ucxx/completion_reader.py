"""`CompletionReader`: turns completions back into arrays, ahead of time where it is told what comes."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

from dray.clock import MONOTONIC
from dray.counters import Counters
from dray.errors import (
    BufferClosedError,
    DrayError,
    ProducerLostError,
    ProtocolError,
    StaleSlotError,
    TransportError,
)
from dray.prefetch import BatchReader, Fetched
from dray.prefetch.batch import Arrays
from dray.protocol import PayloadRef
from dray.transport.lanes import LaneChoice
from dray.ucxx.client import open_client
from dray.ucxx.completion import is_completion, reference_of
from dray.ucxx.config import UCXXConfig

logger = logging.getLogger("dray.ucxx")

MIN_LATE_SECONDS = 1.0
"""What a read of a payload that did not come with its batch gets at least, however long others have waited."""


class LateReads:
    """The time for the payloads that did not come with their batch: each read has what those before it have left.

    Thread-safe.

    Args:
        total: seconds for all of them together.
    """

    def __init__(self, total: float) -> None:
        self._lock = threading.Lock()
        self._total = self._left = total

    @property
    def seconds(self) -> float:
        """What the next read has, at least `MIN_LATE_SECONDS`."""
        with self._lock:
            return max(MIN_LATE_SECONDS, self._left)

    def spend(self, seconds: float) -> None:
        """A read has taken so long."""
        with self._lock:
            self._left -= seconds

    def renew(self) -> None:
        """Another batch begins."""
        with self._lock:
            self._left = self._total


class CompletionReader:
    """What a data packer needs: prefetch, and the arrays that a completion stands for. Thread-safe.

    Args:
        config: timeouts and attempts.
        lane: ``"auto"`` takes ``shm`` on the same host, else ``ucx``, else ``tcp``; or the lane to use.
        secret: the job's secret, where servers have one.
        reader: this reader's id, where payloads are meant for several.
        threads: how many payloads are read at a time.

    Raises:
        ConfigError: an argument is not allowed.
        MissingDependencyError: `ucxx` is needed and not installed; it says what to install.
    """

    def __init__(
        self,
        config: UCXXConfig | None = None,
        *,
        lane: LaneChoice = "auto",
        secret: bytes | None = None,
        reader: int = 0,
        threads: int = 8,
    ) -> None:
        self.config = config or UCXXConfig()
        self._client = open_client(lane, secret, reader)
        self._batches = BatchReader(
            self._client,
            threads=threads,
            attempts=self.config.ucxx_read_max_attempts,
            read_timeout=self.config.ucxx_read_timeout,
        )
        self._counters = Counters("prefetched", "read_at_once", "skipped")
        self._said: set[type[DrayError]] = set()
        self._late = LateReads(self.config.ucxx_prefetch_timeout)

    # --- prefetch ---------------------------------------------------------------------------------------------

    def start_prefetch(self, batch: Iterable[object]) -> bool:
        """Fetch, in the background, what the completions among `batch` stand for; the others are left alone.

        Returns False if it is refused, because an earlier batch is still being fetched: what is in this one is
        then read when it is asked for. See `BatchReader.start`.
        """
        self._late.renew()
        return self._batches.start(self._references(batch), timeout=self.config.ucxx_prefetch_timeout)

    def wait_prefetch(self, timeout: float | None = None) -> bool:
        """Wait until the batch has come, by default as long as ``ucxx_prefetch_timeout``; True at once if none."""
        return self._batches.wait(timeout)

    def collect_prefetch(self, timeout: float | None = None) -> int:
        """Wait for the batch, then make what has come ready for `resolve`, in place of the batch before.

        What has not come by then stays with its producer: `resolve` reads it when it is asked for. The deferred
        batch starts.

        Args:
            timeout: seconds to wait at most; by default as long as the batch has, 0 does not wait.

        Returns:
            How many payloads have come.
        """
        self._batches.wait(timeout)
        self._late.renew()
        return sum(not isinstance(fetched.outcome, DrayError) for fetched in self._batches.collect())

    def defer_prefetch(self, batch: Iterable[object]) -> bool:
        """Fetch a batch when the one before it is collected; False if one is deferred already."""
        return self._batches.defer(self._references(batch), timeout=self.config.ucxx_prefetch_timeout)

    # --- reading ----------------------------------------------------------------------------------------------

    def read_one(self, ref: PayloadRef, *, timeout: float | None = None) -> Arrays:
        """Layer 2: read one payload, by default within ``ucxx_prefetch_timeout``; raises what `read` does."""
        seconds = self.config.ucxx_prefetch_timeout if timeout is None else timeout
        return self._batches.read_one(ref, timeout=seconds)

    def fetch_all(self, refs: Iterable[PayloadRef], *, timeout: float | None = None) -> list[Fetched]:
        """Layer 3: read a batch, by default within ``ucxx_prefetch_timeout``; see `BatchReader.fetch_all`."""
        seconds = self.config.ucxx_prefetch_timeout if timeout is None else timeout
        return self._batches.fetch_all(refs, timeout=seconds)

    def resolve(self, completion: object) -> Arrays | None:
        """The arrays that a completion stands for, from prefetch or read now; None if they cannot be had.

        A payload that did not come with its batch is read now as well. All such payloads of a batch have together
        the time that the batch had, and each at least a second, so that a producer that does not answer costs it
        about once. A
        failure is counted, and logged once for each kind. A payload that could not be read in time stays with its
        producer: the same completion may be resolved again, or given to `discard`.

        Raises:
            BufferClosedError: the reader is closed, or gets closed meanwhile.
        """
        try:
            ref = reference_of(completion)
        except ProtocolError as error:
            self._skip(error)
            return None
        fetched = self._batches.take(ref)
        if fetched is None:
            return self._read_now(ref, self.config.ucxx_prefetch_timeout)
        if not isinstance(fetched.outcome, DrayError):
            self._counters.add("prefetched")
            return fetched.outcome
        if fetched.outcome.retryable:
            return self._read_late(ref)
        self._skip(fetched.outcome, ref)
        return None

    def discard(self, batch: Iterable[object]) -> None:
        """Free, in the background, the payloads of completions that will not be asked for any more."""
        self._batches.discard(self._references(batch))

    def _read_now(self, ref: PayloadRef, seconds: float) -> Arrays | None:
        try:
            arrays = self.read_one(ref, timeout=seconds)
        except BufferClosedError:
            raise
        except DrayError as error:
            self._skip(error, ref)
            return None
        self._counters.add("read_at_once")
        return arrays

    def _read_late(self, ref: PayloadRef) -> Arrays | None:
        """Read what did not come with its batch, within what is left for all of those together."""
        began = MONOTONIC.now()
        try:
            return self._read_now(ref, self._late.seconds)
        finally:
            self._late.spend(MONOTONIC.now() - began)

    def _references(self, batch: Iterable[object]) -> list[PayloadRef]:
        """What can be fetched of a batch; a broken reference is counted where it is resolved."""
        references = []
        for completion in filter(is_completion, batch):
            with contextlib.suppress(ProtocolError):
                references.append(reference_of(completion))
        return references

    def _skip(self, error: DrayError, ref: PayloadRef | None = None) -> None:
        """Count an episode that cannot be had, and say so once for each kind."""
        match error:
            case StaleSlotError():
                kind = "skipped_stale"
            case ProducerLostError():
                kind = "skipped_lost"
            case TransportError():
                kind = "skipped_transport"
            case _:
                kind = "skipped_other"
        self._counters.add_all({"skipped": 1, kind: 1})
        level = logging.DEBUG if type(error) in self._said else logging.WARNING
        self._said.add(type(error))
        logger.log(level, "episode skipped (%s): %s", kind, str(error))
        # It is there and reading it again would not help. One that may still be read is not consumed unseen.
        final = not error.retryable and not isinstance(error, (StaleSlotError, ProducerLostError))
        if ref is not None and final:
            self._batches.discard([ref])

    # --- life -------------------------------------------------------------------------------------------------

    def statistics(self) -> dict[str, Any]:
        """How completions were resolved; under ``batches`` and ``client``, what those have counted."""
        return {
            **self._counters.snapshot(),
            "batches": self._batches.statistics(),
            "client": dataclasses.asdict(self._client.statistics()),
        }

    @property
    def alive(self) -> int:
        """Threads that have not ended: after `close`, those that a read still holds."""
        return self._batches.alive

    def close(self, timeout: float = 5.0) -> None:
        """End; see `BatchReader.close`. Twice is fine."""
        self._batches.close(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
