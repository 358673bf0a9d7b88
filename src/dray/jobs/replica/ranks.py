"""The policy group as its first rank sees it: its commands to the others, and what each of them reads."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from dray.clock import MONOTONIC, Clock, Deadline
from dray.errors import DrayError, OutOfResources, StaleSlotError
from dray.files import FOLDER_MODE
from dray.identifiers import PayloadId
from dray.jobs.api import PolicyTrainer, Trajectory
from dray.jobs.exit_codes import ExitCode
from dray.jobs.messages.channel import GroupLostError, MessageChannel
from dray.jobs.messages.models import RankCommand, RankReply
from dray.jobs.queue import Delivery
from dray.jobs.replica.checkpoint import trainer_folder
from dray.jobs.replica.heartbeat import Activity
from dray.jobs.replica.user_code import UserCodeError, call_user, decoded_metadata, save_into
from dray.payload import Arrays
from dray.payload.ragged import arrays_in
from dray.prefetch import BatchReader, Fetched
from dray.protocol import PayloadRef

_CHECK_PAUSE = 10.0
"""Seconds between two checks for arrays that a trainer keeps: each may collect garbage, which takes time."""

_MAX_NAMED = 5

# --- batch -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Batch:
    """The payloads of one step, in equal parts. All `readers` of a part get the same payloads in the same order.

    Rank r reads part r // readers, as reader r % readers.

    Args:
        size: payloads of all parts together.
        parts: how many there are.

    Attributes:
        waited, reading: seconds that the step has waited for payloads to come, and for their bytes.
        trajectories: what the first rank has read of its part.
    """

    size: int
    parts: int = 1
    waited: float = 0.0
    reading: float = 0.0
    trajectories: dict[PayloadId, Trajectory] = field(default_factory=dict)
    _read: list[list[Delivery]] = field(init=False)

    def __post_init__(self) -> None:
        self._read = [[] for _ in range(self.parts)]

    @property
    def missing(self) -> int:
        """How many payloads are not read yet."""
        return self.size - sum(map(len, self._read))

    @property
    def deliveries(self) -> list[Delivery]:
        """Everything that was read."""
        return [delivery for part in self._read for delivery in part]

    def by_part(self) -> list[list[Delivery]]:
        """What was read, by part, in order."""
        return [list(part) for part in self._read]

    def remove(self, keys: Collection[str]) -> list[Delivery]:
        """Give back the places of the payloads with these keys; returns those."""
        removed = [each for each in self.deliveries if each.entry.identity in keys]
        self._read = [[each for each in part if each.entry.identity not in keys] for part in self._read]
        for each in removed:
            self.trajectories.pop(each.entry.id, None)
        return removed

    def deal(self, deliveries: Sequence[Delivery]) -> list[list[Delivery]]:
        """Which part each of `deliveries`, at most `missing` of them, is to be read for."""
        dealt: list[list[Delivery]] = [[] for _ in range(self.parts)]
        room = self.size // self.parts
        waiting = list(deliveries)
        for read, part in zip(self._read, dealt, strict=True):
            free = room - len(read)
            part += waiting[:free]
            del waiting[:free]
        return dealt

    def add(self, part: int, deliveries: Iterable[Delivery]) -> None:
        """These were read for `part`, by all its ranks."""
        self._read[part] += deliveries


# --- ranks -------------------------------------------------------------------------------------------------------

Failure = Literal["stale", "lost"]


class Ranks:
    """The ranks 1, 2, …, in order; none for a group of one.

    All methods raise `GroupLostError` when one of them is gone.

    Args:
        readers: how many ranks read each payload.
    """

    def __init__(self, channels: Sequence[MessageChannel], readers: int) -> None:
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
        self._send(lambda _: RankCommand(what="share", text=text))
        return text

    def begin(self, checkpoint: Path | None) -> None:
        """Let all load their part of a checkpoint, if there is one."""

        def command(rank: int) -> RankCommand:
            return RankCommand(what="begin", text=str(trainer_folder(checkpoint, rank)) if checkpoint else "")

        self._send(command)

    def read(self, dealt: Sequence[Sequence[Delivery]]) -> None:
        """Let each rank read what its part was dealt, and has not been read ahead."""
        self._send(lambda rank: RankCommand(what="read", **self._references(dealt, rank)))

    def failures(self) -> dict[str, Failure]:
        """What any of them could not read, by identity."""
        failed: dict[str, Failure] = {}
        for channel in self._channels:
            failed |= channel.receive(RankReply).failed
        return failed

    def train(self, batch: Batch, ahead: Sequence[Sequence[Delivery]]) -> None:
        """Let each rank train on its part of `batch`, and meanwhile read what is known of the one after it."""

        parts = batch.by_part()

        def command(rank: int) -> RankCommand:
            identities = [delivery.entry.identity for delivery in parts[rank // self._readers]]
            return RankCommand(what="train", identities=identities, **self._references(ahead, rank))

        self._send(command)

    def weights(self) -> None:
        """Let all join in `PolicyTrainer.weights`."""
        self._send(lambda _: RankCommand(what="weights"))

    def save(self, checkpoint: Path) -> None:
        """Let each rank save its part of a checkpoint."""
        self._send(lambda rank: RankCommand(what="save", text=str(trainer_folder(checkpoint, rank))))

    def wait(self) -> None:
        """Wait until all have answered their commands."""
        for channel in self._channels:
            channel.receive(RankReply)

    def end(self) -> None:
        """The job has ended."""
        self._send(lambda _: RankCommand(what="end"))

    def check(self) -> None:
        """Make sure that all are there."""
        for channel in self._channels:
            if channel.lost:
                raise GroupLostError(f"{channel.peer} is gone")

    def _references(self, dealt: Sequence[Sequence[Delivery]], rank: int) -> dict[str, Any]:
        entries = [delivery.entry for delivery in dealt[rank // self._readers]]
        return {
            "references": [entry.reference or "" for entry in entries],
            "versions": [entry.weight_version for entry in entries],
            "work_items": [entry.work_item for entry in entries],
            "metadata": [entry.metadata for entry in entries],
        }

    def _send(self, command: Callable[[int], RankCommand]) -> None:
        for rank, channel in enumerate(self._channels, start=1):
            channel.send(command(rank))


# --- arrays that a trainer keeps ---------------------------------------------------------------------------------


class KeptArrays:
    """Warns of a trainer that keeps arrays of payloads beyond its step: those in place keep their slots leased.

    There is one warning, and another one each time that twice as many payloads are kept.

    Args:
        warn: called with a line for the user.
    """

    def __init__(self, warn: Callable[[str], None], clock: Clock = MONOTONIC) -> None:
        self._warn = warn
        self._clock = clock
        self._lent: list[_LentPayload] = []
        self._reported = 0
        self._next_check = Deadline.after(0, clock)

    def lend(self, trajectories: Iterable[Trajectory]) -> None:
        """A step begins that is given these."""
        for each in trajectories:
            # All arrays in place of a payload, and views of them, have one base: its bytes in the slot, read-only.
            arrays = {name: array for name, array in arrays_in(each.arrays) if not array.flags.writeable}
            base = next((array.base for array in arrays.values() if isinstance(array.base, np.ndarray)), None)
            if base is not None:
                names = {name: weakref.ref(array) for name, array in arrays.items()}
                self._lent.append(_LentPayload(weakref.ref(base), each.work_item, names))

    def check(self) -> None:
        """No step is under way: what it was given should be gone."""
        if self._is_news() and self._next_check.expired:
            gc.collect()  # an array in a reference cycle is not kept, and is gone now
            self._next_check = Deadline.after(_CHECK_PAUSE, self._clock)
            if self._is_news():
                self._reported = len(self._lent)
                self._warn(self._described())

    def _is_news(self) -> bool:
        self._lent = [each for each in self._lent if each.base() is not None]
        return len(self._lent) >= max(1, 2 * self._reported)

    def _described(self) -> str:
        items = sorted({each.work_item for each in self._lent})
        names = sorted({name for each in self._lent for name, array in each.arrays.items() if array() is not None})
        what = f"arrays {_some(map(repr, names))}" if names else "views of arrays"
        payloads = "1 payload" if len(self._lent) == 1 else f"{len(self._lent)} payloads"
        named = f"work item{'s' if len(items) > 1 else ''} {_some(map(str, items))}"
        return (
            f"the trainer keeps {what} of {payloads} ({named}) after train_step: their slots stay leased, and "
            "rollout replicas wait when no slot is left; copy what is kept, or set policy.in_place = false"
        )


@dataclass(frozen=True, slots=True)
class _LentPayload:
    base: weakref.ref[np.ndarray]
    work_item: int
    arrays: Mapping[str, weakref.ref[np.ndarray]]


def _some(words: Iterable[str]) -> str:
    every = list(words)
    return ", ".join(every[:_MAX_NAMED]) + (" …" if len(every) > _MAX_NAMED else "")


# --- rank worker -------------------------------------------------------------------------------------------------


class RankWorker:
    """Carries out the commands of the first rank until the command to end.

    It does not end by itself when the job does: it would be missing in the first rank's last step.

    Args:
        channel: to the first rank.
        timeout: seconds for reading a batch.
    """

    def __init__(
        self,
        trainer: PolicyTrainer,
        channel: MessageChannel,
        reader: BatchReader,
        activity: Activity,
        *,
        timeout: float,
    ) -> None:
        self._trainer = trainer
        self._channel = channel
        self._reader = reader
        self._activity = activity
        self._timeout = timeout
        self._kept = KeptArrays(activity.warn)
        self._found: dict[str, Arrays | DrayError] = {}  # what was read, by the payload's key
        self._about: dict[str, tuple[int, int, str]] = {}  # version of the weights, work item, metadata

    def run(self) -> ExitCode:
        """The exit code with which the replica ends.

        Raises:
            GroupLostError: the first rank is gone.
        """
        while True:
            self._activity.waits("its commands", self._channel.peer)
            command = self._channel.receive(RankCommand)
            if command.what == "end":
                return ExitCode.OK
            self._activity.doing(f"{command.what}, commanded by {self._channel.peer}")
            try:
                reply = self._carry_out(command)
            except UserCodeError as error:
                if self._channel.lost:
                    raise GroupLostError(f"{self._channel.peer} is gone") from error
                raise
            if reply is not None:
                self._channel.send(reply)

    def _carry_out(self, command: RankCommand) -> RankReply | None:
        if command.what == "begin":
            if command.text:
                call_user(self._trainer, "load", Path(command.text))
            return None
        if command.what == "read":
            return self._read(command)
        if command.what == "train":
            return self._train(command)
        if command.what == "weights":
            call_user(self._trainer, "weights")
            return None
        if command.what == "save":
            folder = Path(command.text)
            folder.mkdir(FOLDER_MODE)
            save_into(self._trainer, folder)
            return RankReply()
        raise GroupLostError(f"{self._channel.peer} shared more than this rank asked for")

    def _read(self, command: RankCommand) -> RankReply:
        """Read what was not read ahead."""
        self._reader.wait()
        self._keep(each for each in self._reader.collect() if not isinstance(each.outcome, DrayError))
        references = self._references(command)
        missing = [each for each in references if each.id.key not in self._found]
        self._keep(self._reader.fetch_all(missing, timeout=self._timeout, consume=False))
        failed: dict[str, Failure] = {}
        for each in references:
            found = self._found[each.id.key]
            if isinstance(found, OutOfResources):
                raise found  # of this process: the payload is there, and is delivered again
            if isinstance(found, DrayError):
                failed[each.id.key] = "stale" if isinstance(found, StaleSlotError) else "lost"
                del self._found[each.id.key]
        return RankReply(failed=failed)

    def _train(self, command: RankCommand) -> RankReply:
        trajectories = [self._trajectory(identity) for identity in command.identities]
        self._found.clear()
        self._about.clear()
        self._reader.start(self._references(command), timeout=self._timeout)
        self._kept.lend(trajectories)
        call_user(self._trainer, "train_step", trajectories)
        trajectories.clear()
        self._kept.check()
        self._activity.counters.add_all({"payloads_read": len(command.identities), "steps": 1})
        return RankReply()

    def _trajectory(self, identity: str) -> Trajectory:
        version, work_item, metadata = self._about[identity]
        arrays = cast(Arrays, self._found[identity])
        return Trajectory(arrays, version, work_item, decoded_metadata(metadata))

    def _references(self, command: RankCommand) -> list[PayloadRef]:
        references = [PayloadRef.from_json(text) for text in command.references]
        about = zip(command.versions, command.work_items, command.metadata, strict=True)
        self._about |= {each.id.key: rest for each, rest in zip(references, about, strict=True)}
        return references

    def _keep(self, results: Iterable[Fetched]) -> None:
        for each in results:
            self._found[each.ref.id.key] = each.outcome
