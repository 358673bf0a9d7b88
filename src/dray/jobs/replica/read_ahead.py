"""Reading ahead: the payloads of the next training step are received and read while the trainer does a step."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from dray.clock import MONOTONIC
from dray.errors import DrayError, OutOfResources, StaleSlotError
from dray.jobs.api import Trajectory
from dray.jobs.queue import Delivery
from dray.jobs.replica.delivery import Deliveries
from dray.jobs.replica.ranks import Batch, Failure
from dray.jobs.replica.user_code import decoded_metadata
from dray.payload import Arrays
from dray.resources import Closing

_LOG = logging.getLogger("dray.jobs.replica.read_ahead")
SLICE = 0.5
"""Seconds after which a wait without an event is interrupted."""

Read = Callable[[Sequence[Delivery]], Iterable[tuple[Delivery, Arrays | DrayError]]]
"""Gives the arrays of each delivery, or why they cannot be had."""


class ReadAhead(Closing):
    """Fills the batch of the next step in a thread of its own; an error of that thread is raised by `wait`.

    The first rank's part of the batch is read there. Other ranks read their parts themselves.

    Args:
        version: of the weights that the first batch trains.
        count: adds to a counter of the replica, by name.
        ending: whether the replica must end.
        reading: called with the payloads whose arrays are about to be read.
    """

    def __init__(
        self,
        deliveries: Deliveries,
        read: Read,
        *,
        batch_size: int,
        parts: int,
        version: int,
        count: Callable[[str, int], None],
        ending: Callable[[], bool],
        reading: Callable[[Sequence[Delivery]], None] = lambda deliveries: None,
    ) -> None:
        self._deliveries = deliveries
        self._read = read
        self._batch_size = batch_size
        self._parts = parts
        self._version = version
        self._count = count
        self._ending = ending
        self._reading = reading
        self._batch = Batch(batch_size, parts)
        self._changed = threading.Condition()
        self._closing = False
        self._error: BaseException | None = None
        self._reading_since: float | None = None
        self._read_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)
        self._thread.start()

    def wait(self, on_wait: Callable[[int], None], on_slice: Callable[[], None]) -> Batch | None:
        """The batch of the next step when it is whole; None if the replica must end before.

        The seconds of this call are added to the batch: those in which payloads were being read to `reading`, the
        others to `waited`.

        Args:
            on_wait: called with the number of payloads that are missing, whenever it has changed.
            on_slice: called after each half second without a change.

        Raises:
            DrayError: of receiving or reading.
        """
        began, read_before, shown = MONOTONIC.now(), self._seconds_of_reading(), 0
        try:
            while True:
                with self._changed:
                    missing = self._batch.missing
                    if self._error is not None:
                        raise self._error
                    if not missing:
                        return self._batch
                    if self._ending():
                        return None
                    changed = missing == shown and self._changed.wait(SLICE)
                if missing != shown:
                    on_wait(missing)
                    shown = missing
                elif not changed:
                    on_slice()
        finally:
            elapsed = MONOTONIC.now() - began
            reading = min(elapsed, self._seconds_of_reading() - read_before)
            self._batch.reading += reading
            self._batch.waited += elapsed - reading

    def begin(self) -> None:
        """The step on the batch that `wait` returned begins; the batch after it is filled from now on."""
        with self._changed:
            self._deliveries.begin(self._batch.deliveries)
            self._batch = Batch(self._batch_size, self._parts)
            self._version += 1
            self._changed.notify_all()

    def drop(self, failed: dict[str, Failure]) -> None:
        """These payloads of the batch could not be read by all ranks: others take their places.

        Args:
            failed: the failure of each, by its key.

        Raises:
            OldEpochError: the group has a newer epoch.
            ControlPlaneError: Redis is lost, or refuses.
        """
        with self._changed:
            lost = self._batch.remove(failed)
        self._lose(lost, failed)
        with self._changed:
            self._changed.notify_all()

    def known(self) -> list[list[Delivery]]:
        """What is known of the batch after the present step, by part."""
        with self._changed:
            return self._batch.by_part()

    def wake(self) -> None:
        """End waits whose reason may be gone, as the replica must end."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Receive nothing more. What was read and not trained on stays with its producers."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        # It may be in the middle of a read, which ends when the reader is closed.
        self._thread.join(2 * SLICE)

    def _run(self) -> None:
        try:
            while self._has_room():
                self._fill()
        except BaseException as error:  # noqa: BLE001 - `wait` raises it in the thread of its caller
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _has_room(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._ending() or self._batch.missing > 0)
            return not (self._closing or self._ending())

    def _fill(self) -> None:
        batch = self._batch
        found = self._deliveries.receive(batch.missing, self._version, SLICE)
        if not found:
            return
        dealt = batch.deal(found)
        self._reading(found)
        failed: dict[str, Failure] = {}
        for delivery, arrays in self._timed(self._read(dealt[0])):
            entry = delivery.entry
            if isinstance(arrays, OutOfResources):
                raise arrays  # of this process: the payload is there, and is delivered again
            if isinstance(arrays, DrayError):
                failed[entry.identity] = "stale" if isinstance(arrays, StaleSlotError) else "lost"
                _LOG.warning("payload %s: %s", entry.id, arrays)
            else:
                metadata = decoded_metadata(entry.metadata)
                batch.trajectories[entry.id] = Trajectory(arrays, entry.weight_version, entry.work_item, metadata)
        good = [[each for each in given if each.entry.identity not in failed] for given in dealt]
        self._deliveries.read(each for given in good for each in given)
        with self._changed:
            for part, given in enumerate(good):
                batch.add(part, given)
            self._changed.notify_all()
        self._lose([each for each in dealt[0] if each.entry.identity in failed], failed)

    def _timed(
        self, results: Iterable[tuple[Delivery, Arrays | DrayError]]
    ) -> Iterator[tuple[Delivery, Arrays | DrayError]]:
        self._reading_since = began = MONOTONIC.now()
        try:
            yield from results
        finally:
            self._reading_since = None
            self._read_seconds += MONOTONIC.now() - began

    def _seconds_of_reading(self) -> float:
        since, now = self._reading_since, MONOTONIC.now()
        return self._read_seconds + (0.0 if since is None else now - since)

    def _lose(self, lost: Sequence[Delivery], failed: dict[str, Failure]) -> None:
        if not lost:
            return
        for each in lost:
            kind = failed[each.entry.identity]
            _LOG.warning("the rollout of work item %d by %s is %s", each.entry.work_item, each.entry.replica, kind)
        for kind, count in Counter(failed[each.entry.identity] for each in lost).items():
            self._count(kind, count)
        self._deliveries.lost(lost)
