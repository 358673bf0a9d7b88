"""The data packer's side: `CompletionReader`, `UCXXDataPackerMixin`, and `UCXXClient` for asyncio."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Awaitable, Collection, Generator, Iterable, Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self, TypeVar

from dray.clock import Stopwatch
from dray.counters import Counters
from dray.errors import (
    BufferClosedError,
    DrayError,
    ProducerLostError,
    ProtocolError,
    SchemaError,
    StaleSlotError,
    TransportError,
)
from dray.payload import Arrays, torch_interop
from dray.payload.trajectory import trim
from dray.prefetch import BatchReader, BatchReaderStatistics, Fetched
from dray.prefetch.batch import Outcome
from dray.protocol import PayloadRef
from dray.resources import Closing
from dray.transport import ClientStatistics, PayloadClient
from dray.transport.lanes import LaneChoice
from dray.transport.lanes.ucx_worker import require
from dray.ucxx.buffer import is_completion, reference_of
from dray.ucxx.config import UCXXConfig

logger = logging.getLogger("dray.ucxx")

Presentable = TypeVar("Presentable", Arrays, Outcome)

MIN_LATE_SECONDS = 1.0  # for a payload that did not arrive with its batch

_SKIPPED: tuple[tuple[type[DrayError], str], ...] = (
    (StaleSlotError, "skipped_stale"),
    (ProducerLostError, "skipped_lost"),
    (TransportError, "skipped_transport"),
)
"""Counters of skipped episodes, by the error. The first that fits is used, else ``skipped_other``."""


def _open_client(lane: LaneChoice, secret: bytes | None, reader: int) -> PayloadClient:
    """A client that needs `ucxx`, unless `lane` names other lanes."""
    if lane == "auto":
        require()
    return PayloadClient(lane=lane, secret=secret, reader=reader)


class _Ended:
    """Nothing is left to wait for."""

    def __await__(self) -> Generator[None, None, None]:
        yield from ()


class UCXXClient(Closing):
    """Layer 1 for asyncio: reads one payload at a time, over another endpoint if the first one fails.

    Arguments and errors are those of `CompletionReader`.
    """

    def __init__(self, *, lane: LaneChoice = "auto", secret: bytes | None = None, reader: int = 0) -> None:
        self._client = _open_client(lane, secret, reader)

    async def read(self, ref: PayloadRef, *, timeout: float | None = 30.0, consume: bool = True) -> Arrays:
        """Return the payload's arrays in new memory; see `PayloadClient.read`."""
        return await self._client.read_async(ref, timeout=timeout, consume=consume)

    def statistics(self) -> ClientStatistics:
        """Return `PayloadClient.statistics`."""
        return self._client.statistics()

    def close(self) -> Awaitable[None]:  # type: ignore[override]
        """Close the client. Twice is fine. ``await client.close()`` is possible; the call itself closes."""
        self._client.close()
        return _Ended()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class LateReads:
    """The `total` seconds for all payloads that did not arrive with their batch. Thread-safe."""

    def __init__(self, total: float) -> None:
        self._lock = threading.Lock()
        self._total = self._left = total

    @property
    def seconds(self) -> float:
        """Time for the next read: what earlier reads left, and at least `MIN_LATE_SECONDS`."""
        with self._lock:
            return max(MIN_LATE_SECONDS, self._left)

    def spend(self, seconds: float) -> None:
        """Record the duration of a read."""
        with self._lock:
            self._left -= seconds

    def renew(self) -> None:
        """Begin another batch."""
        with self._lock:
            self._left = self._total


@dataclass(frozen=True, slots=True)
class CompletionReaderStatistics:
    """Counters of a `CompletionReader`. The four kinds of skipped episodes add up to `skipped`."""

    prefetched: int  # completions resolved from a batch
    read_at_once: int  # completions resolved by a read of their own
    skipped: int  # episodes whose payload is not available
    skipped_stale: int  # the payload was consumed or overwritten
    skipped_lost: int  # the producer is lost
    skipped_transport: int  # the payload could not be read in time
    skipped_other: int  # any other error
    batches: BatchReaderStatistics
    client: ClientStatistics


