"""`PayloadDataset`: the payloads of a stream, for `torch.utils.data.DataLoader`.

```python
with PayloadDataset("cartpole") as dataset:
    for batch in DataLoader(dataset, batch_size=8, num_workers=2):
        train(batch["observations"])
        dataset.acknowledge(batch)
```

The dataset is read in the workers and acknowledged in the trainer's process. A payload that the trainer has not
acknowledged is handed out again when its worker ends, whatever has ended it; see docs/how-to/torch-dataloader.md.
"""

from __future__ import annotations

import copy
import logging
import multiprocessing
import os
import select
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from dray.errors import ConfigError, MissingDependencyError
from dray.forking import here
from dray.identifiers import PayloadId
from dray.payload import PayloadSchema
from dray.resources import Closing
from dray.streams import Consumer, Payload

try:
    import torch
    from torch.utils.data import IterableDataset, default_collate, get_worker_info
    from torch.utils.data._utils.collate import default_collate_fn_map
except ImportError as error:
    raise MissingDependencyError("torch", "dray.integrations.torch_data", "'dray-rl[torch]'") from error

if TYPE_CHECKING:
    from torch.utils.data._utils.worker import WorkerInfo

logger = logging.getLogger("dray.integrations")

STATE_VERSION: Final = 1

Sample: TypeAlias = "Mapping[str, Any]"
"""Tensors by name: what a transform or a collate function makes."""


class Batch(dict[str, Any]):
    """Tensors by name, with the payloads that they come from. A sample is a batch of one payload.

    The default collate function of torch makes one batch of several. Copying, pickling and `pin_memory` keep the
    attributes; a dict that is made of a batch does not have them.

    Attributes:
        ids: the ids of the payloads, for `PayloadDataset.acknowledge`.
        deliveries: how often each of them was handed out, this time included.
    """

    __slots__ = ("deliveries", "ids")

    def __init__(self, fields: Sample, ids: Iterable[PayloadId], deliveries: Iterable[int]) -> None:
        super().__init__(fields)
        self.ids = tuple(ids)
        self.deliveries = tuple(deliveries)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self), self.ids, self.deliveries)

    @property
    def redelivered(self) -> bool:
        """A consumer of this group may have had one of the payloads before."""
        return any(count > 1 for count in self.deliveries)

    def __repr__(self) -> str:
        return f"<Batch of {len(self.ids)} payloads: {', '.join(self)}>"


class Collate:
    """A `collate_fn` that makes one `Batch` of several samples.

    Args:
        function: makes one mapping of a list of mappings: pads, concatenates, … It runs in the workers; with the
            start method ``"spawn"`` it must be possible to pickle it.
    """

    def __init__(self, function: Callable[[list[dict[str, Any]]], Sample]) -> None:
        self._function = function

    def __call__(self, samples: Sequence[Batch]) -> Batch:
        fields = self._function([dict(sample) for sample in samples])
        if not isinstance(fields, Mapping):
            raise TypeError(f"the collate function has returned {type(fields).__name__}, not a mapping")
        return Batch(
            fields,
            chain.from_iterable(sample.ids for sample in samples),
            chain.from_iterable(sample.deliveries for sample in samples),
        )


def _collate_by_default(samples: Sequence[Batch], *, collate_fn_map: object = None) -> Batch:  # noqa: ARG001
    return Collate(default_collate)(samples)


default_collate_fn_map[Batch] = _collate_by_default


