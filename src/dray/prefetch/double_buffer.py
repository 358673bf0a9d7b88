"""The double buffer of prefetch as a state machine: which batch is in use, which is fetched, and which is next."""

from __future__ import annotations

from dray.errors import DrayError
from dray.prefetch.batch import BatchFetch, Fetched, Identity
from dray.protocol import PayloadRef


class DoubleBuffer:
    """The results of the batch in use (front), the batch being fetched (back), and the batch to fetch after it.

    Results are found by their reference, so no result can be mistaken for another. A batch starts only when no
    read of an earlier batch is under way.
    """

    def __init__(self) -> None:
        self.back: BatchFetch | None = None
        self._deferred: BatchFetch | None = None
        self._seconds = 0.0  # for the deferred batch
        self._front: dict[Identity, Fetched] = {}
        self._handed_out: set[Identity] = set()  # of the batch being fetched
        self._ending: list[BatchFetch] = []  # collected with reads under way

    def start(self, batch: BatchFetch) -> bool:
        """Fetch a batch; False if it is refused: an earlier batch is not collected, or is still being read."""
        if self.back is not None or self._deferred is not None or self._busy:
            return False
        self.back = batch
        return True

    @property
    def replaceable(self) -> bool:
        """The batch being fetched is decided, and another may start as soon as it is collected."""
        return self.back is not None and self.back.decided and self._deferred is None and not self._busy

    def defer(self, batch: BatchFetch, seconds: float) -> bool:
        """Fetch a batch, within `seconds`, after the one before it; False if one is deferred already."""
        if self._deferred is not None:
            return False
        self._deferred, self._seconds = batch, seconds
        return True

    def advance(self, now: float) -> BatchFetch | None:
        """Make the deferred batch the one being fetched and return it; None if it must still wait."""
        batch = self._deferred
        if batch is None or self.back is not None or self._busy:
            return None
        batch.deadline = now + self._seconds
        self.back, self._deferred = batch, None
        return batch

    def find(self, ref: PayloadRef) -> Fetched | BatchFetch | None:
        """Return the result for a reference, or the batch being fetched if the reference is in it."""
        found = self._front.get(ref.identity)
        if found is None and self.back is not None and ref in self.back:
            return self.back
        return found

    def result(self, ref: PayloadRef) -> tuple[Fetched, bool]:
        """Return the result for a reference of the batch being fetched, and whether this is the first time.

        If there is no result yet, the batch ends: the caller has waited as long as the batch had.
        """
        assert self.back is not None
        if not self.back.has_result(ref):
            self._end(self.back)
        first = ref.identity not in self._handed_out
        self._handed_out.add(ref.identity)
        return self.back.result(ref), first

    def collect(self) -> tuple[list[Fetched], list[PayloadRef]]:
        """End the batch being fetched; its results replace those in front.

        Returns the results, and the references of payloads that are handed out by this for the first time.
        """
        batch, self.back = self.back, None
        before, self._handed_out = self._handed_out, set()
        if batch is None:
            return [], []
        self._end(batch)
        results = batch.results()
        self._front = {fetched.ref.identity: fetched for fetched in results}
        return results, [
            fetched.ref
            for identity, fetched in self._front.items()
            if identity not in before and not isinstance(fetched.outcome, DrayError)
        ]

    @property
    def decided(self) -> bool:
        """The batch being fetched is decided, or there is none and none is deferred."""
        return self._deferred is None if self.back is None else self.back.decided

    def _end(self, batch: BatchFetch) -> None:
        if not batch.decided:
            self._ending.append(batch)
        batch.close()

    @property
    def _busy(self) -> bool:
        self._ending = [batch for batch in self._ending if batch.reading]
        return bool(self._ending)
