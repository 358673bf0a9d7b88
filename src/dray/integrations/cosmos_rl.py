"""A payload transport for cosmos-rl: trajectories travel through dray, and its control plane carries references.

```python
import dray.integrations.cosmos_rl  # registers the transport "dray"
from cosmos_rl.launcher.worker_entry import main

main(data_packer=packer)
```

With ``[custom] payload_transfer = "dray"`` in the configuration, the data packer of a rollout worker puts the
trajectories that it gets into shared memory, and hands on a reference for each. The packer of a policy worker
turns references into tensors, ahead of their use if it is a `PrefetchDataPackerMixin`. See
docs/how-to/cosmos-rl.md.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from dray.errors import BufferClosedError, DrayError, MissingDependencyError, ProtocolError
from dray.integrations.cosmos_rl_packers import PackerMethods, publishing, resolving
from dray.integrations.cosmos_rl_settings import CosmosSettings
from dray.integrations.cosmos_rl_trajectories import (
    PREFIX,
    Trajectories,
    json_of,
    key_of,
    reference_of,
    text_of,
)
from dray.payload import torch_interop
from dray.prefetch import BatchReader, BatchReaderStatistics
from dray.protocol import PayloadRef
from dray.transport import PayloadClient
from dray.transport.lanes.ucx_worker import require
from dray.transport.server_statistics import ServerStatistics

try:
    from cosmos_rl.utils.payload_transport import (
        PayloadTransport,
        PayloadTransportRegistry,
        PrefetchDataPackerMixin,
    )
    from cosmos_rl.utils.payload_transport.strategy import PayloadTransportStrategy
except ImportError as error:
    reason = None if error.name == "cosmos_rl" else str(error)
    raise MissingDependencyError(
        "cosmos-rl", "dray.integrations.cosmos_rl", "'dray-rl[cosmos-rl]'", reason
    ) from error

logger = logging.getLogger("dray.integrations")

MIN_WATCHDOG_SECONDS: Final = 300.0
"""cosmos-rl ends the process when a batch takes longer; dray gives up its reads well before."""


class DrayStrategy(PayloadTransportStrategy):  # type: ignore[misc]
    """Turns references into trajectories for the data packer of a policy worker. Thread-safe.

    Args:
        settings: the settings of the job.
        device: the device of the worker.

    Raises:
        MissingDependencyError: the ucx lane may be used, and ucxx is not installed.
    """

    def __init__(self, settings: CosmosSettings, device: Any = None) -> None:
        if settings.lanes == "auto":
            require()
        self._settings = settings
        self._device = settings.device(device)
        if self._device is not None:
            torch_interop.check_device("dray_output", self._device)
        self.reader = _reader(settings, settings.reader)
        self._logged: set[type[DrayError]] = set()

    def should_intercept(self, rollout_output: Any) -> bool:
        """Whether a rollout's output is a reference of dray: the completion, or a dict with it."""
        return text_of(rollout_output) is not None

    def cache_key(self, rollout_output: Any) -> str:
        """The payload's identity; the text itself if it is no reference."""
        try:
            ref = reference_of(rollout_output)
        except ProtocolError:
            return str(text_of(rollout_output))
        return key_of(ref)

    def fetch_batch(self, tasks: list[Any]) -> dict[str, Any]:
        """Read the payloads of a batch. Those that cannot be read are left out, and logged once for each kind."""
        found = {}
        for fetched in self.reader.fetch_all(self._references(tasks), timeout=self._settings.timeout):
            if isinstance(fetched.outcome, DrayError):
                self._log(fetched.outcome)
            else:
                found[key_of(fetched.ref)] = self._presented(fetched.outcome)
        return found

    def sync_fetch(self, rollout_output: Any) -> Any | None:
        """Read one payload now; None if it cannot be read, and the episode is skipped."""
        try:
            ref = reference_of(rollout_output)
            return self._presented(self.reader.read_one(ref, timeout=self._settings.timeout))
        except DrayError as error:
            self._log(error)
            return None

    def before_join(self) -> None:
        """End all reads at once."""
        self.reader.close()

    def shutdown(self) -> None:
        """Close the reader. Twice is fine."""
        self.reader.close()

    def _references(self, tasks: Iterable[Any]) -> list[PayloadRef]:
        found = []
        for _, output in tasks:
            try:
                found.append(reference_of(output))
            except ProtocolError as error:
                self._log(error)
        return found

    def _presented(self, values: Any) -> Any:
        return values if self._device is None else torch_interop.to_torch(values, self._device)

    def _log(self, error: DrayError) -> None:
        level = logging.DEBUG if type(error) in self._logged else logging.WARNING
        self._logged.add(type(error))
        logger.log(level, "episode skipped: %s", str(error))


