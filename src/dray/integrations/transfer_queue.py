"""TransferQueue with dray as its storage: payloads stay in shared memory of the process that has put them.

Every process that calls ``transfer_queue.init`` must have called `register`, such as by Ray's
``runtime_env={"worker_process_setup_hook": "dray.integrations.transfer_queue.register"}``; then a configuration
selects the storage::

    backend:
      storage_backend: dray
      dray: {capacity_bytes: 8589934592}

A sample is one payload for each put that has fields of it. See docs/how-to/transfer-queue.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from dray.errors import ConfigError, MissingDependencyError
from dray.integrations.columns import Column, columns_of, reads, rows_of, value_of, wrapped
from dray.integrations.store import PayloadStore
from dray.name_resolution import bracketed
from dray.payload.torch_interop import is_tensor
from dray.transport.receive_buffers import ReceiveBuffers

try:
    from ray.util import get_node_ip_address
    from tensordict import TensorDict
    from transfer_queue.metadata import BatchMeta, extract_field_schema
    from transfer_queue.storage.bootstrap import StorageBootstrapProvider
    from transfer_queue.storage.clients.base import StorageClientFactory, StorageKVClient
    from transfer_queue.storage.managers.base import KVStorageManager, StorageManagerFactory
except ImportError as error:
    raise MissingDependencyError(
        "TransferQueue", "dray.integrations.transfer_queue", "'dray-rl[transfer-queue]'"
    ) from error

NAME: Final = "dray"
"""The storage backend, as a configuration names it."""

_OPTIONS: Final = ("capacity_bytes", "slots", "payload_bytes", "put_timeout")
_OTHER_KEYS: Final = ("listen", "secret_file", "client_name")


def register() -> None:
    """Make the storage backend known in this process; importing this module is enough. Twice is fine."""


def open_store(section: Mapping[str, Any]) -> PayloadStore:
    """The store of one process.

    Args:
        section: ``backend.dray`` of the configuration: ``capacity_bytes``, ``slots``, ``payload_bytes`` and
            ``put_timeout`` as for `PayloadStore`; ``listen``, the lanes on which other hosts are served at the
            address that Ray has for this node, such as ``[tcp]``; ``secret_file``, which contains the secret.

    Raises:
        ConfigError: a key or a value is not allowed, or the file cannot be read.
    """
    for key in section:
        if key not in _OPTIONS and key not in _OTHER_KEYS:
            raise ConfigError(
                f"backend.{NAME}.{key}", section[key], f"one of {', '.join(_OPTIONS + _OTHER_KEYS[:2])}"
            )
    if section.get("capacity_bytes") is None:
        raise ConfigError(f"backend.{NAME}.capacity_bytes", None, "a number of bytes", "is missing")
    options = {key: section[key] for key in _OPTIONS if section.get(key) is not None}
    lanes = section.get("listen") or ()
    if isinstance(lanes, str) or not set(lanes) <= {"tcp", "ucx"}:
        raise ConfigError(f"backend.{NAME}.listen", lanes, "a list of lanes: tcp, ucx")
    host = get_node_ip_address() if lanes else ""
    secret = None
    if section.get("secret_file"):
        try:
            secret = Path(section["secret_file"]).read_bytes().strip()
        except OSError as error:
            what = f"a file that this process can read ({error.strerror})"
            raise ConfigError(f"backend.{NAME}.secret_file", section["secret_file"], what) from error
    return PayloadStore(**options, listen=[f"{lane}://{bracketed(host)}:0" for lane in lanes], secret=secret)


@StorageBootstrapProvider.register_provider(NAME)
def bootstrap(conf: Any) -> dict[str, Any]:
    """Check the configuration in the process that makes the controller. There is no service to start.

    Args:
        conf: the whole configuration.

    Raises:
        ConfigError: a key or a value is not allowed.
    """
    open_store(dict(conf.backend[NAME] or {})).close()
    return {}


@StorageClientFactory.register(NAME)
class DrayStorageClient(StorageKVClient):
    """Values by key; the metadata of a key is the token of its sample's payload.

    Args:
        config: ``backend.dray`` of the configuration.

    Attributes:
        store: where the values of this process are.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.store = open_store(config)

    def put(self, keys: Sequence[str], values: Sequence[Any]) -> list[str]:
        """The token of each key. The fields of a sample are one payload.

        Args:
            keys: ``INDEX@FIELD`` of each value.
            values: the values.
        """
        samples: dict[str, dict[str, Any]] = {}
        for key, value in zip(keys, values, strict=True):
            index, _, field = key.partition("@")
            samples.setdefault(index, {})[field] = value if is_tensor(value) else wrapped(value)
        tokens = dict(zip(samples, self.store.put_many(samples.values()), strict=True))
        return [tokens[key.partition("@")[0]] for key in keys]

    def get(
        self,
        keys: Sequence[str],
        shapes: object = None,
        dtypes: object = None,
        custom_backend_meta: Sequence[str | None] | None = None,
    ) -> list[Any]:
        """The values of keys, in their order: tensors in memory of their own, and other values.

        Args:
            keys: ``INDEX@FIELD`` of each value.
            shapes: not needed.
            dtypes: not needed.
            custom_backend_meta: the tokens that `put` has returned.

        Raises:
            StaleSlotError: a key was never put, or is cleared.
        """
        found: list[Any] = [None] * len(keys)
        fields = [key.partition("@")[2] for key in keys]
        for names, tokens, places in reads(keys, fields, custom_backend_meta or [None] * len(keys)):
            for values, by_name in zip(self.store.get(tokens, fields=names), places, strict=True):
                for name, place in by_name.items():
                    found[place] = value_of(values[name])
        return found

    def clear(self, keys: Sequence[str], custom_backend_meta: Iterable[str | None] | None = None) -> None:
        """Free the payloads of keys: a sample is cleared with all fields that were put together.

        Args:
            keys: not needed.
            custom_backend_meta: the tokens that `put` has returned.
        """
        self.store.clear(dict.fromkeys(token for token in custom_backend_meta or () if token is not None))

    def close(self) -> None:
        """Close the store: what this process has put is gone. Twice is fine."""
        self.store.close()