class PayloadDataset(IterableDataset[Batch], Closing):
    """The payloads of a stream. Each is one sample: a `Batch` of tensors in memory of their own.

    Each worker of a `DataLoader`, or the process itself without workers, is a consumer of the group. An epoch has
    `payloads_per_epoch` payloads, divided among the workers, or lasts until the stream ends.

    A payload is handed out again, marked by `Batch.deliveries`, if it is not acknowledged when its worker ends or
    begins another epoch. A worker ends with its share of an epoch unless the loader has
    ``persistent_workers=True``.

    Args:
        stream: the name of the stream, or the addresses of producers; see `dray.Consumer`.
        payloads_per_epoch: None: an epoch ends with the stream.
        transform: makes other tensors of those of a payload; it runs in the workers.
        prefetch: payloads that may lie at a worker that has not asked for them; see `dray.Consumer`. The others do
            not get these, and the loader has a `prefetch_factor` of its own.
        group, schema, secret, scope, direct: see `dray.Consumer`.

    Raises:
        ConfigError: an argument is not allowed.
    """

    def __init__(
        self,
        stream: str | Sequence[str],
        *,
        payloads_per_epoch: int | None = None,
        transform: Callable[[dict[str, Any]], Sample] | None = None,
        group: str = "default",
        prefetch: int = 0,
        schema: PayloadSchema | None = None,
        secret: bytes | None = None,
        scope: str | None = None,
        direct: bool = True,
    ) -> None:
        per_epoch = payloads_per_epoch
        if per_epoch is not None and (per_epoch.__class__ is not int or per_epoch < 1):
            raise ConfigError("payloads_per_epoch", per_epoch, "an integer of 1 or more, or None")
        self.payloads_per_epoch = per_epoch
        self._transform = transform
        # It only acknowledges: one that also reads would be locked while it waits for payloads.
        self._acknowledging = Consumer(
            stream, group=group, ack="manual", prefetch=prefetch, schema=schema, secret=secret, scope=scope,
            direct=direct,
        )  # fmt: skip
        self._reading = copy.copy(self._acknowledging)
        self._read_in = 0  # the mark of the process in which `_reading` has handed out payloads
        self._outstanding: set[PayloadId] = set()  # what it has handed out here, without workers
        self._payloads = 0
        self._trained: dict[PayloadId, None] = {}
        self._resumed: _ResumedEpoch | None = None

    # --- in the workers ---------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        if self._read_in == here[0]:
            if worker is not None or self._outstanding:
                self._give_back()
        else:
            self._read_in = here[0]
            self._outstanding.clear()
            self._reading = copy.copy(self._reading)
            if worker is not None:
                _call_after_parent(self.close)
        limit = self._limit(worker)
        taken = 0
        while limit is None or taken < limit:
            payload = next(self._reading, None)
            if payload is None:
                return
            taken += 1
            sample = self._sample(payload)
            if worker is None:
                self._outstanding.add(payload.id)
            del payload  # its slot is not in use while the trainer works
            yield sample

    def _sample(self, payload: Payload) -> Batch:
        tensors = payload.torch()
        fields = tensors if self._transform is None else self._transform(tensors)
        if not isinstance(fields, Mapping):
            raise TypeError(f"the transform has returned {type(fields).__name__}, not a mapping")
        return Batch(fields, (payload.id,), (payload.deliveries,))

    def _give_back(self) -> None:
        """What earlier iterations of this process were handed goes to any consumer, unless it is acknowledged.

        A loop that was left early may have dropped batches that the trainer has never seen.
        """
        # Without a producer there is nothing to give back, and a new consumer would not know that they have ended.
        if self._reading.ready or self._reading.producers:
            self._reading.close()
            self._reading = copy.copy(self._reading)
        self._outstanding.clear()

    def _limit(self, worker: WorkerInfo | None) -> int | None:
        """How many payloads this process may take in this epoch."""
        if self.payloads_per_epoch is None:
            return None
        left = self.payloads_per_epoch
        if self._resumed is not None:
            left -= self._resumed.used_before(0 if worker is None else worker.seed - worker.id)
        if worker is None:
            return left
        each, more = divmod(left, worker.num_workers)
        return each + int(worker.id < more)

    # --- in the trainer's process -----------------------------------------------------------------------------

    def acknowledge(self, batch: Batch | PayloadId | Iterable[PayloadId]) -> None:
        """The trainer has used a batch: its payloads are handed out no more, and their slots become free.

        Also from another thread, while workers wait for payloads. What is gone already is not an error.

        Args:
            batch: a batch, or ids of payloads.

        Raises:
            StreamTimeout: the producer of a payload cannot be found.
            TransportError: a producer on another host could not be reached.
        """
        ids = _ids_of(batch)
        self._acknowledge(ids)
        for each in ids:
            if each not in self._trained:
                self._payloads += 1
            else:
                del self._trained[each]

    def trained(self, batch: Batch | PayloadId | Iterable[PayloadId]) -> None:
        """The trainer has used a batch, which is to be acknowledged when a checkpoint contains its effect.

        Call `state_dict`, write the checkpoint, and then call `saved`. Until then the payloads occupy slots.
        """
        for each in _ids_of(batch):
            if each not in self._trained:
                self._trained[each] = None
                self._payloads += 1

    def saved(self, state: Mapping[str, Any]) -> None:
        """Acknowledge the payloads whose effect is in a checkpoint that has been written.

        Args:
            state: what `state_dict` returned for this checkpoint.

        Raises:
            StreamTimeout, TransportError: as for `acknowledge`.
        """
        ids = [each for each in _ids_in(state) if each in self._trained]
        self._acknowledge(ids)
        for each in ids:
            del self._trained[each]

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: how many payloads were used, and which of them are not acknowledged yet.

        Payloads are not in it. Those that the trainer has not acknowledged are with their producers.
        """
        trained = [[each.producer.hex(), each.sequence, each.slot, each.nbytes] for each in self._trained]
        return {"version": STATE_VERSION, "payloads": self._payloads, "trained": trained}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a checkpoint, before the first epoch.

        The payloads whose effect it contains are acknowledged. With `payloads_per_epoch`, the first epoch has what
        was left of the interrupted one.

        Raises:
            ConfigError: the state is not one of a `PayloadDataset`.
            StreamTimeout, TransportError: as for `acknowledge`.
        """
        if state.get("version") != STATE_VERSION:
            raise ConfigError("version", state.get("version"), f"{STATE_VERSION}, as `state_dict` returns it")
        self._acknowledge(_ids_in(state))
        self._payloads = int(state["payloads"])
        self._trained.clear()
        done = 0 if self.payloads_per_epoch is None else self._payloads % self.payloads_per_epoch
        self._resumed = _ResumedEpoch(done) if done else None

    def _acknowledge(self, ids: Sequence[PayloadId]) -> None:
        self._acknowledging.acknowledge(ids)
        self._outstanding.difference_update(ids)

    def close(self) -> None:
        """End the consumers of this process. Twice is fine."""
        self._reading.close()
        self._acknowledging.close()

    def __repr__(self) -> str:
        return f"<PayloadDataset: {self._reading!r}>"


