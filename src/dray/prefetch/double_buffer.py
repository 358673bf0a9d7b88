"""The double buffer of prefetch as a state machine: which batch is used, which is fetched, which is next."""

from __future__ import annotations

from dray.errors import DrayError
from dray.prefetch.batch import BatchFetch, Fetched, Identity
from dray.protocol import PayloadRef


class DoubleBuffer:
    """Prefetch: the batch that is used (front), the one that is fetched (back), and one to be fetched after it.

    Results are found by the reference they belong to, so that none can be taken for another's. A batch starts only
    when no read of the batches before it is under way.
    """

    def __init__(self) -> None:
        self.back: BatchFetch | None = None
        self._front: dict[Identity, Fetched] = {}
        self._taken: set[Identity] = set()
        self._ending: list[BatchFetch] = []
        self._deferred: BatchFetch | None = None
        self._seconds = 0.0

    def start(self, batch: BatchFetch) -> bool:
        """Fetch this batch; False if it is refused: an earlier one is not collected, or still being read."""
        if self.back is not None or self._deferred is not None or self._busy:
            return False
        self.back = batch
        return True

    @property
    def displaceable(self) -> bool:
        """A batch has come that another may start in place of, once it is collected."""
        return self.back is not None and self.back.settled and self._deferred is None and not self._busy

    def defer(self, batch: BatchFetch, seconds: float) -> bool:
        """Fetch this batch, within `seconds`, after the one before it; False if one is waiting already."""
        if self._deferred is not None:
            return False
        self._deferred, self._seconds = batch, seconds
        return True

    def advance(self, now: float) -> BatchFetch | None:
        """The deferred batch, if it is its turn: it has become the one that is fetched."""
        batch = self._deferred
        if batch is None or self.back is not None or self._busy:
            return None
        batch.by = now + self._seconds
        self.back, self._deferred = batch, None
        return batch

    def find(self, ref: PayloadRef) -> Fetched | BatchFetch | None:
        """The result for a reference, or the batch that will have it."""
        found = self._front.get(ref.identity)
        if found is None and self.back is not None and ref in self.back:
            return self.back
        return found

    def take(self, ref: PayloadRef) -> tuple[Fetched, bool]:
        """The result for a reference of the batch being fetched, and whether it is handed out for the first time.

        A reference that is not there yet fails: it was waited for as long as the batch had.
        """
        assert self.back is not None
        if not self.back.has(ref):
            self._end(self.back)
        first = ref.identity not in self._taken
        self._taken.add(ref.identity)
        return self.back.result(ref), first

    def collect(self) -> tuple[list[Fetched], list[PayloadRef]]:
        """End the batch being fetched and put its results in front, in place of those that are there.

        Returns them, and those of its payloads that are handed out with this and not before.
        """
        batch, self.back = self.back, None
        taken, self._taken = self._taken, set()
        if batch is None:
            return [], []
        self._end(batch)
        results = batch.results()
        self._front = {fetched.ref.identity: fetched for fetched in results}
        return results, [
            fetched.ref
            for identity, fetched in self._front.items()
            if identity not in taken and not isinstance(fetched.outcome, DrayError)
        ]

    @property
    def settled(self) -> bool:
        """Nothing is being fetched, and nothing is about to be."""
        return self._deferred is None if self.back is None else self.back.settled

    def _end(self, batch: BatchFetch) -> None:
        if not batch.settled:
            self._ending.append(batch)
        batch.close()

    @property
    def _busy(self) -> bool:
        self._ending = [batch for batch in self._ending if batch.reading]
        return bool(self._ending)