@StorageManagerFactory.register(NAME)
class DrayStorageManager(KVStorageManager):
    """Moves whole columns between TensorDicts and payloads: each row is copied once, in and out.

    Args:
        controller_info: where the controller is.
        config: ``backend.dray`` of the configuration.
        zmq_context: not used; messages to the controller have one of their own.
    """

    def __init__(self, controller_info: Any, config: Mapping[str, Any], zmq_context: Any = None) -> None:
        super().__init__(controller_info, {**config, "client_name": NAME}, zmq_context)
        # What batches have used is kept for later ones.
        self._buffers = ReceiveBuffers(max_free_bytes=self.storage_client.store.capacity_bytes)

    async def put_data(
        self, data: TensorDict, metadata: BatchMeta, data_parser: Callable[[Any], Any] | None = None
    ) -> None:
        """Store the rows of `data`, and report them to the controller.

        Args:
            data: the fields; its rows are the samples of `metadata`.
            metadata: the samples. It gets their tokens.
            data_parser: not supported.

        Raises:
            StoreFullError: there was no room in time.
            PayloadError: a value cannot be carried, or a sample is too large.
            NotImplementedError: `data_parser` is given.
        """
        if data_parser is not None:
            raise NotImplementedError("data_parser is not supported by the storage backend dray")
        indexes = metadata.global_indexes
        if len(data) != len(indexes):
            raise ValueError(f"{len(data)} rows of data for {len(indexes)} samples")
        if not indexes or not len(data.keys()):
            return
        loop = asyncio.get_running_loop()
        store = self.storage_client.store
        tokens = await loop.run_in_executor(None, self._stored, data)
        names = list(map(str, data.keys()))
        by_sample: dict[int, dict[str, str]] = {}
        replaced: dict[tuple[Any, ...], list[str]] = {}
        for index, token, kept in zip(indexes, tokens, metadata._custom_backend_meta, strict=True):  # noqa: SLF001
            for old in {kept[name] for name in names if name in kept} if kept else ():
                replaced.setdefault(tuple(name for name in names if kept.get(name) == old), []).append(old)
            by_sample[index] = dict.fromkeys(names, token)
            kept.update(by_sample[index])
        await self.notify_data_update(metadata.partition_ids[0], indexes, extract_field_schema(data), by_sample)
        for fields, old_tokens in replaced.items():
            await loop.run_in_executor(None, partial(store.clear, old_tokens, fields=fields))

    def _stored(self, data: TensorDict) -> list[str]:
        """The tokens of the rows of `data`, which are in the store now."""
        store: PayloadStore = self.storage_client.store
        columns = columns_of(data)
        return store.put_many(rows_of(data)) if columns is None else store.put_rows(columns)

    async def get_data(self, metadata: BatchMeta) -> TensorDict:
        """The fields and samples of `metadata`, as a storage of TransferQueue returns them.

        Args:
            metadata: what is wanted.

        Raises:
            StaleSlotError: a field of a sample was never put, or is cleared.
            ProducerLostError: the process that has put a sample is gone.
        """
        if not metadata.field_names:
            return TensorDict({}, batch_size=len(metadata))
        columns = await asyncio.get_running_loop().run_in_executor(None, self._columns, metadata)
        return TensorDict(columns, batch_size=len(metadata))

    def _columns(self, metadata: BatchMeta) -> dict[str, Any]:
        shapes, _, tokens = self._get_shape_type_custom_backend_meta_list(metadata)
        names, size = sorted(metadata.field_names), len(metadata)
        columns = {name: Column(shapes[i * size : (i + 1) * size], self._buffers) for i, name in enumerate(names)}
        fields = [name for name in names for _ in range(size)]
        rows = list(range(size)) * len(names)
        for wanted, of, places in reads([metadata.global_indexes[row] for row in rows], fields, tokens):
            for values, by_name in zip(self.storage_client.store.views(of, fields=wanted), places, strict=True):
                for name, place in by_name.items():
                    columns[name].add(rows[place], values[name])
        return {name: column.merged() for name, column in columns.items()}

    async def clear_data(self, metadata: BatchMeta) -> None:
        """Free the samples of `metadata`.

        Args:
            metadata: the samples, with at least one field of each payload.
        """
        _, _, tokens = self._get_shape_type_custom_backend_meta_list(metadata)
        clear = partial(self.storage_client.clear, (), tokens)
        await asyncio.get_running_loop().run_in_executor(None, clear)

    def close(self) -> None:
        """End the messages to the controller, and close the store. Twice is fine."""
        super().close()
        if hasattr(self, "storage_client"):
            self.storage_client.close()