class _ResumedEpoch:
    """How many payloads of an epoch were used before it was interrupted. Shared with the workers.

    The first epoch takes the number. An epoch is known by the seed of its `DataLoader` iterator.
    """

    def __init__(self, done: int) -> None:
        self._words = torch.tensor([done, 0, 0], dtype=torch.int64)  # done, taken, seed
        self._words.share_memory_()  # type: ignore[no-untyped-call]
        self._taken_in = 0

    def used_before(self, seed: int) -> int:
        """The number, in each worker of the first epoch; 0 otherwise."""
        done, taken, first = self._words.tolist()
        if self._taken_in == here[0] or (taken and (not seed or first != seed)):
            return 0
        self._taken_in = here[0]
        self._words[2] = seed
        self._words[1] = 1
        return int(done)


def _ids_of(batch: Batch | PayloadId | Iterable[PayloadId]) -> tuple[PayloadId, ...]:
    if isinstance(batch, Batch):
        return batch.ids
    if isinstance(batch, PayloadId):
        return (batch,)
    ids = tuple(batch)
    if not all(isinstance(each, PayloadId) for each in ids):
        raise ConfigError("batch", type(batch).__name__, "a Batch, or ids of payloads; Collate keeps the ids")
    return ids


def _ids_in(state: Mapping[str, Any]) -> list[PayloadId]:
    return [
        PayloadId(bytes.fromhex(producer), int(sequence), int(slot), int(nbytes))
        for producer, sequence, slot, nbytes in state["trained"]
    ]


def _call_after_parent(callback: Callable[[], None]) -> None:
    """Call `callback` when the process that has started this one has ended.

    A worker that waits for a payload does not notice it otherwise, and would keep what it was handed.
    """
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None:
        return
    try:
        # The sentinel of `multiprocessing` is readable later: other forked workers inherit its other end.
        ended = os.pidfd_open(parent.pid)
    except ProcessLookupError:
        callback()
        return
    except OSError:  # a sandbox refuses it
        ended = os.dup(parent.sentinel)
    if os.getppid() != parent.pid:
        os.close(ended)
        callback()
        return

    def wait() -> None:
        poll = select.poll()
        poll.register(ended, select.POLLIN)
        poll.poll()
        os.close(ended)
        logger.warning("the trainer, process %s, has ended: this worker gives back its payloads", parent.pid)
        callback()

    threading.Thread(target=wait, name="dray-trainer-watch", daemon=True).start()
