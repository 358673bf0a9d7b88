"""A weight-sync backend for TorchRL's collectors: ``WeightSyncScheme.from_backend("dray")``.

```python
import dray.integrations.torchrl  # registers the backend
from torchrl.weight_update.weight_sync_schemes import WeightSyncScheme

scheme = WeightSyncScheme.from_backend("dray")
collector = MultiSyncCollector(…, weight_sync_schemes={"policy": scheme})
```

The trainer's process publishes versions of the weights. A thread of each worker applies the newest one when it
comes, and confirms it by a stream of its own; see docs/how-to/torchrl.md.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np

from dray.clock import Deadline
from dray.errors import (
    BufferClosedError,
    ConfigError,
    MissingDependencyError,
    StreamEnded,
    StreamError,
    StreamTimeout,
)
from dray.integrations.tensordict import from_tensordict, to_tensordict
from dray.resources import Closing
from dray.streams import Consumer, Producer, Publisher, Subscriber
from dray.streams.registry import default_scope
from dray.text import printable

try:
    from torchrl.weight_update.weight_sync_schemes import WeightSyncScheme, register_weight_sync_backend
except ImportError as error:
    raise MissingDependencyError(
        "torchrl", "dray.integrations.torchrl", "'dray-rl[torchrl]'", str(error)
    ) from error

logger = logging.getLogger("dray.integrations")

BACKEND: Final = "dray"

_WEIGHTS: Final = "weights"
_WORKERS: Final = "workers"
_MAX_REASON: Final = 2000
_CONFIRMATION_BYTES: Final = 1 << 16


class Sender(Closing):
    """Sends the weights of one model to all workers.

    Args:
        name, scope: of the stream.
        versions: how many versions there can be at a time.
        timeout: seconds that a call waits.
    """

    def __init__(self, name: str, scope: str, *, versions: int, timeout: float | None) -> None:
        self._timeout = timeout
        self._applied: dict[int, int] = {}
        self._targets: tuple[int, ...] = ()
        self._publisher = Publisher(name, scope=scope, versions=versions)
        self._confirmations = Consumer(_confirmations(name), scope=scope)

    def publish(self, weights: Mapping[Any, Any], workers: Iterable[int] = ()) -> None:
        """Make `weights` the newest version: for these workers, or for all.

        Raises:
            StreamError: the version before was for single workers, and one of them has not applied it.
            BufferFullError: a worker is still using an older version.
        """
        if self._targets:  # the new version takes its place
            self.wait(self._targets)
        self._targets = tuple(workers)
        values = {_WEIGHTS: from_tensordict(weights), _WORKERS: np.array(self._targets, np.int64)}
        self._publisher.publish(values, timeout=self._timeout)

    def wait(self, workers: Iterable[int]) -> None:
        """Wait until each of these workers has applied the newest version.

        Raises:
            StreamTimeout: one has not in time; the message names it.
            StreamError: one cannot, or all have ended.
        """
        deadline, version = Deadline.after(self._timeout), self._publisher.version
        while missing := [each for each in workers if self._applied.get(each, 0) < version]:
            why = f"version {version} of the weights is not applied by worker {', '.join(map(str, missing))}"
            try:
                found = self._confirmations.get(deadline.timeout)
            except StreamTimeout as error:
                raise StreamTimeout(why, elapsed=deadline.elapsed) from error
            except StreamEnded as error:
                raise StreamError(f"{why}: all workers have ended", elapsed=deadline.elapsed) from error
            worker = int(found["worker"])
            self._applied[worker] = int(found["version"])
            if found["problem"] and self._applied[worker] == version:
                raise StreamError(f"worker {worker} cannot apply version {version}: {found['problem']}")

    def close(self) -> None:
        self._confirmations.close()
        self._publisher.close()


class Receiver(Closing):
    """Receives the weights of one model in a worker.

    Args:
        name, scope: of the stream.
        worker: the index of the worker.
        device: where the weights are to be.
        timeout: seconds that the first weights may take.

    Attributes:
        seen: the number of the newest version that has come.
    """

    def __init__(self, name: str, scope: str, *, worker: int, device: Any, timeout: float | None) -> None:
        self.seen = 0
        self._worker = worker
        self._device = device
        self._timeout = timeout
        self._subscriber = Subscriber(name, scope=scope)
        self._confirmations = Producer(
            _confirmations(name), scope=scope, slots=4, slot_bytes=_CONFIRMATION_BYTES, on_full="overwrite"
        )

    def receive_weights(
        self,
        timeout: float | None = None,
        *,
        model: Any = None,
        strategy: Any = None,
        inplace: bool = True,
        **_: Any,
    ) -> Any | None:
        """The newest weights, applied to `model`; None if no newer ones came, or not for this worker.

        Args:
            timeout: seconds; None for no limit.
            model: what to apply them to.
            strategy: how; without it, they are only returned.
            inplace: write to the parameters that the model has; otherwise it gets new ones.

        Raises:
            StreamError: they cannot be applied.
        """
        try:
            newest = self._subscriber.newest(after=self.seen, timeout=timeout)
        except StreamTimeout:
            return None
        self.seen = newest.version
        if newest[_WORKERS].size and self._worker not in newest[_WORKERS]:
            return None
        keeps = model is None or strategy is None or not inplace  # otherwise nothing keeps them or writes to them
        weights = to_tensordict(newest.torch(copy=keeps)[_WEIGHTS], device=self._device)
        del newest
        if any("." in name for name in weights.keys()):  # noqa: SIM118
            weights = weights.unflatten_keys(".")  # it was a state dict
        if model is not None and strategy is not None:
            try:
                strategy.apply_weights(model, weights, inplace=inplace)
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                reason = printable(f"{type(error).__name__}: {error}", _MAX_REASON)
                self._confirm(reason)
                raise StreamError(f"version {self.seen} of the weights cannot be applied: {reason}") from error
        if keeps:
            return weights
        # What the caller gets may be written to: the model's own weights, where they are a TensorDict.
        return strategy.extract_weights(model) if strategy.extract_as == "tensordict" else weights.clone()

    def setup_connection_and_weights_on_receiver(
        self, *, model: Any = None, strategy: Any = None, **_: Any
    ) -> None:
        """Apply the first weights to `model`, whose parameters may have no memory yet (device ``meta``).

        Raises:
            StreamTimeout: none came in time.
        """
        if self.receive_weights(self._timeout, model=model, strategy=strategy, inplace=False) is None:
            raise StreamTimeout(f"no weights have come for worker {self._worker}: {self._subscriber}")
        self.send_ack()

    def send_ack(self, message: str = "") -> None:
        """Confirm that the newest weights are applied. TorchRL's `message` has no use here."""
        self._confirm("")

    def _confirm(self, problem: str) -> None:
        self._confirmations.put(worker=self._worker, version=self.seen, problem=problem)

    def close(self) -> None:
        self._subscriber.close()
        self._confirmations.close(drain=False)


