"""`UCXXDataPackerMixin`: `CompletionReader` for those whose framework asks for a subclass."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from dray.errors import BufferClosedError, DrayError
from dray.payload import Arrays
from dray.prefetch import Fetched
from dray.protocol import PayloadRef
from dray.transport.lanes import LaneChoice
from dray.ucxx.completion import is_completion
from dray.ucxx.completion_reader import CompletionReader
from dray.ucxx.config import UCXXConfig


class UCXXDataPackerMixin:
    """Lets a data packer take completions: `get_policy_input` of the class behind it gets the arrays.

    Stands before the framework's class: ``class Packer(UCXXDataPackerMixin, DataPacker)``. Call
    `setup_ucxx_reader` once and `cleanup_ucxx_reader` at the end. With double buffering, a step is::

        packer.defer_prefetch(completions_of_next_step)  # begins to arrive with `collect_prefetch`
        packer.collect_prefetch()  # waits for this step's
        inputs = [packer.get_policy_input(sample, completion) for sample, completion in this_step]

    Attributes:
        ucxx_reader: the object behind it; None before `setup_ucxx_reader`, and where ``payload_transfer`` is not
            ``"ucxx"``. Then everything that is not a completion passes all the same.
    """

    ucxx_reader: CompletionReader | None = None

    # --- life -------------------------------------------------------------------------------------------------

    def setup_ucxx_reader(
        self,
        config: UCXXConfig | Mapping[str, Any] | None = None,
        *,
        lane: LaneChoice = "auto",
        secret: bytes | None = None,
        reader: int = 0,
        threads: int = 8,
    ) -> None:
        """Make the reader; with ``payload_transfer = "redis"`` do nothing. Arguments as of `CompletionReader`.

        Raises:
            ConfigError: a setting is not allowed.
            MissingDependencyError: `ucxx` is needed and not installed.
            DrayError: the reader made before is not closed, or one of its reads has not ended yet.
        """
        if self.ucxx_reader is not None:
            alive = self.ucxx_reader.alive
            raise DrayError(f"the reader made before is still there, with {alive} threads; clean up first")
        settings = UCXXConfig.parse(config) if isinstance(config, Mapping) else config or UCXXConfig()
        if settings.enabled:
            self.ucxx_reader = CompletionReader(settings, lane=lane, secret=secret, reader=reader, threads=threads)

    def cleanup_ucxx_reader(self, timeout: float = 5.0) -> bool:
        """Close the reader; twice is fine. False if reads did not end in time: call again before a new set-up."""
        if self.ucxx_reader is not None:
            self.ucxx_reader.close(timeout)
            if self.ucxx_reader.alive:
                return False
            self.ucxx_reader = None
        return True

    # --- prefetch ---------------------------------------------------------------------------------------------

    def start_prefetch(self, batch: Collection[object]) -> bool:
        """See `CompletionReader.start_prefetch`."""
        return self._needs_none(batch) or self._reader.start_prefetch(batch)

    def wait_prefetch(self, timeout: float | None = None) -> bool:
        """See `CompletionReader.wait_prefetch`."""
        return self.ucxx_reader is None or self.ucxx_reader.wait_prefetch(timeout)

    def collect_prefetch(self, timeout: float | None = None) -> int:
        """See `CompletionReader.collect_prefetch`."""
        return 0 if self.ucxx_reader is None else self.ucxx_reader.collect_prefetch(timeout)

    def defer_prefetch(self, batch: Collection[object]) -> bool:
        """See `CompletionReader.defer_prefetch`."""
        return self._needs_none(batch) or self._reader.defer_prefetch(batch)

    # --- reading ----------------------------------------------------------------------------------------------

    def get_policy_input(self, *args: Any, **kwargs: Any) -> Any:
        """What the class behind this one makes of an episode; the arrays themselves where there is none.

        Called as that class has it, ``get_policy_input(sample, rollout_output, ...)``, by position or by keyword;
        all arguments are handed on as they were given. Only `rollout_output` is replaced by its arrays if it is a
        completion, from prefetch or read now. Returns None for an episode whose payload cannot be had: it is
        counted, and to be left out of the batch.

        Raises:
            TypeError: there is no `rollout_output`.
        """
        given = list(args)
        if "rollout_output" in kwargs:
            rollout_output = kwargs["rollout_output"]
        elif len(given) > 1:
            rollout_output = given[1]
        else:
            raise TypeError("get_policy_input() needs rollout_output, as the second argument or by keyword")
        if is_completion(rollout_output):
            rollout_output = self._reader.resolve(rollout_output)
            if rollout_output is None:
                return None
            if "rollout_output" in kwargs:
                kwargs["rollout_output"] = rollout_output
            else:
                given[1] = rollout_output
        following = getattr(super(), "get_policy_input", None)
        return rollout_output if following is None else following(*given, **kwargs)

    def discard_completions(self, batch: Collection[object]) -> None:
        """See `CompletionReader.discard`."""
        if not self._needs_none(batch):
            self._reader.discard(batch)

    def _read_one(self, ref: PayloadRef, timeout: float | None = None) -> Arrays:
        """Layer 2; see `CompletionReader.read_one`."""
        return self._reader.read_one(ref, timeout=timeout)

    def _ucxx_dp_fetch_all(self, refs: Iterable[PayloadRef], timeout: float | None = None) -> list[Fetched]:
        """Layer 3; see `CompletionReader.fetch_all`."""
        return self._reader.fetch_all(refs, timeout=timeout)

    # --- inside -----------------------------------------------------------------------------------------------

    @property
    def _reader(self) -> CompletionReader:
        if self.ucxx_reader is None:
            raise BufferClosedError(
                'there is no reader: setup_ucxx_reader with payload_transfer "ucxx" comes first'
            )
        return self.ucxx_reader

    def _needs_none(self, batch: Collection[object]) -> bool:
        return self.ucxx_reader is None and not any(map(is_completion, batch))
