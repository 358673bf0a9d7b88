"""A checkpoint engine for verl: ``backend: dray`` sends the weights of the actor to the rollouts.

```yaml
actor_rollout_ref:
  rollout:
    checkpoint_engine:
      backend: dray
      custom_backend_module: dray.integrations.verl
```

The actor of rank 0 publishes each update as one version of a `dray.Publisher`, which every rollout worker reads,
on the actor's host in place; see `dray.integrations.tensor_versions` and docs/how-to/verl.md. verl also loads this
module by itself, as a plug-in. Where TransferQueue is installed, its backend ``dray`` is registered as well.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
from collections.abc import AsyncIterator, Iterable
from typing import Any, Final

from dray.errors import ConfigError, DrayError, MissingDependencyError, StreamError
from dray.integrations.tensor_versions import Place, TensorPublisher, TensorSubscriber, read_secret
from dray.resources import Closing
from dray.streams.weights import DeltaMode

try:
    import ray
    import torch
    from verl.checkpoint_engine.base import CheckpointEngineRegistry, CheckpointEngineWithCache
    from verl.workers.rollout.utils import ensure_async_iterator
except ImportError as error:
    raise MissingDependencyError("verl", "dray.integrations.verl", "'dray-rl[verl]'", str(error)) from error

BACKEND: Final = "dray"

_PLACE: Final = "dray"
_ANY_ADDRESS: Final = ("://0.0.0.0:", "://[::]:")
_LANES: Final = ("tcp", "ucx")


@CheckpointEngineRegistry.register(BACKEND)
class DrayCheckpointEngine(CheckpointEngineWithCache, Closing):  # type: ignore[misc]
    """Sends or receives the weights of a model. A context manager.

    The arguments after `is_master` are those of ``engine_kwargs.dray`` in verl's configuration.

    Args:
        bucket_size: how many bytes a rollout worker on another host holds at a time, if no tensor has more.
        is_master: this is the actor of rank 0, which sends.
        listen: for rollout workers on other hosts: ``"tcp"`` or ``"ucx"`` listens at the address of the node that
            Ray uses, ``"tcp://HOST:PORT"`` at another. Without it, all are on one host.
        secret_file: a file with the secret for other hosts, on each host; by default that which
            ``$DRAY_SECRET_FILE`` names. Without one, the actor makes a secret, which Ray hands to the others.
        delta: what travels to other hosts, as for `dray.Publisher`: ``"full"`` or ``"sparse"``. With the latter, a
            rollout worker there holds a whole version.
        versions: how many versions the actor's host has memory for, at least 2.
        timeout: seconds that a step of an update may take; None for no limit.
        device: where a rollout worker gets the tensors, such as ``"cpu"``; by default its accelerator.

    Raises:
        ConfigError: an argument is not allowed.
    """

    def __init__(
        self,
        bucket_size: int,
        is_master: bool = False,
        *,
        listen: str = "",
        secret_file: str | None = None,
        delta: DeltaMode = "full",
        versions: int = 2,
        timeout: float | None = 300.0,
        device: str | None = None,
    ) -> None:
        self.bucket_size = bucket_size
        self.is_master = is_master
        self._listen = listen
        self._secret = read_secret(secret_file)
        self._delta = delta
        self._versions = versions
        self._timeout = timeout
        self._device = device
        self._place: Place | None = None
        self._publisher: TensorPublisher | None = None
        self._subscriber: TensorSubscriber | None = None

    # --- what verl calls around an update ---------------------------------------------------------------------

    def prepare(self) -> dict[str, Any]:
        """Where the versions are, from the actor of rank 0; from all others nothing."""
        if not self.is_master:
            return {}
        node = ray.util.get_node_ip_address() if self._listen else ""
        if self._publisher is None:
            listen = f"{self._listen}://{node}:0" if self._listen in _LANES else self._listen
            self._publisher = TensorPublisher(
                bucket_bytes=self.bucket_size, versions=self._versions,
                delta=self._delta, listen=listen or (), secret=self._secret, timeout=self._timeout,
            )  # fmt: skip
        place = self._publisher.place
        return {_PLACE: place._replace(addresses=tuple(_reachable(each, node) for each in place.addresses))}

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[dict[str, Any]]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Hand the place of the versions to every worker.

        Args:
            actor_wg_world_size: how many actors there are.
            rollout_world_size: how many rollout workers.
            metadata: what `prepare` has returned, of the actors first.

        Raises:
            ConfigError: not exactly one of the actors sends.
        """
        places = [each[_PLACE] for each in metadata[:actor_wg_world_size] if each]
        if len(places) != 1:
            raise ConfigError("is_master", len(places), "one actor that sends, and no more")
        return {"place": places * actor_wg_world_size}, {"place": places * rollout_world_size}

    def init_process_group(self, place: Place) -> None:
        """Attach to the versions.

        Args:
            place: where they are.

        Raises:
            ConfigError: the actor is on another host, and `listen` is missing.
        """
        before, self._place = self._place, place
        if self._publisher is None and (before is None or before._replace(version=place.version) != place):
            self._detach()
            self._subscriber = TensorSubscriber(place, secret=self._secret, delta=self._delta)

    def finalize(self) -> None:
        """An update has ended. The newest version stays where it is, for `get_weights` and for the next update."""

    # --- an update --------------------------------------------------------------------------------------------

    async def send_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], global_steps: int | None = None
    ) -> dict[str, Any]:
        """Publish the weights, from the actor of rank 0. The other actors only take part in gathering them.

        Args:
            weights: names and tensors. A tensor may be changed once the next one is asked for.
            global_steps: the step of the trainer, which the rollout workers compare.

        Returns:
            What the update was: bytes and number of the version.

        Raises:
            BufferFullError: a rollout worker is still using an older version; the message names its process.
            PayloadError: the weights cannot be carried.
        """
        tensors = ensure_async_iterator(weights)
        if not self.is_master:
            async for _ in tensors:
                pass
            return {}
        if self._publisher is None:
            raise StreamError("prepare must be called before send_weights")
        try:
            with self._publisher.version(global_steps) as add:
                async for name, tensor in tensors:
                    add(name, tensor)
        except DrayError:
            async for _ in tensors:  # the other actors wait for this one in collectives
                pass
            raise
        return {"dray/version": self._publisher.place.version, "dray/bytes": self._publisher.nbytes}

    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[tuple[str, torch.Tensor]]:
        """The weights that are sent in this update. They must not be written to.

        Args:
            global_steps: the step of the trainer that they must be of.

        Yields:
            The name of a tensor, and the tensor.

        Raises:
            StreamTimeout: none came in time.
            StreamError: they are of another step.
            TransportError: a part of them could not be read in time.
        """
        after = None if self._place is None else self._place.version
        async for each in self._received(after, global_steps):
            yield each

    async def get_weights(self) -> AsyncIterator[tuple[str, torch.Tensor]]:
        """The newest weights, at any time after the first update. They must not be written to.

        On the actor's host they are in memory that is there already; elsewhere they are read again.

        Yields:
            The name of a tensor, and the tensor.

        Raises:
            StreamTimeout: there are none, or the actor has ended.
            StreamError: a newer version came while they were read from another host: call again.
            TransportError: a part of them could not be read in time.
        """
        async for each in self._received(None, None):
            yield each

    async def _received(self, after: int | None, step: int | None) -> AsyncIterator[tuple[str, torch.Tensor]]:
        if self._subscriber is None:
            raise StreamError("this worker does not receive weights, or init_process_group was not called yet")
        here: Any = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        device = here if self._device is None else self._device
        buckets = self._subscriber.buckets(after=after, step=step, timeout=self._timeout)
        while (bucket := await asyncio.to_thread(next, buckets, None)) is not None:
            for name, tensor in bucket:
                yield name, tensor.to(device)
            del bucket, tensor

    # --- the end ----------------------------------------------------------------------------------------------

    def _detach(self) -> None:
        subscriber, self._subscriber = self._subscriber, None
        if subscriber is not None:
            subscriber.close()

    def close(self) -> None:
        """End the stream of this worker. Tensors stay valid. Twice is fine."""
        self._detach()
        publisher, self._publisher = self._publisher, None
        if publisher is not None:
            publisher.close()


def _reachable(address: str, node: str) -> str:
    """`address`, with that of the node in the place of all addresses."""
    for every in _ANY_ADDRESS:
        address = address.replace(every, f"://{node}:")
    return address


def _register_storage() -> None:
    """Register dray's backend of TransferQueue, where TransferQueue is installed."""
    name = "dray.integrations.transfer_queue"
    if importlib.util.find_spec("transfer_queue") and importlib.util.find_spec(name):
        importlib.import_module(name).register()


_register_storage()