@register_weight_sync_backend(BACKEND)
class DrayWeightSyncScheme(WeightSyncScheme, Closing):  # type: ignore[misc]
    """Sends the weights of one model to the workers of a collector on this host. A context manager.

    Args:
        strategy: ``"tensordict"`` or ``"state_dict"``, as for TorchRL's schemes.
        sync: `send` waits until the workers have applied the weights. Otherwise it only publishes them, and a
            worker may skip versions.
        timeout: seconds that a call waits for workers; None for no limit.
        versions: how many versions of the weights there can be at a time, at least 2.

    Raises:
        ConfigError: an argument is not allowed.
    """

    def __init__(
        self, strategy: str = "tensordict", *, sync: bool = True, timeout: float | None = 30.0, versions: int = 2
    ) -> None:
        super().__init__(strategy)
        self.sync = sync
        self._timeout = timeout
        self._versions = versions
        self._stream = f"torchrl-{secrets.token_hex(8)}"
        self._scope = default_scope()
        self._workers: tuple[int, ...] = ()
        self._sender: Sender | None = None

    def create_transport(self, **kwargs: Any) -> Receiver:
        """The transport of a worker, with these arguments of `Receiver`."""
        return Receiver(self._stream, self._scope, timeout=self._timeout, **kwargs)

    # --- the trainer's process --------------------------------------------------------------------------------

    def _init_on_sender_impl(self, *, model_id: str | None = None, context: Any = None, **about: Any) -> None:
        count = about.get("num_workers") or getattr(context, "num_workers", None)
        count = count or len(about.get("params_map") or about.get("devices") or ())
        if count.__class__ is not int or count < 1:
            raise ConfigError("num_workers", count, "an integer of 1 or more, or a collector as context")
        self.model_id = model_id
        self.context = context
        self.weights = about.get("weights")
        self.model = about.get("model")
        self._workers = tuple(range(count))
        self._sender = Sender(self._stream, self._scope, versions=self._versions, timeout=self._timeout)

    def _setup_connection_and_weights_on_sender_impl(self, *, weights: Any = None, **_: Any) -> None:
        self._publish(self.weights if weights is None and self.context is None else weights, ())

    def send(self, weights: Any = None, worker_ids: int | list[int] | None = None) -> None:
        """Publish weights, and with `sync` wait until the workers have applied them.

        Args:
            weights: a module, a TensorDict or a state dict; by default those of the collector's model.
            worker_ids: the workers that are to apply them; by default all.

        Raises:
            StreamError: a worker has not applied them in time, or cannot.
            BufferFullError: a worker is still using an older version.
        """
        self._publish(weights, () if worker_ids is None else self._checked(worker_ids))
        if self.sync:
            self.wait(worker_ids)

    def wait(self, worker_ids: int | list[int] | None = None) -> None:
        """Wait until the workers have applied the weights that were sent last.

        Args:
            worker_ids: the workers; by default all.

        Raises:
            StreamError: a worker has not applied them in time, or cannot.
        """
        self._opened().wait(self._workers if worker_ids is None else self._checked(worker_ids))

    def _publish(self, weights: Any, workers: tuple[int, ...]) -> None:
        prepared = self.prepare_weights(weights, self._model_id, self._strategy, self.context)
        if prepared is None:
            raise ConfigError("weights", None, "weights, or a collector with the model", "are missing")
        self._opened().publish(prepared, workers)

    def _opened(self) -> Sender:
        if self._sender is None:
            raise BufferClosedError("the scheme is closed, or is not that of the trainer's process")
        return self._sender

    def _checked(self, worker_ids: int | list[int]) -> tuple[int, ...]:
        chosen = (worker_ids,) if isinstance(worker_ids, int) else tuple(worker_ids)
        if not set(chosen) <= set(self._workers):
            raise ConfigError("worker_ids", worker_ids, f"workers from 0 to {len(self._workers) - 1}")
        return chosen

    # --- a worker ---------------------------------------------------------------------------------------------

    def _init_on_receiver_impl(self, *, model_id: str, context: Any = None, **about: Any) -> None:
        worker = getattr(context, "worker_idx", None) if about.get("worker_idx") is None else about["worker_idx"]
        if worker.__class__ is not int:
            raise ConfigError("worker_idx", worker, "the index of the worker, or a collector that has it")
        self.model_id = model_id
        self.context = context
        self.worker_idx = worker
        self.model = about.get("model")
        self._register_transport_receiver(worker=worker, device=getattr(context, "policy_device", None))

    def _setup_connection_and_weights_on_receiver_impl(self, *, worker_idx: int | None = None) -> None:
        super()._setup_connection_and_weights_on_receiver_impl(worker_idx=worker_idx)
        self._start_background_receiver()

    def _background_receive_loop(self) -> None:
        receiver, stopping = self.receiver_transport, self._stop_event
        while not stopping.is_set():
            seen = receiver.seen
            try:
                self.receive()
            except BufferClosedError:
                return
            except Exception:
                # The trainer gets to know of weights that do not fit, and the next ones may: the thread continues.
                logger.exception("worker %s has not applied version %d", self.worker_idx, receiver.seen)
                if receiver.seen == seen:
                    raise

    # --- both -------------------------------------------------------------------------------------------------

    def shutdown(self) -> None:
        """Close the streams of this process. Twice is fine."""
        receiver, sender = self.receiver_transport, self._sender
        self._receiver_transport: Any = None
        self._sender = None
        if self._stop_event is not None:
            self._stop_event.set()
        if receiver is not None:
            receiver.close()  # ends the wait of the thread
        super().shutdown()
        if sender is not None:
            sender.close()

    def close(self) -> None:
        self.shutdown()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_sender": None, "_receiver_transport": None, "_weights": None}


def _confirmations(name: str) -> str:
    return f"{name}.applied"