class CompletionReader(Closing):
    """Prefetches payloads, and resolves completions to arrays. Thread-safe.

    Args:
        config: timeouts, attempts, and what arrays become: trimmed, NumPy arrays or torch tensors.
        lane: ``"auto"`` uses ``shm`` on the same host, else ``ucx``, else ``tcp``; or the lanes to use.
        secret: the job's secret, if servers have one.
        reader: this consumer's reader id, if payloads are meant for several.
        threads: groups of payloads that are read at the same time.

    Raises:
        ConfigError: an argument is not allowed.
        MissingDependencyError: `ucxx` or torch is needed and not installed; see `UCXXBuffer`.
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
        self._time = self.config.ucxx_prefetch_timeout
        if self.config.ucxx_device is not None:
            torch_interop.check_device("ucxx_device", self.config.ucxx_device)
        self._client = _open_client(lane, secret, reader)
        self._batches = BatchReader(
            self._client,
            threads=threads,
            attempts=self.config.ucxx_read_max_attempts,
            read_timeout=self.config.ucxx_read_timeout,
        )
        kinds = (kind for _, kind in _SKIPPED)
        self._counters = Counters("prefetched", "read_at_once", "skipped", "skipped_other", *kinds)
        self._logged: set[type[DrayError]] = set()
        self._late = LateReads(self._time)

    def start_prefetch(self, batch: Iterable[object]) -> bool:
        """Fetch, in the background, the payloads of the completions in `batch`; other values are ignored.

        Returns False if the batch is refused; see `BatchReader.start`. Its payloads are then read by `resolve`.
        """
        self._late.renew()
        return self._batches.start(self._references(batch), timeout=self._time)

    def wait_prefetch(self, timeout: float | None = None) -> bool:
        """Wait until the batch has arrived; see `BatchReader.wait`."""
        return self._batches.wait(timeout)

    def collect_prefetch(self, timeout: float | None = None) -> int:
        """Wait for the batch, end it, and return how many payloads arrived. `resolve` then finds them.

        A payload that has not arrived stays with its producer and is read by `resolve`. The deferred batch starts.
        `timeout` is in seconds, by default until the deadline of the batch; 0 does not wait.
        """
        self._batches.wait(timeout)
        self._late.renew()
        return sum(not isinstance(fetched.outcome, DrayError) for fetched in self._batches.collect())

    def defer_prefetch(self, batch: Iterable[object]) -> bool:
        """Fetch a batch when the one before it is collected; False if one is deferred already."""
        return self._batches.defer(self._references(batch), timeout=self._time)

    def read_one(self, ref: PayloadRef, *, timeout: float | None = None, consume: bool = True) -> Arrays:
        """Layer 2: `BatchReader.read_one`, by default within ``ucxx_prefetch_timeout``."""
        seconds = self._time if timeout is None else timeout
        return self._presented(self._batches.read_one(ref, timeout=seconds, consume=consume))

    def fetch_all(
        self, refs: Iterable[PayloadRef], *, timeout: float | None = None, consume: bool = True
    ) -> list[Fetched]:
        """Layer 3: `BatchReader.fetch_all`, by default within ``ucxx_prefetch_timeout``.

        With ``consume=False`` the payloads stay with their producers, until they are read again or discarded.
        """
        seconds = self._time if timeout is None else timeout
        results = []
        for each in self._batches.fetch_all(refs, timeout=seconds, consume=consume):
            try:
                results.append(replace(each, outcome=self._presented(each.outcome)))
            except SchemaError as error:
                results.append(replace(each, outcome=error))
        return results

    def resolve(self, completion: object) -> Arrays | None:
        """Return the arrays that a completion stands for, prefetched or read now; None if they are not available.

        Payloads that did not arrive with their batch are read now. All of them share one ``ucxx_prefetch_timeout``
        and each has at least a second, so a producer that does not answer costs this time about once. Failures are
        counted. A payload that could not be read in time stays with its producer: its completion may be resolved
        again, or given to `discard`.

        Raises:
            BufferClosedError: the reader is closed, also while it reads.
        """
        try:
            ref = reference_of(completion)
        except ProtocolError as error:
            self._skip(error)
            return None
        fetched = self._batches.result(ref)
        if fetched is None:
            return self._read_now(ref, self._time)
        if not isinstance(fetched.outcome, DrayError):
            try:
                arrays = self._presented(fetched.outcome)
            except SchemaError as error:
                self._skip(error, ref)
                return None
            self._counters.add("prefetched")
            return arrays
        if fetched.outcome.retryable:
            stopwatch = Stopwatch()
            try:
                return self._read_now(ref, self._late.seconds)
            finally:
                self._late.spend(stopwatch.elapsed)
        self._skip(fetched.outcome, ref)
        return None

    def discard(self, batch: Iterable[object]) -> None:
        """Free, in the background, the payloads of completions that are not needed any more."""
        self._batches.discard(self._references(batch))

    def statistics(self) -> CompletionReaderStatistics:
        """Return the counters of this object, its batches and its client."""
        batches, client = self._batches.statistics(), self._client.statistics()
        return self._counters.statistics(CompletionReaderStatistics, batches=batches, client=client)

    @property
    def alive(self) -> int:
        """Threads that have not ended: after `close`, those with a request that still hangs."""
        return self._batches.alive

    def close(self, timeout: float = 5.0) -> None:
        """Close the reader; see `BatchReader.close`. Twice is fine."""
        self._batches.close(timeout)

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

    def _presented(self, outcome: Presentable) -> Presentable:
        """The arrays as the configuration asks for them; an error as it is."""
        if isinstance(outcome, DrayError):
            return outcome
        values: Any = trim(outcome, self.config.ucxx_per_step) if self.config.ucxx_trim else outcome
        device = self.config.ucxx_device
        return values if device is None else torch_interop.to_torch(values, device)

    def _references(self, batch: Iterable[object]) -> list[PayloadRef]:
        """The references in a batch. Broken ones are left out: `resolve` counts them."""
        references = []
        for completion in filter(is_completion, batch):
            with contextlib.suppress(ProtocolError):
                references.append(reference_of(completion))
        return references

    def _skip(self, error: DrayError, ref: PayloadRef | None = None) -> None:
        """Count an episode whose payload is not available, and log it: the first of each kind as a warning."""
        kind = next((kind for error_type, kind in _SKIPPED if isinstance(error, error_type)), "skipped_other")
        self._counters.add_all({"skipped": 1, kind: 1})
        level = logging.DEBUG if type(error) in self._logged else logging.WARNING
        self._logged.add(type(error))
        logger.log(level, "episode skipped (%s): %s", kind, str(error))
        # Another read of such a payload would fail as well. One that may still be read is not consumed unseen.
        final = not error.retryable and not isinstance(error, (StaleSlotError, ProducerLostError))
        if ref is not None and final:
            self._batches.discard([ref])


class UCXXDataPackerMixin:
    """Gives a framework's data packer the methods of a `CompletionReader`; `get_policy_input` accepts completions.

    It is the first base: ``class Packer(UCXXDataPackerMixin, DataPacker)``. Call `setup_ucxx_reader` once and
    `cleanup_ucxx_reader` at the end. With double buffering, a step is::

        packer.defer_prefetch(completions_of_next_step)  # starts with `collect_prefetch`
        packer.collect_prefetch()  # waits for the completions of this step
        inputs = [packer.get_policy_input(sample, completion) for sample, completion in this_step]

    Attributes:
        ucxx_reader: the reader. Without one (before `setup_ucxx_reader`, or if ``payload_transfer`` is not
            ``"ucxx"``) it is ``None``, and values that are not completions pass.
    """

    ucxx_reader: CompletionReader | None = None

    def setup_ucxx_reader(
        self,
        config: UCXXConfig | Mapping[str, Any] | None = None,
        *,
        lane: LaneChoice = "auto",
        secret: bytes | None = None,
        reader: int = 0,
        threads: int = 8,
    ) -> None:
        """Make the reader; with ``payload_transfer = "redis"`` do nothing. Arguments: see `CompletionReader`.

        Raises:
            ConfigError, MissingDependencyError: as `CompletionReader`.
            DrayError: the earlier reader is not closed, or one of its threads has not ended.
        """
        if (earlier := self.ucxx_reader) is not None:
            raise DrayError(f"a reader still has {earlier.alive} threads; call cleanup_ucxx_reader first")
        settings = UCXXConfig.parse(config) if isinstance(config, Mapping) else config or UCXXConfig()
        if settings.enabled:
            self.ucxx_reader = CompletionReader(settings, lane=lane, secret=secret, reader=reader, threads=threads)

    def cleanup_ucxx_reader(self, timeout: float = 5.0) -> bool:
        """Close the reader. Twice is fine. False if threads did not end in time: call again before a set-up."""
        if self.ucxx_reader is not None:
            self.ucxx_reader.close(timeout)
            if not self.ucxx_reader.alive:
                self.ucxx_reader = None
        return self.ucxx_reader is None

    def start_prefetch(self, batch: Collection[object]) -> bool:
        """Call `CompletionReader.start_prefetch`."""
        return self._has_none(batch) or self._reader.start_prefetch(batch)

    def wait_prefetch(self, timeout: float | None = None) -> bool:
        """Call `CompletionReader.wait_prefetch`."""
        return self.ucxx_reader is None or self.ucxx_reader.wait_prefetch(timeout)

    def collect_prefetch(self, timeout: float | None = None) -> int:
        """Call `CompletionReader.collect_prefetch`."""
        return 0 if self.ucxx_reader is None else self.ucxx_reader.collect_prefetch(timeout)

    def defer_prefetch(self, batch: Collection[object]) -> bool:
        """Call `CompletionReader.defer_prefetch`."""
        return self._has_none(batch) or self._reader.defer_prefetch(batch)

    def discard_completions(self, batch: Collection[object]) -> None:
        """Call `CompletionReader.discard`."""
        if not self._has_none(batch):
            self._reader.discard(batch)

    def get_policy_input(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the next base class makes of an episode; without such a class, the arrays themselves.

        The call is ``get_policy_input(sample, rollout_output, ...)``, by position or by keyword. All arguments are
        passed on as they are, but a `rollout_output` that is a completion is replaced by its arrays. Returns None
        for an episode whose payload is not available: it is counted, and must be left out of the batch.

        Raises:
            TypeError: there is no `rollout_output`.
        """
        named = "rollout_output" in kwargs
        if not named and len(args) < 2:
            raise TypeError("get_policy_input() needs rollout_output, as the second argument or by keyword")
        rollout_output = kwargs["rollout_output"] if named else args[1]
        if is_completion(rollout_output):
            rollout_output = self._reader.resolve(rollout_output)
            if rollout_output is None:
                return None
            if named:
                kwargs["rollout_output"] = rollout_output
            else:
                args = (args[0], rollout_output, *args[2:])
        following = getattr(super(), "get_policy_input", None)
        return rollout_output if following is None else following(*args, **kwargs)

    # Frameworks know these two names, so they are a part of the documented surface.

    def _read_one(self, ref: PayloadRef, timeout: float | None = None, consume: bool = True) -> Arrays:
        """Call `CompletionReader.read_one`: layer 2."""
        return self._reader.read_one(ref, timeout=timeout, consume=consume)

    def _ucxx_dp_fetch_all(
        self, refs: Iterable[PayloadRef], timeout: float | None = None, consume: bool = True
    ) -> list[Fetched]:
        """Call `CompletionReader.fetch_all`: layer 3."""
        return self._reader.fetch_all(refs, timeout=timeout, consume=consume)

    @property
    def _reader(self) -> CompletionReader:
        if self.ucxx_reader is None:
            raise BufferClosedError(
                'there is no reader: call setup_ucxx_reader with payload_transfer "ucxx" first'
            )
        return self.ucxx_reader

    def _has_none(self, batch: Collection[object]) -> bool:
        """Without a reader, whether a batch can do without it: no value in it is a completion."""
        return self.ucxx_reader is None and not any(map(is_completion, batch))
