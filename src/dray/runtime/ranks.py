"""The policy group as its first rank sees it: what it tells the others, and what they answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from dray.control import Delivery
from dray.runtime.batch import Batch
from dray.runtime.checkpoint import trainer_folder
from dray.runtime.group_channel import Answer, Channel, GroupLostError, Order

Failure = Literal["stale", "lost"]


class Ranks:
    """The ranks 1, 2, …, in order; none for a group of one.

    All methods raise `GroupLostError` when one of them is gone.

    Args:
        readers: how many ranks read each payload.
    """

    def __init__(self, channels: Sequence[Channel], readers: int) -> None:
        self._channels = tuple(channels)
        self._readers = readers

    @property
    def parts(self) -> int:
        """How many parts a batch is dealt in."""
        return (len(self._channels) + 1) // self._readers

    def share(self, text: str | None) -> str:
        """Give `text` to all."""
        if text is None:
            raise ValueError("the first rank of a group has to share something")
        self._tell(lambda _: Order(what="share", text=text))
        return text

    def begin(self, checkpoint: Path | None) -> None:
        """Let all load their part of a checkpoint, if there is one."""

        def order(rank: int) -> Order:
            return Order(what="begin", text=str(trainer_folder(checkpoint, rank)) if checkpoint else "")

        self._tell(order)

    def read(self, dealt: Sequence[Sequence[Delivery]]) -> None:
        """Let each rank read what its part was dealt."""

        def order(rank: int) -> Order:
            entries = [delivery.entry for delivery in dealt[rank // self._readers]]
            return Order(
                what="read",
                references=[entry.reference or "" for entry in entries],
                versions=[entry.weight_version for entry in entries],
            )

        self._tell(order)

    def failures(self) -> dict[str, Failure]:
        """What any of them could not read, by identity."""
        failed: dict[str, Failure] = {}
        for channel in self._channels:
            failed |= channel.receive(Answer).failed
        return failed

    def train(self, batch: Batch) -> None:
        """Let each rank train on its part of `batch`."""

        def order(rank: int) -> Order:
            part = batch.part(rank // self._readers)
            return Order(what="train", identities=[delivery.entry.identity for delivery in part])

        self._tell(order)

    def weights(self) -> None:
        """Let all join in `PolicyTrainer.weights`."""
        self._tell(lambda _: Order(what="weights"))

    def save(self, checkpoint: Path) -> None:
        """Let each rank save its part of a checkpoint."""
        self._tell(lambda rank: Order(what="save", text=str(trainer_folder(checkpoint, rank))))

    def wait(self) -> None:
        """Wait until all have done what they were told."""
        for channel in self._channels:
            channel.receive(Answer)

    def end(self) -> None:
        """The job is over."""
        self._tell(lambda _: Order(what="end"))

    def check(self) -> None:
        """Make sure that all are there."""
        for channel in self._channels:
            if channel.lost:
                raise GroupLostError(f"{channel.peer} is gone")

    def _tell(self, order: Callable[[int], Order]) -> None:
        for rank, channel in enumerate(self._channels, start=1):
            channel.send(order(rank))