class DrayTransport(PayloadTransport):  # type: ignore[misc]
    """What cosmos-rl's registry has under the name ``"dray"``: one object in each process. Thread-safe."""

    name = "dray"
    completion_prefix = PREFIX

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._trajectories: Trajectories | None = None
        self._discarding: list[BatchReader] = []
        self._attached: dict[int, tuple[PackerMethods, DrayStrategy]] = {}

    def attach_data_packer(
        self,
        packer: Any,
        *,
        config: Any,
        device: Any = None,
        redis_endpoint: Any = None,
    ) -> None:
        """Give a packer its side of the transport. Raises what ends the worker: `ConfigError`, `ImportError`."""
        settings = CosmosSettings.of(config)
        if id(packer) in self._attached:
            raise DrayError("the data packer is attached already; close it first")
        strategy = DrayStrategy(settings, device)
        attached = PackerMethods(packer)
        with self._lock:
            self._attached[id(packer)] = attached, strategy
            if self._trajectories is None:
                self._trajectories = Trajectories(settings)
            trajectories = self._trajectories
        try:
            if os.environ.get("COSMOS_ROLE") == "Rollout":
                trajectories.open()  # here, where an error ends the worker with its reason
            if isinstance(packer, PrefetchDataPackerMixin):
                packer.set_transport_strategy(strategy)
                watchdog = max(MIN_WATCHDOG_SECONDS, 3 * settings.timeout)
                packer._setup_prefetch(prefetch_timeout=watchdog, thread_name="dray-packer")  # noqa: SLF001
            else:
                attached.replace("get_policy_input", lambda original: resolving(original, strategy))
            attached.replace("get_rollout_output", lambda original: publishing(original, trajectories))
        except BaseException:
            self.close_data_packer(packer)
            raise

    def close_data_packer(self, packer: Any, *, timeout: float = 5.0) -> None:
        """Take from a packer what `attach_data_packer` gave it. Twice is fine."""
        with self._lock:
            attached, strategy = self._attached.pop(id(packer), (None, None))
        if attached is not None:
            attached.restore()
        super().close_data_packer(packer, timeout=timeout)
        if strategy is not None:
            strategy.reader.close(timeout)

    def publish(self, trajectory: Mapping[str, Any]) -> str:
        """Put a trajectory of a rollout worker whose packer is attached; return the completion for it."""
        if self._trajectories is None:
            raise BufferClosedError("no data packer of this process is attached to the transport")
        return self._trajectories.publish(trajectory)

    def producer_statistics(self) -> ServerStatistics:
        """Return the statistics of this process's trajectories."""
        if self._trajectories is None:
            raise BufferClosedError("no data packer of this process is attached to the transport")
        return self._trajectories.statistics()

    def discarding_statistics(self) -> list[BatchReaderStatistics]:
        """Return the statistics of what frees discarded trajectories, for each rank that gets every trajectory."""
        with self._lock:
            return [reader.statistics() for reader in self._discarding]

    def close_producer(self, producer: Any, *, timeout: float = 5.0) -> None:
        """End the rollout worker's trajectories, after up to `timeout` seconds for their readers."""
        with self._lock:
            trajectories, self._trajectories = self._trajectories, None
        if trajectories is not None:
            trajectories.close(timeout)

    def publish_cleanup_for_discarded(
        self,
        *,
        transfer_ids: list[str],
        config: Any,
        redis_client: Any = None,
    ) -> int:
        """Free, in the background, the trajectories of rollouts that the controller discards."""
        refs = list(_readable(transfer_ids))
        try:
            for reader in self._discarding_readers(config):
                reader.discard(refs)
        except DrayError:
            logger.exception("%d discarded trajectories are not freed", len(refs))  # the registry hides the error
            raise
        return len(refs)

    def _discarding_readers(self, config: Any) -> list[BatchReader]:
        """One for each reader id: a payload is free when all of them have consumed it."""
        with self._lock:
            if not self._discarding:
                settings = CosmosSettings.of(config)
                self._discarding = [_reader(settings, reader) for reader in range(settings.readers)]
            return self._discarding

    def close(self) -> None:
        """Close everything of this process. Twice is fine."""
        self.close_producer(None, timeout=0)
        with self._lock:
            readers, self._discarding = self._discarding, []
            readers += [strategy.reader for _, strategy in self._attached.values()]
        for reader in readers:
            reader.close()


def _reader(settings: CosmosSettings, reader: int) -> BatchReader:
    client = PayloadClient(lane=settings.lanes, secret=settings.secret, reader=reader)
    return BatchReader(client, read_timeout=settings.read_timeout)


def _readable(transfer_ids: Iterable[str]) -> Iterator[PayloadRef]:
    for each in transfer_ids:
        try:
            yield PayloadRef.from_json(json_of(each))
        except ProtocolError as error:
            logger.warning("a discarded trajectory is not freed: %s", str(error))


if __name__ != "__main__":
    transport = DrayTransport()
    PayloadTransportRegistry.register(transport)
    atexit.register(transport.close)
    publish = transport.publish
else:  # `cosmos-rl --config job.toml dray.integrations.cosmos_rl`: the module registers under its own name
    import importlib

    importlib.import_module("dray.integrations.cosmos_rl")
    importlib.import_module("cosmos_rl.launcher.worker_entry").main()
